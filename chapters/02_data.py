# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 2. Data

By the end of this chapter we have shown that a loader can throw no text away, begin every row with
the mark that opens a document, feed a fast GPU from two cores, and still resume a stopped run with
exactly the batches of a run that was not.

A training loop asks one thing of this chapter: the next batch. Here it is, from the tiny world:
"""

# %%
import tempfile

from nanochat.data import TokenBatches as FinishedBatches, open_source as finished_source
from nanochat.data import prepare_tokens as finished_prepare
from nanochat.tokenizer import Tokenizer

text = [t for t, _ in zip(finished_source("tinyworld").documents("train"), range(300))]
demo = Tokenizer.train(text, 512)
with tempfile.TemporaryDirectory() as folder:
    shards = finished_prepare(finished_source("tinyworld"), demo, folder, "train", 20_000)
    inputs, targets = FinishedBatches(shards, batch_size=2, seq_len=12).next()
    print(inputs, targets, sep="\n")

# %% [markdown]
r"""
Two rows of twelve tokens, and the same rows one place to the left: the target of each position is
the token that comes next. (A target of $-1$ means "none"; we shall see why.)

**You will be able to**

- open text from three kinds of source with one function: the tiny world, a folder, the hub;
- explain why tokenised text belongs on disk, and measure what that saves;
- compare ways of packing documents into rows by what they waste, and by what a model learns;
- shuffle documents so that order, epoch and number of processes are under control;
- stop a run anywhere and resume it to the exact batch, also on another number of processes;
- judge models on a validation set that cannot move.

**Prerequisites:** chapter 1. **Reading:** 40 minutes. **Running:** about half a minute on two CPU
cores, no GPU, no network.
"""

# %% tags=["parameters"]
profile = "quick"
data = "tinyworld"  # or folder:PATH with parquet files of your own
n_tokens = 400_000  # tokens to prepare for training
vocab_size = 1024
seq_len, batch_size = 128, 8
train_steps, n_seeds = 60, 3  # of the comparison at the end
seed = 0

# %%
import math
import time

import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure

# %%
#| default_exp data

# %%
#| export
import bisect
import errno
import hashlib
import http.client
import importlib
import itertools
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.common import Progress, UserError, atomic_write, read_json, usable_cores, write_json
from nanochat.tinyworld import World, document, validation_document
from nanochat.tokenizer import Tokenizer

# %% [markdown]
r"""
## A source gives documents

We ask little of a source of text: a name, and an endless or finite run of documents for two
*splits*, `train` and `val`, from any starting point. The starting point is what lets us stop and go
on later.
"""


# %%
#| export
class Source(Protocol):
    """Anything that gives documents for the splits "train" and "val"."""

    def describe(self, split: str) -> str:
        """Say in one line where the documents of a split come from; other text, another line."""
        ...

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """Yield the documents of "train" or "val" in order, from number `start` on."""
        ...


def check_split(split: str) -> None:
    """Raise UserError unless split is "train" or "val"."""
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} is unknown; choose 'train' or 'val'.")


# %% [markdown]
r"""
The tiny world makes document number `index` when asked, so it starts anywhere and never ends. Its
validation documents are a disjoint set.
"""


# %%
#| export
class TinyWorldSource:
    """The generated world of appendix A1: endless, offline, the same for the same seed."""

    def __init__(self, seed: int = 0):
        self.seed, self.world = seed, World(seed)

    def describe(self, split: str) -> str:
        """Name the world and the split."""
        return f"tinyworld, seed {self.seed}, {split} documents"

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """Yield generated documents without end."""
        check_split(split)
        make = document if split == "train" else validation_document
        return (make(self.world, index) for index in itertools.count(start))


# %% [markdown]
r"""
## A folder of parquet shards

Large text collections travel as *shards*: files of a hundred megabytes or so. Parquet is the
usual format, with one string column `text` and one document a row. `write_shard` uses the settings
of nanochat's shards: groups of 1,024 rows, compressed with zstd.
"""


# %%
#| export
def write_shard(path: str | Path, texts: Sequence[str]) -> None:
    """Write documents as one parquet shard: column `text`, row groups of 1,024, zstd."""
    table = pa.table({"text": pa.array(list(texts), pa.string())})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=1024, compression="zstd", compression_level=3)
    atomic_write(path, buffer.getvalue().to_pybytes())


# %% [markdown]
r"""
Which shard is for validation? It must not change when more shards arrive. The rule: **the last
shard in name order is validation**. nanochat had the same rule over *the shards on disk*, so its
validation set moved with each download, and a failed download turned a training shard into a
validation shard without a word. We name the shard in everything that we record, and a missing one
is an error.

Hub exports often name their splits, in the name of the file (`train-00000-of-00002.parquet`) or of
its folder (`test/0000.parquet`). Where a name says `train` or `val` we obey it, since nothing is
guessed then; `test` files are left alone. The innermost name counts, and folders above the one that
was opened say nothing: a whole collection may lie in `/home/ann/test`.
"""


# %%
#| export
SPLIT_NAME = re.compile(r"(train|val|test)(ing|id|idation)?(?![a-z])", re.IGNORECASE)


def split_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """Assign shard names to splits: {"train": [...], "val": [...]}, each in name order.

    Files called train*, val* and test* go where they say (test: nowhere), and so do those in
    folders called like that; if none says train, those that say nothing are for training. If none
    says val, the last training shard in name order is validation.
    """
    said: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for name in sorted(names):
        parts = reversed(PurePosixPath(name).parts)  # the file first, then the folders around it
        match = next(filter(None, map(SPLIT_NAME.match, parts)), None)
        said[match[1].lower() if match else ""].append(name)
    train, val = said["train"] or said[""], said["val"]
    if not val:
        train, val = train[:-1], train[-1:]
    return {"train": train, "val": val}


# %%
#| test
assert split_shards(["b", "c", "a"]) == {"train": ["a", "b"], "val": ["c"]}
assert split_shards(["d/train-0", "d/test-0", "d/validation-0"])["val"] == ["d/validation-0"]
assert split_shards(["train-0", "train-1", "test-0"]) == {"train": ["train-0"], "val": ["train-1"]}
assert split_shards(["test/0", "train/0", "val/0"]) == {"train": ["train/0"], "val": ["val/0"]}

# %% [markdown]
r"""
A shard can be broken in many ways: cut short, empty, without the column, with a column of numbers.
All of them are found when the folder is opened, from the footer that parquet keeps at the end of a
file, and not hours later. Each gives one sentence.
"""


# %%
#| export
def open_shard(path: Path) -> pq.ParquetFile:
    """Open a parquet shard and check that it has documents; UserError says what is wrong."""
    advice = "replace the file or take it out of the folder."
    if not path.is_file():
        raise UserError(f"shard {path} is missing; put it back or download it again.")
    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        size = f"{path.stat().st_size:,} bytes"
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"shard {path} ({size}) is not a readable parquet file ({reason}); it is truncated "
            f"or damaged: {advice}"
        ) from None
    columns = shard.schema_arrow.names
    if "text" not in columns:
        found = ", ".join(columns) or "none"
        raise UserError(f"shard {path} has no column `text` (found {found}); {advice}")
    kind = shard.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column `text` of shard {path} holds {kind}, expected string; {advice}")
    if shard.metadata.num_rows == 0:
        raise UserError(f"shard {path} is empty (0 rows); {advice}")
    return shard


# %% [markdown]
r"""
Reading may begin anywhere in a shard, and row groups before that place are not even opened. Damage
inside a file shows only here.
"""


# %%
#| export
def read_shard(path: Path, start: int = 0) -> Iterator[str]:
    """Yield the documents of a shard from row `start` on; a null row is an empty string."""
    shard = open_shard(path)
    sizes = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
    group = 0
    while group < len(sizes) and start >= sizes[group]:  # skip row groups without reading them
        start -= sizes[group]
        group += 1
    groups = list(range(group, len(sizes)))
    try:
        for batch in shard.iter_batches(1024, row_groups=groups, columns=["text"]):
            texts = batch.column(0).slice(start).to_pylist()
            start = max(start - batch.num_rows, 0)
            yield from (text or "" for text in texts)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"shard {path} is damaged inside ({reason}); replace the file.") from None


# %% [markdown]
r"""
Has a shard been written anew since we last looked? Its size and its last bytes tell, without
reading the rest: the footer is there, and with it the number of rows, the compressed size of each
row group and its smallest and largest text. (Of a small file, they are all there is.) A hub needs
none of this: its commit stands for the content.
"""


# %%
#| export
def shard_end(path: Path) -> tuple[int, str]:
    """Return the size of a shard and the hash of its last 256 kB. UserError if it is missing."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - (1 << 18), 0))
            return size, hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise UserError(
            f"shard {path} cannot be read ({error.strerror}); put it back or choose another folder."
        ) from None


# %% [markdown]
r"""
What a folder and the hub have in common: documents come shard by shard, in name order. They differ
in `path`, which says where a shard lies, and a folder adds to its description what `shard_end`
tells.
"""


# %%
#| export
class ShardedSource:
    """Documents from parquet shards; `path(name)` may fetch a shard first (see HubSource)."""

    def __init__(self, name: str, splits: dict[str, list[str]]):
        self.name, self.splits = name, splits

    def path(self, shard: str) -> Path:
        """Return where a shard lies on this machine."""
        raise NotImplementedError

    def describe(self, split: str) -> str:
        """Name the source, and the shards from first to last."""
        check_split(split)
        names = self.splits[split]
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return f"{self.name}, {split}: {len(names)} shards, {span}"

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """Yield documents, shard by shard; whole shards before `start` are skipped unread."""
        check_split(split)
        for shard in self.splits[split]:
            path = self.path(shard)
            n_rows = open_shard(path).metadata.num_rows
            if start < n_rows:
                yield from read_shard(path, start)
            start = max(start - n_rows, 0)


