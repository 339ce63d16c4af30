"""The inference engine: KV cache, sampling, streaming, batches and the calculator tool.

Exported from chapters/08_inference.py (chapter 08, Inference); edit there, not here.
"""

import ast
import copy
import math
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

__all__ = [
    "Completion",
    "Engine",
    "EngineBase",
    "KVCache",
    "MAX_DEPTH",
    "MAX_EXPONENT",
    "MAX_LENGTH",
    "MAX_VALUE",
    "OPERATORS",
    "QUOTED",
    "Row",
    "Sampling",
    "Stream",
    "THOUSANDS",
    "Token",
    "Transcript",
    "calculate",
    "choose",
    "count_call",
    "decode",
    "draw",
    "evaluate",
    "format_number",
    "group_rows",
    "next_token_probabilities",
    "padded_view",
    "power",
    "prefill",
    "prepared_copy",
    "sample",
    "step",
    "uniform_table",
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
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
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

    def select(self, rows: Tensor, max_len: int | None = None) -> "KVCache":
        """Return a cache of the chosen rows (int64, repeats allowed), with its own memory."""
        size = max_len or self.max_len
        device, dtype = self.keys.device, self.keys.dtype
        other = KVCache(self.config, len(rows), size, device, dtype)
        other.length, filled = self.length, slice(0, self.length)
        other.keys[:, :, :, filled] = self.keys[:, :, :, filled].index_select(1, rows)
        other.values[:, :, :, filled] = self.values[:, :, :, filled].index_select(1, rows)
        other.starts = None if self.starts is None else self.starts[rows]
        other.last = None if self.last is None else self.last[rows]
        return other


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

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, with the value in the sentence."""
        wrong = None
        if not (0 <= self.temperature < math.inf):
            wrong = f"temperature is {self.temperature}; use 0 (greedy) or a positive number"
        elif self.top_k is not None and self.top_k < 0:
            wrong = f"top_k is {self.top_k}; use a positive whole number, or None for no limit"
        elif self.top_p is not None and not 0 < self.top_p <= 1:
            wrong = f"top_p is {self.top_p}; use a number above 0 and at most 1"
        elif self.min_p is not None and not 0 <= self.min_p <= 1:
            wrong = f"min_p is {self.min_p}; use a number from 0 to 1"
        if wrong:
            raise UserError(wrong + ".")


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn logits (..., V) into the float32 probabilities (..., V) from which we draw.

    In this order: divide by the temperature, keep the top_k largest, keep the fewest tokens that
    hold top_p of the probability (Holtzman et al. 2019), drop those below min_p times the largest.
    """
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.size(-1):
        values, where = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, where, values)
    p = logits.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, where = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass of the likelier tokens
        p = torch.zeros_like(p).scatter(-1, where, ordered * (before < sampling.top_p))
    if sampling.min_p:
        p = p * (p >= sampling.min_p * p.amax(dim=-1, keepdim=True))
    return p / p.sum(dim=-1, keepdim=True)


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


MAX_LENGTH, MAX_DEPTH, MAX_VALUE, MAX_EXPONENT = 500, 50, 1e30, 100
QUOTED = re.compile(r"""("[^"\\\n]*"|'[^'\\\n]*')""")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: power(a, b),
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
}


def power(base: float, exponent: float) -> float:
    """Return base ** exponent; ValueError before the work when the result would be too large."""
    if abs(exponent) > MAX_EXPONENT or (base and exponent * math.log10(abs(base)) > 30):
        raise ValueError("the power is too large")
    return base**exponent


def evaluate(node: ast.AST, depth: int = 0) -> int | float:
    """Compute a syntax tree of allowed nodes; ValueError for any other node or size."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left, depth + 1), evaluate(node.right, depth + 1)
        value = OPERATORS[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.operand, depth + 1))
    else:
        value = count_call(node)
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:  # `not <=` is true for NaN
        raise ValueError("the number is too large")
    return value


def count_call(node: ast.AST) -> int:
    """Compute `"text".count("t")`, the one call there is; ValueError for any other node."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError(f"{type(node).__name__} is not allowed")


