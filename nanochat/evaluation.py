"""Evaluation of base models: bits per byte, few-shot tasks, error bars and controls.

Exported from chapters/07_evaluation.py (chapter 07, Evaluation); edit there, not here.
"""

import copy
import inspect
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.common import COLORS, UserError, figure, usable_cores
from nanochat.tinyworld import World, arithmetic_problem, choices_prompt, exam, validation_document

__all__ = [
    "Group",
    "KEPT",
    "KERNELS",
    "KINDS",
    "LEAST",
    "OPTIONS",
    "Prefix",
    "Row",
    "Task",
    "bits_per_byte",
    "bootstrap_interval",
    "cache_argument",
    "centered",
    "common_length",
    "compare",
    "completed",
    "context_length",
    "controls",
    "core_table",
    "crop",
    "decide",
    "draw_shots",
    "evaluate_core",
    "evaluate_task",
    "fact_tasks",
    "fault",
    "file_names",
    "group_batches",
    "length_batches",
    "longest_answer",
    "majority_class",
    "one_ahead",
    "plot_core",
    "prepare",
    "read_on",
    "read_shared",
    "remove_question",
    "render",
    "row_means",
    "score_rest",
    "score_rows",
    "score_task",
    "send",
    "shared_groups",
    "shuffle_labels",
    "spaced",
    "spans",
    "sum_over",
    "summarize",
    "text_tasks",
    "tinyworld_core",
    "topic",
    "unseen_texts",
    "who_fits",
]


@torch.no_grad()
def bits_per_byte(
    model: Any, batches: Any, n_batches: int, token_bytes: Tensor, world: Any = None
) -> float:
    """Return the bits a model needs per byte of text, over `n_batches` batches.

    `batches` has `.next()` (or is an iterator) giving (inputs, targets), each (B, T) int64.
    `token_bytes` (V,) is the length of each token, 0 for specials: those and targets -1 do not
    count. `world` adds the sums of all its processes. No bytes at all gives infinity.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device).long()
    nats = torch.zeros((), dtype=torch.float64)
    n_bytes = torch.zeros((), dtype=torch.float64)
    for _ in range(n_batches):
        inputs, targets = batches.next() if hasattr(batches, "next") else next(batches)
        inputs, targets = inputs.to(device), targets.to(device)
        losses = model(inputs, targets, reduction="none")  # (B, T) nats
        length = token_bytes[targets.clamp(min=0)] * (targets >= 0)  # (B, T)
        nats += losses[length > 0].cpu().double().sum()
        n_bytes += length.sum().cpu()
    if world is not None:
        nats, n_bytes = sum_over(world, torch.stack([nats, n_bytes]))
    return float(nats / (math.log(2) * n_bytes)) if n_bytes > 0 else math.inf


def sum_over(world: Any, values: Tensor) -> Tensor:
    """Add float64 values over the processes of a world; the result is on the CPU."""
    values = values.to(world.device)
    added = world.sum(values)
    return (values if added is None else added).cpu()


KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class Task:
    """One test: items of one kind and how to ask them.

    `items` are dicts with the fields of `KINDS[kind]`; `shots` solved examples stand before
    each; `baseline` is the accuracy of blind guessing, between 0 and 1.
    """

    name: str
    kind: str
    items: list[dict]
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an unknown kind, no items, a missing field or an impossible answer."""
        if self.kind not in KINDS:
            raise UserError(
                f"task {self.name}: kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}."
            )
        if not self.items:
            raise UserError(f"task {self.name} has no items; check its file or leave it out.")
        for number, item in enumerate(self.items):
            problem = fault(self.kind, item, self.delimiter)
            if problem:
                raise UserError(f"task {self.name}: item {number} {problem}; mend its file.")