# %%
#| export
class FolderSource(ShardedSource):
    """Parquet files of a folder and the folders below it, checked when opened."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"data folder {self.folder} does not exist; check the path.")
        names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.parquet")]
        splits = split_shards(name for name in names if not re.search(r"(^|/)\.", name))
        if not splits["train"]:
            raise UserError(
                f"data folder {self.folder} has {len(names)} .parquet files, at least 2 are needed "
                "(the last is for validation, the others for training); split or add files."
            )
        for shard in splits["train"] + splits["val"]:
            open_shard(self.folder / shard)
        super().__init__(f"folder {self.folder.resolve()}", splits)

    def likely_tokens(self, split: str) -> int:
        """Guess the tokens of a split from the size of its text, three bytes each: rather many."""
        n_bytes = 0
        for shard in self.splits[split]:
            metadata = open_shard(self.path(shard)).metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            n_bytes += sum(group.total_byte_size for group in groups)
        return n_bytes // 3

    def describe(self, split: str) -> str:
        """Name the folder, the shards from first to last, and a hash of what is in them.

        The hash is of names, sizes and last bytes. Raises UserError when a shard is missing.
        """
        digest, line = hashlib.sha256(), super().describe(split)
        for shard in self.splits[split]:
            digest.update(repr((shard, shard_end(self.path(shard)))).encode())
        return f"{line}, content {digest.hexdigest()[:12]}"

    def path(self, shard: str) -> Path:
        """Return the path of a shard."""
        return self.folder / shard


# %%
#| test
with tempfile.TemporaryDirectory() as _folder:
    for _n in range(3):
        write_shard(Path(_folder) / f"{_n}.parquet", [f"{_n} {row}" for row in range(1500)])
    _source = FolderSource(_folder)
    assert _source.splits == {"train": ["0.parquet", "1.parquet"], "val": ["2.parquet"]}
    _all = list(_source.documents("train"))
    assert len(_all) == 3000
    for _start in (1, 1024, 2999, 3000):
        assert list(_source.documents("train", _start)) == _all[_start:]

# %% [markdown]
r"""
A folder of one's own, and a broken shard in it:
"""

# %%
with tempfile.TemporaryDirectory() as folder:
    for number in range(3):
        notes = [f"Note {number}.{row}" for row in range(4)]
        write_shard(Path(folder) / f"notes_{number}.parquet", notes)
    source = FolderSource(folder)
    print(source.splits)
    print(list(source.documents("val")))

    good = (Path(folder) / "notes_1.parquet").read_bytes()
    (Path(folder) / "notes_1.parquet").write_bytes(good[: len(good) // 2])  # a broken download
    try:
        FolderSource(folder)
    except UserError as error:
        print("UserError:", str(error).replace(folder, "FOLDER"))

# %% [markdown]
r"""
## The hub

The Hugging Face hub keeps data sets as folders of parquet files on a server. We write
`hub:OWNER/NAME`, and may add a revision after `@` and a number of training shards after `:`, as in
`hub:karpathy/climbmix-400b-shuffle@main:170`. The validation shard is always the last one of the
*repository*, however few shards we fetch.

The package `huggingface_hub` tells us the files, their sizes and their hashes. Shards are fetched
when they are first needed: the first alone, so that a small request stays small, then four at a
time, with a progress line. What can go wrong on the way will go wrong, so a download promises:

- **nothing half-done under the final name:** bytes go to `NAME.part`, which is renamed at the
  end;
- **nothing twice:** a cut connection, or a killed program, goes on where it stopped, with an HTTP
  *range* request (`Range: bytes=1000-` asks for byte 1,000 and what follows);
- **patience, but not too much:** errors of the server are tried again after 0.5, 1, 2, ...
  seconds; a machine without network is told so in a second or two;
- **nothing forged or damaged:** the hash of the file must be the one the hub announced.

First the patience. `retrying` calls an action again when the trouble may pass. How often depends on
the trouble, so two helpers come before it: one finds the HTTP status in an error, one puts an error
into words.
"""


# %%
#| export
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class IncompleteDownload(Exception):
    """The connection ended before the file did."""


def http_status(error: Exception) -> int:
    """Return the HTTP status that an error of urllib or huggingface_hub carries, or 0."""
    response = getattr(error, "response", None)
    return getattr(error, "code", None) or getattr(response, "status_code", None) or 0


def explain_failure(error: Exception) -> str:
    """Say in words why a request failed and what to do about it."""
    status = http_status(error)
    if status in (401, 403, 404):
        return (
            f"not found, or not for you (HTTP {status}); check name and revision, and for a "
            "closed data set log in with `hf auth login`."
        )
    if status:
        return f"the server answers HTTP {status}; try again later."
    if getattr(error, "errno", None) in DISK_ERRORS:
        return f"{error.strerror}; free some space or set NANOCHAT_CACHE to a larger disk."
    if isinstance(error, (ConnectionResetError, IncompleteDownload)):
        return f"the connection keeps breaking off ({error}); run again to go on from there."
    reason = str(getattr(error, "reason", None) or error).strip() or type(error).__name__
    return (
        f"no connection ({reason.splitlines()[0][:120].rstrip('.')}); check the network, or use "
        "`tinyworld` or `folder:PATH`, which need none."
    )


# %%
#| export
def retrying(
    action: Callable[[], Any], what: str, attempts: int = 6, unreachable: int = 2, wait: float = 0.5
) -> Any:
    """Call `action`; call it again, with doubled waits, after trouble that may pass.

    A server that is busy (HTTP 429, 5xx) or cuts the connection gets `attempts` chances, one that
    cannot be reached `unreachable`, a refusal (401, 404) or a full disk one. Then UserError.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            status = http_status(error)
            cut = isinstance(error, (ConnectionResetError, IncompleteDownload))
            limit = attempts if cut or status == 429 or status >= 500 else unreachable
            if 0 < status < 500 and status != 429 or getattr(error, "errno", None) in DISK_ERRORS:
                limit = 1
            if attempt >= limit:
                raise UserError(f"{what}: {explain_failure(error)}") from error
            time.sleep(min(wait * 2 ** (attempt - 1), 30))


# %% [markdown]
r"""
The range request is a few lines. If a part of the file is here, ask for the rest; a server that
does not know ranges answers 200 instead of 206 and sends everything, so we begin anew. The access
token, if there is one, goes to the hub and not to the server that the hub may redirect us to. A
server that sends more than was announced could fill the disk, so we stop when too many bytes come.
"""


# %%
#| export
def fetch_rest(
    url: str,
    part: Path,
    size: int,
    token: str | None = None,
    arrived: Callable[[int], None] = lambda n: None,
) -> None:
    """Append to `part` what is missing of the `size` bytes at url; IncompleteDownload if cut.

    `arrived(n)` is told of every n bytes; it may raise to stop. More bytes than announced are a
    UserError, and nothing is kept.
    """
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if 0 < have < size:
        request.add_header("Range", f"bytes={have}-")
    try:
        with (
            urllib.request.urlopen(request, timeout=20) as response,
            open(part, "ab" if response.status == 206 else "wb") as file,
        ):
            while file.tell() <= size and (block := response.read1(1 << 20)):
                file.write(block)
                arrived(len(block))
    except (http.client.HTTPException, TimeoutError) as error:
        raise IncompleteDownload(f"the connection broke off: {error!r}") from error
    came = part.stat().st_size
    if came > size:
        part.unlink()
        raise UserError(
            f"{url} sends more than the {size:,} bytes announced; the bytes were thrown away, run "
            "again or try another network."
        )
    if came < size:
        raise IncompleteDownload(f"{came:,} of {size:,} bytes came")


# %% [markdown]
r"""
Two checks stand around the transfer: is there room on the disk, and is the hash the one announced?
The hub gives the SHA-256 of a large file, and git's own hash of a small one.
"""


# %%
#| export
def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise UserError when the disk of a folder has less than n_bytes left."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(
            f"{what} needs {n_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free in "
            f"{folder}; free some space or choose another folder."
        )


def file_digest(path: Path, kind: str) -> str:
    """Return the hex hash of a file: kind "sha256", or "git" (SHA-1 with git's header)."""
    if kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# %% [markdown]
r"""
`download` puts the steps in order: room, transfer, hash, and only then the final name.
"""


# %%
#| export
def download(
    url: str,
    path: Path,
    size: int,
    digest: str,
    kind: str = "sha256",
    token: str | None = None,
    arrived: Callable[[int], None] = lambda n: None,
) -> None:
    """Fetch url to path: resumed after a cut, verified, and under its name only when whole.

    `arrived(n)` is told of every n bytes, those of an earlier run first; it may raise to stop.
    Raises UserError when the server, the network, the disk or the hash is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, what = path.with_name(f"{path.name}.{digest[:12]}.part"), f"download of {path.name}"
    have = part.stat().st_size if part.exists() else 0
    arrived(have)
    check_space(path.parent, size - have, f"the {what}")
    retrying(lambda: fetch_rest(url, part, size, token, arrived), what, unreachable=6)
    found = file_digest(part, kind)
    if found != digest:
        part.unlink()
        raise UserError(
            f"download of {path.name} has the wrong checksum (expected {kind} {digest[:12]}, found "
            f"{found[:12]}); the bytes were thrown away, run again or try another network."
        )
    os.replace(part, path)


# %% [markdown]
r"""
Several shards at a time means several threads, one progress line, and one question: what if one
fails? The first failure stops the others the next time that bytes arrive, and is the one raised.
"""


# %%
#| export
def fetch_together(
    fetch_one: Callable[[str, Callable[[int], None]], None], sizes: dict[str, int], workers: int
) -> None:
    """Call `fetch_one(shard, arrived)` for each shard in `workers` threads, with a progress line.

    `sizes` gives the bytes of each shard; `arrived(n)` is to be told of every n bytes. The first
    failure stops the others and is raised.
    """
    failures: list[BaseException] = []
    lock, what = threading.Lock(), f"{len(sizes)} shards" if len(sizes) > 1 else "1 shard"
    with (
        Progress(sum(sizes.values()), f"download of {what}", "byte") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def arrived(n: int) -> None:
            if failures:
                raise UserError("the download was stopped; run again to go on.")
            with lock:
                bar.update(min(n, bar.total - bar.done))

        def bring(shard: str) -> None:
            try:
                if not failures:
                    fetch_one(shard, arrived)
            except Exception as error:
                failures.append(error)

        try:
            list(pool.map(bring, sizes))
        except BaseException as interrupt:
            failures.append(interrupt)
            raise
    if failures:
        raise failures[0]


# %% [markdown]
r"""
Next, what the hub is asked: the files of a data set with their sizes and hashes, at the *commit*
that the revision stands for today. `HF_ENDPOINT` may name any server, and its list says where files
are written, so `check_listing` refuses a path that leads out of our folder.
"""


# %%
#| export
def leads_out(name: str) -> bool:
    """Return whether a file's name is more than a plain path within the folder it is meant for."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or bool(re.search(r"[\\:\0]", name))


def check_listing(files: dict[str, dict], where: str) -> None:
    """Raise UserError unless all files have plain relative paths and hashes in hex."""
    for name, facts in files.items():
        if leads_out(name):
            raise UserError(
                f"{where} holds {name!r}, which is no plain file inside of it; do not use it."
            )
        digest = str(facts["digest"])
        if not re.fullmatch(r"[0-9a-f]{40,64}", digest):
            raise UserError(
                f"{where} gives {name!r} the hash {digest!r}, which is none; do not use it."
            )