def format_number(value: int | float) -> str:
    """Write a number as the training data do: 12 not 12.0, 0.3 not 0.30000000000000004."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    return format(Decimal(f"{value:.12g}"), "f")


def calculate(expression: str) -> str | None:
    """Return the value of a short expression as text, or None for whatever is not one.

    Allowed: + - * / // % **, parentheses, decimal numbers (with thousands commas) and
    `"text".count("t")`. Nothing is ever executed: the text is parsed, and the tree is computed
    node by node with limits on length, depth, size and exponents.
    """
    if len(expression) > MAX_LENGTH:
        return None
    pieces = QUOTED.split(expression.strip())  # plain, quoted, plain, quoted, ..., plain
    for i in range(0, len(pieces), 2):
        plain = pieces[i] = THOUSANDS.sub(lambda m: m[0].replace(",", ""), pieces[i])
        if not re.fullmatch(r"[0-9.+\-*/%() ]*", plain.replace(".count", "")):
            return None
        if plain.count("(") > MAX_DEPTH:
            return None
    try:
        tree = ast.parse("".join(pieces), mode="eval")
        return format_number(evaluate(tree.body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


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
    """One request on its way: its tokens, its own random numbers, and the calculator's state."""

    def __init__(
        self, prompt: Sequence[int], budget: int, seed: int, tokenizer: Tokenizer, tools: bool
    ):
        self.prompt, self.budget, self.tokenizer, self.tools = (
            list(prompt),
            budget,
            tokenizer,
            tools,
        )
        self.ids, self.mask, self.logprobs = [], [], []
        self.queue: deque[int] = deque()  # tokens that must come next, whatever the model wants
        self.expression: list[int] | None = None  # ids since python_start
        self.special = {name.strip("<|>"): tokenizer.special(name) for name in SPECIAL_TOKENS}
        self.stop_ids = {self.special["assistant_end"], self.special["bos"]}
        self.finish_reason: str | None = None if budget else "length"
        generator = torch.Generator().manual_seed(seed)
        self.uniforms = torch.rand(max(budget, 1), generator=generator, dtype=torch.float64)

    def take(self, id: int, logprob: float) -> None:
        """Append the next token and decide what follows from it."""
        forced = bool(self.queue)
        if forced:
            self.queue.popleft()
        elif logprob != logprob:
            raise UserError("the model's output is not a number (NaN); load an earlier checkpoint.")
        self.ids.append(id)
        self.mask.append(int(not forced))
        self.logprobs.append(logprob)
        if not forced and id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.budget:
            self.finish_reason = "length"
        elif self.tools and not forced:
            self.watch(id)

    def watch(self, id: int) -> None:
        """Collect a tool call; when it closes and has a value, queue the tokens of that value."""
        if id == self.special["python_start"]:
            self.expression = []
        elif id == self.special["python_end"] and self.expression is not None:
            value = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if value is not None:
                start, end = self.special["output_start"], self.special["output_end"]
                self.queue.extend([start, *self.tokenizer.encode(value), end])
        elif self.expression is not None:
            self.expression.append(id)

    def completion(self) -> Completion:
        """Return what the row has become."""
        transcript = Transcript(self.tokenizer)
        pieces = [transcript.push(id) for id in self.ids]
        text = "".join(piece for kind, piece in pieces if kind == "text")
        return Completion(self.ids, self.mask, text, self.logprobs, self.finish_reason or "length")