def fault(kind: str, item: Any, delimiter: str = " ") -> str | None:
    """Say what is wrong with an item of a kind, or None."""
    if not isinstance(item, dict):
        return "is not an object with fields"
    missing = [name for name in KINDS[kind] if name not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    options, gold = item.get(OPTIONS.get(kind), [""]), item.get("gold")
    texts = [item[name] for name in KINDS[kind] if name not in ("gold", OPTIONS.get(kind))]
    if kind in OPTIONS:
        if not isinstance(options, list) or not options:
            return f"has no list of {OPTIONS[kind]}"
        if type(gold) is not int or not 0 <= gold < len(options):
            return f"has no option number {gold!r} (gold)"
    if not all(isinstance(text, str) for text in texts + options):
        return "has a field that is no text"
    shared = delimiter or "".join(texts).strip()  # what stands in every text of the item
    return None if shared or all(options) else "has no text to score"


def completed(task: Task, item: dict, option: int | None = None) -> str:
    """Return an item as text with one option filled in; by default the right one."""
    option = item.get("gold") if option is None else option
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][option]
    if task.kind == "schema":
        return item["context_options"][option] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def draw_shots(task: Task, index: int) -> list[dict]:
    """Draw the solved examples for item `index`: seed 1234 + index, never the item itself."""
    others = range(len(task.items) - 1)
    drawn = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
    return [task.items[j + (j >= index)] for j in drawn]  # step over the item


def render(task: Task, index: int) -> list[str]:
    """Return the texts to score for item `index`: one for each option.

    For language modelling: the prompt alone, stripped so that its tokens begin the second text,
    and the prompt with its continuation. Rules of CORE (DCLM, Li et al. 2024).
    """
    item = task.items[index]
    shots = "".join(completed(task, shot) + "\n\n" for shot in draw_shots(task, index))
    if task.kind == "language_modeling":
        prompt = shots + item["context"].strip() + task.delimiter
        return [prompt.strip(), shots + completed(task, item)]
    n_options = len(item[OPTIONS[task.kind]])
    return [shots + completed(task, item, option) for option in range(n_options)]


@dataclass
class Row:
    """One text as tokens, a list or an array; the span ids[start:end] is what gets scored."""

    ids: Sequence[int]
    start: int
    end: int


def common_length(texts: list[Sequence[int]]) -> int:
    """Return how many leading tokens all texts share."""
    n = min(len(ids) for ids in texts)
    table = np.array([ids[:n] for ids in texts])  # (texts, n)
    differ = (table != table[0]).any(axis=0)
    return int(differ.argmax()) if differ.any() else n


def spans(kind: str, texts: list[Sequence[int]]) -> list[Row]:
    """Locate the scored span in the token lists of one item; each span has a token or more."""
    if kind == "schema":
        shared = common_length([ids[::-1] for ids in texts])
        shared = max(1, min(shared, *(len(ids) - 1 for ids in texts)))
        return [Row(ids, len(ids) - shared, len(ids)) for ids in texts]
    start = common_length(texts)
    if kind == "language_modeling":
        texts = texts[1:]
    start = max(1, min(start, *(len(ids) - 1 for ids in texts), len(texts[0]) - 1))
    return [Row(ids, start, len(ids)) for ids in texts]


def crop(row: Row, seq_len: int) -> Row:
    """Cut a row from the left so that seq_len tokens remain: the question is at the end."""
    cut = max(0, len(row.ids) - seq_len)
    return Row(row.ids[cut:], max(1, row.start - cut), row.end - cut)


class Prefix:
    """Keys and values of tokens that were read once, for rows that go on from there.

    The model of chapter 3 takes it as `kv_cache`: the first pass fills it, the second one reads it.
    """

    positions = mask = None  # nothing is padded on the left

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # of each layer, (B, n_kv_head, P, head_dim)
        self.values: list[Tensor] = []
        self.length, self.last = 0, None  # last: (B, 1, C), if the model smears

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer; k, v are the new (B, n_kv_head, T, head_dim)."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
            return k, v
        return torch.cat((self.keys[layer], k), dim=2), torch.cat((self.values[layer], v), dim=2)

    def advance(self, n_new: int) -> None:
        """Count n_new tokens as read; the model calls this once a pass."""
        self.length += n_new

    def batch_select_indices(self, rows: Tensor) -> None:
        """Deal the rows out, in place: row i becomes what row rows[i] was; repeats are allowed."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.last = None if self.last is None else self.last.index_select(0, rows)


def cache_argument(model: Any) -> str | None:
    """Return the name under which a model takes a cache, or None if it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("kv_cache", "past_key_values") if name in takes), None)