def hub_listing(name: str, revision: str, endpoint: str) -> dict:
    """Ask a hub for the parquet files of a data set: {"commit", "files": {path: facts}}.

    Facts are size, kind and digest of each file. Raises UserError.
    """
    from huggingface_hub import HfApi  # needed for this source only

    api = HfApi(endpoint=endpoint)

    def ask() -> dict:
        commit = api.dataset_info(name, revision=revision, timeout=10).sha
        files = {}
        for item in api.list_repo_tree(name, repo_type="dataset", revision=commit, recursive=True):
            if item.path.endswith(".parquet"):
                lfs = getattr(item, "lfs", None)
                kind, digest = ("sha256", lfs.sha256) if lfs else ("git", item.blob_id)
                files[item.path] = {"size": item.size, "kind": kind, "digest": digest}
        return {"commit": commit, "files": files}

    return retrying(ask, f"list of data set {name}@{revision} at {endpoint}")


# %% [markdown]
r"""
The list is kept beside the shards: without a network, what is here already can still be used.
"""


# %%
#| export
def cache_folder() -> Path:
    """Return the folder of what is downloaded: $NANOCHAT_CACHE, or else ~/.cache/nanochat."""
    cache = os.environ.get("NANOCHAT_CACHE") or Path.home() / ".cache" / "nanochat"
    return Path(cache).expanduser()


def kept_listing(name: str, revision: str, endpoint: str, folder: Path) -> dict:
    """Return `hub_listing` and keep it in the folder; without a network, the one kept earlier."""
    kept = folder / f"listing-{revision.replace('/', '--')}.json"
    try:
        listing = hub_listing(name, revision, endpoint)
        write_json(kept, listing)
    except UserError as error:
        if not kept.is_file() or "no connection" not in str(error):
            raise
        warnings.warn(f"{error} Going on with the list fetched earlier.", stacklevel=3)
        listing = read_json(kept)
    return listing


def parse_hub(spec: str) -> tuple[str, str, int | None]:
    """Split OWNER/NAME[@REVISION][:SHARDS] into name, revision (main) and shards (None: all)."""
    match = re.fullmatch(r"((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?(?::([1-9]\d*))?", spec)
    if not match:
        raise UserError(
            f"data source 'hub:{spec}' is not understood; write hub:OWNER/NAME, and if you like "
            "@REVISION and then :NUMBER_OF_TRAINING_SHARDS."
        )
    return match[1], match[2] or "main", int(match[3]) if match[3] else None


# %% [markdown]
r"""
`HubSource` puts it together. A shard that is here is trusted when the note beside it carries the
right hash, so nothing is fetched or hashed twice.
"""


# %%
#| export
class HubSource(ShardedSource):
    """A data set of the Hugging Face hub; shards are fetched when first needed and kept.

    They are kept in $NANOCHAT_CACHE or ~/.cache/nanochat, in `hub/OWNER--NAME/`. HF_ENDPOINT
    names another hub. `spec` is OWNER/NAME[@REVISION][:SHARDS].
    """

    def __init__(self, spec: str):
        self.dataset, revision, limit = parse_hub(spec)
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.folder = cache_folder() / "hub" / self.dataset.replace("/", "--")
        listing = kept_listing(self.dataset, revision, self.endpoint, self.folder)
        self.commit, self.files = listing["commit"], listing["files"]
        check_listing(self.files, f"data set {self.dataset} at {self.endpoint}")
        splits = split_shards(self.files)
        if not splits["train"]:
            raise UserError(
                f"data set {self.dataset} has {len(self.files)} parquet files, at least 2 are "
                "needed: the last is for validation; choose another data set."
            )
        splits["train"] = splits["train"][:limit]
        super().__init__(f"hub {self.dataset}@{self.commit[:12]}", splits)

    def have(self, shard: str) -> bool:
        """Tell whether a shard is here, whole, and the one of the listing."""
        facts, path = self.files[shard], self.folder / shard
        note = path.with_name(f"{path.name}.{facts['kind']}")
        if not (note.is_file() and path.is_file() and path.stat().st_size == facts["size"]):
            return False
        return note.read_text(encoding="utf-8") == facts["digest"]

    def fetch(self, shards: Sequence[str], workers: int = 4) -> None:
        """Download those shards that are not here; after a failure, what has come is kept."""
        sizes = {shard: self.files[shard]["size"] for shard in shards if not self.have(shard)}
        if sizes:
            fetch_together(self.fetch_one, sizes, workers)

    def fetch_one(self, shard: str, arrived: Callable[[int], None]) -> None:
        """Download and check a shard, then note its hash beside it."""
        from huggingface_hub import get_token, hf_hub_url

        facts, path = self.files[shard], self.folder / shard
        place = dict(repo_type="dataset", revision=self.commit, endpoint=self.endpoint)
        url = hf_hub_url(self.dataset, shard, **place)
        download(url, path, facts["size"], facts["digest"], facts["kind"], get_token(), arrived)
        atomic_write(path.with_name(f"{path.name}.{facts['kind']}"), facts["digest"])

    def path(self, shard: str) -> Path:
        """Return the path of a shard, after fetching it (and the next ones) if it is not here."""
        if not self.have(shard):
            shards = next(names for names in self.splits.values() if shard in names)
            at = shards.index(shard)
            self.fetch(shards[at : at + 4] if at else [shard])
        return self.folder / shard


# %% [markdown]
r"""
One function opens any of the three. Everything after this line is the same for all of them.
"""


# %%
#| export
def open_source(spec: str, seed: int = 0) -> Source:
    """Open a data source: `tinyworld`, `folder:PATH` or `hub:OWNER/NAME[@REVISION][:SHARDS]`.

    `seed` chooses the tiny world. Raises UserError when the source is missing or broken.
    """
    kind, _, rest = spec.partition(":")
    if spec == "tinyworld":
        return TinyWorldSource(seed)
    if kind == "folder" and rest:
        return FolderSource(rest)
    if kind == "hub" and rest:
        return HubSource(rest)
    raise UserError(
        f"data source {spec!r} is unknown; use tinyworld, folder:PATH or hub:OWNER/NAME."
    )


# %%
for spec in ("tinyworld", "folder:nowhere", "hub:one/two/three", "ftp:files"):
    try:
        print(spec, "->", open_source(spec).describe("val"))
    except UserError as error:
        print(spec, "-> UserError:", error)

# %% [markdown]
r"""
## Tokens belong on disk

Training reads its text at least once, often several times, and each experiment on it reads it
again. Tokenising each time, while an expensive accelerator waits, is the naive way:
"""

# %%
source = open_source(data, seed)
documents = list(itertools.islice(source.documents("train"), 4000))
tokenizer = Tokenizer.train(documents[:2000], vocab_size)


def naive_batches(documents, batch_size, seq_len):
    """Tokenise on the fly into a list, and cut rows from its front."""
    waiting = []
    for text in documents:
        waiting = waiting + tokenizer.encode(text, bos=True)
        while len(waiting) > batch_size * seq_len:
            rows = torch.tensor(waiting[: batch_size * seq_len + 1])
            waiting = waiting[batch_size * seq_len :]
            yield rows[:-1].view(batch_size, seq_len), rows[1:].view(batch_size, seq_len)


start = time.process_time()  # processor time: other programs do not count
n_naive = sum(x.numel() for x, _ in naive_batches(documents, 32, 512))
naive_rate = n_naive / (time.process_time() - start)
print(f"naive: {n_naive:,} tokens, {naive_rate / 1e6:.2f} million a second")

# %% [markdown]
r"""
The other way: tokenise once, write the numbers to disk as they are, and let the operating system
map the file into memory. A number below 65,536 fits into two bytes (`uint16`, else `uint32`).
Reading is then a copy from memory, and a file larger than memory is no problem: only the pages
that are read are loaded.

Every document begins with the special token `bos` (beginning of sequence). Beside the tokens we
keep the length of each document, so that nobody has to search for the beginnings later.
"""


# %%
#| export
BATCH_DOCUMENTS = 256  # documents that are tokenised at a time


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise documents, each begun with bos; an empty text gives nothing.

    Returns all tokens one after another, (n_tokens,) of dtype, and lengths, (n,) uint32.
    """
    rows = tokenizer.encode_batch([text for text in texts if text], bos=True)
    lengths = np.array([len(row) for row in rows], np.uint32)
    tokens = np.fromiter(itertools.chain.from_iterable(rows), dtype, int(lengths.sum()))
    return tokens, lengths


# %% [markdown]
r"""
Ten billion tokens take an hour and more in one process, and the machine that trains has many
cores. So *worker processes* tokenise, and this process reads the documents, hands them out 256 at
a time and takes the tokens back **in the order of the documents**. What lands on disk is therefore
the same for any number of workers.

How is a worker started? A process that was *forked* inherits half-copied threads of torch, and may
hang. We *spawn*: a fresh Python, which by default also imports the script that started it. A script
without `if __name__ == "__main__":` would then start workers of its own, without end. Our workers
need nothing from the script, so we show them an empty one while they start.

What a process is started with goes through a pipe of 64 kB. If it is more, as a table of 32,768
ranks is, Python waits until the new process has imported its modules and read the rest, and only
then starts the next: with sixteen workers the first tokens came after 41 seconds
(`benchmarks/RESULTS.md`). So a worker gets the name of a folder that holds the tokenizer, and all
start at once.
"""


# %%
#| export
WORKER: dict[str, Any] = {}  # what a worker process was started with


def start_worker(folder: str, dtype: str) -> None:
    """Prepare a worker process: load the tokenizer once."""
    WORKER.update(tokenizer=Tokenizer.load(folder), dtype=dtype)


def encode_in_worker(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise documents in a worker process."""
    return encode_texts(texts, WORKER["tokenizer"], WORKER["dtype"])


