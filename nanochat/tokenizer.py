"""Byte-level BPE tokenizer with special tokens: train, encode, decode, save, load.

Exported from chapters/01_tokenizer.py (chapter 01, The tokenizer); edit there, not here.
"""

import base64
import codecs
import contextlib
import hashlib
import html
import itertools
import os
import pickletools
import queue
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import tiktoken
import torch

from nanochat.bpe import SPLIT_PATTERN, count_batches, learn_merges, ranks_from_merges, text_batches
from nanochat.common import UserError, atomic_write, read_json, usable_cores, write_json

__all__ = [
    "BLANK_SIGN",
    "ENCODING",
    "LARGEST_FILE",
    "LONG_BLANKS",
    "LONG_RUN",
    "PUSHED",
    "PUSHED_BYTES",
    "SPECIAL_TOKENS",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerFiles",
    "count_chunks",
    "count_in_worker",
    "encode_long",
    "pickled_fields",
    "pieces_as_html",
    "read_limited",
    "read_nanochat_pickle",
    "read_ranks",
    "token_explorer",
    "tokens_as_html",
    "write_ranks",
]


def pieces_as_html(
    pieces: Sequence[str],
    titles: Sequence[object] | None = None,
    colors: Sequence[str | None] | None = None,
) -> str:
    """Return HTML that shows each piece of text on a coloured ground, escaped.

    `titles` gives each piece a tooltip. `colors` gives each a CSS colour (or None for no colour);
    without it six pale colours take turns.
    """
    pale = ("#cfe8ff", "#ffe0cc", "#d3f2e4", "#f6dcec", "#fff0c2", "#e2e2e2")
    spans = []
    for number, piece in enumerate(pieces):
        color = colors[number] if colors is not None else pale[number % len(pale)]
        title = "" if titles is None else f' title="{html.escape(str(titles[number]))}"'
        style = f"background:{color or 'none'};color:#111;white-space:pre-wrap"
        text = html.escape(piece).replace("\n", "↵<br>")
        spans.append(f'<span{title} style="{style}">{text}</span>')
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


def count_in_worker(batches: Iterable[pa.StringArray], pattern: str) -> Counter[str]:
    """Send batches to a new worker process and return its counts; UserError if it dies."""
    code = "import sys; from nanochat.bpe import serve_counts; serve_counts(sys.argv[1])"
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code, pattern],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | path,
    ) as process:
        try:
            with pa.ipc.new_stream(process.stdin, pa.schema({"text": pa.string()})) as stream:
                for batch in batches:
                    stream.write_batch(pa.record_batch([batch], ["text"]))
            process.stdin.close()
            table = pa.ipc.open_stream(process.stdout).read_all()
        except (OSError, pa.ArrowInvalid):
            process.kill()
            with contextlib.suppress(OSError):
                process.stdin.close()
            lines = process.stderr.read().decode("utf-8", "replace").splitlines() or ["no message"]
            raise UserError(
                f"a worker process that counts chunks has died ({lines[-1][:200]}); "
                "free some memory and train again, or count with workers=1."
            ) from None
    return Counter(dict(zip(table["chunk"].to_pylist(), table["n"].to_pylist())))


def count_chunks(
    texts: Iterable[str], pattern: str = SPLIT_PATTERN, workers: int | None = None
) -> Counter[str]:
    """Split texts with the pattern and count each different chunk, in `workers` processes.

    `workers` is by default the number of usable cores, 16 at most. One worker, or less than 12
    million characters (four batches), means this process. The result does not depend on it.
    """
    batches = text_batches(texts)
    begin = list(itertools.islice(batches, 4))
    workers = min(usable_cores(), 16) if workers is None else workers
    if workers <= 1 or len(begin) < 4:
        return count_batches(itertools.chain(begin, batches), pattern)
    waiting: queue.Queue = queue.Queue(workers)

    def feed_worker(_: int) -> Counter[str]:
        feed = iter(waiting.get, None)
        try:
            return count_in_worker(feed, pattern)
        finally:
            for _ in feed:  # a worker that has died must not leave the others waiting
                pass

    with ThreadPoolExecutor(workers) as pool:  # a thread for each worker process, to talk to it
        results = pool.map(feed_worker, range(workers))
        try:
            for batch in itertools.chain(begin, batches):
                waiting.put(batch)
        finally:
            for _ in range(workers):
                waiting.put(None)
        counts: Counter[str] = Counter()
        for result in results:
            counts.update(result)
    return counts


SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",  # ... and reads its answer
    "<|output_end|>",
)