def read_on(
    model: Any, ids: Tensor, cache: Any = None, positions: np.ndarray | None = None
) -> tuple:
    """Return (logits (n, V), cache) of ids (B, T) that follow what `cache` holds.

    The logits are those of `positions` (n,), counted row after row: b * T + t; None asks for
    few, whichever cost least. Works with our model, with causal models of Hugging Face, and with
    anything else that gives logits: that one has no cache, and gets None back.
    """
    name, takes = cache_argument(model), inspect.signature(model.forward).parameters
    if name == "kv_cache":
        cache = cache or Prefix()
        few = {"last_only": True} if positions is None else {"positions": send(positions, model)}
        return model(ids, kv_cache=cache, **few), cache
    B, T = ids.shape
    at = np.arange(B) * T + T - 1 if positions is None else positions
    few = {"logits_to_keep": T - int((at % T).min())} if "logits_to_keep" in takes else {}
    out = model(ids, **({"past_key_values": cache, "use_cache": True} if name else {}), **few)
    logits = getattr(out, "logits", out)  # of the last columns: (B, kept, V)
    at = at // T * logits.size(1) + at % T - (T - logits.size(1))
    return logits.flatten(0, 1)[send(at, model)], getattr(out, "past_key_values", None)


def send(values: np.ndarray, model: Any) -> Tensor:
    """Copy an array to the model's device, without waiting for the work that is queued there."""
    device, values = next(model.parameters()).device, torch.from_numpy(values)
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=device.type == "cuda")


@dataclass
class Group:
    """Rows, by number, that have their first `shared` tokens in common."""

    shared: int
    rows: list[int]


LEAST = 16  # tokens; a shorter beginning is not worth a pass of its own


def shared_groups(rows: list[Row]) -> list[Group]:
    """Put rows that begin alike into groups, each row into one; the longest beginnings first.

    The token before a span stays out of the shared part: its logits predict the span's first.
    """
    groups: list[Group] = []
    names = [np.array(row.ids, ">u4").tobytes() for row in rows]  # these sort as the ids do
    for i in sorted(range(len(rows)), key=names.__getitem__):
        shared = rows[i].start - 1
        if groups:
            group = groups[-1]
            common = common_length([rows[group.rows[-1]].ids, rows[i].ids])
            common = min(group.shared, shared, common)
            if 2 * common >= group.shared:
                group.shared = common
                group.rows.append(i)
                continue
        groups.append(Group(shared, [i]))
    for group in groups:
        if len(group.rows) == 1 or group.shared < LEAST:
            group.shared = 0
    return sorted(groups, key=lambda group: -group.shared)