@contextmanager
def empty_main() -> Iterator[None]:
    """Processes started inside do not import the script of this one, guarded or not."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def pick_workers(n_tokens: int) -> int:
    """Return how many processes should tokenise: 0 (this one) for small work or few cores."""
    cores = usable_cores()
    return min(cores, 16) if cores > 2 and n_tokens > 20_000_000 else 0


# %%
#| export
Encoded = tuple[np.ndarray, np.ndarray, int]  # tokens, lengths, number of documents


def encode_stream(
    documents: Iterator[str], tokenizer: Tokenizer, dtype: str, workers: int = 0
) -> Iterator[Encoded]:
    """Yield the tokens of batches of documents, in order; the same for any number of workers.

    With `workers` 0 this process does the work. A worker that dies raises UserError.
    """
    batches = iter(lambda: list(itertools.islice(documents, BATCH_DOCUMENTS)), [])
    if workers == 0:
        for texts in batches:
            yield *encode_texts(texts, tokenizer, dtype), len(texts)
        return
    context, waiting = multiprocessing.get_context("spawn"), deque()
    package = importlib.import_module("nanochat.data")  # a worker cannot import from a notebook
    folder = tempfile.TemporaryDirectory()
    tokenizer.save(folder.name)
    pool = ProcessPoolExecutor(workers, context, package.start_worker, (folder.name, dtype))
    try:
        for texts in batches:
            with empty_main():
                waiting.append((pool.submit(package.encode_in_worker, texts), len(texts)))
            if len(waiting) > 3 * workers:  # enough in hand: take the oldest back
                future, count = waiting.popleft()
                yield *future.result(), count
        for future, count in waiting:
            yield *future.result(), count
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process died, perhaps for lack of memory; run again: finished shards "
            "stay, and fewer workers need less memory."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        folder.cleanup()


# %% [markdown]
r"""
`prepare_tokens` writes *token shards* and an index. Its promises are those of `download`: a shard
appears under its name when it is whole; a run that was stopped goes on at the last whole shard; a
full disk is found before the work, or if not, said in one sentence.
"""


# %%
#| export
def write_shard_files(folder: Path, number: int, parts: list[Encoded]) -> dict:
    """Write token shard `number`: NAME.bin and NAME.lengths; return its facts for the index."""
    tokens, lengths = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    payload, path = tokens.tobytes(), folder / f"{number:05d}.bin"
    atomic_write(path, payload)
    atomic_write(path.with_suffix(".lengths"), lengths.tobytes())
    facts = {"file": path.name, "tokens": len(tokens), "documents": sum(part[2] for part in parts)}
    return {**facts, "sha256": hashlib.sha256(payload).hexdigest()}


def write_token_shard(folder: Path, index: dict, parts: list[Encoded], ended: bool) -> None:
    """Write one token shard, then the index that knows it; each appears whole or not at all."""
    if parts:
        index["shards"].append(write_shard_files(folder, len(index["shards"]), parts))
        index["next_document"] += index["shards"][-1]["documents"]
    index["ended"] = ended
    write_json(folder / "index.json", index)


# %% [markdown]
r"""
The index remembers which tokenizer and which source made the tokens. Tokens of another tokenizer
are refused: they are numbers like any others, and training on them would fail without a word. So
are tokens of a folder whose shards have been written anew: adding to them would mix old and new.
"""


# %%
#| export
def open_index(folder: Path, source: Source, tokenizer: Tokenizer, split: str) -> dict:
    """Return the index of a folder, or a fresh one; UserError if it is not of this making.

    Tokens of a `folder:` source made before its description held a hash are refused too.
    """
    wanted = {
        "source": source.describe(split),
        "tokenizer": tokenizer.fingerprint(),
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
    }
    if not (folder / "index.json").is_file():
        return {**wanted, "shards": [], "next_document": 0, "ended": False, "n_tokens": None}
    index = read_json(folder / "index.json")
    for key, value in wanted.items():
        if index.get(key) != value:
            raise UserError(
                f"the tokens in {folder} were made with another {key} ({index.get(key)!r}, now "
                f"{value!r}); delete that folder or choose another one."
            )
    return index


# %% [markdown]
r"""
A shard may also disappear later, or be cut short by a copy that was broken off. Because the index
knows how many documents each shard holds, we can make that one shard again and keep the others.
"""


# %%
#| export
def shard_fault(folder: Path, shard: dict, dtype: str) -> str | None:
    """Say what is wrong with the files of a token shard, or None; the tokens are not read."""
    path, expected = folder / shard["file"], shard["tokens"] * np.dtype(dtype).itemsize
    beside = path.with_suffix(".lengths")
    for file in (path, beside):
        if not file.is_file():
            return f"token shard {file} is missing"
    if (size := path.stat().st_size) != expected:
        return f"token shard {path} has {size:,} bytes, expected {expected:,}"
    if (found := int(np.fromfile(beside, np.uint32).sum(dtype=np.int64))) != shard["tokens"]:
        return f"{beside} counts {found:,} tokens, token shard {path} holds {shard['tokens']:,}"
    return None


def mend_shards(
    folder: Path, index: dict, source: Source, tokenizer: Tokenizer, split: str
) -> None:
    """Make missing or cut token shards again from their documents; the others stay."""
    first = 0
    for number, shard in enumerate(index["shards"]):
        if shard_fault(folder, shard, index["dtype"]):
            texts = itertools.islice(source.documents(split, first), shard["documents"])
            parts = list(encode_stream(texts, tokenizer, index["dtype"]))
            if not parts or write_shard_files(folder, number, parts) != shard:
                raise UserError(
                    f"{folder / shard['file']} cannot be made again: the source has changed; "
                    f"delete {folder} and prepare the tokens anew."
                )
        first += shard["documents"]


# %%
#| export
def missing_tokens(source: Source, split: str, n_tokens: int, done: int) -> int:
    """Guess how many tokens are still to be made; a folder knows about how many it has."""
    guess = getattr(source, "likely_tokens", lambda split: n_tokens)(split)
    return max(min(n_tokens, guess) - done, 0)


def write_stream(
    stream: Iterator[Encoded], folder: Path, index: dict, n: int, shard_tokens: int, progress: Any
) -> None:
    """Write shards of `shard_tokens` or a little more, until n tokens are there or no more."""
    parts, size, done = [], 0, 0
    for part in stream:
        parts.append(part)
        size, done = size + len(part[0]), done + len(part[0])
        if progress is not None:
            progress.update(len(part[0]))
        if size >= shard_tokens or done >= n:
            write_token_shard(folder, index, parts, ended=False)
            parts, size = [], 0
        if done >= n:
            return
    write_token_shard(folder, index, parts, ended=True)


# %%
#| export
def prepare_tokens(
    source: Source,
    tokenizer: Tokenizer,
    directory: str | Path,
    split: str,
    n_tokens: int,
    progress: Any = None,
    shard_tokens: int | None = None,
    workers: int | None = None,
) -> "TokenShards":
    """Tokenise the first `n_tokens` tokens of a split into `directory/split`, once.

    Goes on where an earlier call stopped, and adds to what is there when more is asked for. A
    source that ends earlier gives fewer: see `len` of the result. `progress` has `.update(n)`
    in tokens. `shard_tokens` is the size of a shard (by default 1/64 of the whole, from one to
    64 million tokens). `workers` processes do the work: 0 is this one, None chooses. The files
    do not depend on it. Raises UserError for a full disk and for tokens of another making.
    """
    check_split(split)
    folder = Path(directory) / split
    folder.mkdir(parents=True, exist_ok=True)
    index = open_index(folder, source, tokenizer, split)
    mend_shards(folder, index, source, tokenizer, split)
    done = sum(shard["tokens"] for shard in index["shards"])
    shard_tokens = shard_tokens or min(max(n_tokens // 64, 1 << 20), 1 << 26)
    if done < n_tokens and not index["ended"]:
        missing = missing_tokens(source, split, n_tokens, done)
        n_bytes = missing * np.dtype(index["dtype"]).itemsize
        check_space(folder, n_bytes, f"tokenising {missing:,} tokens")
        workers = pick_workers(missing) if workers is None else workers
        documents = source.documents(split, index["next_document"])
        stream = encode_stream(documents, tokenizer, index["dtype"], workers)
        with closing(stream):
            write_stream(stream, folder, index, n_tokens - done, shard_tokens, progress)
    if index["n_tokens"] != n_tokens:
        write_json(folder / "index.json", {**index, "n_tokens": n_tokens})
    return TokenShards.load(directory, split)


# %% [markdown]
r"""
`TokenShards` shows the shards as one long sequence of tokens, cut at the number that was asked
for. (The last shard may hold a little more, as documents are not cut; a run must not depend on
that.) `starts` and `stops` say where each document lies in it.
"""


# %%
#| export
class TokenFiles:
    """Opens token shards: the base class of TokenShards."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index, self.maps, lengths = folder, index, [], []
        for shard in index["shards"]:
            path, fault = folder / shard["file"], shard_fault(folder, shard, index["dtype"])
            if fault:
                raise UserError(
                    f"{fault}; this shard alone is made when you prepare the tokens again."
                )
            lengths.append(np.fromfile(path.with_suffix(".lengths"), np.uint32))
            if shard["tokens"]:
                self.maps.append(np.memmap(path, index["dtype"], mode="r"))
        self.ends = list(itertools.accumulate(len(tokens) for tokens in self.maps))
        self.length = min([index["n_tokens"], *self.ends[-1:]]) if self.ends else 0
        stops = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        self.starts = stops[:-1][stops[:-1] < self.length]
        self.stops = np.minimum(stops[1 : len(self.starts) + 1], self.length)
        self.shuffled: tuple[Any, np.ndarray] = (None, self.starts)  # epoch and its order

    @classmethod
    def load(cls, directory: str | Path, split: str) -> "TokenShards":
        """Open the tokens of a split; UserError when they are missing or damaged."""
        folder = Path(directory) / split
        if not (folder / "index.json").is_file():
            raise UserError(f"there are no tokens in {folder}; prepare them first.")
        index = read_json(folder / "index.json")
        if index["n_tokens"] is None:
            raise UserError(f"the tokens in {folder} are unfinished; prepare them again to go on.")
        return cls(folder, index)

    def verify(self) -> None:
        """Read every token shard and compare it with its hash; UserError names a changed one."""
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            if file_digest(path, "sha256") != shard["sha256"]:
                raise UserError(
                    f"token shard {path} is not what was written; delete this file: it alone is "
                    "made when you prepare the tokens again."
                )


