"""Tokenizer benchmark: training and encoding, ours beside rustbpe and Hugging Face tokenizers.

    python benchmarks/tokenizer.py                        # tiny world, 2 MB, vocabulary 2,048
    python benchmarks/tokenizer.py --corpus FOLDER --megabytes 20 --vocab 32768

Each trainer runs in its own process on the same documents (cut at 10,000 characters), with the
same split pattern; time is wall time of training alone, memory is the peak of the process. The
merges of ours and of rustbpe are compared rank for rank.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def load_texts(corpus, megabytes):
    """Documents up to a number of megabytes, from a folder of parquet or from the tiny world."""
    from nanochat.data import open_source

    texts, size = [], 0
    source = open_source(f"folder:{corpus}" if corpus else "tinyworld")
    for text in source.documents("train"):
        if size >= megabytes * 1e6:
            break
        texts.append(text[:10_000])
        size += len(texts[-1].encode("utf-8"))
    return texts, size


def train_nanochat(texts, n_ranks):
    from nanochat.tokenizer import count_chunks, learn_merges, ranks_from_merges

    start = time.perf_counter()
    counts = count_chunks(texts)
    split = time.perf_counter() - start
    ranks = ranks_from_merges(learn_merges(counts, n_ranks - 256))
    return ranks, {"split_seconds": round(split, 2), "different_chunks": len(counts)}


def train_rustbpe(texts, n_ranks):
    import rustbpe

    from nanochat.tokenizer import SPLIT_PATTERN

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), n_ranks, pattern=SPLIT_PATTERN)
    return {bytes(symbol): rank for symbol, rank in tokenizer.get_mergeable_ranks()}, {}


def train_huggingface(texts, n_ranks):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from nanochat.tokenizer import SPLIT_PATTERN

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
    tokenizer.train_from_iterator(iter(texts), trainer)
    return {}, {"vocabulary": tokenizer.get_vocab_size()}


TRAINERS = {
    "nanochat": train_nanochat,
    "rustbpe": train_rustbpe,
    "huggingface": train_huggingface,
}


def measure(name, arguments):
    """Train in this process; print one line of JSON (called in a child process)."""
    import hashlib

    texts, size = load_texts(arguments.corpus, arguments.megabytes)
    cpu, start = time.process_time(), time.perf_counter()
    ranks, facts = TRAINERS[name](texts, arguments.vocab - 9)
    facts["seconds"] = round(time.perf_counter() - start, 2)
    facts["cpu_seconds"] = round(time.process_time() - cpu, 2)
    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        facts["peak_mb"] = round(peak / 1e6)
    except ImportError:  # Windows
        pass
    if ranks:
        facts["ranks"] = len(ranks)
        facts["hash"] = hashlib.sha256(repr(list(ranks.items())).encode()).hexdigest()[:12]
    if name == "nanochat":
        facts["encoding"] = measure_encoding(ranks, texts)
    print(json.dumps({"trainer": name, "megabytes": round(size / 1e6, 1), **facts}))


def measure_encoding(ranks, texts):
    """Encoding speed through tiktoken in one and two threads, in MB/s and million tokens/s."""
    from nanochat.tokenizer import Tokenizer

    tokenizer, found = Tokenizer(ranks), {}
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text.encode("utf-8"))
        if size > 10e6:
            break
    for threads in (1, 2):
        start = time.perf_counter()
        n_tokens = sum(map(len, tokenizer.encode_batch(sample, num_threads=threads)))
        seconds = time.perf_counter() - start
        found[f"mb_per_s_{threads}"] = round(size / 1e6 / seconds, 1)
        found[f"mtok_per_s_{threads}"] = round(n_tokens / 1e6 / seconds, 2)
    return {**found, "bytes_per_token": round(size / n_tokens, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="folder of parquet shards; default: the tiny world")
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--vocab", type=int, default=2048, help="with the 9 special tokens")
    parser.add_argument("--only", choices=list(TRAINERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return measure(arguments.only, arguments)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    hashes = {}
    for name in TRAINERS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{name}: failed ({reason})")
            continue
        facts = json.loads(child.stdout.splitlines()[-1])
        hashes[name] = facts.get("hash")
        print(json.dumps(facts))
    if hashes.get("rustbpe"):
        same = hashes["nanochat"] == hashes["rustbpe"]
        print("merges equal to rustbpe rank for rank:", "yes" if same else "NO")
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
