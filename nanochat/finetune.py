"""Midtraining and supervised fine-tuning: packing conversations into training rows.

Exported from chapters/09_chat_finetuning.py (chapter 09, From text to chat); edit there, not here.
"""

from collections.abc import Sequence

import numpy as np
import torch

from nanochat.chat import render
from nanochat.common import UserError
from nanochat.tasks import Mixture

__all__ = ["ConversationBatches", "ConversationStream", "best_fit", "estimate_rows", "pack_row"]


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


class ConversationStream:
    """Endless rows of packed conversations; every conversation exactly once in an epoch.

    A window of `window` conversations waits; each row takes the longest that fits until none
    does. At the end of an epoch the window is emptied before the next one, in another order,
    begins. `epoch` counts from 0; `truncated` counts conversations longer than a row, which are
    cut at the row's end.
    """

    def __init__(
        self, mixture: Mixture, tokenizer, seq_len: int, train_on: str, seed: int, window=64
    ):
        if train_on not in ("all", "assistant"):
            raise UserError(f"train_on must be 'all' or 'assistant', not {train_on!r}.")
        self.mixture, self.tokenizer, self.seq_len = mixture, tokenizer, seq_len
        self.train_on, self.seed, self.window = train_on, seed, window
        self.epoch, self.cursor, self.truncated, self.waiting = 0, 0, 0, []
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch, self.cursor, self.order = epoch, 0, rng.permutation(len(self.mixture))

    def _render(self, position: int) -> tuple[int, list[int], list[int]]:
        """Return (position, ids, mask) of the conversation at a position of this epoch's order."""
        conversation = self.mixture[int(self.order[position])]
        ids, mask = render(conversation, self.tokenizer)
        if self.train_on == "all":
            mask = [0] + [1] * (len(ids) - 1)  # nothing before it says how a conversation begins
        return position, ids, mask

    def _fill(self) -> None:
        """Fill the window from this epoch; start the next one when this one is used up."""
        if not self.waiting and self.cursor == len(self.order):
            self._start_epoch(self.epoch + 1)
        while len(self.waiting) < self.window and self.cursor < len(self.order):
            position, ids, mask = self._render(self.cursor)
            self.truncated += len(ids) > self.seq_len + 1
            ids, mask = ids[: self.seq_len + 1], mask[: self.seq_len + 1]
            self.waiting.append((position, ids, mask))
            self.cursor += 1

    def next_row(self) -> list[tuple[list[int], list[int]]]:
        """Return the conversations (ids, mask) of the next row, at most seq_len + 1 tokens."""
        row, space = [], self.seq_len + 1
        self._fill()
        while (best := best_fit([len(ids) for _, ids, _ in self.waiting], space)) is not None:
            _, ids, mask = self.waiting.pop(best)
            row.append((ids, mask))
            space -= len(ids)
            if self.cursor < len(self.order):
                self._fill()
        return row


class ConversationBatches:
    """Batches of packed conversations for midtraining ("all") and SFT ("assistant").

    `next()` returns (inputs, targets), int64 (batch_size, seq_len), targets -1 where nothing is
    trained. The rows' global order does not depend on the number of processes: with W of them,
    batch g is rows g*W*batch_size ... and rank r holds the r-th part. `state_dict()` resumes to
    the row exactly, also with another split of the same global batch.
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
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.tokens, self.padding, self.trained = 0, 0, 0  # of the rows seen so far

    @property
    def epoch(self) -> int:
        """The number of times all conversations have been used up."""
        return self.stream.epoch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this process's part of the next global batch: (inputs, targets)."""
        rows, seq_len, pad_id = [], self.stream.seq_len, self.stream.tokenizer.bos_id
        for number in range(self.batch_size * self.world_size):
            pieces = self.stream.next_row()
            used = sum(len(ids) for ids, _ in pieces)
            self.tokens += seq_len + 1
            self.padding += seq_len + 1 - used
            self.trained += sum(sum(mask) for _, mask in pieces)
            if number // self.batch_size == self.rank:
                rows.append(pack_row(pieces, seq_len, pad_id))
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def state_dict(self) -> dict:
        """Return the place in the data as plain numbers, for a checkpoint's meta.json."""
        stream = self.stream
        counts = dict(tokens=self.tokens, padding=self.padding, trained=self.trained)
        return dict(
            epoch=stream.epoch,
            cursor=stream.cursor,
            waiting=[position for position, _, _ in stream.waiting],
            truncated=stream.truncated,
            setting=[len(stream.mixture), stream.seq_len, stream.train_on, stream.seed],
            **counts,
        )

    def load_state_dict(self, state: dict) -> None:
        """Go to the place that `state_dict()` described; UserError if the data is not the same."""
        stream = self.stream
        setting = [len(stream.mixture), stream.seq_len, stream.train_on, stream.seed]
        if list(state["setting"]) != setting:
            raise UserError(
                f"This data position belongs to (conversations, seq_len, train_on, seed) = "
                f"{state['setting']}, but the run has {setting}; resume with the same settings."
            )
        stream._start_epoch(state["epoch"])
        stream.cursor, stream.truncated = state["cursor"], state["truncated"]
        cut = stream.seq_len + 1
        rendered = [stream._render(position) for position in state["waiting"]]
        stream.waiting = [(position, ids[:cut], mask[:cut]) for position, ids, mask in rendered]
        self.tokens, self.padding = state["tokens"], state["padding"]
        self.trained = state["trained"]


def estimate_rows(mixture: Mixture, tokenizer, seq_len: int, sample: int = 200) -> int:
    """Return about how many rows of seq_len + 1 tokens one epoch of a mixture packs into.

    Renders `sample` conversations spread over the mixture; padding is taken as 5 %.
    """
    step = max(1, len(mixture) // sample)
    cut = seq_len + 1
    lengths = [
        min(len(render(mixture[i], tokenizer)[0]), cut) for i in range(0, len(mixture), step)
    ]
    return max(1, round(np.mean(lengths) * len(mixture) / cut / 0.95))
