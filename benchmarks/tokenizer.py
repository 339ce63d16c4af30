"""Tokenizer benchmark: training and encoding, ours beside rustbpe and Hugging Face tokenizers.

    python benchmarks/tokenizer.py                        # tiny world, 20 MB, vocabulary 2,048
    python benchmarks/tokenizer.py --corpus FOLDER --vocab 32768 --megabytes 50 --repeats 3
    python benchmarks/tokenizer.py --corpus FOLDER --vocab 32768 --expect RANKS.tiktoken

Each trainer runs in its own process on the same documents (cut at 10,000 characters, all shards of
the folder but the last), with the same split pattern. Time is wall time of training alone, from
texts in memory to ranks: for ours it includes starting the worker processes and loading numba (and,
the first time on a machine, compiling). CPU seconds, workers included, say more when the machine
has other work. Memory is the largest sum over the process and its workers,
sampled every tenth of a second, the texts included. The ranks of ours, of rustbpe and of the
file given with --expect are compared one by one. Prints Markdown (and each round, as it ends, to
the error output).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def load_texts(corpus, megabytes):
    """Documents up to a number of megabytes, from a folder of parquet or from the tiny world."""
    texts, size = [], 0
    for text in documents_of(corpus):
        if size >= megabytes * 1e6:
            break
        texts.append(text[:10_000])
        size += len(texts[-1].encode("utf-8"))
    return texts, size


def documents_of(corpus):
    if corpus is None:
        from nanochat.tinyworld import World, document

        world = World(0)
        for index in range(10**9):
            yield document(world, index)
    import pyarrow.parquet as pq

    for path in sorted(Path(corpus).glob("*.parquet"))[:-1]:
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def train_nanochat(texts, n_ranks, workers):
    from nanochat.bpe import learn_merges, ranks_from_merges
    from nanochat.tokenizer import count_chunks

    start = time.perf_counter()
    counts = count_chunks(texts, workers=workers)
    middle = time.perf_counter()
    ranks = ranks_from_merges(learn_merges(counts, n_ranks - 256))
    end = time.perf_counter()
    note = f"counting {middle - start:.1f} s, merging {end - middle:.1f} s"
    return ranks, end - start, f"{note}, {len(counts):,} different chunks"


def train_plain(texts, n_ranks, workers):
    from nanochat import bpe

    bpe.COMPILE_FROM = 10**12
    return train_nanochat(texts, n_ranks, workers)


def train_rustbpe(texts, n_ranks, workers):
    import rustbpe

    from nanochat.bpe import SPLIT_PATTERN

    start = time.perf_counter()
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), n_ranks, pattern=SPLIT_PATTERN)
    seconds = time.perf_counter() - start
    return {bytes(s): rank for s, rank in tokenizer.get_mergeable_ranks()}, seconds, ""


def train_huggingface(texts, n_ranks, workers):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from nanochat.bpe import SPLIT_PATTERN

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False
    )
    start = time.perf_counter()
    tokenizer.train_from_iterator(iter(texts), trainer)
    return {}, time.perf_counter() - start, "another tie-break: ranks not comparable"


TRAINERS = {
    "ours": train_nanochat,
    "ours without numba": train_plain,
    "rustbpe": train_rustbpe,
    "Hugging Face tokenizers": train_huggingface,
}


def child(arguments):
    """Train in this process; leave the ranks in a file and the figures as one line of JSON."""
    from nanochat.tokenizer import write_ranks

    texts, size = load_texts(arguments.corpus, arguments.megabytes)
    trainer, n_ranks = TRAINERS[arguments.only], arguments.vocab - 9
    start = sum(os.times()[:4])  # of this process and of the children it has waited for
    ranks, seconds, note = trainer(texts, n_ranks, arguments.workers)
    cpu = sum(os.times()[:4]) - start
    if ranks:
        write_ranks(arguments.out, ranks)
    found = {"megabytes": size / 1e6, "seconds": seconds, "cpu": cpu, "note": note}
    print(json.dumps(found))


def measure(name, arguments, out):
    """Run one trainer in a child process; return its figures with the peak memory in GB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", str(out)]
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(arguments.workers),
    }
    process = psutil.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = 0
    while process.poll() is None:
        total = 0
        for one in [process, *children_of(process)]:
            try:
                total += one.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    output, errors = process.communicate()
    if process.returncode:
        return {"error": (errors.strip().splitlines() or ["no message"])[-1]}
    return json.loads(output.splitlines()[-1]) | {"peak": peak / 1e9}


