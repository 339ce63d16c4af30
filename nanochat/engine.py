"""The inference engine: KV cache, sampling, streaming and batches that rows join and leave.

Exported from chapters/08_inference.py (chapter 08, Inference); edit there, not here.
"""

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.calculator import ToolCalls
from nanochat.common import UserError, synchronize
from nanochat.decode import decoder, pack_heads, power_of_two
from nanochat.model import GPT, GPTConfig, rms_norm
from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

__all__ = [
    "Batch",
    "Beginning",
    "Beginnings",
    "CHUNK",
    "Completion",
    "Door",
    "Engine",
    "GROUP_TOKENS",
    "KVCache",
    "Loop",
    "Post",
    "Prefixes",
    "RingCache",
    "Row",
    "SMALLEST",
    "Sampling",
    "Seats",
    "Stream",
    "Table",
    "Token",
    "Transcript",
    "begin_step",
    "bench",
    "benchmark",
    "bucket",
    "check_tokenizer",
    "choose",
    "copy_in",
    "copy_out",
    "copy_weights",
    "draw",
    "first_tokens",
    "generate_with_lookup",
    "last_embedding",
    "look_up",
    "move_rows",
    "next_group",
    "next_token_probabilities",
    "padded_view",
    "prefill",
    "prepared_copy",
    "read_bandwidth",
    "record",
    "rehearse",
    "request",
    "row_probabilities",
    "row_seeds",
    "runs_on",
    "sample",
    "side_stream",
    "token_probabilities",
]


class KVCache:
    """Keys and values of every token read so far, for all layers, in memory taken once.

    `keys` and `values` are (n_layer, B, n_kv_head, max_len, head_dim); the first `length` slots
    are filled. Rows of different lengths stand flush right: row b begins at slot `starts[b]`, and
    what lies before is padding that `mask` hides (see `prepare`).
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        starts: Sequence[int] | None = None,
    ):
        self.config, self.max_len, self.length = config, max_len, 0
        self.slots = [max_len] * config.n_layer
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.groups = {max_len: (list(range(config.n_layer)), self.keys, self.values)}
        padded = starts is not None and any(starts)
        self.starts = torch.tensor(starts, device=device) if padded else None  # (B,)
        self.positions: Tensor | None = None  # (B, T): the model's rotary positions
        self.mask: Tensor | None = None  # (B, 1, T, S): True where a query may look
        self.last: Tensor | None = None  # (B, 1, C): the last embedding, if the model smears

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_kv_head, T, head_dim) of one layer; return all S of them."""
        end = self.length + k.size(2)
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.max_len}.")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_new: int) -> None:
        """Count n_new slots as filled; the model calls this once, after its last layer."""
        self.length += n_new

    def prepare(self, n_new: int) -> None:
        """Set `positions` and `mask` for the next n_new tokens (None when no row is padded)."""
        self.positions, self.mask = padded_view(self.starts, self.length, n_new)

    def recent(self, slots: int, n: int) -> Tensor:
        """Return the slots of the last n tokens of a layer, oldest first, int64."""
        return torch.arange(self.length - n, self.length, device=self.keys.device)

    def begin_like(self, other: "KVCache", n: int, last: Tensor | None) -> None:
        """Copy the first n tokens of another cache into this empty one; `last` is as above."""
        self.keys[:, :, :, :n] = other.keys[:, :, :, :n]
        self.values[:, :, :, :n] = other.values[:, :, :, :n]
        self.length, self.last = n, last