def group_batches(groups: list[Group], batch_tokens: int) -> Iterator[list[Group]]:
    """Yield groups to read together: at most `batch_tokens` shared tokens, of similar lengths."""
    while groups:
        longest = groups[0].shared
        most = max(1, batch_tokens // max(longest, 1))
        least = min(longest - LEAST, longest * 0.8)
        near = [group for group in groups[:most] if group.shared >= least]
        yield near
        groups = groups[len(near) :]


KEPT = 4  # a batch may have this many times as many tokens in its cache as it reads


def length_batches(lengths: list[int], batch_tokens: int, shared: int = 0) -> Iterator[list[int]]:
    """Yield row numbers grouped by length, longest first, at most `batch_tokens` read a batch.

    The `shared` tokens that each row has before it count too, against KEPT * batch_tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        n = max(1, min(batch_tokens // longest, KEPT * batch_tokens // (shared + longest)))
        yield order[:n]
        order = order[n:]


def read_shared(model: Any, groups: list[Group], rows: list[Row]) -> tuple[int, Any]:
    """Read what groups share, a row each: (tokens read, cache); (0, None) where nothing is kept."""
    shared = min(group.shared for group in groups)
    if not shared:
        return 0, None
    ids = np.array([rows[group.rows[0]].ids[:shared] for group in groups])
    cache = read_on(model, send(ids, model))[1]
    return (shared, cache) if hasattr(cache, "batch_select_indices") else (0, None)


def score_rest(model: Any, cache: Any, rows: list[Row], shared: int, pad_id: int) -> Tensor:
    """Score rows whose first `shared` tokens are in the cache.

    Returns the loss of each scored token and whether greedy decoding would write it, row after
    row, (2, n) float32 on the model's device.
    """
    lengths = [row.end - 1 - shared for row in rows]  # the last token is a target, not read
    ids = np.full((len(rows), max(lengths)), pad_id)
    positions, targets = [], []
    for b, (row, length) in enumerate(zip(rows, lengths)):
        ids[b, :length] = row.ids[shared : row.end - 1]
        end = b * ids.shape[1] + length
        positions.append(np.arange(end - (row.end - row.start), end))
        targets.append(row.ids[row.start : row.end])
    logits = read_on(model, send(ids, model), cache, np.concatenate(positions))[0].float()
    target = send(np.concatenate(targets), model)  # (n,)
    losses = F.cross_entropy(logits, target, reduction="none")
    return torch.stack((losses, (logits.argmax(-1) == target).float()))


def row_means(parts: list[Tensor], rows: list[Row]) -> list[tuple[float, bool]]:
    """Return (mean loss, every token hit) of each row from what `score_rest` gave for them."""
    losses, hits = torch.cat(parts, dim=1).cpu().double().numpy()  # here we wait for the device
    lengths = np.array([row.end - row.start for row in rows])
    first = np.cumsum(lengths) - lengths
    means = np.add.reduceat(losses, first) / lengths
    return list(zip(means.tolist(), (np.minimum.reduceat(hits, first) > 0).tolist()))


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
@sdpa_kernel(KERNELS)
def score_rows(
    model: Any,
    rows: list[Row],
    pad_id: int = 0,
    batch_tokens: int | None = None,
    share: bool = True,
) -> list[tuple[float, bool]]:
    """Return (mean loss in nats, greedy decoding would write it) of each row's span, in order.

    `model(ids)` gives logits (B, T, V), or an object that has them as `.logits`. Beginnings that
    rows share are read once, if the model has a cache (`share=False` reads all of every row).
    Sharing, padding and batching change the losses by float rounding at most. Equal rows are
    scored once, so that they tie exactly.
    """
    device = next(model.parameters()).device
    size = batch_tokens or (32768 if device.type == "cuda" else 2048)
    keys = [(np.array(row.ids).tobytes(), row.start, row.end) for row in rows]
    unique = dict(zip(keys, rows))
    names, texts = list(unique), list(unique.values())
    share = share and cache_argument(model) is not None
    groups = shared_groups(texts) if share else [Group(0, list(range(len(texts))))]
    order, found = [], []
    for batch in group_batches(groups, size):
        shared, cache = read_shared(model, batch, texts)
        owners = [(g, i) for g, group in enumerate(batch) for i in group.rows]
        lengths = [texts[i].end - 1 - shared for _, i in owners]
        parts = list(length_batches(lengths, size, shared))
        for numbers in parts:
            part = copy.deepcopy(cache) if len(parts) > 1 else cache
            if part is not None:
                from_group = np.array([owners[k][0] for k in numbers])
                part.batch_select_indices(send(from_group, model))
            chosen = [owners[k][1] for k in numbers]
            found.append(score_rest(model, part, [texts[i] for i in chosen], shared, pad_id))
            order += chosen
    results = dict(zip((names[i] for i in order), row_means(found, [texts[i] for i in order])))
    return [results[key] for key in keys]


def one_ahead(items: Iterable) -> Iterator:
    """Yield the items, none of them None; while one is in use, a thread makes the next."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(next, items, None)
        while (item := later.result()) is not None:
            later = pool.submit(next, items, None)
            yield item


def prepare(
    task: Task, tokenizer: Any, seq_len: int, numbers: Sequence[int]
) -> tuple[Sequence[int], list[list[Row]], list[bool]]:
    """Return the numbers of some items, and for each item its rows and whether one was cropped."""
    texts = [render(task, index) for index in numbers]
    flat = [text for several in texts for text in several]
    encoded = tokenizer.encode_batch(flat, bos=True, num_threads=usable_cores())
    encoded = [np.array(ids) for ids in encoded]  # millions of tokens: lists would be slow
    ids = iter(encoded)
    groups = [spans(task.kind, [next(ids) for _ in several]) for several in texts]
    cropped = [max(len(row.ids) for row in group) > seq_len for group in groups]
    return numbers, [[crop(row, seq_len) for row in group] for group in groups], cropped


def score_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    limit: int | None = None,
    seed: int = 1337,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int | None = None,
    chunk: int | None = None,
    share: bool = True,
) -> Iterator[dict]:
    """Yield one decision for each item: index, correct, choice, losses (one an option), cropped.

    The items are shuffled with `seed` and cut to `limit` before shots are drawn, as in nanochat.
    A process of rank r takes items r, r + world_size, ... `chunk` items are scored together, by
    default 256, on a GPU 1024; `batch_tokens` and `share` are as in `score_rows`.
    """
    items = list(task.items)
    random.Random(seed).shuffle(items)
    task = replace(task, items=items[:limit])
    chunk = chunk or (1024 if next(model.parameters()).is_cuda else 256)
    mine = range(rank, len(task.items), world_size)
    parts = [mine[first : first + chunk] for first in range(0, len(mine), chunk)]
    ready = map(partial(prepare, task, tokenizer, context_length(model)), parts)
    for numbers, groups, cropped in one_ahead(ready):
        rows = [row for group in groups for row in group]
        scores = iter(score_rows(model, rows, tokenizer.bos_id, batch_tokens, share))
        for index, group, cut in zip(numbers, groups, cropped):
            yield {**decide(task, index, [next(scores) for _ in group]), "cropped": cut}