def write_ranks(path: str | Path, ranks: Mapping[bytes, int]) -> None:
    """Write ranks as lines of base64 and number, in order of number."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(symbol).decode()} {rank}\n" for symbol, rank in ordered]
    atomic_write(path, "".join(lines))


LARGEST_FILE = 64_000_000  # bytes; a vocabulary of 65,536 takes about one million


def read_limited(path: Path) -> bytes:
    """Read a file of a tokenizer; UserError when it is missing or far too large to be one."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the folder or train the tokenizer first.")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, a tokenizer at most {LARGEST_FILE:,}; "
            "check the path."
        )
    return path.read_bytes()


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a ranks file; UserError names the first line that is wrong.

    The file is read directly: tiktoken's own reader caches by path and would return an old one.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_limited(Path(path)).splitlines(), 1):
        try:
            encoded, rank = line.split()
            symbol = base64.b64decode(encoded, validate=True)
            if int(rank) != len(ranks) or symbol in ranks or not symbol:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}, line {number}: found {line[:40]!r}, expected new base64 bytes and the "
                f"number {len(ranks)}; the file is damaged, copy it again or train again."
            ) from None
        ranks[symbol] = int(rank)
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{path} lacks some of the 256 single bytes; copy it again or train again.")
    return ranks


class TokenizerFiles:
    """How a Tokenizer is trained, identified, saved and loaded; the base class of Tokenizer."""

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> "Tokenizer":
        """Train on texts; `vocab_size` counts bytes, merges and the nine special tokens.

        A small text may support fewer merges: the tokenizer is then smaller, its `vocab_size`
        says so and a warning tells it. A vocabulary without room for the bytes is a UserError.
        """
        n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
        if n_merges < 0:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {vocab_size - n_merges}; ask for that many or more."
            )
        merges = learn_merges(count_chunks(texts, pattern), n_merges)
        tokenizer = cls(ranks_from_merges(merges), pattern)
        if tokenizer.vocab_size < vocab_size:
            message = f"the text is too small for {vocab_size} tokens; {tokenizer.vocab_size} were"
            warnings.warn(f"{message} learned. More text gives more.", stacklevel=2)
        return tokenizer

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of pattern, ranks and special tokens."""
        digest = hashlib.sha256(repr((self.pattern, SPECIAL_TOKENS)).encode())
        for symbol in self.ranks:
            digest.update(len(symbol).to_bytes(4, "little") + symbol)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.tiktoken` (ranks) and `tokenizer.json` (all else) to a directory."""
        directory = Path(directory)
        write_ranks(directory / "tokenizer.tiktoken", self.ranks)
        facts = {"pattern": self.pattern, "special_tokens": self.special_ids}
        facts |= {"n_vocab": self.vocab_size, "fingerprint": self.fingerprint()}
        write_json(directory / "tokenizer.json", facts)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote; UserError when a file is missing, damaged or of another set."""
        directory = Path(directory)
        facts = read_json(directory / "tokenizer.json")
        ranks = read_ranks(directory / "tokenizer.tiktoken")
        if not isinstance(facts, dict) or not isinstance(facts.get("pattern"), str):
            raise UserError(
                f"{directory / 'tokenizer.json'} is not a nanochat tokenizer: it lacks a "
                "`pattern`; check the folder or train the tokenizer again."
            )
        tokenizer = cls(ranks, facts["pattern"])
        if tokenizer.fingerprint() != facts.get("fingerprint"):
            raise UserError(
                f"the two tokenizer files in {directory} do not belong together: the ranks hash "
                f"to {tokenizer.fingerprint()[:12]}, the JSON file says "
                f"{str(facts.get('fingerprint'))[:12]}; copy both again or train again."
            )
        return tokenizer


LONG_RUN = 900_000  # blanks in a run; from 999,999 on tiktoken's pattern engine gives up
BLANK_SIGN = r"[^\S\r\n\x1c-\x1f]"  # white space as the engine knows it, except line ends
LONG_BLANKS = rf"(?<!{BLANK_SIGN}){BLANK_SIGN}{{%d,}}(?!{BLANK_SIGN}|[\r\n])"


def encode_long(encoding: tiktoken.Encoding, text: str, long_run: int = LONG_RUN) -> list[int]:
    """Encode text as `encode_ordinary` does, but runs of `long_run` blanks past the pattern.

    The cut is that of SPLIT_PATTERN: the last blank before a word goes with the word.
    """
    ids, done = [], 0
    for run in re.finditer(LONG_BLANKS % long_run, text):
        stop = run.end() - (run.end() < len(text))
        ids += encoding.encode_ordinary(text[done : run.start()])
        ids += encoding._encode_single_piece(text[run.start() : stop])
        done = stop
    return ids + encoding.encode_ordinary(text[done:])


class Tokenizer(TokenizerFiles):
    """Byte-level BPE with special tokens: text to integers and back, without loss.

    `ranks` maps byte strings to 0 .. n-1; the special tokens follow as n .. n+8. Encoding is
    done by tiktoken; see `Tokenizer.train` and `Tokenizer.load` for how to get one. A pattern
    that is no regular expression is a UserError.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.pattern = pattern
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        try:
            self.encoding = tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
        except ValueError as error:
            raise UserError(f"tiktoken refuses the pattern {pattern[:60]!r}: {error}") from None
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.bos_id = self.special_ids["<|bos|>"]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint()[:8]})"

    def special(self, name: str) -> int:
        """Return the id of a special token, named with or without its signs: "bos", "<|bos|>"."""
        full = name if name.startswith("<|") else f"<|{name}|>"
        if full not in self.special_ids:
            raise KeyError(f"{name!r} is not one of {', '.join(SPECIAL_TOKENS)}")
        return self.special_ids[full]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Encode text as ordinary tokens, never as special ones; `bos` puts that one in front."""
        short = len(text) < LONG_RUN
        ids = self.encoding.encode_ordinary(text) if short else encode_long(self.encoding, text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, num_threads: int = 2
    ) -> list[list[int]]:
        """Encode several texts, a slice of them in each thread; the same as `encode` of each."""
        size = max(len(texts) // (4 * num_threads), 1)
        slices = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads) as pool:
            rows = pool.map(lambda piece: [self.encode(text, bos) for text in piece], slices)
            return list(itertools.chain.from_iterable(rows))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of the ids (a special token is spelled out)."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD, never an error."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> torch.Tensor:
        """Return int32 (vocab_size,): the bytes that each id stands for, 0 for special tokens."""
        lengths = torch.zeros(self.vocab_size, dtype=torch.int32)
        lengths[: len(self.ranks)] = torch.tensor([len(symbol) for symbol in self.ranks])
        return lengths


PUSHED = ("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE")
PUSHED_BYTES = ("BINBYTES", "SHORT_BINBYTES")
ENCODING = ("tiktoken.core", "Encoding")  # stands for the class; nothing is imported


def pickled_fields(data: bytes) -> Any:
    """Return the plain values in a pickle; nothing in it is imported or called.

    Numbers, text, bytes and dictionaries are read, and the fields of a `tiktoken.Encoding` in
    its place. Anything else is a ValueError.
    """
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(data):
        name = opcode.name
        if name in (*PUSHED, *PUSHED_BYTES):
            stack.append(value)
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            start = len(stack) - 2 if name == "SETITEM" else marks.pop()
            stack[start - 1].update(zip(stack[start::2], stack[start + 1 :: 2]))
            del stack[start:]
        elif name == "GLOBAL" and tuple(value.split(" ")) == ENCODING:
            stack.append(ENCODING)
        elif name == "STACK_GLOBAL" and tuple(stack[-2:]) == ENCODING:
            stack[-2:] = [ENCODING]
        elif name == "NEWOBJ" and stack[-2:] == [ENCODING, ()]:
            stack.pop()
        elif name == "BUILD" and stack[-2] == ENCODING:
            stack[-2:] = stack[-1:]
        elif name == "STOP" and len(stack) == 1:
            return stack[0]
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it contains {name}" + (f" {value!r}" if value is not None else ""))
    raise ValueError("it has no end")


def read_nanochat_pickle(path: str | Path) -> Tokenizer:
    """Convert the `tokenizer.pkl` of the original nanochat, without executing anything in it.

    The file must hold the ranks of byte strings as 0 .. n-1 and nanochat's nine special tokens
    after them; anything else is a UserError. `read_nanochat_pickle(old).save(folder)` converts.
    """
    data = read_limited(Path(path))
    try:
        fields = pickled_fields(data)
        ranks, pattern = fields["mergeable_ranks"], fields["pat_str"]
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        if not all(type(symbol) is bytes for symbol in ranks) or type(pattern) is not str:
            raise ValueError("its ranks or its pattern have the wrong type")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks are not 0, 1, 2, ...")
        if not {bytes([i]) for i in range(256)} <= set(ranks):
            raise ValueError("it lacks some of the 256 single bytes")
        if fields["special_tokens"] != special:
            raise ValueError("its special tokens are not the nine of nanochat")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a tokenizer of the original nanochat ({str(error)[:120]}); nothing "
            "in it was executed; ask where the file comes from or train a tokenizer."
        ) from None
    return Tokenizer(ranks, pattern)


class StreamDecoder:
    """Decode ids one at a time; incomplete UTF-8 is held back until its last byte arrives.

    The pieces together equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is complete now, perhaps an empty string."""
        return self.decoder.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """Return what is still held back, as U+FFFD, and begin anew."""
        rest = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return rest


def tokens_as_html(
    tokenizer: Tokenizer, ids: Sequence[int], colors: Sequence[str | None] | None = None
) -> str:
    """Return HTML that shows each token on a coloured ground, with its id as a tooltip.

    `colors` gives one CSS colour (or None) for each id; without it six pale colours take turns.
    """
    return pieces_as_html([tokenizer.decode([i]) for i in ids], ids, colors)


def token_explorer(tokenizer: Tokenizer, text: str = "") -> Any:
    """Return a widget: a box to type in, and the tokens of what is typed, coloured at once."""
    import ipywidgets

    box = ipywidgets.Textarea(value=text, description="text", layout={"width": "95%"})
    view, count = ipywidgets.HTML(), ipywidgets.Label()

    def show(_: Any = None) -> None:
        ids = tokenizer.encode(box.value)
        view.value = tokens_as_html(tokenizer, ids)
        n_bytes = int(tokenizer.token_bytes()[ids].sum())
        rate = f", {n_bytes / len(ids):.2f} bytes a token" if ids else ""
        count.value = f"{len(box.value)} characters, {n_bytes} bytes, {len(ids)} tokens{rate}"

    box.observe(show, "value")
    show()
    return ipywidgets.VBox([box, count, view])
