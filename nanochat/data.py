"""Documents to batches: sources, memory-mapped token shards and resumable batches.

Exported from chapters/02_data.py (chapter 02, Data); edit there, not here.
"""

import bisect
import errno
import hashlib
import http.client
import itertools
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.common import UserError, atomic_write, read_json, write_json
from nanochat.tinyworld import World, document, validation_document
from nanochat.tokenizer import Tokenizer

__all__ = [
    "DISK_ERRORS",
    "FolderSource",
    "HubSource",
    "IncompleteDownload",
    "RowOrder",
    "ShardedSource",
    "Source",
    "TinyWorldSource",
    "TokenBatches",
    "TokenShards",
    "check_space",
    "check_split",
    "download",
    "encode_stream",
    "explain_failure",
    "fetch_rest",
    "file_digest",
    "http_status",
    "hub_listing",
    "open_index",
    "open_shard",
    "open_source",
    "parse_hub",
    "prepare_tokens",
    "read_shard",
    "retrying",
    "split_shards",
    "write_shard",
    "write_token_shard",
]


class Source(Protocol):
    """Anything that gives documents for the splits "train" and "val"."""

    def describe(self, split: str) -> str:
        """Say in one line where the documents of a split come from; shards are named."""
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


def split_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """Assign shard names to splits: {"train": [...], "val": [...]}, each in name order.

    Files called train*, val* and test* go where they say (test: nowhere). Otherwise, or when no
    file says val, the last training shard in name order is validation.
    """
    names = sorted(names)
    said = {name: re.match(r"(train|val)(idation)?(?![a-z])", Path(name).name) for name in names}
    train = [name for name in names if said[name] and said[name][1] == "train"]
    val = [name for name in names if said[name] and said[name][1] == "val"]
    if not train:
        train, val = names, []
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

    def path(self, shard: str) -> Path:
        """Return the path of a shard."""
        return self.folder / shard


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class IncompleteDownload(Exception):
    """The connection ended before the file did."""


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


def fetch_rest(url: str, part: Path, size: int, token: str | None = None) -> None:
    """Append to `part` what is missing of the `size` bytes at url; IncompleteDownload if cut."""
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
            shutil.copyfileobj(response, file, 1 << 20)
    except (http.client.HTTPException, TimeoutError) as error:
        raise IncompleteDownload(f"the connection broke off: {error!r}") from error
    if part.stat().st_size != size:
        raise IncompleteDownload(f"{part.stat().st_size:,} of {size:,} bytes came")


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
    url: str, path: Path, size: int, digest: str, kind: str = "sha256", token: str | None = None
) -> None:
    """Fetch url to path: resumed after a cut, verified, and under its name only when whole.

    Raises UserError when the server, the network, the disk or the hash is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{digest[:12]}.part")
    missing = size - (part.stat().st_size if part.exists() else 0)
    check_space(path.parent, missing, f"the download of {path.name}")
    retrying(lambda: fetch_rest(url, part, size, token), f"download of {path.name}", unreachable=6)
    found = file_digest(part, kind)
    if found != digest:
        part.unlink()
        raise UserError(
            f"download of {path.name} has the wrong checksum (expected {kind} {digest[:12]}, found "
            f"{found[:12]}); the bytes were thrown away, run again or try another network."
        )
    os.replace(part, path)


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise UserError when the disk of a folder has less than n_bytes left."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(
            f"{what} needs {n_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free in "
            f"{folder}; free some space or choose another folder."
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
        cache = Path(os.environ.get("NANOCHAT_CACHE") or Path.home() / ".cache" / "nanochat")
        self.folder = cache.expanduser() / "hub" / self.dataset.replace("/", "--")
        listing_file = self.folder / f"listing-{revision.replace('/', '--')}.json"
        try:
            listing = hub_listing(self.dataset, revision, self.endpoint)
            write_json(listing_file, listing)
        except UserError as error:
            if not listing_file.is_file() or "no connection" not in str(error):
                raise
            warnings.warn(f"{error} Going on with the list fetched earlier.", stacklevel=2)
            listing = read_json(listing_file)
        self.commit, self.files = listing["commit"], listing["files"]
        splits = split_shards(self.files)
        if not splits["train"]:
            raise UserError(
                f"data set {self.dataset} has {len(self.files)} parquet files, at least 2 are "
                "needed: the last is for validation; choose another data set."
            )
        splits["train"] = splits["train"][:limit]
        super().__init__(f"hub {self.dataset}@{self.commit[:12]}", splits)

    def path(self, shard: str) -> Path:
        """Return the path of a shard, after fetching and checking it if it is not here."""
        from huggingface_hub import get_token, hf_hub_url

        facts, path = self.files[shard], self.folder / shard
        note = path.with_name(f"{path.name}.{facts['kind']}")
        noted = note.read_text(encoding="utf-8") if note.is_file() and path.is_file() else None
        if noted == facts["digest"] and path.stat().st_size == facts["size"]:
            return path
        url = hf_hub_url(
            self.dataset,
            shard,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.endpoint,
        )
        download(url, path, facts["size"], facts["digest"], facts["kind"], get_token())
        atomic_write(note, facts["digest"])
        return path


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


def encode_stream(
    documents: Iterator[str], tokenizer: Tokenizer, dtype: np.dtype, batch: int = 256
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens, number of documents) for batches of documents, each begun with bos."""
    while texts := list(itertools.islice(documents, batch)):
        rows = tokenizer.encode_batch([text for text in texts if text], bos=True)
        tokens = np.fromiter(itertools.chain.from_iterable(rows), dtype, sum(map(len, rows)))
        yield tokens, len(texts)