def decide(task: Task, index: int, scores: list[tuple[float, bool]]) -> dict:
    """Turn the scores of one item's rows into a decision; UserError if a loss is no number."""
    losses = [loss for loss, _ in scores]
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"task {task.name}: the losses of item {index} are {losses}, and no score can be made "
            f"of these; look for nan in the model's weights, or take an earlier checkpoint."
        )
    if task.kind == "language_modeling":
        return {"index": index, "correct": scores[0][1], "choice": None, "losses": losses}
    choice = losses.index(min(losses))
    correct = choice == task.items[index]["gold"]
    return {"index": index, "correct": correct, "choice": choice, "losses": losses}


def context_length(model: Any) -> int:
    """Return how many tokens a model reads at once, ours or a Hugging Face one."""
    for name in ("seq_len", "n_positions", "max_position_embeddings"):
        if hasattr(model.config, name):
            return getattr(model.config, name)
    return 2048


def centered(accuracy: float, baseline: float) -> float:
    """Return the accuracy on a scale where guessing is 0 and perfect is 1."""
    return (accuracy - baseline) / (1 - baseline)


def bootstrap_interval(
    values: Iterable[float], seed: int = 0, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval of the mean. Efron (1979).

    When 0/1 values are all equal, resampling shows no spread; the exact binomial bound is used
    instead, so that 0 right of 20 does not claim to be certain.
    """
    values = np.asarray(list(values), dtype=np.float64)
    tail, n = (1 - level) / 2, len(values)
    if n == 0:
        return math.nan, math.nan
    if np.all(values == 0):
        return 0.0, 1 - tail ** (1 / n)
    if np.all(values == 1):
        return tail ** (1 / n), 1.0
    rng = np.random.default_rng(seed)
    if np.isin(values, (0, 1)).all():  # the mean of a resample is binomial
        means = rng.binomial(n, values.mean(), draws) / n
    else:
        means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(draws)])
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    limit: int | None = None,
    seed: int = 1337,
    world: Any = None,
    batch_tokens: int | None = None,
    progress: Any = None,
) -> dict:
    """Return accuracy, centered, n, the accuracy's 95 % interval (low, high) and the baseline.

    `correct` is a string with a 1 or 0 for each item, in the shuffled order; `cropped` says of how
    many items a prompt was too long for the model's window. With a `world`, its processes share the
    items and all get the same result. `progress.update(n)` is told of every n items. Warns when
    there are too few items for the shots.
    """
    if limit is not None and limit < 1:
        raise UserError(f"task {task.name}: limit {limit} leaves no items; use 1 or more, or None.")
    n = len(task.items[:limit])
    if n <= task.shots:
        warnings.warn(
            f"task {task.name}: {n} items are too few for {task.shots} shots beside the question; "
            f"asked with {n - 1}, which is another test than the full one; raise the limit.",
            stacklevel=2,
        )
    found = torch.zeros(2, n, dtype=torch.float64)  # correct, cropped
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    for decision in score_task(model, tokenizer, task, limit, seed, rank, world_size, batch_tokens):
        found[:, decision["index"]] = torch.tensor([decision["correct"], decision["cropped"]])
        if progress is not None:
            progress.update(world_size)
    correct, cropped = found if world is None else sum_over(world, found)
    accuracy = correct.mean().item()
    low, high = bootstrap_interval(correct.tolist())
    return {
        "kind": task.kind,
        "shots": min(task.shots, n - 1),
        "n": n,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "baseline": task.baseline,
        "centered": centered(accuracy, task.baseline),
        "cropped": int(cropped.sum()),
        "correct": "".join(str(int(value)) for value in correct),
    }


def evaluate_core(
    model: Any,
    tokenizer: Any,
    tasks: list[Task],
    limit: int | None = None,
    world: Any = None,
    progress: Any = None,
) -> dict:
    """Score a list of tasks: {"core", "low", "high", "n_tasks", "tasks": {name: result}}.

    `core` is the mean centred accuracy; `progress` is as in `evaluate_task`. Raises UserError for
    no tasks, or two of one name.
    """
    file_names(tasks)
    results = {}
    for task in tasks:
        results[task.name] = evaluate_task(
            model, tokenizer, task, limit, world=world, progress=progress
        )
    return summarize(results)


def file_names(tasks: Sequence[Task]) -> list[str]:
    """Return a file's name for each task's result; UserError when two tasks would share one."""
    names, owners = [re.sub(r"[^\w.-]+", "_", task.name) for task in tasks], {}
    for task, name in zip(tasks, names):
        key = name.lower()  # on some machines A and a are one file
        if key in owners:
            raise UserError(
                f"two tasks are called {owners[key]!r} and {task.name!r}, and their results would "
                f"share one place; rename one of them."
            )
        owners[key] = task.name
    return names


def summarize(results: dict[str, dict], seed: int = 0, draws: int = 2000) -> dict:
    """Return the mean of the centred accuracies with its bootstrap interval, and the results."""
    if not results:
        raise UserError("there are no tasks to score; give at least one.")
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    for result in results.values():
        n = result["n"]
        total += centered(rng.binomial(n, result["accuracy"], draws) / n, result["baseline"])
    low, high = np.quantile(total / len(results), (0.025, 0.975))
    mean = sum(result["centered"] for result in results.values()) / len(results)
    return {
        "core": mean,
        "low": float(low),
        "high": float(high),
        "n_tasks": len(results),
        "tasks": results,
    }


def compare(one: dict, other: dict, seed: int = 0, draws: int = 2000) -> dict:
    """Compare two results of `evaluate_core` on the same items: {"difference", "low", "high"}.

    The difference is other - one in the mean centred score, with the bootstrap interval of the
    differences item by item. Raises UserError when the two did not sit the same exam.
    """
    a, b = one["tasks"], other["tasks"]
    if {n: len(r["correct"]) for n, r in a.items()} != {n: len(r["correct"]) for n, r in b.items()}:
        raise UserError("these two results are not of the same tasks and items; score both anew.")
    rng, total, mean = np.random.default_rng(seed), np.zeros(draws), 0.0
    for name in a:
        pairs = Counter(int(y) - int(x) for x, y in zip(a[name]["correct"], b[name]["correct"]))
        n, scale = len(a[name]["correct"]), len(a) * (1 - a[name]["baseline"])
        drawn = rng.multinomial(n, [pairs[-1] / n, pairs[0] / n, pairs[1] / n], draws)
        total += (drawn[:, 2] - drawn[:, 0]) / n / scale
        mean += (pairs[1] - pairs[-1]) / n / scale
    low, high = np.quantile(total, (0.025, 0.975))
    return {"difference": mean, "low": float(low), "high": float(high)}


def majority_class(task: Task) -> float:
    """Return the accuracy of always giving the commonest answer (position or continuation)."""
    name = "continuation" if task.kind == "language_modeling" else "gold"
    counts = Counter(item[name] for item in task.items)
    return counts.most_common(1)[0][1] / len(task.items)


def longest_answer(task: Task) -> float:
    """Return the accuracy of always picking the option with the most characters.

    Ties are shared out evenly. Without options (language modelling) it is 0.
    """
    if task.kind == "language_modeling":
        return 0.0
    right = 0.0
    for item in task.items:
        lengths = [len(option) for option in item[OPTIONS[task.kind]]]
        winners = [i for i, length in enumerate(lengths) if length == max(lengths)]
        right += (item["gold"] in winners) / len(winners)
    return right / len(task.items)


def shuffle_labels(task: Task, seed: int = 0) -> Task:
    """Return the task with its answers dealt out again at random among the items.

    Items with the same number of options exchange answers, so each key is still a legal one.
    """
    rng, groups = random.Random(seed), {}
    name = "continuation" if task.kind == "language_modeling" else "gold"
    for number, item in enumerate(task.items):
        size = 0 if name == "continuation" else len(item[OPTIONS[task.kind]])
        groups.setdefault(size, []).append(number)
    items = list(task.items)
    for numbers in groups.values():
        answers = [task.items[number][name] for number in numbers]
        rng.shuffle(answers)
        for number, answer in zip(numbers, answers):
            items[number] = {**items[number], name: answer}
    return replace(task, name=task.name + ", labels shuffled", items=items)


def remove_question(task: Task) -> Task:
    """Return the task without what is asked: only the options (or the answer's form) remain.

    Multiple choice loses its query, language modelling its context. In a schema item the
    contexts are compared as texts on their own, without the continuation they should fit.
    """
    name, kind = task.name + ", question removed", task.kind
    if kind == "multiple_choice":
        return replace(task, name=name, items=[{**item, "query": ""} for item in task.items])
    if kind == "language_modeling":
        return replace(task, name=name, items=[{**item, "context": ""} for item in task.items])
    items = [
        {"query": "", "choices": item["context_options"], "gold": item["gold"]}
        for item in task.items
    ]
    return replace(task, name=name, kind="multiple_choice", items=items)


def controls(
    model: Any, tokenizer: Any, task: Task, limit: int | None = None, world: Any = None
) -> dict[str, float]:
    """Return the accuracies that need no understanding: four controls beside a score."""
    shuffled = evaluate_task(model, tokenizer, shuffle_labels(task), limit, world=world)
    removed = evaluate_task(model, tokenizer, remove_question(task), limit, world=world)
    return {
        "majority_class": majority_class(task),
        "longest_answer": longest_answer(task),
        "shuffled_labels": shuffled["accuracy"],
        "question_removed": removed["accuracy"],
    }


def core_table(result: dict) -> str:
    """Return a result of `evaluate_core` as a Markdown table, one row a task and the mean last."""
    lines = [
        "| task | kind | shots | items | accuracy | 95 % interval | guessing | centred |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["tasks"].items():
        lines.append(
            f"| {name} | {r['kind'].replace('_', ' ')} | {r['shots']} | {r['n']} "
            f"| {r['accuracy']:.3f} | {r['low']:.3f} to {r['high']:.3f} "
            f"| {r['baseline']:.3f} | {r['centered']:+.3f} |"
        )
    interval = f"{result['low']:+.3f} to {result['high']:+.3f}"
    lines.append(f"| **mean** | | | | | centred {interval} | | **{result['core']:+.3f}** |")
    return "\n".join(lines)


def plot_core(
    results: dict[str, dict], controls: dict[str, dict[str, float]] | None = None, title: str = ""
) -> tuple[Any, Any]:
    """Draw the accuracies of several results, {label: result}, with intervals and baselines.

    `controls` is {task name: {control: accuracy}}; the best control of a task is marked.
    """
    names = list(next(iter(results.values()))["tasks"])
    size = (7, 0.35 * len(names) + 1.3)
    fig, ax = figure(title or "Accuracy", "accuracy", "", size, alt=title or "Accuracy by task")
    for k, (label, result) in enumerate(results.items()):
        rows = [result["tasks"][name] for name in names]
        y = np.arange(len(names)) + 0.12 * (k - (len(results) - 1) / 2)
        x = np.array([r["accuracy"] for r in rows])
        spread = np.array([[r["accuracy"] - r["low"], r["high"] - r["accuracy"]] for r in rows])
        ax.errorbar(x, y, xerr=spread.clip(0).T, fmt="o", ms=4, color=COLORS[k], label=label)
    guess = [next(iter(results.values()))["tasks"][name]["baseline"] for name in names]
    ax.plot(guess, range(len(names)), "|", ms=14, color=COLORS[6], label="guessing")
    if controls:
        best = [max(controls.get(name, {"": math.nan}).values()) for name in names]
        ax.plot(best, range(len(names)), "x", ms=6, color=COLORS[3], label="best control")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    return fig, ax


def topic(world: World, item: dict) -> str:
    """Return what an exam item is about: people, places or things (its id names the subject)."""
    _, relation, subject, _ = item["id"].split("/")
    if subject in world.people:
        return "people"
    places = ("market", "landmark", "festival", "north", "south", "east", "west", "road")
    return "places" if relation in places else "things"


def fact_tasks(world: World, n: int) -> list[Task]:
    """Return the tasks that ask for facts by likelihood, n items each at most."""
    tasks, asked = [], exam(world, "multiple_choice", seed=7)
    unfinished = exam(world, "cloze", seed=7)
    for name in ("people", "places", "things"):
        items = [
            {**item, "query": f"Question: {item['query']}"}
            for item in asked
            if topic(world, item) == name
        ]
        tasks.append(
            Task(f"{name}: questions", "multiple_choice", items[:n], 3, "\nAnswer: ", 0.25)
        )
        items = [item for item in unfinished if topic(world, item) == name]
        tasks.append(Task(f"{name}: sentences", "multiple_choice", items[:n], 0, " ", 0.25))
    letters = [
        {
            "query": choices_prompt(item["query"], item["choices"]),
            "choices": list("ABCD"),
            "gold": item["gold"],
        }
        for item in asked[-n:]
    ]
    return [*tasks, Task("letters", "multiple_choice", letters, 0, "\n", 0.25)]


def who_fits(world: World, n: int) -> Task:
    """Return the schema task: two subjects in one sentence, and an ending true of one of them."""
    items, rng = [], random.Random(7)
    for item in exam(world, "cloze", seed=8)[:n]:
        _, relation, subject, k = item["id"].split("/")
        others = [
            fact
            for fact in world.facts
            if fact.relation == relation and fact.object != item["answer"]
        ]
        other = world.wordings[rng.choice(others)].exam_stems[int(k)]
        gold = rng.randrange(2)
        contexts = [other, item["query"]] if gold else [item["query"], other]
        items.append({"context_options": contexts, "continuation": item["answer"], "gold": gold})
    return Task("who fits", "schema", items, 0, " ", 0.5)


def unseen_texts(world: World, n: int) -> list[list[str]]:
    """Return n validation documents of one paragraph and four sentences or more, as sentences."""
    texts, index = [], 0
    while len(texts) < n:
        text = validation_document(world, index)
        index += 1
        sentences = text.replace(". ", ".\n").split("\n")
        plain = "\n" not in text and not any(c.isdigit() for c in text)
        if plain and len(sentences) >= 4 and sentences[-1][-2:-1].isalpha():
            texts.append(sentences)
    return texts


def text_tasks(world: World, n: int) -> list[Task]:
    """Return the tasks made from unseen text, people and sums, n items each at most."""
    rng, texts = random.Random(7), unseen_texts(world, n)
    endings, words = [], []
    for number, sentences in enumerate(texts):
        others = [t[-1] for i, t in enumerate(texts) if i != number and t[-1] != sentences[-1]]
        choices = [sentences[-1], *rng.sample(sorted(set(others)), 3)]
        rng.shuffle(choices)
        context = " ".join(sentences[:-1])
        gold = choices.index(sentences[-1])
        endings.append({"query": context, "choices": choices, "gold": gold})
        before, _, last = " ".join(sentences).rstrip(".!?").rpartition(" ")
        words.append({"context": before, "continuation": last})
    pronouns = [
        {"query": start.format(n=p.name, j=p.job), "choices": ["he", "she"], "gold": int(p.woman)}
        for start in ("{n} the {j} is tired. Then", "In the evening {n} goes home. Then")
        for p in world.people.values()
    ]
    rng.shuffle(pronouns)
    problems = [arithmetic_problem(world, i, "test") for i in range(n)]
    sums = [
        {
            "context": f"{p['question']} {spaced(p['parts'][0]['text'])} =",
            "continuation": p["answer"],
        }
        for p in problems
    ]
    return [
        Task("he or she", "multiple_choice", pronouns[:n], 0, " ", 0.5),
        Task("endings", "multiple_choice", endings, 0, " ", 0.25),
        Task("last word", "language_modeling", words),
        Task("sums", "language_modeling", sums),
    ]


def spaced(expression: str) -> str:
    """Write "3*7" as the training text does: "3 * 7"."""
    return "".join(f" {c} " if c in "+-*/" else c for c in expression)


def tinyworld_core(world: World, n: int = 200) -> list[Task]:
    """Return thirteen small tasks of the three kinds over the tiny world, n items each at most.

    Facts are asked in wordings that no training document uses; texts come from the validation
    split. The same world and n give the same items.
    """
    stems = exam(world, "cloze", seed=9)[:n]
    recall = [{"context": item["query"], "continuation": item["answer"]} for item in stems]
    return [
        *fact_tasks(world, n),
        who_fits(world, n),
        Task("recall", "language_modeling", recall),
        *text_tasks(world, n),
    ]