# %%
#| export
class TokenShards(TokenFiles):
    """Tokens on disk as one sequence, mapped into memory; made by `prepare_tokens`.

    `starts` and `stops`, each (n_documents,) int64, are the places of the documents in it.
    """

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start .. stop-1, fewer at the end: (n,) uint16 or uint32, often a view."""
        stop = min(stop, self.length)
        first = bisect.bisect_right(self.ends, start)
        before = self.ends[first - 1] if first else 0
        if stop <= self.ends[first]:  # the usual case: a view, nothing is copied
            return self.maps[first][start - before : stop - before]
        head = self.maps[first][start - before :]
        return np.concatenate([head, self.read(self.ends[first], stop)])

    @property
    def bos_id(self) -> int:
        """The token that every document begins with; UserError when there are no tokens."""
        if not self.length:
            raise UserError(f"{self.folder} holds no tokens; prepare more.")
        return int(self.read(0, 1)[0])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of the documents in an epoch: a permutation, int64 (n_documents,)."""
        if self.shuffled[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.starts))
            self.shuffled = ((seed, epoch), order)
        return self.shuffled[1]

    def window(self, seed: int, epoch: int, number: int) -> "Window | None":
        """Return the documents of window `number` of an epoch; None after the last."""
        chosen = self.order(seed, epoch)[number * WINDOW : (number + 1) * WINDOW]
        if not len(chosen):
            return None
        return self.read, self.starts[chosen].tolist(), self.stops[chosen].tolist()

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the tokens: the same for any division into shards."""
        digest = hashlib.sha256()
        for start in range(0, self.length, 1 << 20):
            digest.update(self.read(start, start + (1 << 20)).astype("<u4").tobytes())
        return digest.hexdigest()


# %%
workspace = tempfile.TemporaryDirectory()
start = time.perf_counter()
shards = prepare_tokens(source, tokenizer, workspace.name, "train", n_tokens)
seconds = time.perf_counter() - start
print(f"prepared {len(shards):,} tokens in {seconds:.2f} s: {len(shards.starts):,} documents")
print(repr(tokenizer.decode(shards.read(0, 30).tolist())))
for name in sorted(p.name for p in shards.folder.iterdir()):
    print(f"{name}: {(shards.folder / name).stat().st_size:,} bytes")

# %% [markdown]
r"""
The same with two workers, forced, and a shard that goes missing:
"""

# %%
again = Path(workspace.name) / "again"
start = time.perf_counter()
twin = prepare_tokens(source, tokenizer, again, "train", n_tokens, workers=2)
print(f"two workers: {time.perf_counter() - start:.2f} s; same: ", end="")
print(twin.fingerprint() == shards.fingerprint())

(again / "train" / "00000.bin").unlink()
try:
    TokenShards.load(again, "train")
except UserError as error:
    print("UserError:", str(error).replace(workspace.name, "WORKSPACE"))
twin = prepare_tokens(source, tokenizer, again, "train", n_tokens)
print("made again, same:", twin.fingerprint() == shards.fingerprint())

# %% [markdown]
r"""
The two workers lose: starting a Python that imports torch takes seconds, and here there is only a
moment of work. They are for machines with many cores. Of 24 million tokens of real text,
handing out and writing cost this process 0.9 seconds, tokenising 11; so one process can keep a
dozen others busy, and `prepare_tokens` starts them from 20 million tokens and three cores on.

## From documents to rows

A batch is a rectangle: `batch_size` rows of `seq_len` = $T$ slots. Documents are not. Filling rows
with documents is called *packing*, and each way to do it wastes something:

- **padding:** slots that hold nothing are computed for nothing;
- **throwing away:** text that fits nowhere is never learned;
- **cutting:** what comes after a cut has lost its context; if, moreover, the row does not begin
  with `bos`, the model cannot know that something is missing.

We describe a row as a list of *pieces* `(start, stop, resumed)`: tokens `start` to `stop - 1` of
the long sequence. In a resumed piece a `bos` of our own comes first. The oldest way is
*concatenate and cut*: the sequence is cut every $T$ tokens, wherever that falls.
"""


# %%
def concatenate(starts, stops, T):
    """Cut the sequence every T tokens; only the first row is sure to begin with bos."""
    return [[(at, at + T, False)] for at in range(starts[0], stops[-1] - T + 1, T)]


# %% [markdown]
r"""
nanochat's way since 2026 is *best fit with cropping*. Take the longest document that still fits,
again and again; when none fits, take the shortest, fill the gap with its beginning, and **throw
the rest away**. Every row begins with `bos` and is full. *Best fit with padding* leaves the gap
empty instead.
"""


# %%
def best_fit_crop(starts, stops, T, pad=False):
    """Whole documents while they fit; then the beginning of the shortest, or padding."""
    waiting = sorted((stop - start, start) for start, stop in zip(starts, stops))
    rows = []
    while waiting:
        row, space = [], T
        while space and waiting:
            fit = bisect.bisect(waiting, (space + 1,)) - 1  # the longest that fits, -1 if none
            if fit < 0 and pad and row:
                break
            length, start = waiting.pop(max(fit, 0))
            row.append((start, start + min(length, space), False))
            space -= min(length, space)
        rows.append(row)
    return rows


def best_fit_pad(starts, stops, T):
    return best_fit_crop(starts, stops, T, pad=True)


# %% [markdown]
r"""
Can we have all of it: full rows, each from `bos`, and nothing thrown away? Yes, at the price of
one slot for each cut. When no document fits the gap, we cut **the longest** (it must be cut
somewhere sooner or later) and put its rest back among the waiting, with a `bos` in front. The rest
will open or fill a later row.

One detail keeps the meaning of `bos` clean. In a resumed piece, the `bos` is not asked to predict
the token after it: that token was the last target of the piece before, where its context was still
there. So the model never learns that documents begin in mid-sentence, and **each token of the text
is a target exactly once**.
"""


# %%
#| export
Piece = tuple[int, int, bool]  # first token, end, resumed: a bos of our own comes first


def pack_rows(starts: Sequence[int], stops: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Pack documents into rows of seq_len slots: best fit, cut documents go on in a later row.

    Every row begins with a bos, no token is left out, and only the last row may have empty slots.
    A cut costs one slot. After Ding et al. (2024), with rests that wait instead of rows that do.
    """
    waiting = sorted((stop - start, start, False) for start, stop in zip(starts, stops))
    rows = []
    while waiting:
        row, space = [], seq_len
        while space and waiting:
            fit = bisect.bisect(waiting, (space + 1,)) - 1  # the longest that fits, or -1:
            length, start, resumed = waiting.pop(fit)  # ... then the longest of all
            taken = min(length, space)
            stop, space = start + taken - resumed, space - taken
            row.append((start, stop, resumed))
            if taken < length:
                bisect.insort(waiting, (length - taken + 1, stop, True))
        rows.append(row)
    return rows


# %%
#| test
assert pack_rows([0, 3, 7], [3, 7, 12], 8) == [[(7, 12, False), (0, 3, False)], [(3, 7, False)]]
assert pack_rows([0], [5], 4) == [[(0, 4, False)], [(4, 5, True)]]

# %% [markdown]
r"""
> **Exercise 2.1.** Rows have 8 slots, documents 5, 4 and 7 tokens. Pack them by hand in all four
> ways. How many slots are padding, how many tokens are thrown away, and what stands in the one slot
> that the document of 7 leaves free?
"""

# %% [markdown]
r"""
Rows of pieces become tensors in one function, whatever the packer. The target of a slot is the
token that follows in the sequence; after the last token of a document that is the `bos` of the
next document: "the end". Slots without a target (padding, our own `bos`, the very last token)
get the target $-1$, which the losses of this book ignore.
"""


# %%
#| export
Read = Callable[[int, int], np.ndarray]


def fill_rows(
    rows: Sequence[tuple[Read, list[Piece]]], bos_id: int, seq_len: int, pin: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, targets), each int64 (len(rows), seq_len); -1 marks a slot without target.

    Each row comes with the function that reads its tokens. Empty slots hold bos. `pin` puts the
    tensors in page-locked memory, from which a GPU copies without waiting.
    """
    inputs = torch.full((len(rows), seq_len), bos_id, dtype=torch.int64, pin_memory=pin)
    targets = torch.full((len(rows), seq_len), -1, dtype=torch.int64, pin_memory=pin)
    into_inputs, into_targets = inputs.numpy(), targets.numpy()  # the same memory
    for b, (read, row) in enumerate(rows):
        at = 0
        for start, stop, resumed in row:
            at, n = at + resumed, stop - start
            tokens = read(start, stop + 1)
            into_inputs[b, at : at + n] = tokens[:n]
            into_targets[b, at : at + len(tokens) - 1] = tokens[1:]
            at += n
    return inputs, targets


# %% [markdown]
r"""
Let us look at the same sixty documents, packed in four ways. `picture` gives every slot a number
that stands for a colour.
"""


# %%
PACKERS = {
    "concatenate and cut": concatenate,
    "best fit, padding": best_fit_pad,
    "best fit, cropping": best_fit_crop,
    "best fit, continued (kept)": pack_rows,
}


def picture(rows, T):
    """One number a slot: the document's colour, -1 for bos, -2 for padding."""
    image = np.full((len(rows), T), -2)
    for b, row in enumerate(rows):
        at = 0
        for start, stop, resumed in row:
            places = np.arange(start - resumed, stop)
            document = np.searchsorted(shards.starts, places + resumed * (places < start), "right")
            begins = np.isin(places, shards.starts) | (places < start)
            image[b, at : at + len(places)] = np.where(begins, -1, colours[document])
            at += len(places)
    return image


# %%
colours = np.random.default_rng(0).integers(5, size=61)
starts, stops = shards.starts[:60].tolist(), shards.stops[:60].tolist()
fig, axes = plt.subplots(2, 2, figsize=(8, 5), dpi=110, layout="constrained", sharex=True)
palette = plt.matplotlib.colors.ListedColormap(["white", COLORS[6], *COLORS[:5]])
for ax, (name, pack) in zip(axes.flat, PACKERS.items()):
    image = picture(pack(starts, stops, seq_len), seq_len)
    ax.imshow(image, aspect="auto", cmap=palette, vmin=-2, vmax=4, interpolation="nearest")
    ax.set_title(f"{name}: {len(image)} rows", fontsize=9, loc="left")
    ax.set_xlim(-5, seq_len)
    ax.tick_params(labelsize=8)
for ax in axes[1]:
    ax.set_xlabel("slot in the row", fontsize=9)
for ax in axes[:, 0]:
    ax.set_ylabel("row", fontsize=9)
fig.suptitle(
    "Only the last way fills its rows, begins each with bos and loses nothing", fontsize=10
)
fig.set_label(
    "Four panels of rows. Colours are documents, dark marks bos, white is padding. Concatenated "
    "rows begin inside documents; padded rows end in white; cropped rows are fewer; continued rows "
    "are full and begin with bos."
)
plt.show()

# %% [markdown]
r"""
Now the table. *Own slots* are the `bos` that we put in front of rests. *Cut* counts documents that
do not stand in one piece. *Rate* is packing and filling together, in million tokens a second.
"""