def write_token_shard(
    folder: Path, index: dict, parts: list[np.ndarray], n_documents: int, ended: bool
) -> None:
    """Write one token shard, then the index that knows it; both appear whole or not at all."""
    if parts:
        data = np.concatenate(parts).tobytes()
        name = f"{len(index['shards']):05d}.bin"
        atomic_write(folder / name, data)
        facts = {"file": name, "tokens": sum(map(len, parts)), "documents": n_documents}
        index["shards"].append({**facts, "sha256": hashlib.sha256(data).hexdigest()})
    index["next_document"] += n_documents
    index["ended"] = ended
    write_json(folder / "index.json", index)


def open_index(folder: Path, source: Source, tokenizer: Tokenizer, split: str) -> dict:
    """Return the index of a folder, or a fresh one; UserError if it is not of this making."""
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


def prepare_tokens(
    source: Source,
    tokenizer: Tokenizer,
    directory: str | Path,
    split: str,
    n_tokens: int,
    progress: Any = None,
    shard_tokens: int | None = None,
) -> "TokenShards":
    """Tokenise the first `n_tokens` tokens of a split into `directory/split`, once.

    Goes on where an earlier call stopped, and adds to what is there when more is asked for. A
    source that ends earlier gives fewer: see `len` of the result. `progress` has `.update(n)`
    in tokens. `shard_tokens` is the size of a shard (by default 1/64 of the whole, from one to
    64 million tokens). Raises UserError for a full disk and for tokens of another making.
    """
    check_split(split)
    folder = Path(directory) / split
    folder.mkdir(parents=True, exist_ok=True)
    index = open_index(folder, source, tokenizer, split)
    done = sum(shard["tokens"] for shard in index["shards"])
    shard_tokens = shard_tokens or min(max(n_tokens // 64, 1 << 20), 1 << 26)
    if done < n_tokens and not index["ended"]:
        guess = getattr(source, "likely_tokens", lambda split: n_tokens)(split)
        missing = max(min(n_tokens, guess) - done, 0)
        n_bytes = missing * np.dtype(index["dtype"]).itemsize
        check_space(folder, n_bytes, f"tokenising {missing:,} tokens")
        documents = source.documents(split, index["next_document"])
        parts, size, n_documents = [], 0, 0
        for tokens, count in encode_stream(documents, tokenizer, np.dtype(index["dtype"])):
            parts.append(tokens)
            size, n_documents, done = size + len(tokens), n_documents + count, done + len(tokens)
            if progress is not None:
                progress.update(len(tokens))
            if size >= shard_tokens or done >= n_tokens:
                write_token_shard(folder, index, parts, n_documents, ended=False)
                parts, size, n_documents = [], 0, 0
            if done >= n_tokens:
                break
        else:
            write_token_shard(folder, index, parts, n_documents, ended=True)
    if index["n_tokens"] != n_tokens:
        write_json(folder / "index.json", {**index, "n_tokens": n_tokens})
    return TokenShards.load(directory, split)


class TokenShards:
    """Tokens on disk as one sequence, mapped into memory; made by `prepare_tokens`."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index, self.maps = folder, index, []
        dtype = np.dtype(index["dtype"])
        for shard in index["shards"]:
            path, n_bytes = folder / shard["file"], shard["tokens"] * dtype.itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != n_bytes:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise UserError(
                    f"token shard {path} {state}, expected {n_bytes:,} bytes; delete the folder "
                    f"{folder} and prepare the tokens again."
                )
            if n_bytes:
                self.maps.append(np.memmap(path, dtype, mode="r"))
        self.ends = list(itertools.accumulate(len(tokens) for tokens in self.maps))
        self.length = min([index["n_tokens"], *self.ends[-1:]]) if self.ends else 0

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

    def __len__(self) -> int:
        return self.length

    def rows(self, seq_len: int) -> int:
        """Return how many rows of `seq_len` inputs, each with one more target, there are."""
        return max((self.length - 1) // seq_len, 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start .. stop-1, also across shards: (stop - start,) uint16 or uint32."""
        first = bisect.bisect_right(self.ends, start)
        before = self.ends[first - 1] if first else 0
        if stop <= self.ends[first]:  # the usual case: a view, nothing is copied
            return self.maps[first][start - before : stop - before]
        head = self.maps[first][start - before :]
        return np.concatenate([head, self.read(self.ends[first], stop)])

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the tokens: the same for any division into shards."""
        digest = hashlib.sha256()
        for start in range(0, self.length, 1 << 20):
            tokens = self.read(start, min(start + (1 << 20), self.length))
            digest.update(tokens.astype("<u4").tobytes())
        return digest.hexdigest()


class RowOrder:
    """The endless order in which rows are seen: for each epoch its own seeded permutation."""

    def __init__(self, n_rows: int, seed: int = 0, shuffle: bool = True):
        self.n_rows, self.seed, self.shuffle = n_rows, seed, shuffle
        self.epoch, self.permutation = -1, np.arange(n_rows)

    def take(self, place: int, n: int) -> np.ndarray:
        """Return the rows at places place .. place + n - 1: int64 (n,)."""
        rows = np.empty(n, np.int64)
        filled = 0
        while filled < n:
            epoch, offset = divmod(place + filled, self.n_rows)
            if self.shuffle and epoch != self.epoch:
                self.permutation = np.random.default_rng([self.seed, epoch]).permutation(
                    self.n_rows
                )
                self.epoch = epoch
            piece = self.permutation[offset : offset + n - filled]
            rows[filled : filled + len(piece)] = piece
            filled += len(piece)
        return rows


class TokenBatches:
    """Batches of rows in a seeded random order, the same global order for any world size.

    `next()` gives this rank's (inputs, targets), each int64 (batch_size, seq_len) on the CPU, in
    pinned memory if `pin`. Every row comes once an epoch. With `shuffle=False` rows come in the
    order of the text, for validation.
    """

    def __init__(
        self,
        shards: TokenShards,
        batch_size: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        pin: bool = False,
    ):
        self.n_rows = shards.rows(seq_len)
        if self.n_rows == 0:
            raise UserError(
                f"{shards.folder} holds {len(shards):,} tokens, one row of {seq_len} needs "
                f"{seq_len + 1:,}; prepare more tokens or choose a shorter seq_len."
            )
        self.shards, self.batch_size, self.seq_len, self.pin = shards, batch_size, seq_len, pin
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.order = RowOrder(self.n_rows, seed, shuffle)
        self.position = 0  # rows that all ranks together have taken since the beginning

    @property
    def epoch(self) -> int:
        """The epoch of the next row: 0 in the first pass over the data."""
        return self.position // self.n_rows

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next (inputs, targets) of this rank and advance."""
        B, T = self.batch_size, self.seq_len
        inputs = torch.empty((B, T), dtype=torch.int64, pin_memory=self.pin)
        targets = torch.empty((B, T), dtype=torch.int64, pin_memory=self.pin)
        into_inputs, into_targets = inputs.numpy(), targets.numpy()  # the same memory
        rows = self.order.take(self.position + self.rank * B, B)
        for b, start in enumerate((rows * T).tolist()):
            tokens = self.shards.read(start, start + T + 1)
            into_inputs[b], into_targets[b] = tokens[:-1], tokens[1:]
        self.position += self.world_size * B
        return inputs, targets

    def state_dict(self) -> dict[str, int]:
        """Return the place in the data, and what it depends on."""
        facts = {"seed": self.seed, "seq_len": self.seq_len, "n_rows": self.n_rows}
        return {"position": self.position, **facts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place, also with another batch or world size; UserError if data differ."""
        for key in ("seed", "seq_len", "n_rows"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"cannot resume: the saved data position has {key} {state[key]}, this run has "
                    f"{key} {getattr(self, key)}; resume with the settings of the first run."
                )
        self.position = state["position"]