def children_of(process):
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def encoding_table(ranks, arguments):
    """Print the speed of encoding, in MB/s and million tokens/s, several ways side by side."""
    from nanochat.tokenizer import Tokenizer

    texts, size = load_texts(arguments.corpus, min(arguments.megabytes, 10))
    tokenizer = Tokenizer(ranks)
    ways = {
        "`encode`, text by text": lambda: [tokenizer.encode(text) for text in texts],
        "`encode_batch`, 1 thread": lambda: tokenizer.encode_batch(texts, num_threads=1),
        "`encode_batch`, 2 threads": lambda: tokenizer.encode_batch(texts, num_threads=2),
        "tiktoken's own batch, 2 threads": lambda: tokenizer.encoding.encode_ordinary_batch(
            texts, num_threads=2
        ),
    }
    print(f"\n| encoding {size / 1e6:.0f} MB | MB/s | million tokens/s |\n| --- | --- | --- |")
    rows = {}
    for name, way in ways.items():
        start = time.perf_counter()
        rows[name] = way()
        seconds = time.perf_counter() - start
        n_tokens = sum(map(len, rows[name]))
        rate = f"{size / 1e6 / seconds:.1f} | {n_tokens / 1e6 / seconds:.2f}"
        print(f"| {name} | {rate} |")
    same = all(row == rows["`encode`, text by text"] for row in rows.values())
    print(f"\nThe same tokens every way: {yes(same)}. {size / n_tokens:.3f} bytes a token.")
    return same


def yes(value):
    return "yes" if value else "**NO**"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="folder of parquet shards; default: the tiny world")
    parser.add_argument("--megabytes", type=float, help="how much text; default: all, or 20 MB")
    parser.add_argument("--vocab", type=int, default=2048, help="with the 9 special tokens")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of ours, threads of theirs"
    )
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the best time counts")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(TRAINERS))
    parser.add_argument("--expect", help="a ranks file that ours has to equal")
    parser.add_argument("--only", choices=list(TRAINERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.megabytes is None:
        arguments.megabytes = 1e9 if arguments.corpus else 20
    if arguments.only:
        return child(arguments)
    from nanochat.tokenizer import read_ranks

    names = [name for name in TRAINERS if name not in arguments.skip]
    best, ranks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for name in names:
                out = Path(folder, name)
                found = measure(name, arguments, out)
                print(f"{name}: {found}", file=sys.stderr, flush=True)
                if name not in best or found.get("seconds", 1e9) < best[name].get("seconds", 1e9):
                    best[name] = found
                if out.exists():
                    ranks[name] = read_ranks(out)
    size = max(found.get("megabytes", 0) for found in best.values())
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; ",
        end="",
    )
    print(f"{size:.0f} MB, vocabulary {arguments.vocab:,}, best of {arguments.repeats}\n")
    print("| training | seconds | against ours | CPU seconds | peak memory | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in best.items():
        if "error" in found:
            print(f"| {name} | failed: {found['error'][:80]} | | | | |")
            continue
        ratio = found["seconds"] / best["ours"].get("seconds", float("nan"))
        row = f"| {name} | {found['seconds']:.1f} | {ratio:.2f} | {found['cpu']:.1f}"
        row += f" | {found['peak']:.2f} GB"
        print(f"{row} | {found['note']} |")
    good, ours = True, ranks["ours"]
    others = {name: ranks[name] for name in ("ours without numba", "rustbpe") if name in ranks}
    if arguments.expect:
        others[Path(arguments.expect).name] = read_ranks(arguments.expect)
    print()
    for name, other in others.items():
        good &= other == ours
        print(f"All {len(ours):,} ranks equal to {name}: {yes(other == ours)}.  ")
    return 0 if encoding_table(ours, arguments) and good else 1


if __name__ == "__main__":
    sys.exit(main())
