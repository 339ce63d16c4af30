"""Midtraining and supervised fine-tuning: packing conversations into training rows.

Exported from chapters/09_chat_finetuning.py (chapter 09, From text to chat); edit there, not here.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.chat import render, turns
from nanochat.common import UserError, usable_cores
from nanochat.model import GPT, Linear
from nanochat.tasks import Mixture

__all__ = [
    "AHEAD",
    "ConversationBatches",
    "ConversationStream",
    "EncodedAhead",
    "LowRank",
    "add_lora",
    "best_fit",
    "estimate_rows",
    "held_out_loss",
    "load_lora_state",
    "lora_groups",
    "lora_places",
    "lora_state",
    "merge_lora",
    "merged_copy",
    "pack_row",
    "split_conversation",
    "training_pieces",
]


def split_conversation(
    conversation: dict, tokenizer, max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Render a training conversation as pieces (ids, mask) of whole exchanges; one, if it fits.

    A piece has at most max_tokens tokens if its exchanges allow it: a single exchange that is
    longer stays whole. Every piece begins with the system message, if there is one.
    """
    whole = render(conversation, tokenizer)
    if len(whole[0]) <= max_tokens:
        return [whole]
    messages = conversation["messages"]
    first = int(messages[0]["role"] == "system")
    pieces, begin = [], first
    for end in range(first + 2, len(messages) + 1, 2):
        exchanges = {"messages": messages[:first] + messages[begin:end]}
        longer = render(exchanges, tokenizer)
        if pieces and len(longer[0]) > max_tokens:  # the last exchange begins a new piece
            begin = end - 2
            exchanges = {"messages": messages[:first] + messages[begin:end]}
            pieces.append(render(exchanges, tokenizer))
        else:
            pieces[-1:] = [longer]
    return pieces


def best_fit(lengths: Sequence[int], space: int) -> int | None:
    """Return the position of the longest of `lengths` that fits into `space` (ties: the first)."""
    best = None
    for position, length in enumerate(lengths):
        if length <= space and (best is None or length > lengths[best]):
            best = position
    return best


def pack_row(pieces: Sequence[tuple[list[int], list[int]]], seq_len: int, pad_id: int):
    """Return (inputs, targets), two int64 tensors (seq_len,), of conversations put side by side.

    `pieces` are (ids, mask) with together at most seq_len + 1 tokens. A target is -1 where its
    token has mask 0, and after the last conversation.
    """
    row = np.full(seq_len + 1, pad_id, dtype=np.int64)
    trained = np.zeros(seq_len + 1, dtype=bool)
    end = 0
    for ids, mask in pieces:
        start, end = end, end + len(ids)
        if end > seq_len + 1:
            raise UserError(f"{end} tokens do not fit into a row of {seq_len + 1}.")
        row[start:end], trained[start:end] = ids, mask
    targets = np.where(trained, row, -1)[1:]
    return torch.from_numpy(row[:-1].copy()), torch.from_numpy(targets)


class EncodedAhead:
    """Stands in for a tokenizer: it has encoded the texts of some conversations, in threads."""

    def __init__(self, tokenizer, conversations: Sequence[list[tuple[str, list[dict]]]]):
        spoken = (part["text"] for turns in conversations for _, parts in turns for part in parts)
        texts = list(dict.fromkeys(spoken))  # each once
        known = tokenizer.encode_batch(texts, num_threads=min(8, usable_cores()))
        self.known, self.tokenizer = dict(zip(texts, known)), tokenizer
        self.bos_id, self.special = tokenizer.bos_id, tokenizer.special

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.known[text] if text in self.known else self.tokenizer.encode(text)