def group_rows(rows: Sequence[Row], seq_len: int, max_batch: int) -> list[list[Row]]:
    """Split rows into batches that decode together: alike in length, at most max_batch rows.

    The longest prompt plus the largest budget of a batch must fit in the window, unless all
    prompts are equally long.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        group = groups[-1] if groups else []
        first = group[0] if group else row  # the shortest prompt has the largest budget
        same = len(row.prompt) == len(first.prompt)
        fits = same or len(row.prompt) + first.budget <= seq_len
        if group and len(group) < max_batch and fits:
            group.append(row)
        else:
            groups.append([row])
    return groups


@torch.inference_mode()
def prefill(model: GPT, rows: Sequence[Row]) -> tuple[KVCache, Tensor]:
    """Read the prompts of all rows at once; return the cache and the next logits (B, V).

    A prompt that several rows share is read once and copied.
    """
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    longest = max(map(len, prompts))
    starts = [longest - len(prompt) for prompt in prompts]
    budget, shared = max(row.budget for row in rows), len(prompts) < len(rows)
    size = longest if shared else longest + budget
    cache = KVCache(model.config, len(prompts), size, model.device, model.compute_dtype, starts)
    filled = [[0] * start + list(prompt) for start, prompt in zip(starts, prompts)]
    cache.prepare(longest)
    idx = torch.tensor(filled, device=model.device)  # (B, T)
    logits = model(idx, kv_cache=cache, last_only=True)[:, -1]
    if shared:
        number = {prompt: i for i, prompt in enumerate(prompts)}
        which = [number[tuple(row.prompt)] for row in rows]
        which = torch.tensor(which, device=model.device)
        cache, logits = cache.select(which, longest + budget), logits[which]
    return cache, logits


@torch.inference_mode()
def choose(
    logits: Tensor, rows: Sequence[Row], uniform: Tensor, sampling: Sampling
) -> tuple[Tensor, list, list]:
    """Choose the next id of every row: forced where a tool has spoken, else sampled.

    Returns the ids as a tensor (B,) and, fetched from the device together, ids and logprobs.
    """
    known = rows[0].tokenizer.vocab_size  # a padded head has logits that stand for no token
    ids = sample(logits[:, :known], **vars(sampling), uniform=uniform)
    if any(row.queue for row in rows):
        forced = torch.tensor([row.queue[0] if row.queue else -1 for row in rows])
        forced = forced.to(ids.device)
        ids = torch.where(forced >= 0, forced, ids)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    logprobs = chosen - logits.logsumexp(dim=-1)
    both = torch.stack((ids.float(), logprobs)).tolist()  # ids below 2^24 are exact in float32
    return ids, [int(id) for id in both[0]], both[1]


@torch.inference_mode()
def step(model: GPT, cache: KVCache, ids: Tensor) -> Tensor:
    """Feed one token per row, ids (B,); return the logits (B, V) of the token after it."""
    cache.prepare(1)
    return model(ids[:, None], kv_cache=cache, last_only=True)[:, -1]


def uniform_table(rows: Sequence[Row]) -> Tensor:
    """Return the random numbers of all rows, float (B, longest budget), zero beyond a budget."""
    table = torch.zeros(len(rows), max(row.budget for row in rows), dtype=torch.float64)
    for line, row in zip(table, rows):
        line[: row.budget] = row.uniforms
    return table


def decode(
    model: GPT,
    rows: Sequence[Row],
    sampling: Sampling,
    stop: threading.Event | None = None,
) -> Iterator[None]:
    """Generate for all rows in lockstep; yields after each token, with the rows brought forward.

    Rows that have ended are dropped from the batch when a quarter of it is idle.
    """
    live = [row for row in rows if row.finish_reason is None]
    if not live:
        return
    cache, logits = prefill(model, live)
    longest = max(row.budget for row in live)
    uniforms = uniform_table(live).to(model.device)  # (B, longest)
    for number in range(longest):
        if stop is not None and stop.is_set():
            for row in live:
                row.finish_reason = row.finish_reason or "cancelled"
            return
        ids, chosen, logprobs = choose(logits, live, uniforms[:, number], sampling)
        for row, id, logprob in zip(live, chosen, logprobs):
            if row.finish_reason is None:
                row.take(id, logprob)
        yield
        going = [i for i, row in enumerate(live) if row.finish_reason is None]
        if not going:
            return
        if len(going) <= 0.75 * len(live):
            live, keep = [live[i] for i in going], torch.tensor(going, device=ids.device)
            cache, ids, uniforms = cache.select(keep), ids[keep], uniforms[keep]
        logits = step(model, cache, ids)


class Stream:
    """The tokens of one request as they come; afterwards `finish_reason` and `completion()`."""

    def __init__(self, row: Row, steps: Iterator[None]):
        self.row, self.steps, self.transcript = row, steps, Transcript(row.tokenizer)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Token:
        next(self.steps)
        kind, text = self.transcript.push(self.row.ids[-1])
        forced = not self.row.mask[-1]
        return Token(self.row.ids[-1], text, self.row.logprobs[-1], forced, kind)

    @property
    def finish_reason(self) -> str | None:
        """None while running; then "stop", "length" or "cancelled"."""
        return self.row.finish_reason

    def completion(self) -> Completion:
        """Return what has been generated so far."""
        return self.row.completion()


def prepared_copy(model: GPT, dtype: torch.dtype) -> GPT:
    """Return a copy of the model for inference whose weights and activations have `dtype`."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for weight in twin.parameters():
        weight.grad, weight.data = None, weight.data.to(dtype)
    twin.compute_dtype = dtype
    return twin


