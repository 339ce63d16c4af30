"""Documents to batches: sources, memory-mapped token shards, packed and resumable batches.

Exported from chapters/02_data.py (chapter 02, Data); edit there, not here.
"""

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

__all__ = [
    "BATCH_DOCUMENTS",
    "DISK_ERRORS",
    "Encoded",
    "FolderSource",
    "HubSource",
    "IncompleteDownload",
    "Piece",
    "Prefetch",
    "Read",
    "RowPlan",
    "SPLIT_NAME",
    "ShardedSource",
    "Source",
    "TinyWorldSource",
    "TokenBatches",
    "TokenFiles",
    "TokenShards",
    "TokenStream",
    "ValidationBatches",
    "WINDOW",
    "WORKER",
    "Window",
    "cache_folder",
    "check_listing",
    "check_space",
    "check_split",
    "document_bounds",
    "document_ids",
    "document_mask",
    "download",
    "empty_main",
    "encode_in_worker",
    "encode_stream",
    "encode_texts",
    "explain_failure",
    "fetch_rest",
    "fetch_together",
    "file_digest",
    "fill_rows",
    "http_status",
    "hub_listing",
    "kept_listing",
    "leads_out",
    "make_ahead",
    "mend_shards",
    "missing_tokens",
    "open_index",
    "open_shard",
    "open_source",
    "pack_rows",
    "parse_hub",
    "pick_workers",
    "prepare_tokens",
    "read_shard",
    "retrying",
    "shard_end",
    "shard_fault",
    "split_shards",
    "start_worker",
    "write_shard",
    "write_shard_files",
    "write_stream",
    "write_token_shard",
]


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


def write_shard(path: str | Path, texts: Sequence[str]) -> None:
    """Write documents as one parquet shard: column `text`, row groups of 1,024, zstd."""
    table = pa.table({"text": pa.array(list(texts), pa.string())})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=1024, compression="zstd", compression_level=3)
    atomic_write(path, buffer.getvalue().to_pybytes())


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


WINDOW = 4096  # documents that are packed together
Window = tuple[Read, Sequence[int], Sequence[int]]  # how to read tokens; starts and stops


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