def training_pieces(
    mixture: Mixture, places: Sequence[int], tokenizer, max_tokens: int, train_on: str
) -> list[list[tuple[list[int], list[int]]]]:
    """Return conversations of a mixture, each as pieces (ids, mask), see `split_conversation`.

    `train_on` "assistant" keeps the mask of `render`, "all" trains on all but bos. Raises UserError
    that names the task and its row for a malformed conversation.
    """
    conversations, checked = [mixture[place] for place in places], []
    for place, each in zip(places, conversations):
        try:
            checked.append(turns(each, training=True))
        except UserError as error:
            task, row = mixture.origin(place)
            name = mixture.tasks[task].name
            raise UserError(f"Conversation {row} of task {name!r}: {error}") from error
    ahead = EncodedAhead(tokenizer, checked)
    pieces = [split_conversation(each, ahead, max_tokens) for each in conversations]
    if train_on == "all":
        pieces = [[(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in each] for each in pieces]
    return pieces


AHEAD = 256  # conversations that are rendered together


class ConversationStream:
    """Endless rows of packed conversations; every conversation exactly once in an epoch.

    A window of `window` conversations waits, long ones in pieces; each row takes the longest that
    fits until none does. At the end of an epoch the window is emptied before the next begins, in
    another order. `truncated` counts exchanges longer than a row, which are cut at its end.
    """

    def __init__(
        self, mixture: Mixture, tokenizer, seq_len: int, train_on: str, seed: int, window: int = 64
    ):
        if train_on not in ("all", "assistant"):
            raise UserError(f"train_on must be 'all' or 'assistant', not {train_on!r}.")
        self.mixture, self.tokenizer, self.window = mixture, tokenizer, window
        self.seq_len, self.train_on, self.seed = seq_len, train_on, seed
        self.truncated, self.waiting = 0, []  # waiting: (position, piece, ids, mask)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, whose order follows from the seed and its number."""
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch, self.cursor, self.order = epoch, 0, rng.permutation(len(self.mixture))
        self.rendered = {}

    def _render(self, positions: Sequence[int]) -> None:
        """Keep the pieces of the conversations at some places of this epoch, as in `waiting`."""
        places, settings = self.order[positions].tolist(), (self.seq_len + 1, self.train_on)
        pieces = training_pieces(self.mixture, places, self.tokenizer, *settings)
        self.rendered = {
            position: [(position, piece, ids, mask) for piece, (ids, mask) in enumerate(several)]
            for position, several in zip(positions, pieces)
        }

    def _fill(self) -> None:
        """Fill the window from this epoch; start the next one when this one is used up."""
        if not self.waiting and self.cursor == len(self.order):
            self._start_epoch(self.epoch + 1)
        while len(self.waiting) < self.window and self.cursor < len(self.order):
            if self.cursor not in self.rendered:
                end = min(self.cursor + AHEAD, len(self.order))
                self._render(range(self.cursor, end))
            pieces = self.rendered[self.cursor]
            self.truncated += sum(len(ids) > self.seq_len + 1 for _, _, ids, _ in pieces)
            self.waiting += pieces
            self.cursor += 1

    def next_row(self) -> list[tuple[list[int], list[int]]]:
        """Return the conversations (ids, mask) of the next row, at most seq_len + 1 tokens."""
        row, space = [], self.seq_len + 1
        self._fill()
        while True:
            lengths = [min(len(ids), self.seq_len + 1) for _, _, ids, _ in self.waiting]
            if (best := best_fit(lengths, space)) is None:
                return row
            _, _, ids, mask = self.waiting.pop(best)
            row.append((ids[:space], mask[:space]))
            space -= len(row[-1][0])
            if self.cursor < len(self.order):
                self._fill()

    def restore(self, epoch: int, cursor: int, waiting: Sequence[Sequence[int]]) -> None:
        """Go to a place in the data; `waiting` holds the window as pairs (position, piece)."""
        self._start_epoch(epoch)
        self._render([position for position, _ in waiting])
        self.cursor = cursor
        self.waiting = [self.rendered[position][piece] for position, piece in waiting]


class ConversationBatches:
    """Batches of packed conversations for midtraining ("all") and SFT ("assistant").

    `next()` returns (inputs, targets), int64 (batch_size, seq_len), targets -1 where nothing is
    trained. The order of the rows does not depend on the number of processes: with W of them, rank
    r has the r-th part of every W*batch_size rows. `state_dict()` resumes to the row exactly.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer,
        batch_size: int,
        seq_len: int,
        train_on: str = "all",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window: int = 64,
    ):
        self.stream = ConversationStream(mixture, tokenizer, seq_len, train_on, seed, window)
        self.setting = [len(mixture), seq_len, train_on, seed]
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.tokens, self.padding, self.trained = 0, 0, 0  # of the rows seen so far

    @property
    def epoch(self) -> int:
        """The number of times all conversations have been used up."""
        return self.stream.epoch

    def next(self) -> tuple[Tensor, Tensor]:
        """Return this process's part of the next global batch: (inputs, targets)."""
        rows, seq_len, pad_id = [], self.stream.seq_len, self.stream.tokenizer.bos_id
        for number in range(self.batch_size * self.world_size):
            pieces = self.stream.next_row()
            self.tokens += seq_len + 1
            self.padding += seq_len + 1 - sum(len(ids) for ids, _ in pieces)
            self.trained += sum(sum(mask) for _, mask in pieces)
            if number // self.batch_size == self.rank:
                rows.append(pack_row(pieces, seq_len, pad_id))
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def state_dict(self) -> dict:
        """Return the place in the data as plain numbers, for a checkpoint's meta.json."""
        stream, waiting = self.stream, [list(entry[:2]) for entry in self.stream.waiting]
        place = dict(epoch=stream.epoch, cursor=stream.cursor, waiting=waiting)
        counts = dict(tokens=self.tokens, padding=self.padding, trained=self.trained)
        return dict(**place, truncated=stream.truncated, setting=self.setting, **counts)

    def load_state_dict(self, state: dict) -> None:
        """Go to the place that `state_dict()` described; UserError if the data is not the same."""
        if (found := list(state["setting"])) != self.setting:
            raise UserError(
                "This data position belongs to (conversations, seq_len, train_on, seed) = "
                f"{found}, but the run has {self.setting}; resume with the same settings."
            )
        self.stream.restore(state["epoch"], state["cursor"], state["waiting"])
        self.stream.truncated, self.trained = state["truncated"], state["trained"]
        self.tokens, self.padding = state["tokens"], state["padding"]


def estimate_rows(mixture: Mixture, tokenizer, seq_len: int, sample: int = 200) -> int:
    """Return about how many rows of seq_len + 1 tokens one epoch of a mixture packs into.

    Renders `sample` conversations spread over the mixture; padding is taken as 5 %, as rows of 128
    tokens of the tiny world have. Rows of 2,048 of real conversations have hardly any: there are
    5 % fewer rows than this says.
    """
    step, cut = max(1, len(mixture) // sample), seq_len + 1
    lengths = [
        sum(min(len(ids), cut) for ids, _ in split_conversation(mixture[i], tokenizer, cut))
        for i in range(0, len(mixture), step)
    ]
    return max(1, round(np.mean(lengths) * len(mixture) / cut / 0.95))


@torch.no_grad()
def held_out_loss(model, batches: Sequence[tuple[Tensor, Tensor]], world=None) -> float:
    """Return the mean loss in nats per trained token over (inputs, targets), each (B, T) int64.

    With a `world` each process gives its own batches; the mean is over the targets of all.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for inputs, targets in batches:
        loss = model(inputs.to(model.device), targets.to(model.device), reduction="sum")
        total += torch.tensor([float(loss), int((targets != -1).sum())], dtype=torch.float64)
    total = world.sum(total.float().to(model.device)) if world else total
    return float(total[0] / total[1].clamp(min=1))


class LowRank(nn.Module):
    """A frozen linear layer with a trained change of low rank beside it. Hu et al. (2021).

    down is (rank, in), up (out, rank). up starts at zero: at first nothing is changed.
    """

    def __init__(self, layer: Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        n_out, n_in = layer.weight.shape
        down = torch.randn(rank, n_in, generator=generator) / n_in**0.5
        self.layer, self.scale = layer, alpha / rank
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(layer.weight.new_zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        detour = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.layer(x) + self.scale * detour

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return the layer with the change added to its weight, which does the same alone."""
        self.layer.weight += self.scale * (self.up @ self.down)
        return self.layer


def lora_places(model: GPT, kind: type) -> list[tuple[nn.Module, str]]:
    """Return (owner, attribute) of every layer of exactly this type in a model's blocks."""
    return [
        (owner, name)
        for owner in model.blocks.modules()
        for name, layer in owner.named_children()
        if type(layer) is kind and type(owner) is not LowRank
    ]


def add_lora(model: GPT, rank: int, alpha: float | None = None, seed: int = 0) -> GPT:
    """Freeze a model in place and give each matrix of its blocks a `LowRank` change; return it.

    `alpha` (default 2 * rank) over rank scales the changes. Raises UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"The rank of LoRA must be 1 or more, not {rank}.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for owner, name in lora_places(model, Linear):
        layer = getattr(owner, name)
        setattr(owner, name, LowRank(layer, rank, 2 * rank if alpha is None else alpha, generator))
    return model


def lora_groups(model: GPT, lr: float = 0.01) -> list[dict]:
    """Return the parameter groups of a model with LoRA for `MuonAdamW`: all that is trained."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return [
        dict(kind="adamw", params=trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    ]


def merge_lora(model: GPT) -> GPT:
    """Add every change to its matrix, in place; return the model, plain and trainable again."""
    for owner, name in lora_places(model, LowRank):
        setattr(owner, name, getattr(owner, name).merged())
    return model.requires_grad_(True)


def merged_copy(model: GPT) -> GPT:
    """Return a plain GPT that answers as a model with LoRA does; the model stays as it is."""
    return merge_lora(copy.deepcopy(model))


def lora_state(model: GPT) -> dict[str, Tensor]:
    """Return the trained thin matrices of a model with LoRA as "adapter.<name>", for saving."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {f"adapter.{name}": value for name, value in trained.items()}


@torch.no_grad()
def load_lora_state(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put back what `lora_state` gave; return the tensors that are not the adapter's."""
    params = dict(model.named_parameters())
    for name in (name for name in tensors if name.startswith("adapter.")):
        params[name.removeprefix("adapter.")].copy_(tensors[name])
    return {k: v for k, v in tensors.items() if not k.startswith("adapter.")}