class EngineBase:
    """What an Engine holds: the model, its tokenizer, and checks of what it is asked."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None = None):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
                f"{model.config.vocab_size:,}; use the tokenizer that it was trained with."
            )
        self.source, self.model, self.tokenizer, self.dtype = model, model, tokenizer, dtype
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights again (only when a dtype was given)."""
        if self.dtype is not None:
            self.model = prepared_copy(self.source, self.dtype)

    def row(self, ids: Sequence[int], max_tokens: int, seed: int, tools: bool) -> Row:
        """Check one request and return its Row. UserError for a bad prompt."""
        config = self.model.config
        if not len(ids):
            raise UserError("the prompt is empty; begin it with the token bos.")
        if len(ids) > config.seq_len:
            raise UserError(
                f"the prompt has {len(ids):,} tokens and the model's context window holds "
                f"{config.seq_len:,}; shorten the prompt or start a new conversation."
            )
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            last = self.tokenizer.vocab_size - 1
            raise UserError(f"the prompt has an id outside 0 .. {last}, the tokens there are.")
        if max_tokens < 0:
            raise UserError(f"max_tokens is {max_tokens}; use 0 or more.")
        budget = min(max_tokens, config.seq_len - len(ids))
        return Row(ids, budget, seed, self.tokenizer, tools)

    @torch.inference_mode()
    def token_probabilities(self, ids: Sequence[int], top: int = 5) -> list[dict]:
        """Tell for each id of a sequence how likely the model found it, and what else it expected.

        One dict per id: id, text, probability (None for the first id, before which nothing was
        read) and top, the `top` likeliest (text, probability) at that place.
        """
        row = self.row(ids, 0, 0, False)
        idx = torch.tensor([row.prompt], device=self.model.device)
        p = self.model(idx)[0, :-1].softmax(dim=-1)  # (T - 1, V)
        known = self.tokenizer.vocab_size
        values, where = p[:, :known].topk(min(top, known), dim=-1)
        own = p.gather(-1, idx[0, 1:, None]).squeeze(-1).tolist()
        texts = [[self.tokenizer.decode([i]) for i in line] for line in where.tolist()]
        tops = [list(zip(*pair)) for pair in zip(texts, values.tolist())]
        return [
            {"id": id, "text": self.tokenizer.decode([id]), "probability": own, "top": tops}
            for id, own, tops in zip(row.prompt, [None, *own], [[], *tops])
        ]


class Engine(EngineBase):
    """Generates text with a model and its tokenizer: `generate` streams, `generate_batch` returns.

    By default the engine uses the caller's model itself and so sees every change of its weights.
    `dtype` makes a copy of the weights in that dtype instead, prepared once (bfloat16 is best on
    a GPU); `refresh()` copies them again.
    """

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: threading.Event | None = None,
        tools: bool = True,
    ) -> Stream:
        """Stream the Tokens that follow the prompt `ids`, the stopping token (text "") included.

        Ends at assistant_end or bos ("stop"), after max_tokens or at the end of the context window
        ("length"), or when another thread sets `stop` ("cancelled"). UserError for a bad prompt.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        row = self.row(ids, max_tokens, seed, tools)
        return Stream(row, decode(self.model, [row], sampling, stop))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: threading.Event | None = None,
        tools: bool = True,
        max_batch: int = 128,
    ) -> list[Completion]:
        """Complete many prompts, of any lengths, together; the results come in their order.

        `seed` is one number (row i then draws with seed + 1,000,003 i) or one per prompt. What a
        row becomes does not depend on the other rows, up to rounding.
        """
        sampling, n = Sampling(temperature, top_k, top_p, min_p), len(prompts)
        seeds = [seed + 1_000_003 * i for i in range(n)] if isinstance(seed, int) else list(seed)
        if len(seeds) != n:
            raise UserError(f"there are {n} prompts and {len(seeds)} seeds; give one for each.")
        rows = [self.row(ids, max_tokens, s, tools) for ids, s in zip(prompts, seeds)]
        for group in group_rows(rows, self.model.config.seq_len, max_batch):
            for _ in decode(self.model, group, sampling, stop):
                pass
        return [row.completion() for row in rows]
