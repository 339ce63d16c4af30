"""CORE for any model: the bundle, Hugging Face models, kept results, contamination.

Exported from chapters/07_evaluation.py (chapter 07, Evaluation); edit there, not here.
"""

import csv
import gzip
import hashlib
import json
import math
import re
import shutil
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from nanochat.common import Progress, UserError, atomic_write, read_json, write_json
from nanochat.data import cache_folder, download, leads_out, retrying
from nanochat.evaluation import (
    Task,
    core_table,
    evaluate_task,
    file_names,
    plot_core,
    sum_over,
    summarize,
)
from nanochat.model import GPT

__all__ = [
    "CHAT_CORE",
    "CORE_SHA256",
    "CORE_URL",
    "HubTokenizer",
    "MAX_BYTES",
    "MAX_FILES",
    "MAX_TASK_BYTES",
    "SHORTEST",
    "WORD",
    "archive_size",
    "bundle_entries",
    "chat_core",
    "code_blocks",
    "contamination",
    "fetch_core",
    "kept_result",
    "load_core",
    "load_hub_model",
    "member_path",
    "model_digest",
    "read_items",
    "run_core",
    "run_hashes",
    "save_core",
    "unpack",
]


MAX_TASK_BYTES = 500_000_000  # of one task's file, unpacked


def read_items(path: Path, max_bytes: int = MAX_TASK_BYTES) -> list[dict]:
    """Read the items of a JSON-lines file, gzipped or not.

    UserError names a file that is missing, broken or, counted as it unpacks, over `max_bytes`.
    """
    opener, items, left = gzip.open if path.suffix == ".gz" else open, [], max_bytes
    try:
        with opener(path, "rb") as file:
            while line := file.readline(left + 1):
                left -= len(line)
                if left < 0:
                    raise UserError(
                        f"{path} holds more than {max_bytes:,} bytes; get the file again, or split "
                        f"its items among several tasks."
                    )
                if line.strip():
                    items.append(json.loads(line.decode("utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the whole folder of tasks again.") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); get the file again.") from None
    return items


def bundle_entries(folder: Path) -> list[dict]:
    """Read the task list of the DCLM bundle: core.yaml and eval_meta_data.csv."""
    try:
        import yaml
    except ImportError:
        raise UserError("core.yaml needs the package pyyaml: pip install pyyaml.") from None
    with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in table}
    listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    return [
        {
            "label": task["label"],
            "file": str(Path("eval_data") / task["dataset_uri"]),
            "task_type": task["icl_task_type"],
            "num_fewshot": task["num_fewshot"][0],
            "continuation_delimiter": task.get("continuation_delimiter", " "),
            "random_baseline": baselines[task["label"]],
        }
        for task in listed
    ]


def load_core(folder: str | Path) -> list[Task]:
    """Load the CORE tasks of a folder with manifest.json, or of the DCLM bundle (core.yaml).

    Baselines are percents in the files and shares in `Task`. A listed task without a file is
    left out; a missing or broken file raises UserError.
    """
    folder = Path(folder)
    lists = [folder / name for name in ("manifest.json", "core.yaml")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{folder} holds no CORE tasks: neither manifest.json nor core.yaml was found; "
            f"give the folder that holds one of them."
        )
    try:
        whole = found.suffix == ".yaml"
        entries = bundle_entries(folder) if whole else read_json(found)["tasks"]
        facts = [
            (
                entry["label"],
                entry["task_type"],
                folder / entry["file"],
                int(entry["num_fewshot"]),
                entry.get("continuation_delimiter", " "),
                float(entry["random_baseline"]) / 100,
            )
            for entry in entries
            if entry.get("file")
        ]
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{found} is no list of tasks ({said}); get the folder again.") from None
    return [
        Task(label, kind, read_items(path), shots, delimiter, baseline)
        for label, kind, path, shots, delimiter, baseline in facts
    ]


CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
MAX_FILES, MAX_BYTES = 1000, 2 * 10**9


def member_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """Return the path of an archive's member; UserError unless it is a plain relative file name."""
    path, kind = PurePosixPath(info.filename), stat.S_IFMT(info.external_attr >> 16)
    if leads_out(info.filename) or not path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"the archive holds {info.filename!r}, which is no plain file inside of it; "
            f"do not use this archive."
        )
    return path


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Unpack a zip file into a new folder, complete or not at all.

    Refuses names that lead out of the folder, links, more than MAX_FILES members and, counted as
    they come, more than `max_bytes` bytes (UserError). Checksums inside the archive are checked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as place:
        target, left = Path(place) / "files", max_bytes
        target.mkdir()
        try:
            with zipfile.ZipFile(archive) as source:
                members = source.infolist()
                if len(members) > MAX_FILES:
                    raise UserError(f"{archive} holds {len(members):,} files; do not use it.")
                for info in members:
                    path = target / member_path(info)
                    if info.is_dir():
                        continue
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with source.open(info) as packed, open(path, "wb") as file:
                        while block := packed.read(1 << 20):
                            left -= len(block)
                            if left < 0:
                                raise UserError(
                                    f"{archive} unpacks to more than {max_bytes:,} bytes; "
                                    f"do not use it."
                                )
                            file.write(block)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{archive} is no sound zip file ({error}); get it again.") from None
        except OSError as error:
            raise UserError(
                f"{archive} cannot be unpacked ({error}); free some space or get it again."
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)