# %%
def judge_packer(pack, shards, T, n_documents):
    """Return the measures of a packer as a dict of numbers."""
    starts, stops = shards.starts[:n_documents].tolist(), shards.stops[:n_documents].tolist()
    began = time.perf_counter()
    rows = pack(starts, stops, T)
    inputs, _ = fill_rows([(shards.read, row) for row in rows], tokenizer.bos_id, T)
    seconds, pieces = time.perf_counter() - began, [piece for row in rows for piece in row]
    placed, own = sum(b - a for a, b, _ in pieces), sum(resumed for *_, resumed in pieces)
    whole, n_slots = set(zip(starts, stops)), len(rows) * T
    in_one_piece = sum((a, b) in whole for a, b, _ in pieces)
    if pack is concatenate:  # its pieces hold many documents: whole unless a cut goes through
        in_one_piece = sum(a // T == (b - 1) // T for a, b in whole)
    return {
        "padding": 1 - (placed + own) / n_slots,
        "own slots": own / n_slots,
        "thrown away": 1 - placed / (stops[-1] - starts[0]),
        "cut": 1 - in_one_piece / len(whole),
        "begin with bos": (inputs[:, 0] == tokenizer.bos_id).double().mean().item(),
        "rate": placed / seconds / 1e6,
    }


table = {name: judge_packer(pack, shards, seq_len, 4096) for name, pack in PACKERS.items()}
print(f"{'':<28}" + "".join(f"{measure:>16}" for measure in next(iter(table.values()))))
for name, row in table.items():
    shares = "".join(f"{row[key]:>16.1%}" for key in list(row)[:-1])
    print(f"{name:<28}{shares}{row['rate']:>16.1f}")

# %% [markdown]
r"""
Padding burns compute (and loses what a document has beyond one row), cropping burns text,
concatenating burns neither and pays with rows that begin in the middle. The kept packer throws
nothing away; its price stands under *own slots*, and it cuts fewer documents than concatenating
does.

The tiny world has short documents. To see the table on text of your own, set `data` in the
parameters to `folder:PATH` and `seq_len` to 2048. On eight million tokens of encyclopaedia, books,
textbooks and news, 4,507 documents of which 56 % are longer than such a row, it reads:

| packer | padding | own slots | thrown away | cut | rows from `bos` |
| --- | --- | --- | --- | --- | --- |
| concatenate and cut | 0.00 % | 0.00 % | 0.01 % | 72.4 % | 0.05 % |
| best fit, padding | 11.38 % | 0.00 % | 16.06 % | 55.8 % | 100 % |
| best fit, cropping | 0.00 % | 0.00 % | 24.76 % | 64.0 % | 100 % |
| best fit, continued (kept) | 0.03 % | 0.04 % | 0.00 % | 55.8 % | 100 % |

nanochat reports 35 % thrown away on its own text. The kept packer throws away nothing, pays four
slots in ten thousand, and cuts only the documents that are longer than a row and must be cut.

> **Play.** Set `seq_len` to 64 and to 512 and run the two cells again. Which way changes most, and
> why?

## Whose tokens may I see?

Documents that share a row have nothing to do with each other, but attention does not know that.
The boundaries travel in the batch itself: **every piece begins with `bos`**, also a resumed one.
So who belongs to whom can be read off the inputs, on any device, with a running count:
"""


# %%
#| export
def document_ids(inputs: torch.Tensor, bos_id: int) -> torch.Tensor:
    """Number the documents of each row of inputs (B, T) from 1: int64 (B, T)."""
    return (inputs == bos_id).cumsum(1)


def document_mask(inputs: torch.Tensor, bos_id: int) -> torch.Tensor:
    """Return (B, 1, T, T) bool: True where a slot may look: at its own document, not ahead.

    Dense, for the plain attention of chapter 3; see `document_bounds` for fast kernels.
    """
    ids = document_ids(inputs, bos_id)
    return (ids[:, None, :, None] == ids[:, None, None, :]).tril()


def document_bounds(inputs: torch.Tensor, bos_id: int) -> torch.Tensor:
    """Return where documents begin in the flattened inputs (B, T), and the end: int32 (n + 1,).

    This is the `cu_seqlens` that variable-length attention kernels take.
    """
    begins = inputs == bos_id
    begins[:, 0] = True  # no document goes on from one row to the next
    places = begins.flatten().nonzero().flatten()
    return torch.cat([places, places.new_tensor([inputs.numel()])]).to(torch.int32)


# %%
#| test
_inputs = torch.tensor([[9, 1, 2, 9], [9, 3, 9, 4]])
assert document_ids(_inputs, 9).tolist() == [[1, 1, 1, 2], [1, 1, 2, 2]]
assert document_bounds(_inputs, 9).tolist() == [0, 3, 4, 6, 8]
assert document_mask(_inputs, 9)[1, 0].int().tolist() == [
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 1, 1],
]

# %%
row = max(pack_rows(starts, stops, seq_len), key=len)
inputs, targets = fill_rows([(shards.read, row)], tokenizer.bos_id, seq_len)
fig, ax = figure(
    "A slot may look back, within its own document",
    "slot looked at",
    "slot that looks",
    size=(3.6, 3.4),
    alt="Square matrix: dark triangles along the diagonal, one for each document of the row",
)
ax.imshow(document_mask(inputs, tokenizer.bos_id)[0, 0], cmap="Blues", interpolation="nearest")
ax.grid(False)
plt.show()
print("boundaries:", document_bounds(inputs, tokenizer.bos_id).tolist())

# %% [markdown]
r"""
The dense mask is $T^2$ numbers a row, fine to learn with; kernels for long rows take the
boundaries instead. What masks are worth we measure at the end of this chapter.

## Batches, shuffled

In one batch, neighbours from the text would tell the same story, so we draw the *documents* in
random order: a *permutation*, made from the seed and the number of the pass over the data (the
*epoch*). A permutation, not independent draws: every document comes exactly once in an epoch. New
epochs make new rows, too, since other documents meet.

Packing all documents of an epoch before the first step would take long, and packing as we go would
make step $k$ depend on all steps before it. The middle way: the permutation is cut into *windows*
of 4,096 documents, each packed for itself, its rows shuffled. A window depends on four
numbers only: seed, epoch, its place, `seq_len`. At most one row a window has empty slots.

Several processes share the work. All of them plan the same rows. Of the rows of a step, `W * B`
for `W` processes with batches of `B`, process `r` takes those from `r * B` on. Together they read
one list of rows from left to right, whatever `W` is. **The state of the loader is three
integers**: epoch, window, row.
"""


# %%
#| export
WINDOW = 4096  # documents that are packed together
Window = tuple[Read, Sequence[int], Sequence[int]]  # how to read tokens; starts and stops

# %% [markdown]
r"""
`RowPlan` is the endless list of rows and the place in it. It asks the shards for one window at a
time and packs it when its first row is needed. If a whole epoch has no row, as when all documents
are empty, it says so instead of looking for ever.
"""


# %%
#| export
class RowPlan:
    """The endless list of rows that a seed stands for, and a place in it: epoch, window, row."""

    def __init__(self, shards: Any, seq_len: int, seed: int = 0):
        if seq_len < 2:
            raise UserError(f"seq_len is {seq_len}, a row needs at least 2 slots; choose more.")
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        self.go_to(0, 0, 0)

    def go_to(self, epoch: int, window: int, row: int) -> None:
        """Make this row the next one."""
        self.epoch, self.window, self.row = epoch, window, row
        self.rows: list[tuple[Read, list[Piece]]] | None = None  # of the window, when planned

    def plan_window(self) -> None:
        """Plan the rows of the window, or of the first one of the next epoch."""
        found = self.shards.window(self.seed, self.epoch, self.window)
        if found is None and self.window > 0:
            self.go_to(self.epoch + 1, 0, 0)
            found = self.shards.window(self.seed, self.epoch, 0)
        if found is None:
            raise UserError("the data source holds no documents; choose another one.")
        read, starts, stops = found
        rows = pack_rows(starts, stops, self.seq_len)
        key = [self.seed, self.epoch, self.window + 1]
        order = np.random.default_rng(key).permutation(len(rows))
        self.rows = [(read, rows[i]) for i in order.tolist()]

    def take(self, n: int) -> list[tuple[Read, list[Piece]]]:
        """Return the next n rows, each with the function that reads its tokens, and advance.

        Raises UserError when a whole epoch has no rows.
        """
        taken: list[tuple[Read, list[Piece]]] = []
        epoch = self.epoch  # of the last row
        while len(taken) < n:
            if self.rows is None:
                self.plan_window()
            found = self.rows[self.row : self.row + n - len(taken)]
            taken, self.row = taken + found, self.row + len(found)
            if found:
                epoch = self.epoch
            elif self.epoch > epoch + 1:
                raise UserError("the data source holds empty documents only; choose another one.")
            if self.row == len(self.rows):
                self.go_to(self.epoch, self.window + 1, 0)
        return taken


# %% [markdown]
r"""
`TokenBatches` takes the rows of a step from the plan, keeps those of its own process, and fills
them. Its state is the place in the plan, with the facts that the plan depends on.
"""


# %%
#| export
class TokenBatches:
    """Batches of packed rows in a seeded random order, the same rows for any world size.

    `next()` gives this rank's (inputs, targets), each int64 (batch_size, seq_len) on the CPU, in
    pinned memory if `pin`. Every row begins with bos; targets are -1 where a slot has none. Every
    document comes once an epoch. `shards` are TokenShards or a TokenStream.
    """

    def __init__(
        self,
        shards: Any,
        batch_size: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        pin: bool = False,
    ):
        self.plan, self.bos_id = RowPlan(shards, seq_len, seed), shards.bos_id
        self.batch_size, self.seq_len, self.pin = batch_size, seq_len, pin
        self.rank, self.world_size = rank, world_size
        self.facts = {"seed": seed, "seq_len": seq_len, "n_tokens": shards.length}

    @property
    def epoch(self) -> int:
        """The epoch that the loader is in: 0 in the first pass over the data."""
        return self.plan.epoch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next (inputs, targets) of this rank and advance."""
        rows = self.plan.take(self.world_size * self.batch_size)
        own = rows[self.rank * self.batch_size :][: self.batch_size]
        return fill_rows(own, self.bos_id, self.seq_len, self.pin)

    def state_dict(self) -> dict[str, int]:
        """Return the place in the data, and what it depends on."""
        plan = self.plan
        return {"epoch": plan.epoch, "window": plan.window, "row": plan.row, **self.facts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place, also with another batch or world size; UserError if data differ."""
        for key, value in self.facts.items():
            if state.get(key) != value:
                raise UserError(
                    f"cannot resume: the saved data position has {key} {state.get(key)}, this run "
                    f"has {key} {value}; resume with the settings of the first run."
                )
        self.plan.go_to(state["epoch"], state["window"], state["row"])


# %% [markdown]
r"""
Checks stand for the promises: every token a target once, ranks together equal to one process, and
resume exact. The tests of the package try them on hundreds of random sizes.
"""

# %%
#| test
with tempfile.TemporaryDirectory() as _folder:
    _tokenizer = Tokenizer.train(["red green blue " * 50], 270)
    _shards = prepare_tokens(TinyWorldSource(0), _tokenizer, _folder, "train", 3001)
    assert len(_shards) == _shards.stops[-1] == 3001
    _one = TokenBatches(_shards, 4, 50)
    _x, _y = _one.next()
    assert _x.shape == _y.shape == (4, 50) and (_x[:, 0] == _tokenizer.bos_id).all()
    _ranks = [TokenBatches(_shards, 2, 50, rank=r, world_size=2) for r in range(2)]
    assert torch.equal(torch.cat([rank.next()[0] for rank in _ranks]), _x)
    _saved, _next = _one.state_dict(), _one.next()[0]
    _again = TokenBatches(_shards, 4, 50)
    _again.load_state_dict(_saved)
    assert torch.equal(_again.next()[0], _next)
    _rows = pack_rows(_shards.starts.tolist(), _shards.stops.tolist(), 50)
    _, _y = fill_rows([(_shards.read, row) for row in _rows], _tokenizer.bos_id, 50)
    assert sorted(_y[_y >= 0].tolist()) == sorted(_shards.read(1, 3001).tolist())