def padded_view(
    starts: Tensor | None, length: int, n_new: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return positions (B, T) and mask (B, 1, T, S) of n_new slots after `length` filled ones.

    `starts` (B,) is the slot at which each row begins; None means that no row is padded, and gives
    (None, None). A padding slot sees itself alone: attention over nothing would be 0/0.
    """
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new, device=starts.device)  # (S,)
    new = slots[length:, None]  # (T, 1)
    positions = (new.T - starts[:, None]).clamp(min=0)  # (B, T)
    visible = (slots <= new) & (slots >= starts[:, None, None])  # (B, T, S)
    return positions, (visible | (slots == new)).unsqueeze(1)


@dataclass(frozen=True)
class Sampling:
    """The knobs of sampling. temperature 0 is greedy; top_k None or 0, top_p 1, min_p 0 are off."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, with the value in the sentence."""
        wrong = None
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            wrong = f"temperature is {self.temperature}; use 0 (greedy) or a number from 1e-6 on"
        elif self.top_k is not None and self.top_k < 0:
            wrong = f"top_k is {self.top_k}; use a positive whole number, or None for no limit"
        elif self.top_p is not None and not 0 < self.top_p <= 1:
            wrong = f"top_p is {self.top_p}; use a number above 0 and at most 1"
        elif self.min_p is not None and not 0 <= self.min_p <= 1:
            wrong = f"min_p is {self.min_p}; use a number from 0 to 1"
        elif not -100 <= self.frequency_penalty <= 100:
            wrong = (
                f"frequency_penalty is {self.frequency_penalty}; use a number near 0, such as 0.5"
            )
        if wrong:
            raise UserError(wrong + ".")

    @property
    def effort(self) -> int:
        """0: take the likeliest, 1: draw, 2: filter (which needs a sort) and draw."""
        filters = self.top_k or self.min_p or (self.top_p or 1) < 1
        return 0 if self.temperature == 0 else 2 if filters else 1

    def numbers(self) -> list[float]:
        """Return the five knobs; one that is off has a value that changes nothing."""
        top_p = 2.0 if self.top_p in (None, 1) else self.top_p
        cut = [self.top_k or math.inf, top_p, self.min_p or 0.0]
        return [self.temperature, *cut, self.frequency_penalty]


def row_probabilities(logits: Tensor, knobs: Tensor, filters: bool) -> Tensor:
    """Turn logits (B, V) into weights (B, V) to draw from, by knobs (B, 5) as in `numbers`.

    In this order: divide by the temperature, keep the top_k largest, keep the fewest tokens that
    hold top_p of what is left (Holtzman et al. 2019), drop those below min_p times the largest.
    Weights need not sum to one. Without `filters` only the temperature counts.
    """
    temperature, top_k, top_p, min_p, _ = knobs[:, :, None].unbind(1)  # (B, 1) each
    p = (logits / (temperature + (temperature == 0))).softmax(dim=-1)
    if not filters:
        return p
    ordered, where = p.sort(dim=-1, descending=True)
    ordered = ordered * (torch.arange(p.size(-1), device=p.device) < top_k)
    before = ordered.cumsum(dim=-1) - ordered  # the mass of the likelier tokens
    keep = (before < top_p * ordered.sum(dim=-1, keepdim=True)) & (
        ordered >= min_p * ordered[:, :1]
    )
    return torch.zeros_like(p).scatter(-1, where, ordered * keep)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn logits (..., V) into the float32 probabilities (..., V) from which we draw."""
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    rows = logits.reshape(-1, logits.size(-1))
    knobs = torch.tensor([sampling.numbers()], device=logits.device).expand(len(rows), -1)
    p = row_probabilities(rows, knobs, filters=True)
    return (p / p.sum(dim=-1, keepdim=True)).view_as(logits)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row: the first whose cumulative probability exceeds uniform (B,) in [0, 1).

    probabilities float (B, V), need not sum to one; returns int64 (B,). One number decides one
    row, so a row's draw depends on no other row.
    """
    ladder = probabilities.double().cumsum(dim=-1)  # (B, V)
    target = uniform.double()[:, None] * ladder[:, -1:]
    last = probabilities.size(-1) - 1
    return torch.searchsorted(ladder, target, right=True).squeeze(-1).clamp(max=last)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Choose the next id of each row from logits (B, V); returns int64 (B,).

    Randomness comes from `uniform` (B,) when given, else from the generator. UserError for a knob
    out of its range.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if uniform is None:
        device = generator.device if generator is not None else logits.device
        kind = torch.float64 if device.type != "mps" else torch.float32
        uniform = torch.rand(len(logits), generator=generator, device=device, dtype=kind)
    probabilities = next_token_probabilities(logits, Sampling(temperature, top_k, top_p, min_p))
    return draw(probabilities, uniform.to(logits.device))


@dataclass
class Token:
    """One generated token. `text` is whole characters; `kind` is text, python, output, special."""

    id: int
    text: str
    logprob: float
    forced: bool = False
    kind: str = "text"


@dataclass
class Completion:
    """All that one prompt led to. `mask` is 1 where the model chose the token, 0 where a tool did.

    `ids` ends with the token that stopped it, if one did. `text` is the reply outside of tool calls
    and outputs. `logprobs` are under the model's own distribution, at temperature 1 and unfiltered.
    """

    ids: list[int]
    mask: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str = "length"  # or "stop", "cancelled"


class Transcript:
    """Reads ids one by one and tells, for each, its kind and the text it completes."""

    INSIDE = {"python_start": "python", "output_start": "output"}

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.kind = tokenizer, "text"
        self.decoder = StreamDecoder(tokenizer)
        self.special = {tokenizer.special(n): n.strip("<|>") for n in SPECIAL_TOKENS}

    def push(self, id: int) -> tuple[str, str]:
        """Return (kind, text) of one id; bytes that never become a character are dropped."""
        name = self.special.get(id)
        if name is None:
            return self.kind, self.decoder.push(id)
        self.kind = self.INSIDE.get(name, "text")
        self.decoder.flush()
        return "special", ""


class Row:
    """One request on its way: its tokens, its own random numbers, and its calls of the tool."""

    def __init__(
        self,
        prompt: Sequence[int],
        budget: int,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 0,
        stop: threading.Event | None = None,
        tools: bool = True,
    ):
        self.prompt, self.budget, self.tokenizer = list(prompt), budget, tokenizer
        self.sampling, self.effort, self.stop = sampling, sampling.effort, stop
        self.calls = ToolCalls(tokenizer) if tools else None
        self.ids, self.mask, self.logprobs = [], [], []
        self.queue: deque[int] = deque()  # tokens that must come next, whatever the model wants
        self.stop_ids = {tokenizer.special("assistant_end"), tokenizer.special("bos")}
        self.finish_reason: str | None = None if budget else "length"
        self.error: Exception | None = None
        generator = torch.Generator().manual_seed(seed % 2**64)
        self.uniforms = torch.rand(max(budget, 1), generator=generator, dtype=torch.float64)

    @property
    def n_read(self) -> int:
        """Tokens that the model has read: all but the one chosen last."""
        return len(self.prompt) + len(self.ids) - 1

    def ended(self) -> bool:
        """Return whether the row goes no further, after a look at its stop button."""
        if self.stop is not None and self.stop.is_set():
            self.finish_reason = self.finish_reason or "cancelled"
        return self.finish_reason is not None

    def take(self, id: int, logprob: float) -> None:
        """Append the next token and decide what follows from it; UserError for a logprob of NaN."""
        forced = bool(self.queue)
        if forced:
            self.queue.popleft()
        elif math.isnan(logprob):
            raise UserError("the model's output is not a number (NaN); load an earlier checkpoint.")
        self.mask.append(int(not forced))
        self.logprobs.append(logprob)
        self.ids.append(id)  # last: another thread that sees the id finds the rest
        if not forced and id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.budget:
            self.finish_reason = "length"
        elif self.calls and not forced:
            self.queue.extend(self.calls.push(id))

    def completion(self) -> Completion:
        """Return what the row has become."""
        transcript = Transcript(self.tokenizer)
        pieces = [transcript.push(id) for id in self.ids]
        text = "".join(piece for kind, piece in pieces if kind == "text")
        return Completion(self.ids, self.mask, text, self.logprobs, self.finish_reason or "length")


class RingCache:
    """Keys and values of rows that decode together, one token a step, in memory that never moves.

    All rows write into slot `clock % slots`; row b is the last `lengths[b]` slots before it. Layers
    have `size` slots, those with a window at most window + 1. Clock and lengths are tensors, so
    that a step needs nothing from Python. `groups` holds layers with the same number of slots in
    one piece: by that number their layers, keys and values (layers, B, n_kv_head, slots, head_dim).
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.size, self.length = config, size, 0
        self.slots = [size if w is None else min(size, w + 1) for w in config.window_sizes()]
        self.keys, self.values, self.groups = [None] * config.n_layer, [None] * config.n_layer, {}
        for n in set(self.slots):
            layers = [i for i, slots in enumerate(self.slots) if slots == n]
            shape = (2, len(layers), batch_size, config.n_kv_head, n, config.head_dim)
            keys, values = torch.zeros(shape, device=device, dtype=dtype)
            self.groups[n] = layers, keys, values
            for i, k, v in zip(layers, keys, values):
                self.keys[i], self.values[i] = k, v
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.last = self.before = None
        if config.smear:
            self.before = torch.zeros(batch_size, 1, config.n_embd, device=device, dtype=dtype)
            self.last = self.before
        self.positions: Tensor | None = None  # (B, 1)
        self.mask: Tensor | None = None  # (B, 1, 1, slots) of the layer that has just updated

    def prepare(self) -> None:
        """Work out where the next token of each row goes and what it may see."""
        self.positions = self.lengths[:, None].clamp(max=self.config.seq_len - 1)
        self.hand, self.masks = {}, {}
        for n in set(self.slots):
            age = (self.clock - torch.arange(n, device=self.clock.device)) % n  # (slots,)
            self.hand[n] = self.clock % n
            self.masks[n] = (age <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, slots)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_kv_head, 1, head_dim) of one layer; return all slots of it."""
        n = self.slots[layer]
        self.mask = self.masks[n]
        self.keys[layer].index_copy_(2, self.hand[n], k)
        self.values[layer].index_copy_(2, self.hand[n], v)
        return self.keys[layer], self.values[layer]

    def advance(self, n_new: int) -> None:
        """Let the clock tick; the model calls this once, after its last layer."""
        self.clock += 1
        self.lengths += 1
        if self.before is not None:
            self.before.copy_(self.last)
            self.last = self.before

    def recent(self, slots: int, n: int) -> Tensor:
        """Return the slots of the last n tokens of a layer with so many slots, oldest first."""
        return (self.clock + torch.arange(-n, 0, device=self.clock.device)) % slots


CHUNK, GROUP_TOKENS = 512, 16384  # of one prompt, and of several together, read at a time


def copy_in(
    ring: RingCache, seats: Tensor, source: KVCache | RingCache, numbers: Tensor,
    lengths: Sequence[int],
) -> None:  # fmt: skip
    """Seat rows `numbers` (R,) of a cache, of so many tokens each, as rows `seats` of the ring."""
    for here, there in set(zip(ring.slots, source.slots)):
        mine, theirs, n = ring.groups[here], source.groups[there], min(max(lengths), here, there)
        both = [i for i in mine[0] if i in theirs[0]]
        places = [[group[0].index(i) for i in both] for group in (mine, theirs)]
        places = torch.tensor(places, device=seats.device)[:, :, None, None]  # (2, layers, 1, 1)
        to, of = ring.recent(here, n), source.recent(there, n)
        some = max(1, GROUP_TOKENS // (n * len(lengths)))  # layers at a time: copies take memory
        for a, b in zip(*(each.split(some) for each in places)):
            for new, old in zip(mine[1:], theirs[1:]):
                new[a, seats[:, None], :, to] = old[b, numbers[:, None], :, of]
    ring.lengths[seats] = torch.tensor(lengths, device=ring.clock.device)
    if ring.before is not None:
        ring.before[seats] = source.last[numbers]


def copy_out(ring: RingCache, b: int, length: int) -> KVCache:
    """Return row b of the ring, of `length` tokens, as a KVCache of one row."""
    k = ring.keys[0]
    cache = KVCache(ring.config, 1, length, k.device, k.dtype)
    cache.keys.zero_(), cache.values.zero_()
    for layer, slots in enumerate(ring.slots):
        n = min(length, slots)
        where = ring.recent(slots, n)
        cache.keys[layer, 0, :, length - n :] = ring.keys[layer][b][:, where]
        cache.values[layer, 0, :, length - n :] = ring.values[layer][b][:, where]
    cache.length = length
    cache.last = None if ring.before is None else ring.before[b : b + 1].clone()
    return cache


def choose(
    logits: Tensor, knobs: Tensor, uniform: Tensor, counts: Tensor, forced: Tensor, effort: int
) -> tuple[Tensor, Tensor]:
    """Choose the next id of every row of logits (B, V); return ids and logprobs, both (B,).

    knobs (B, 5) are `Sampling.numbers` of each row, uniform (B,) its random numbers, counts
    (B, known) how often it has written each token, forced (B,) an id, or -1 for a free choice.
    effort 0 serves greedy rows only, 1 draws too, 2 filters too. A head padded beyond the known
    tokens has logits that stand for nothing; they are not chosen.
    """
    shown = logits[:, : counts.size(1)] - knobs[:, 4:] * counts
    ids = shown.argmax(dim=-1)
    if effort:
        drawn = draw(row_probabilities(shown, knobs, filters=effort == 2), uniform)
        ids = torch.where(knobs[:, 0] == 0, ids, drawn)
    ids = torch.where(forced >= 0, forced, ids)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return ids, chosen - logits.logsumexp(dim=-1)


class Post:
    """Carries what steps have chosen from the device to Python; two steps may be under way."""

    def __init__(self, n_rows: int, device: torch.device):
        gpu = device.type == "cuda"
        kind = dict(dtype=torch.float64, pin_memory=gpu)
        self.device, self.sent = device, deque()
        slots = [torch.zeros(2, n_rows, **kind) for _ in range(2)]
        self.free = deque((slot, torch.cuda.Event() if gpu else None) for slot in slots)

    def send(self, results: Tensor, live: list[tuple[int, Row]]) -> None:
        """Send for the results (2, B) of a step of these seats and rows, and do not wait."""
        slot, event = self.free.popleft()
        slot.copy_(results, non_blocking=True)
        if event:
            event.record(torch.cuda.current_stream(self.device))
        self.sent.append((live, slot, event))

    def receive(self) -> None:
        """Wait for the oldest results, and let each row that has not ended take its token."""
        live, slot, event = self.sent.popleft()
        if event:
            event.synchronize()
        ids, logprobs = slot.tolist()
        self.free.append((slot, event))
        for b, row in live:
            if not row.finish_reason:
                row.take(int(ids[b]), logprobs[b])

    def clear(self) -> None:
        """Let go of what is under way."""
        self.free.extend(sent[1:] for sent in self.sent)
        self.sent.clear()


class Batch:
    """What the device holds of rows that decode together. Seats without a row are None."""

    def __init__(self, model: GPT, n_rows: int, size: int, known: int):
        device, dtype, seq_len = model.device, model.compute_dtype, model.config.seq_len
        self.model, self.rows = model, [None] * n_rows
        self.cache = RingCache(model.config, n_rows, size, device, dtype)
        self.decode = decoder(model, self.cache)  # does all that the model does, or is None
        self.ids = torch.zeros(n_rows, dtype=torch.int64, device=device)  # chosen, not yet read
        self.made = torch.zeros_like(self.ids)  # tokens chosen so far
        self.forced, self.forcing = torch.full_like(self.ids, -1), False
        self.knobs = torch.zeros(n_rows, 5, device=device)
        self.counts = torch.zeros(n_rows, known, device=device)
        self.uniforms = torch.zeros(n_rows, seq_len, dtype=torch.float64, device=device)
        self.results = torch.zeros(2, n_rows, dtype=torch.float64, device=device)  # ids, logprobs
        self.post = Post(n_rows, device)
        self.graphs: dict[int, Callable[[], None]] = {}  # by effort: see `record`

    def put(
        self, seats: Sequence[int], rows: Sequence[Row], cache: KVCache, numbers: Sequence[int]
    ) -> None:
        """Seat rows that have chosen their first token; row i has read row numbers[i] of cache."""
        device, n_read = self.ids.device, [row.n_read for row in rows]
        places, numbers = torch.tensor([seats, numbers], device=device)  # (R,) each
        copy_in(self.cache, places, cache, numbers, n_read)
        facts = [[row.ids[-1], *row.sampling.numbers()] for row in rows]
        facts = torch.tensor(facts, dtype=torch.float64).to(device)  # (R, 6)
        uniforms = pad_sequence([row.uniforms for row in rows], batch_first=True).to(device)
        ids = facts[:, 0].long()
        self.ids[places], self.knobs[places] = ids, facts[:, 1:].float()
        self.made.index_fill_(0, places, 1)
        self.counts.index_fill_(0, places, 0.0)[places, ids] = 1.0
        self.uniforms[places, : uniforms.size(1)] = uniforms
        for b, row in zip(seats, rows):
            self.rows[b] = row

    def advance(self, effort: int) -> None:
        """Read one token of every row and choose the next, without a word to Python."""
        if self.decode and effort == 0:
            return self.decode.step(self)
        if self.decode:
            logits = self.decode(self.ids)  # (B, V)
        else:
            self.cache.prepare()
            logits = self.model(self.ids[:, None], kv_cache=self.cache, last_only=True)[:, -1]
        place = self.made.clamp(max=self.uniforms.size(1) - 1)[:, None]
        uniform = self.uniforms.gather(1, place).squeeze(1)
        ids, logprobs = choose(logits, self.knobs, uniform, self.counts, self.forced, effort)
        self.ids.copy_(ids)
        torch.stack((ids.double(), logprobs.double()), out=self.results)
        self.counts.scatter_add_(1, ids[:, None], torch.ones_like(self.counts[:, :1]))
        self.made += 1

    def live(self) -> list[tuple[int, Row]]:
        """Return the seats and rows that have not ended."""
        return [(b, row) for b, row in enumerate(self.rows) if row and not row.finish_reason]


def move_rows(old: Batch, new: Batch) -> None:
    """Seat the live rows of a batch on the first seats of another, which may have been used."""
    live = old.live()
    new.rows = [row for _, row in live] + [None] * (len(new.rows) - len(live))
    new.post.clear()
    if not live:
        return
    seats = torch.tensor([[b for b, _ in live], range(len(live))], device=new.ids.device)
    copy_in(new.cache, seats[1], old.cache, seats[0], [row.n_read for _, row in live])
    for name in ("ids", "made", "knobs", "counts", "uniforms"):
        getattr(new, name)[: len(live)] = getattr(old, name)[seats[0]]


def rehearse(batch: Batch, effort: int) -> None:
    """Make a step and undo it."""
    cache = batch.cache
    state = [batch.ids, batch.made, batch.counts, cache.clock, cache.lengths]
    state += [] if cache.before is None else [cache.before]
    kept = [tensor.clone() for tensor in state]
    batch.advance(effort)
    for tensor, old in zip(state, kept):
        tensor.copy_(old)


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a CUDA device on which steps are recorded."""
    return torch.cuda.Stream(device)


def record(
    device: torch.device, work: Callable[[], None], rehearsal: Callable[[], None]
) -> Callable[[], None]:
    """Record what `work` asks of a CUDA device as a graph, and return what replays it."""
    side, graph = side_stream(device), torch.cuda.CUDAGraph()
    now = torch.cuda.current_stream(device)
    side.wait_stream(now)
    with torch.cuda.stream(side):
        rehearsal()
        torch.cuda.empty_cache()  # what is free may be needed, and cannot be had while recording
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()  # recorded, not run
        finally:
            graph.capture_end()
    now.wait_stream(side)
    return graph.replay


def runs_on(row: Row, slots: int) -> bool:
    """Return whether the token after the row's next may be chosen before we know the next.

    Not inside a tool call, and not past the budget or a cache of so many slots.
    """
    calling = row.queue or (row.calls is not None and row.calls.expression is not None)
    return not calling and len(row.ids) + 1 < row.budget and row.n_read + 1 < slots


def begin_step(batch: Batch, live: list[tuple[int, Row]], graph: bool) -> None:
    """Bring these seats and rows forward by one token, and send for it."""
    queued = [(b, row.queue[0]) for b, row in live if row.queue]
    if queued or batch.forcing:  # now, or in the step before
        forced = torch.full((len(batch.rows),), -1)
        for b, id in queued:
            forced[b] = id
        batch.forced.copy_(forced)
        batch.forcing = bool(queued)
    effort = max(row.effort for _, row in live)
    if not graph:
        batch.advance(effort)
    else:
        if effort not in batch.graphs:
            step, rehearsal = partial(batch.advance, effort), partial(rehearse, batch, effort)
            batch.graphs[effort] = record(batch.ids.device, step, rehearsal)
        batch.graphs[effort]()
    batch.post.send(batch.results, live)


def last_embedding(model: GPT, last: Tensor) -> Tensor | None:
    """Return what `smear` needs of the last tokens (B, 1), (B, 1, C); None without smear."""
    if not model.config.smear:
        return None
    return rms_norm(model.embedding(last).to(model.compute_dtype))


class Prefixes:
    """Keys and values of the last `limit` finished rows, for prompts that begin like them."""

    def __init__(self, limit: int):
        self.limit, self.entries = limit, deque(maxlen=limit)  # of (ids, KVCache)

    def keep(self, ids: list[int], cache: KVCache) -> None:
        """Remember a cache that holds exactly these ids; it replaces those that it continues."""
        longer = [e for e in self.entries if e[0] != ids[: len(e[0])]]
        self.entries.clear()
        self.entries.extend([*longer, (ids, cache)])

    def start(self, model: GPT, prompt: Sequence[int], cache: KVCache) -> None:
        """Fill the empty cache of a prompt with as many of its first tokens as are known."""
        found = [(self.usable(ids, prompt, model.config), old) for ids, old in self.entries]
        n, old = max(found, key=lambda pair: pair[0], default=(0, None))
        if n == 0:
            return
        last = torch.tensor([[prompt[n - 1]]], device=model.device)
        cache.begin_like(old, n, last_embedding(model, last))

    @staticmethod
    def usable(ids: list[int], prompt: Sequence[int], config: GPTConfig) -> int:
        """Return how many first tokens of the prompt are these ids, with all that they saw.

        At least one token of the prompt is left to read. A row longer than a window holds only the
        last window + 1 tokens of such a layer: it can be cut before its last token, not earlier.
        """
        most = min(len(ids), len(prompt) - 1)
        same = next((i for i in range(most) if ids[i] != prompt[i]), most)
        forgotten = any(w is not None and len(ids) > w + 1 for w in config.window_sizes())
        return same if not forgotten or same >= len(ids) - 1 else 0


def next_group(waiting: deque[Row], free: int, max_tokens: int) -> list[Row]:
    """Take rows to be read together: the first that waits, and others about as long.

    At most `free` rows and, beyond the first, `max_tokens` tokens with their padding. The others
    keep their order.
    """
    group, others, first = [], [], len(waiting[0].prompt)
    longest = first
    while waiting:
        row = waiting.popleft()
        n = len(row.prompt)
        alike = first <= 2 * n and n <= 2 * first
        small = not group or max(n, longest) * (len(group) + 1) <= max_tokens
        if alike and small and len(group) < free:
            group.append(row)
            longest = max(longest, n)
        else:
            others.append(row)
    waiting.extend(others)
    return group


def prefill(
    model: GPT, rows: Sequence[Row], prefixes: Prefixes, chunk: int, beginnings: Any = None
) -> Iterator[tuple[KVCache, list[int], Tensor] | None]:
    """Read the prompts of rows in chunks; yields None between two, at last the whole.

    That is (cache, numbers, logits): the i-th row is row numbers[i] of the cache, since equal
    prompts are read once, and logits (B, V) are those after its prompt. `beginnings` (see
    Beginnings) reads the first chunk of a single prompt.
    """
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    numbers = [prompts.index(tuple(row.prompt)) for row in rows]
    longest = max(map(len, prompts))
    starts = [longest - len(prompt) for prompt in prompts]
    device, dtype = model.device, model.compute_dtype
    cache = KVCache(model.config, len(prompts), longest, device, dtype, starts)
    if len(prompts) == 1:
        prefixes.start(model, prompts[0], cache)
    filled = [[0] * start + list(prompt) for start, prompt in zip(starts, prompts)]
    idx = torch.tensor(filled, device=device)  # (B, T)
    order = torch.tensor(numbers, device=device)
    while cache.length < longest:
        part = idx[:, cache.length : cache.length + chunk]
        if beginnings and len(idx) == 1 and cache.length == 0:
            logits = beginnings.read(part, cache)
        else:
            cache.prepare(part.size(1))
            logits = model(part, kv_cache=cache, last_only=True)[:, -1]
        if cache.length < longest:
            yield None
    yield cache, numbers, logits[order]


class Beginning:
    """Reads the first tokens of a prompt, at most `size`, always by the same operations."""

    def __init__(self, model: GPT, size: int):
        self.model, device = model, model.device
        self.cache = KVCache(model.config, 1, size, device, model.compute_dtype)
        self.ids = torch.zeros(1, size, dtype=torch.int64, device=device)
        self.end = torch.zeros(1, dtype=torch.int64, device=device)  # the place of the last token

    def advance(self) -> None:
        """Read all of `ids`; logits (1, V) and the last embedding are those at `end`."""
        self.cache.length, self.cache.last = 0, None
        self.logits = self.model(self.ids, kv_cache=self.cache, positions=self.end)
        self.last = last_embedding(self.model, self.ids[:, self.end])

    def read(self, part: Tensor, cache: KVCache, replay: Callable[[], None]) -> Tensor:
        """Read tokens (1, n) into an empty cache, and return the logits (1, V) after them."""
        n = part.size(1)
        self.ids[:, :n] = part  # behind it stands what an earlier prompt has left
        self.end.fill_(n - 1)
        replay()
        cache.begin_like(self.cache, n, None if self.last is None else self.last.clone())
        return self.logits.clone()


class Beginnings:
    """Recordings of `Beginning`, by size: powers of two from 64 to 512, made when first needed."""

    def __init__(self, model: GPT):
        self.model = model
        self.kept: dict[int, tuple[Beginning, Callable[[], None]]] = {}

    def read(self, part: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (1, n), n <= CHUNK, into an empty cache; return the logits (1, V)."""
        size = bucket(max(part.size(1), SMALLEST), coarse=True)
        size = min(size, CHUNK, self.model.config.seq_len)
        if size not in self.kept:
            one = Beginning(self.model, size)
            self.kept[size] = one, record(part.device, one.advance, one.advance)
        one, replay = self.kept[size]
        return one.read(part, cache, replay)


def first_tokens(rows: Sequence[Row], logits: Tensor, known: int) -> None:
    """Choose the first token of each row from logits (B, V); a row that has ended takes none."""
    knobs = torch.tensor([row.sampling.numbers() for row in rows])
    uniform = torch.stack([row.uniforms[0] for row in rows])
    knobs, uniform = (t.to(logits.device, non_blocking=True) for t in (knobs, uniform))
    counts, forced = logits.new_zeros(len(rows), known), torch.full_like(uniform, -1).long()
    effort = max(row.effort for row in rows)
    ids, logprobs = choose(logits, knobs, uniform, counts, forced, effort)
    for row, id, logprob in zip(rows, *torch.stack((ids.double(), logprobs.double())).tolist()):
        if not row.ended():
            row.take(int(id), logprob)


class Door:
    """Rows that wait, and those whose prompts are being read."""

    def __init__(self, model: GPT, prefixes: Prefixes, graph: bool):
        self.model, self.prefixes = model, prefixes
        self.beginnings = Beginnings(model) if graph else None
        self.waiting: deque[Row] = deque()
        self.arriving: list[Row] = []
        self.reading: Iterator | None = None

    def rows(self) -> list[Row]:
        """Return all rows that have no seat yet."""
        return [*self.waiting, *self.arriving]

    def busy(self, free: int) -> bool:
        """Return whether there is a prompt to read, when there are so many free seats."""
        return self.reading is not None or bool(free and self.waiting)

    def read(self, free: int) -> tuple[list[Row], KVCache, list[int], Tensor] | None:
        """If busy: read a chunk for at most `free` rows; after the last, rows and `prefill`'s."""
        if self.reading is None:
            most = 1 if self.prefixes.limit else free  # each prompt has its own beginning
            self.arriving = next_group(self.waiting, most, GROUP_TOKENS)
            self.reading = prefill(self.model, self.arriving, self.prefixes, CHUNK, self.beginnings)
        found = next(self.reading)
        if found is None:
            return None
        rows, self.arriving, self.reading = self.arriving, [], None
        if self.prefixes.limit:
            self.prefixes.keep(rows[0].prompt, found[0])
        return rows, *found

    def leave(self) -> None:
        """Let go of rows that have ended while they waited."""
        if self.waiting:
            self.waiting = deque(row for row in self.waiting if not row.ended())

    def clear(self) -> None:
        """Forget everybody, and all that was recorded."""
        self.waiting.clear()
        self.arriving, self.reading = [], None
        if self.beginnings:
            self.beginnings.kept.clear()


SMALLEST = 64  # slots of a cache


def bucket(n: int, coarse: bool = False) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (coarse: powers of 2) from n on."""
    power = power_of_two(n)
    return power * 3 // 4 if not coarse and power >= 4 and power * 3 // 4 >= n else power


class Seats:
    """The batch at the table, and with `graph` those that were there before and may come back."""

    def __init__(self, model: GPT, known: int, max_batch: int, graph: bool):
        self.model, self.known, self.max_batch, self.graph = model, known, max_batch, graph
        self.batch = self.empty = Batch(model, 0, 1, known)
        self.kept: dict[tuple[int, int], Batch] = {}  # by rows and slots; the last used come last

    def rows(self) -> list[Row]:
        """Return the rows that have a seat."""
        return [row for row in self.batch.rows if row]

    def another(self, seats: int, size: int) -> Batch:
        """Return a batch of these sizes to be used next, a kept one if there is one."""
        batch = self.kept.pop((seats, size), None) or Batch(self.model, seats, size, self.known)
        if self.graph:
            self.kept[seats, size] = batch
            while sum(n * m for n, m in self.kept) > self.max_batch * self.model.config.seq_len:
                del self.kept[next(iter(self.kept))]
        return batch

    def move(self, seats: int, longest: int = 0) -> None:
        """Move everybody to a batch of so many seats, with room for more than `longest` tokens."""
        live = self.batch.live()
        longest = max([longest, *(row.n_read for _, row in live)])
        seats = min(seats, max(self.max_batch, len(live)))
        room = max(longest + 1, 4 * SMALLEST if self.graph else SMALLEST)
        new = self.another(seats, min(bucket(room, self.graph), self.model.config.seq_len))
        move_rows(self.batch, new)
        self.batch = new

    def clear(self) -> None:
        """Forget everybody, and all that was computed."""
        self.batch = self.empty
        self.kept.clear()


class Table(Seats):
    """The rows that write: they sit down, get tokens, and leave."""

    def put(self, rows: Sequence[Row], cache: KVCache, numbers: Sequence[int]) -> None:
        """Seat rows that have not ended; row i has read what is row numbers[i] of the cache."""
        going = [(row, number) for row, number in zip(rows, numbers) if not row.finish_reason]
        if not going:
            return
        seats, longest = len(self.rows()) + len(going), max(row.n_read for row, _ in going)
        if seats > len(self.batch.rows) or longest >= self.batch.cache.size:
            self.move(max(bucket(seats, self.graph), len(self.batch.rows)), longest)
        free = [b for b, row in enumerate(self.batch.rows) if row is None]
        rows, numbers = zip(*going)
        self.batch.put(free[: len(rows)], rows, cache, numbers)

    def step(self, late: bool) -> None:
        """Begin a step if we may, and take the tokens of it, or with `late` of the one before."""
        batch, live, waiting = self.batch, self.batch.live(), len(self.batch.post.sent)
        slots = batch.cache.size
        if live and not waiting and max(row.n_read for _, row in live) >= slots:
            self.move(len(batch.rows))
            batch, live = self.batch, self.batch.live()
        if live and (not waiting or (late and all(runs_on(row, slots) for _, row in live))):
            begin_step(batch, live, self.graph)
        if batch.post.sent and (waiting or not late):
            batch.post.receive()

    def settle(self) -> None:
        """Take the tokens that are under way: before rows join or move."""
        while self.batch.post.sent:
            self.batch.post.receive()

    def leave(self, prefixes: Prefixes) -> None:
        """Free the seats of rows that have ended, and remember what they have read."""
        batch = self.batch
        for b, row in enumerate(batch.rows):
            if row is not None and row.ended():
                batch.rows[b] = None
                if prefixes.limit and row.finish_reason != "cancelled":
                    n = row.n_read + len(batch.post.sent)  # a step under way reads the last token
                    prefixes.keep((row.prompt + row.ids)[:n], copy_out(batch.cache, b, n))
        if not any(batch.rows):
            self.batch = self.empty

    def shrink(self, prefixes: Prefixes) -> None:
        """Move to fewer seats if most are free."""
        if bucket(len(self.rows()), self.graph) <= 0.75 * len(self.batch.rows):
            self.settle()
            self.leave(prefixes)
            if self.rows():
                self.move(bucket(len(self.rows()), self.graph))


class Loop:
    """One loop for all requests of an engine: rows join and leave between two steps.

    Whoever wants a token calls `run` from any thread; who holds the lock makes a step for all. With
    `graph` steps and short prompts are recorded, with `late` steps are looked at one step late.
    """

    def __init__(
        self, model: GPT, known: int, max_batch: int, remember: int, graph: bool, late: bool
    ):
        self.prefixes, self.lock, self.late = Prefixes(remember), threading.Lock(), late
        self.door = Door(model, self.prefixes, graph)
        self.table = Table(model, known, max_batch, graph)

    def run(self, rows: Sequence[Row], done: Callable[[], bool]) -> None:
        """Make steps until done() is true; `rows` are new ones that join."""
        if rows:
            with self.lock:
                self.door.waiting.extend(rows)
        while not done():
            with self.lock, torch.inference_mode():
                try:
                    self.step()
                except BaseException as error:
                    self.fail(error)
                    raise

    def rows(self) -> list[Row]:
        """Return all rows in the house."""
        return self.door.rows() + self.table.rows()

    def free(self) -> int:
        """Return how many rows may join."""
        return self.table.max_batch - len(self.table.rows())

    def step(self) -> None:
        """Let rows leave and join, read a chunk of a prompt, and give everybody a token."""
        door, table = self.door, self.table
        self.leave()
        if door.busy(self.free()):
            table.settle()
            self.leave()
        if door.busy(self.free()):
            found = door.read(self.free())
            if found:
                rows, cache, numbers, logits = found
                first_tokens(rows, logits, table.known)
                table.put(rows, cache, numbers)
        table.step(self.late and not door.busy(self.free()))
        self.leave()
        if not door.waiting and not door.arriving:
            table.shrink(self.prefixes)

    def leave(self) -> None:
        """Let go of rows that have ended."""
        self.door.leave()
        self.table.leave(self.prefixes)

    def fail(self, error: BaseException) -> None:
        """After an error nobody can go on: end all rows, with the error if it is one."""
        for row in self.rows():
            row.error = error if isinstance(error, Exception) else None
            row.finish_reason = row.finish_reason or "cancelled"
        self.door.clear()
        self.table.clear()


class Stream:
    """The tokens of one request as they come; afterwards `finish_reason` and `completion()`.

    It joins the loop with its first token. A stream that nobody holds any more leaves the loop.
    """

    def __init__(self, row: Row, loop: Loop):
        self.row, self.loop, self.count = row, loop, 0
        self.new, self.transcript = [row], Transcript(row.tokenizer)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Token:
        row, new = self.row, self.new
        if row.stop is not None and row.stop.is_set():
            self.cancel()
        self.new = []
        if not row.finish_reason and self.count == len(row.ids):
            self.loop.run(new, lambda: len(row.ids) > self.count or row.finish_reason)
        if row.error is not None:
            raise row.error
        if self.count >= len(row.ids):
            raise StopIteration
        self.count += 1
        id, forced = row.ids[self.count - 1], not row.mask[self.count - 1]
        kind, text = self.transcript.push(id)
        return Token(id, text, row.logprobs[self.count - 1], forced, kind)

    def cancel(self) -> None:
        """End here; tokens that were made ahead of the reader are dropped."""
        row = self.row
        with self.loop.lock, torch.inference_mode():
            if not row.finish_reason or self.count < len(row.ids):
                row.finish_reason = "cancelled"
            for made in (row.ids, row.mask, row.logprobs):
                del made[self.count :]
            self.loop.leave()

    def __del__(self) -> None:
        self.row.finish_reason = self.row.finish_reason or "cancelled"

    @property
    def finish_reason(self) -> str | None:
        """None while running; then "stop", "length" or "cancelled"."""
        ended = self.row.finish_reason and self.count >= len(self.row.ids)
        return self.row.finish_reason if ended else None

    def completion(self) -> Completion:
        """Return what has been generated so far."""
        return self.row.completion()


def prepared_copy(model: GPT, dtype: torch.dtype) -> GPT:
    """Return a copy of the model for inference whose weights and activations have `dtype`."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for weight in twin.parameters():
        weight.grad, weight.data = None, weight.data.to(dtype)
    pack_heads(twin)
    twin.compute_dtype = dtype
    return twin


@torch.no_grad()
def copy_weights(twin: GPT, model: GPT) -> None:
    """Give a prepared copy the weights of its model anew, in the memory that it has."""
    for mine, new in zip(twin.parameters(), model.parameters()):
        mine.copy_(new)


def check_tokenizer(model: GPT, tokenizer: Tokenizer) -> None:
    """Raise UserError when the tokenizer has tokens that the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
            f"{model.config.vocab_size:,}; use the tokenizer that it was trained with."
        )


def request(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int, *options: Any
) -> Row:
    """Return the Row of a prompt, or UserError; `options` are those of Row from sampling on."""
    seq_len, last = model.config.seq_len, tokenizer.vocab_size - 1
    if not len(ids):
        raise UserError("the prompt is empty; begin it with the token bos.")
    if len(ids) > seq_len:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and the model's context window holds "
            f"{seq_len:,}; shorten the prompt or start a new conversation."
        )
    if not 0 <= min(ids) <= max(ids) <= last:
        raise UserError(f"the prompt has an id outside 0 .. {last}, the tokens there are.")
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; use 0 or more.")
    return Row(ids, min(max_tokens, seq_len - len(ids)), tokenizer, *options)


@torch.inference_mode()
def token_probabilities(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], top: int = 5
) -> list[dict]:
    """Tell for each id of a sequence how likely the model found it, and what else it expected.

    One dict per id: id, text, probability (None for the first id, before which nothing was
    read) and top, the `top` likeliest (text, probability) at that place. UserError for bad ids.
    """
    row = request(model, tokenizer, ids, 0, Sampling())
    idx = torch.tensor([row.prompt], device=model.device)
    p = model(idx)[0, :-1].softmax(dim=-1)  # (T - 1, V)
    known = tokenizer.vocab_size
    values, where = p[:, :known].topk(min(top, known), dim=-1)
    own = p.gather(-1, idx[0, 1:, None]).squeeze(-1).tolist()
    texts = [[tokenizer.decode([i]) for i in line] for line in where.tolist()]
    tops = [list(zip(*pair)) for pair in zip(texts, values.tolist())]
    return [
        {"id": id, "text": tokenizer.decode([id]), "probability": own, "top": tops}
        for id, own, tops in zip(row.prompt, [None, *own], [[], *tops])
    ]


def row_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """Return a seed for each of n rows; UserError when those that are given are not n."""
    if isinstance(seed, int):
        return [seed + 1_000_003 * i for i in range(n)]
    if len(seed) != n:
        raise UserError(f"there are {n} prompts and {len(seed)} seeds; give one for each.")
    return list(seed)


class Engine:
    """Generates text with a model and its tokenizer: `generate` streams, `generate_batch` returns.

    The model is the caller's own, so every change of its weights is seen; `dtype` makes a copy in
    that dtype instead (bfloat16 is best on a GPU), until `refresh()`. At most `max_batch` rows
    decode together. `remember` keeps keys and values of so many finished rows for prompts that
    continue them: for weights that do not change. `graph` records steps, and how one prompt is
    read, as CUDA graphs (then weights must stay where they are); `late` looks at tokens a step
    late. Both are done on CUDA.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None = None,
        max_batch: int = 128, remember: int = 0, graph: bool | None = None,
        late: bool | None = None,
    ):  # fmt: skip
        check_tokenizer(model, tokenizer)
        on_gpu = model.device.type == "cuda"
        options = max_batch, remember, *(on_gpu if x is None else x for x in (graph, late))
        self.source, self.tokenizer = model, tokenizer
        self.model = model if dtype is None else prepared_copy(model, dtype)
        self.loop = Loop(self.model, tokenizer.vocab_size, *options)

    def refresh(self) -> None:
        """Forget all prompts; a copy in another dtype takes over the weights as they are now."""
        with self.loop.lock:
            if self.model is not self.source:
                copy_weights(self.model, self.source)
            self.loop.prefixes.entries.clear()

    def row(self, *asked: Any) -> Row:
        """Check one request and return its Row: see `request`."""
        return request(self.model, self.tokenizer, *asked)

    def generate(
        self, ids: Sequence[int], max_tokens: int = 256, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        seed: int = 0, stop: threading.Event | None = None, tools: bool = True,
        frequency_penalty: float = 0.0,
    ) -> Stream:  # fmt: skip
        """Stream the Tokens that follow the prompt `ids`, the stopping token (text "") included.

        Ends at assistant_end or bos ("stop"), after max_tokens or at the end of the context window
        ("length"), or when another thread sets `stop` ("cancelled"). UserError for a bad prompt.
        Streams of one engine decode together, from one thread or from several.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, frequency_penalty)
        return Stream(self.row(ids, max_tokens, sampling, seed, stop, tools), self.loop)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 256, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        seed: int | Sequence[int] = 0, stop: threading.Event | None = None, tools: bool = True,
        frequency_penalty: float = 0.0,
    ) -> list[Completion]:  # fmt: skip
        """Complete many prompts, of any lengths, together; the results come in their order.

        `seed` is one number (row i then draws with seed + 1,000,003 i) or one per prompt. What a
        row becomes does not depend on the other rows, up to rounding.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, frequency_penalty)
        pairs = zip(prompts, row_seeds(seed, len(prompts)))
        rows = [self.row(ids, max_tokens, sampling, s, stop, tools) for ids, s in pairs]
        self.loop.run(rows, lambda: all(row.finish_reason for row in rows))
        for error in (row.error for row in rows if row.error):
            raise error
        return [row.completion() for row in rows]

    def token_probabilities(self, ids: Sequence[int], top: int = 5) -> list[dict]:
        """Tell how likely the model found each id of a sequence: see `token_probabilities`."""
        return token_probabilities(self.model, self.tokenizer, ids, top)


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second of summing a large array, the best of six."""
    data = torch.ones((2**30 if device.type == "cuda" else 2**26) // 4, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return data.numel() * 4 / min(seconds)


def benchmark(engine: Engine, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Time `batch` greedy requests of `prompt` tokens, `new` tokens each; return the figures.

    ttft_ms is until every row has its first token, tpot_ms the mean of each later step.
    """
    model, loop, device = engine.model, engine.loop, engine.model.device
    letters = min(256, engine.tokenizer.vocab_size)  # no two prompts are alike
    prompts = [[(7 * b + i) % letters for i in range(prompt)] for b in range(batch)]
    rows = [engine.row(ids, new, Sampling(0.0), 0, None, False) for ids in prompts]
    for row in rows:
        row.stop_ids = set()
    synchronize(device)
    start = time.perf_counter()
    loop.run(rows, lambda: all(row.ids for row in rows))
    first, cache = time.perf_counter() - start, loop.table.batch.cache
    loop.run([], lambda: all(row.finish_reason for row in rows))
    synchronize(device)
    each = (time.perf_counter() - start - first) / (new - 1)
    params, size, item = model.num_params(), model.config, cache.keys[0].element_size()
    seen = sum(min(prompt + new / 2, w or math.inf) for w in size.window_sizes())
    kv = 2 * size.n_kv_head * size.head_dim * seen * batch
    return {
        "batch": batch,
        "ttft_ms": round(first * 1e3, 3),
        "tpot_ms": round(each * 1e3, 3),
        "tokens_per_second": round(batch / each, 1),
        "bytes_per_second": item * (params["matrix"] + params["head"] + kv) / each,
        "cache_bytes": sum(2 * k.numel() * item for k in cache.keys),
        "memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def bench(
    engine: Engine, batches: Sequence[int], prompt: int, new: int, repeats: int = 3
) -> dict[str, Any]:
    """Print a table of `benchmark` over batch sizes (the medians of repeats); return its facts."""
    device, results = engine.model.device, []
    bandwidth = read_bandwidth(device)
    print(f"{'batch':>6} {'first token':>13} {'per token':>10} {'tokens/s':>9} {'bandwidth':>10} "
          f"{'cache':>9}")  # fmt: skip
    for batch in batches:
        benchmark(engine, batch, prompt, new)  # to warm up, and to record steps
        runs = [benchmark(engine, batch, prompt, new) for _ in range(repeats)]
        found = sorted(runs, key=lambda run: run["tpot_ms"])[repeats // 2]
        found["bandwidth_share"] = round(found.pop("bytes_per_second") / bandwidth, 4)
        results.append(found)
        print(f"{batch:6} {found['ttft_ms']:10.1f} ms {found['tpot_ms']:7.2f} ms "
              f"{found['tokens_per_second']:9,.0f} {found['bandwidth_share']:10.1%} "
              f"{found['cache_bytes'] / 2**20:6.1f} MB")  # fmt: skip
    facts = {"prompt": prompt, "new": new, "threads": torch.get_num_threads()}
    facts |= {"device": str(device), "dtype": str(engine.model.compute_dtype).split(".")[1]}
    facts |= {"torch": torch.__version__, "read_gb_per_second": round(bandwidth / 1e9, 1)}
    return {**facts, "results": results}


def look_up(ids: list[int], n: int) -> list[int]:
    """Return up to n ids that followed the last two ids where they last stood before."""
    for place in range(len(ids) - 3, -1, -1):
        if ids[place : place + 2] == ids[-2:]:
            return ids[place + 2 : place + 2 + n]
    return []


@torch.inference_mode()
def generate_with_lookup(
    model: GPT, prompt: Sequence[int], n_new: int, draft: int = 8
) -> tuple[list[int], int]:
    """Return the greedy continuation, n_new ids, and how many passes of the model it took.

    Each pass checks up to `draft` ids that `look_up` proposes (Saxena 2023, prompt lookup).
    """
    total, passes = len(prompt) + n_new, 0
    cache = KVCache(model.config, 1, total, model.device, model.compute_dtype)
    ids, new = list(prompt), list(prompt)
    while len(ids) < total:
        guess = look_up(ids, min(draft, total - len(ids) - 1))
        logits = model(torch.tensor([new + guess], device=model.device), kv_cache=cache)
        best = logits[0, len(new) - 1 :].argmax(dim=-1).tolist()  # after new, and after each guess
        right = next((i for i, id in enumerate(guess) if id != best[i]), len(guess))
        ids += best[: right + 1]
        cache.length -= len(guess) - right  # what was guessed wrongly has never been read
        cache.last = last_embedding(model, torch.tensor([ids[-2:-1]], device=model.device))
        new, passes = ids[-1:], passes + 1
    return ids[len(prompt) :], passes