def archive_size(url: str) -> int:
    """Ask the server for the size of a file in bytes; UserError when that is missing or absurd."""

    def ask() -> int:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "nanochat"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.headers.get("Content-Length") or 0)

    size = retrying(ask, f"size of {url}")
    if not 0 < size <= MAX_BYTES:
        raise UserError(f"{url} says it has {size:,} bytes; check the address, or use a folder.")
    return size


def fetch_core(
    folder: str | Path | None = None, url: str = CORE_URL, digest: str = CORE_SHA256
) -> Path:
    """Return the folder of the CORE bundle, after downloading it if it is not here yet.

    It is kept in `folder`, or in $NANOCHAT_CACHE or ~/.cache/nanochat under `core/`. The archive is
    verified by its SHA-256, unpacked and thrown away; when a file has changed its size since, it is
    fetched again. Raises UserError without a network or when anything is wrong with the file.
    """
    place = Path(folder) if folder else cache_folder() / "core"
    files, note, archive = place / "files", place / "unpacked.json", place / "eval_bundle.zip"

    def sizes() -> dict[str, int]:
        paths = sorted(path for path in files.rglob("*") if path.is_file())
        return {path.relative_to(files).as_posix(): path.stat().st_size for path in paths}

    known = read_json(note) if note.is_file() else None
    if known != {"sha256": digest, "sizes": sizes()}:
        size = archive_size(url)
        with Progress(size, "download of CORE", "byte") as bar:
            download(url, archive, size, digest, arrived=bar.update)
        unpack(archive, files)
        archive.unlink()
        write_json(note, {"sha256": digest, "sizes": sizes()})
    lists = sorted(files.glob("**/core.yaml")) + sorted(files.glob("**/manifest.json"))
    if not lists:
        raise UserError(f"the archive at {url} holds no CORE tasks; use a folder that does.")
    return lists[0].parent


class HubTokenizer:
    """A tokenizer of Hugging Face with the methods of ours that scoring needs.

    Texts begin with the model's bos token, or with its end-of-text token where it has no bos.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        bos, end = inner.bos_token_id, inner.eos_token_id
        self.bos_id = end if bos is None else bos
        if self.bos_id is None:
            raise UserError("this tokenizer has neither a bos nor an eos token; use another model.")

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, num_threads: int = 0
    ) -> list[list[int]]:
        """Encode several texts; `bos` puts that token in front of each."""
        rows = self.inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[self.bos_id, *row] if bos else list(row) for row in rows]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Encode one text."""
        return self.encode_batch([text], bos)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        return self.inner.decode(list(ids))

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary."""
        vocabulary = json.dumps(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(vocabulary.encode()).hexdigest()


def load_hub_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, HubTokenizer]:
    """Return (model, tokenizer) of a causal model of Hugging Face, by name or folder.

    Reads safetensors only and runs no code of the repository. Needs the extra `eval-hf`. Raises
    UserError when the package, the model or its safetensors file is not there.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            "models of Hugging Face need the package transformers: pip install -e '.[eval-hf]'."
        ) from None
    safe = dict(use_safetensors=True, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, **safe)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"there is no causal model with safetensors and a tokenizer at {name!r} ({said}); "
            f"check the name, the network, or give a folder."
        ) from None
    return model.to(device=device, dtype=dtype).eval(), HubTokenizer(tokenizer)