# %% [markdown]
r"""
### How fast?

The same units and the same shape of batch as for the naive way:
"""

# %%
batches = TokenBatches(shards, 32, 512, seed=seed)
start, n_read = time.process_time(), 0
while n_read < 8 * n_tokens:  # eight passes over the data
    n_read += batches.next()[0].numel()
kept_rate = n_read / (time.process_time() - start)
start = time.process_time()
n_encoded = sum(len(tokenizer.encode(text, bos=True)) for text in documents)
encode_rate = n_encoded / (time.process_time() - start)

fig, ax = figure(
    f"Packed rows from mapped files come {kept_rate / naive_rate:.1f} times faster",
    "million tokens a second of one core",
    size=(5, 2.2),
    alt="Bars: naive, tokenising alone, memory-mapped rows; the last is far longer",
)
bars = {"naive": naive_rate, "tokenising alone": encode_rate, "memory-mapped": kept_rate}
ax.barh(list(bars), [rate / 1e6 for rate in bars.values()], color=COLORS[:3])
plt.show()
for way, rate in bars.items():
    print(f"{way:<18}{rate / 1e6:8.2f} million tokens a second")

# %% [markdown]
r"""
The middle bar is the control: tokenising alone, no rows at all. No loader that tokenises on the
fly can be faster than that. The gain is modest here, because the tokens of the tiny world come in
short pieces, and a piece costs about the same time whatever its length. On the real text of
the table above one core delivers 120 million tokens a second in rows of 2,048. For scale: a
12-layer model on one H200 GPU trains on about 540,000.

### How well does it shuffle?

If documents come in the order of the text, the two neighbours of a document in the stream are its
neighbours in the text. In a random order that is rare.
"""

# %%
n_documents = len(shards.starts)
orders = {f"epoch {e}": shards.order(seed, e) for e in (0, 1)}
for name, order in {"text order": np.arange(n_documents), **orders}.items():
    near = np.mean(np.abs(np.diff(order)) == 1)
    print(f"{name:<11} neighbours in the text: {near:6.2%} (chance: {2 / n_documents:.2%})")

fig, ax = figure(
    "Two epochs, two orders: the first 500 documents of each",
    "place in the order",
    "document of the text",
    alt="Scatter of document number against place: no pattern in either epoch",
)
for name, order in orders.items():
    ax.plot(order[:500], ".", ms=2.5, label=name)
ax.legend(fontsize=8, loc="lower right", framealpha=1, markerscale=4)
plt.show()

# %% [markdown]
r"""
## Stop and go on

A run of ten steps, and a run that is stopped after four and resumed in a new loader. The control
is a loader that forgets its state.
"""

# %%
whole = TokenBatches(shards, batch_size, seq_len, seed=seed)
expected = [whole.next()[0] for _ in range(10)]

first = TokenBatches(shards, batch_size, seq_len, seed=seed)
seen = [first.next()[0] for _ in range(4)]
saved = first.state_dict()
print("saved:", saved)

second = TokenBatches(shards, batch_size, seq_len, seed=seed)
second.load_state_dict(saved)
seen += [second.next()[0] for _ in range(6)]
print("resumed equals uninterrupted:", all(map(torch.equal, seen, expected)))

forgetful = TokenBatches(shards, batch_size, seq_len, seed=seed)
print("without the state:           ", torch.equal(forgetful.next()[0], expected[4]))

# %% [markdown]
r"""
It also resumes on another number of processes, as long as the rows per step, over all processes,
stay the same: here one process with batches of 8 goes on as two with batches of 4.
"""