def model_digest(model: Any) -> str:
    """Return a SHA-256 over all weights of a model; of ours, also how it computes with them."""
    how = f"{model.config} {model.compute_dtype}" if isinstance(model, GPT) else ""
    digest = hashlib.sha256(how.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept_result(path: Path, about: dict) -> dict | None:
    """Return the result kept at a path, None if there is none; UserError if of something else."""
    if not path.is_file():
        return None
    kept = read_json(path)
    other = [key for key in about if kept.get(key) != about[key]]
    if other:
        raise UserError(
            f"{path} belongs to another {' and '.join(other)}; choose another folder for these "
            f"results, or delete that one."
        )
    return kept["result"]


def run_core(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    folder: str | Path,
    limit: int | None = None,
    world: Any = None,
    title: str = "CORE",
) -> dict:
    """Score tasks as `evaluate_core` does, keep each result in `folder` at once, and go on there.

    Writes `tasks/NAME.json`, and at the end core.json, core.md (a table) and core.png (a picture).
    With a `world` all processes share the items and the first one writes. Raises UserError when two
    tasks would share a file, or a file holds the result of something else.
    """
    folder, main = Path(folder), world is None or world.is_main
    paths = [folder / "tasks" / f"{name}.json" for name in file_names(tasks)]
    common = {"model": model_digest(model), "tokenizer": tokenizer.fingerprint(), "limit": limit}
    abouts = []
    for task in tasks:
        text = json.dumps(asdict(task), sort_keys=True)
        abouts.append({**common, "task": hashlib.sha256(text.encode()).hexdigest()})
    kept = [kept_result(path, about) for path, about in zip(paths, abouts)]
    if world is not None:  # only what every process can see counts as done
        seen = sum_over(world, torch.tensor([float(r is not None) for r in kept]).double())
        kept = [r if n == world.world_size else None for r, n in zip(kept, seen.tolist())]
    results = {}
    n_items = sum(len(task.items[:limit]) for task in tasks)
    with Progress(n_items, title, "item") if main else nullcontext() as bar:
        if main:
            bar.skip(sum(result["n"] for result in kept if result))
        for task, result, path, about in zip(tasks, kept, paths, abouts):
            if result is None:
                result = evaluate_task(model, tokenizer, task, limit, world=world, progress=bar)
                if main:
                    write_json(path, {**about, "result": result})
            results[task.name] = result
    summary = {**summarize(results), **common}
    if main:
        save_core(summary, folder, title)
    return summary


def save_core(summary: dict, folder: Path, title: str) -> None:
    """Write a result of `run_core` as core.json, core.md and core.png."""
    import matplotlib.pyplot as plt

    write_json(folder / "core.json", summary)
    atomic_write(folder / "core.md", f"# {title}\n\n{core_table(summary)}\n")
    found = f"{title}: {summary['core']:.4f} ({summary['low']:.4f} to {summary['high']:.4f})"
    fig, _ = plot_core({"accuracy": summary}, title=found)
    fig.savefig(folder / "core.png")
    plt.close(fig)


CHAT_CORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")


def chat_core(results: dict[str, dict]) -> dict:
    """Return ChatCORE with its interval, as `summarize` does, of the results of all six tasks.

    A result holds accuracy, chance, centered and n. Raises UserError when a task is missing.
    """
    missing = [name for name in CHAT_CORE if name not in results]
    if missing:
        raise UserError(
            f"ChatCORE is the mean of {len(CHAT_CORE)} tasks and {', '.join(missing)} did not run; "
            f"run them, or report the tasks one by one."
        )
    return summarize({k: {**results[k], "baseline": results[k]["chance"]} for k in CHAT_CORE})


WORD = re.compile(r"\w+")
SHORTEST = 5  # words; a text of fewer says nothing about where it comes from


def run_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """Hash each run of n codes (W,) uint64 into (W - n + 1,) uint64; 0 where the run holds a 0."""
    count = max(0, len(codes) - n + 1)
    hashes, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for j in range(n):
        part = codes[j : j + count]
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + part  # modulo 2**64
        known &= part != 0
    return np.where(known, hashes, np.uint64(0))


def code_blocks(
    documents: Iterable[str], codes: dict[str, int], block: int
) -> Iterator[np.ndarray]:
    """Yield the codes of the documents' words, about `block` at a time, a 0 between documents."""
    words: list[int] = []
    for text in documents:
        words.append(0)
        words.extend(codes.get(word, 0) for word in WORD.findall(text.lower()))
        if len(words) >= block:
            yield np.array(words, np.uint64)
            words = []
    yield np.array(words, np.uint64)


def contamination(
    texts: Sequence[str], documents: Iterable[str], n: int = 13, block: int = 1_000_000
) -> np.ndarray:
    """Return for each text the share of its runs of n words that some document holds, (texts,).

    Case, punctuation and spaces do not count. A text of fewer than n words is looked for as a
    whole; one of fewer than SHORTEST words gets NaN. Reads the documents once.
    """
    split = [WORD.findall(text.lower()) for text in texts]
    vocabulary = sorted({word for words in split for word in words})
    drawn = np.random.default_rng(0).integers(1, 2**64, len(vocabulary), np.uint64)
    codes = dict(zip(vocabulary, drawn.tolist()))
    lengths = [min(n, len(words)) for words in split]
    runs = [
        run_hashes(np.array([codes[word] for word in words], np.uint64), length)
        for words, length in zip(split, lengths)
    ]
    wanted = {
        length: np.unique(np.concatenate([r for r, m in zip(runs, lengths) if m == length]))
        for length in {m for m in lengths if m >= SHORTEST}
    }
    found = {length: np.zeros(len(hashes), bool) for length, hashes in wanted.items()}
    for part in code_blocks(documents, codes, block) if wanted else ():
        for length, hashes in wanted.items():
            seen = run_hashes(part, length)
            at = np.searchsorted(hashes, seen).clip(max=len(hashes) - 1)
            found[length][at[hashes[at] == seen]] = True
    return np.array(
        [
            found[m][np.searchsorted(wanted[m], r)].mean() if m in wanted else math.nan
            for r, m in zip(runs, lengths)
        ]
    )