# %%
pair = [
    TokenBatches(shards, batch_size // 2, seq_len, rank=r, world_size=2, seed=seed) for r in (0, 1)
]
for loader in pair:
    loader.load_state_dict(saved)
both = torch.cat([loader.next()[0] for loader in pair])
print("two processes go on as one:", torch.equal(both, expected[4]))

try:
    wrong = TokenBatches(shards, batch_size, seq_len // 2, seed=seed)
    wrong.load_state_dict(saved)
except UserError as error:
    print("UserError:", error)

# %% [markdown]
r"""
> **Exercise 2.2.** In the middle of an epoch a run is stopped and resumed with twice the batch
> size. Which of the three integers change, and does every document still come once?

## Ahead of time

While a GPU computes a step, the CPU has nothing to do; it could make the next batch. A *prefetch*
is a thread that does so and keeps a few batches ready in a queue. Three things go wrong in
careless ones: the saved state is that of the thread, which has run ahead, not of the batch that
was trained on; an error in the thread is lost, and training waits for ever; the thread does not
end.

Our thread puts each batch into the queue **together with the state after it**. The state that
`state_dict` reports is the one that came with the last batch handed out. An error travels through
the same queue and is raised in the loop that asks for the batch.
"""


# %%
#| export
def make_ahead(
    batches: Any, ready: queue.Queue, stopping: threading.Event, device: int | None
) -> None:
    """Fill `ready` with (batch, state after it) until told to stop: the body of the thread."""

    def put(item: Any) -> None:
        while not stopping.is_set():
            try:
                return ready.put(item, timeout=0.05)
            except queue.Full:
                continue

    try:
        if device is not None:  # a new thread would open GPU 0, whatever our rank is
            torch.cuda.set_device(device)
        while not stopping.is_set():
            put((batches.next(), batches.state_dict()))
    except BaseException as error:
        put(error)


# %%
#| export
class Prefetch:
    """Batches of another loader, made ahead by a thread; the same batches, the same state.

    `close()`, or leaving a `with` block, ends the thread; `next()` starts it again. `waited` is
    the time in seconds that `next()` has spent waiting for a batch.
    """

    def __init__(self, batches: Any, depth: int = 2):
        self.batches, self.batch_size, self.waited = batches, batches.batch_size, 0.0
        self.state, self.ready = batches.state_dict(), queue.Queue(depth)
        self.stopping, self.thread = threading.Event(), None

    def next(self) -> Any:
        """Return the next batch; an error of the thread is raised here."""
        if self.thread is None:
            self.batches.load_state_dict(self.state)
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            work = (self.batches, self.ready, self.stopping, device)
            self.thread = threading.Thread(target=make_ahead, args=work, daemon=True)
            self.thread.start()
        began = time.perf_counter()
        item = self.ready.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self.state = item
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the state after the batch that was handed out last."""
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place; what was made ahead is dropped."""
        self.close()
        self.batches.load_state_dict(state)
        self.state = state

    def close(self) -> None:
        """End the thread and drop what it has made."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join()
        self.thread, self.ready = None, queue.Queue(self.ready.maxsize)
        self.stopping.clear()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


# %% [markdown]
r"""
On a GPU machine the loader is built with `pin=True`: its tensors lie in *page-locked* memory, from
which the GPU copies by itself (`tensor.to(device, non_blocking=True)`) while Python goes on. A
12-layer model on one H200, fed this way, waited for data 0.03 % of its time
(`benchmarks/RESULTS.md`). Here a pause stands for the GPU's step, so that we see who waits for
whom.
"""


# %%
def seconds_a_step(batches, n_steps=40, step=0.01):
    """Return the mean time of steps that take `step` seconds and a batch each."""
    batches.next()
    start = time.perf_counter()
    for _ in range(n_steps):
        batches.next()
        time.sleep(step)  # the accelerator is busy, the CPU is free
    return (time.perf_counter() - start) / n_steps


big = dict(batch_size=128, seq_len=seq_len, seed=seed)
plain = seconds_a_step(TokenBatches(shards, **big))
with Prefetch(TokenBatches(shards, **big)) as ahead:
    fetched = seconds_a_step(ahead)
    ahead.load_state_dict(TokenBatches(shards, **big).state_dict())  # back to the beginning
    same = torch.equal(ahead.next()[0], TokenBatches(shards, **big).next()[0])
print(f"step alone 10.0 ms, with the loader {1e3 * plain:.1f} ms, ahead {1e3 * fetched:.1f} ms")
print("the same batches:", same)

# %% [markdown]
r"""
## A validation set that does not move

Two losses can be compared only if they are over the same text. "The first twenty batches" is not
the same text for another batch size or another number of processes, and a set that ends with the
last full batch drops some. So: every document of the validation shards, packed in order, dealt out
row by row, and the last batch filled up with rows without targets. Its hash is printed beside the
loss.
"""


# %%
#| export
class ValidationBatches:
    """Every document of some token shards once, as batches of (inputs, targets).

    Iterate over it, as often as you like; `len` is the number of batches of this rank, the same
    for all ranks. The rows do not depend on batch size and world size: rows beyond the last have
    targets -1 only.
    """

    def __init__(
        self, shards: Any, batch_size: int, seq_len: int, rank: int = 0, world_size: int = 1
    ):
        self.bos_id, self.batch_size, self.seq_len = shards.bos_id, batch_size, seq_len
        self.rank, self.stride, self.rows = rank, batch_size * world_size, []
        for first in range(0, len(shards.starts), WINDOW):
            part = slice(first, first + WINDOW)
            packed = pack_rows(shards.starts[part].tolist(), shards.stops[part].tolist(), seq_len)
            self.rows += [(shards.read, row) for row in packed]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.stride)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = self.rank * self.batch_size
        for start in range(first, first + len(self) * self.stride, self.stride):
            rows = self.rows[start : start + self.batch_size]
            rows = rows + [(lambda a, b: None, [])] * (self.batch_size - len(rows))
            yield fill_rows(rows, self.bos_id, self.seq_len)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of all rows: the same for every batch and world size."""
        digest = hashlib.sha256()
        for row in self.rows:
            for half in fill_rows([row], self.bos_id, self.seq_len):
                digest.update(half.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


# %%
val_shards = prepare_tokens(source, tokenizer, workspace.name, "val", 30_000)
for size, world_size in ((8, 1), (5, 3)):
    ranks = [ValidationBatches(val_shards, size, seq_len, r, world_size) for r in range(world_size)]
    n_targets = sum(int((y >= 0).sum()) for rank in ranks for _, y in rank)
    print(f"{world_size} x {size} rows: {len(ranks[0])} batches, {n_targets:,} targets, ", end="")
    print(f"hash {ranks[-1].fingerprint()[:12]}")

# %% [markdown]
r"""
## When the disk is short

Two bytes a token are not much, yet a disk can be full. `TokenStream` tokenises when a window of
documents is needed and keeps nothing. Everything else stays: packing, state, exact resume. What is
lost: documents come in the order of the source (only the rows of a window are shuffled), and
every process tokenises everything, so it suits one process, not eight.
"""


# %%
#| export
class TokenStream:
    """Tokens of a source made when they are needed, for TokenBatches; nothing goes to disk.

    Documents come in the order of the source, whatever the seed; rows are shuffled in windows.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, split: str = "train"):
        check_split(split)
        self.source, self.tokenizer, self.split = source, tokenizer, split
        self.bos_id, self.length = tokenizer.bos_id, 0  # the length is not known
        self.documents, self.next_window = iter(()), -1

    def window(self, seed: int, epoch: int, number: int) -> Window | None:
        """Return window `number` of the source, tokenised; None after the last."""
        if number != self.next_window:
            self.documents = self.source.documents(self.split, number * WINDOW)
        texts = list(itertools.islice(self.documents, WINDOW))
        self.next_window = number + 1
        if not texts:
            return None
        tokens, lengths = encode_texts(texts, self.tokenizer, "int32")
        tokens = np.append(tokens, np.int32(self.bos_id))  # what follows the last document
        stops = np.cumsum(lengths, dtype=np.int64)
        return lambda start, stop: tokens[start:stop], (stops - lengths).tolist(), stops.tolist()


# %%
stream = TokenBatches(TokenStream(source, tokenizer), batch_size, seq_len, seed=seed)
start = time.perf_counter()
n_read = sum(stream.next()[0].numel() for _ in range(200))
stream_rate = n_read / (time.perf_counter() - start)
print(f"generated, tokenised and packed: {stream_rate / 1e6:.2f} million tokens a second")

# %% [markdown]
r"""
## The result of the chapter: what packing teaches

Waste is one thing, learning another. We train the same small model for the same number of steps on
the same text, five times over: with the four packers, and with the kept one plus document masks.
The model is the GPT of chapter 3 and the optimizer that of chapter 4; here they are measuring
instruments. A mask reaches the model's
attention the way the inference engine of chapter 8 hands over its own, through the `kv_cache`
argument:
"""

# %%
from nanochat.model import GPT, GPTConfig
from nanochat.optim import MuonAdamW, lr_multiplier, muon_momentum, param_groups


class Mask:
    """Looks like a key-value cache, keeps nothing, and carries a mask for attention."""

    length, positions = 0, None

    def __init__(self, inputs):
        self.mask = document_mask(inputs, tokenizer.bos_id)

    def update(self, layer, k, v):
        return k, v

    def advance(self, n):
        pass


# %% [markdown]
r"""
Which text do we judge on? It has to favour nobody. Each validation document stands alone, so masks
make no difference there. And *every* token counts: a document longer than a row goes on in a
second row that repeats half a row as context and is judged on the new half only.
"""


# %%
def documents_alone(shards, T):
    """Batches with one document a row; and, apart, the rest of those longer than T."""
    begins, rests = [], []
    for start, stop in zip(shards.starts.tolist(), shards.stops.tolist()):
        begins.append([(start, min(start + T, stop), False)])
        rests += [
            [(a, min(a + T, stop), False)] for a in range(start + T // 2, stop - T // 2, T // 2)
        ]
    batches = []
    for rows, context in ((begins, 0), (rests, T // 2)):
        inputs, targets = fill_rows([(shards.read, row) for row in rows], tokenizer.bos_id, T)
        targets[:, :context] = -1
        batches.append((inputs, targets))
    return batches


token_bytes = tokenizer.token_bytes()
judged_on = documents_alone(
    prepare_tokens(source, tokenizer, workspace.name, "val", 12_000), seq_len
)
n_judged = [int((token_bytes[y.clamp(min=0)] * (y >= 0)).sum()) for _, y in judged_on]
print(f"bytes judged: {n_judged[0]:,} in beginnings, {n_judged[1]:,} in rests")


# %%
@torch.no_grad()
def bits(model):
    """Bits per byte of the beginnings, and of whole documents."""
    nats = []
    for inputs, targets in judged_on:
        losses = model(inputs, targets, reduction="none")
        nats.append(losses[token_bytes[targets.clamp(min=0)] > 0].sum().item() / math.log(2))
    return nats[0] / n_judged[0], sum(nats) / sum(n_judged)


def rows_in_order(pack, seed):
    """Yield the rows of a packer without end: packed and shuffled anew each epoch."""
    for epoch in itertools.count():
        order = np.arange(len(shards.starts)) if pack is concatenate else shards.order(seed, epoch)
        rows = pack(shards.starts[order].tolist(), shards.stops[order].tolist(), seq_len)
        shuffle = np.random.default_rng([seed, epoch]).permutation(len(rows))
        yield from ((shards.read, rows[i]) for i in shuffle)


def train_and_judge(pack, seed, masked=False):
    """Train the small model on one packer's rows and judge it."""
    model = GPT(GPTConfig(tokenizer.vocab_size, seq_len, 2, 1, 1, 32), seed=seed)
    optimizer = MuonAdamW(param_groups(model, 0.02, 0.3, 0.008, 0.0))
    rows = rows_in_order(pack, seed)
    for step in range(train_steps):
        optimizer.set_schedule(lr_multiplier(step, train_steps), muon_momentum(step))
        taken = list(itertools.islice(rows, batch_size))
        inputs, targets = fill_rows(taken, tokenizer.bos_id, seq_len)
        model(inputs, targets, kv_cache=Mask(inputs) if masked else None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


# %% [markdown]
r"""
Three seeds each; a seed sets the initial weights and the order of the rows. Seeds differ from each
other more than packers do, so we compare **within a seed**: the difference from *concatenate and
cut* with the same initial weights, and its standard error over the seeds.
"""

# %%
arms = {name: (pack, False) for name, pack in PACKERS.items()}
arms["... with document masks"] = (pack_rows, True)
scores = {  # (n_seeds, 2): beginnings, whole documents
    name: np.array([train_and_judge(pack, s, masked) for s in range(n_seeds)])
    for name, (pack, masked) in arms.items()
}
gains = {name: score - scores["concatenate and cut"] for name, score in scores.items()}
print(
    f"{'validation bits per byte':<28}{'whole documents':>18}{'difference':>20}{'beginnings':>22}"
)
for name, gain in gains.items():
    mean, error = gain.mean(0), gain.std(0, ddof=1) / n_seeds**0.5
    shown = [f"{m:+.4f} ± {e:.4f}" for m, e in zip(mean, error)]
    print(f"{name:<28}{scores[name][:, 1].mean():>18.4f}{shown[1]:>20}{shown[0]:>22}")

# %%
fig, ax = figure(
    "Three short runs each: the kept packer does no harm, masks look best",
    "bits per byte above concatenate and cut (lower is better)",
    size=(6.5, 3),
    alt="Points with error bars for each packer on two rulers, relative to concatenating",
)
for i, ruler in ((1, "whole documents"), (0, "beginnings only")):
    y = np.arange(len(gains))[::-1] + (0.12 if i else -0.12)
    mean = [gain[:, i].mean() for gain in gains.values()]
    error = [gain[:, i].std(ddof=1) / n_seeds**0.5 for gain in gains.values()]
    ax.errorbar(mean, y, xerr=error, fmt="o" if i else "s", ms=5, capsize=3, label=ruler)
ax.axvline(0, color=COLORS[6], linewidth=0.8)
ax.set_yticks(np.arange(len(gains))[::-1], list(gains))
ax.legend(fontsize=8)
plt.show()
workspace.cleanup()

# %% [markdown]
r"""
Three seeds of a tiny run can only hint, and the bars say so. Ten seeds and 150 steps (set
`train_steps` and `n_seeds` in the parameters; it takes a few minutes) give this:

| packer | whole documents | beginnings only |
| --- | --- | --- |
| concatenate and cut | 1.1077 bits per byte | (baseline) |
| best fit, padding | -0.007 ± 0.004 | -0.024 ± 0.004 |
| best fit, cropping | +0.005 ± 0.004 | -0.008 ± 0.004 |
| best fit, continued (kept) | -0.012 ± 0.004 | -0.012 ± 0.004 |
| ... with document masks | -0.055 ± 0.004 | -0.057 ± 0.004 |

First, **the ruler decides**: cropping and padding throw ends away, so they look better on
beginnings than on whole documents. Second, the kept packer wins on whole documents although every
step has a few slots fewer for text. Padding is behind after 60 steps, when it has seen less text,
and ahead of concatenating after 150, perhaps because most of its rows hold one document only. Masks
give that to every row, and gain most: our documents are short, and neighbours in a row have nothing
to do with each other. On web text, where rows hold one or two, nanochat found no gain from masks.
That is why `TokenBatches` passes the boundaries on and does not insist.

The same check at the size of the laptop capstone (depth 4, 2.5 million tokens, one seed each):
0.2012 bits per byte on documents alone with concatenated rows, 0.1971 with kept ones. On rows cut
anywhere the order is the other way round, 0.213 against 0.249: a model that has always begun
with `bos` is at a loss without it. Ours always gives it one.

## Recap

`nanochat` can now go from documents to batches:

- `open_source(spec)` opens `tinyworld`, `folder:PATH` and `hub:OWNER/NAME[@REVISION][:SHARDS]`;
  `HubSource.fetch` downloads side by side, resumed and verified;
- `prepare_tokens(...)` tokenises once, in worker processes; `TokenShards.load(directory, split)`
  maps the result, `.verify()` checks it; `TokenStream` does without the disk;
- `pack_rows` packs without loss; `document_ids`, `document_mask` and `document_bounds` say who
  belongs to whom;
- `TokenBatches(...)` with `.next()`, `.state_dict()`, `.load_state_dict()`; `Prefetch` around it;
- `ValidationBatches(...)` with `.fingerprint()`.

**Pitfalls**, all of them shipped by real projects

- *A validation set that moves* with the files that happen to be there. Name the shard, and print a
  hash of what is judged.
- *A new packer that improves the loss*, partly because its rows are easier to predict, as nanochat
  says of its own. Judge the old and the new one on one ruler.
- *A document longer than a row.* nanochat's packer for conversations cut nothing: with short rows
  its buffer filled up with conversations that never fit, and the loss became NaN (0/0). A packer
  must make progress on any length.
- *Resuming at the nearest group of rows.* nanochat skips to the next one and drops its packing
  buffer, and needs the same number of GPUs. Two such runs cannot be compared.
- *A garbage collector in the loop.* nanochat met pauses of half a second in Python's. A prefetch
  hides short ones, and chapter 5 spares it most of its work.

**Readings**

1. H. Ding et al., "Fewer Truncations Improve Language Modeling", 2024: best-fit packing, and what
   cutting does to a model.
2. M. Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021: packing as a
   bin problem, and masks.
3. G. Penedo et al., "The FineWeb Datasets", 2024: what it takes to make web text usable.
4. The Apache Parquet format, parquet.apache.org; RFC 9110, section 14: range requests.
"""
