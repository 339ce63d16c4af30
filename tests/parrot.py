"""A stand-in for the engine of chapter 8: the same `generate`, but no model."""

import threading
import time
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer


class Token(NamedTuple):
    """Same fields as nanochat.engine.Token."""

    id: int
    text: str
    logprob: float
    forced: bool


@lru_cache
def small_tokenizer() -> Tokenizer:
    text = "You said: the quick brown fox. Hello there, 12*3 is 36 and so on."
    return Tokenizer.train([text] * 4, 300)


def wait_for(condition, seconds=60.0):
    """Wait until condition() is true; False when `seconds` pass first."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


class Parrot:
    """Answers "You said: " and the last question; `reply` replaces that by a fixed text.

    A tag such as <|python_start|> in `reply` becomes the special token. Repeats it `times` times.
    Writes down its calls.
    """

    def __init__(self, delay=0.0, window=512, reply=None, fail_after=None, tail=True, times=1):
        self.tokenizer = small_tokenizer()
        self.delay, self.reply, self.fail_after, self.tail = delay, reply, fail_after, tail
        self.times = times
        self.model = SimpleNamespace(config=SimpleNamespace(seq_len=window))
        self.calls, self.running, self.closed = [], 0, 0

    def _answer(self, ids):
        special = self.tokenizer.special
        if self.reply is not None:
            text = self.reply
        elif special("user_start") in ids:
            start = len(ids) - ids[::-1].index(special("user_start"))
            end = len(ids) - 1 - ids[::-1].index(special("user_end"))
            text = "You said: " + self.tokenizer.decode(ids[start:end])
        else:
            text = " and so on"
        while text:
            tags = SPECIAL_TOKENS if self.reply is not None else []  # what a user wrote is text
            found = [(text.find(name), name) for name in tags if name in text]
            at, name = min(found, default=(len(text), ""))
            for _ in range(self.times):
                yield from self.tokenizer.encode(text[:at])
            if name:
                yield special(name)
            text = text[at + len(name) :]
        if self.tail:
            yield special("assistant_end")

    def generate(self, ids, max_tokens=256, stop=None, **options):
        self.calls.append({"ids": list(ids), "max_tokens": max_tokens, **options})
        self.running += 1
        inside, decoder = False, StreamDecoder(self.tokenizer)
        try:
            for count, token in enumerate(self._answer(list(ids))):
                if count >= max_tokens:
                    return
                if self.delay:
                    time.sleep(self.delay)
                if stop is not None and stop.is_set():
                    return
                if count == self.fail_after:
                    raise RuntimeError("secret path /home/somebody/model.safetensors")
                inside = (inside or token == self.tokenizer.special("output_start")) and (
                    token != self.tokenizer.special("output_end")
                )
                yield Token(token, decoder.push(token), -0.25, inside)
        finally:
            self.running -= 1
            self.closed += 1


class Gated(Parrot):
    """Says its first `free` tokens, then nothing until `gate` is set."""

    def __init__(self, free=0, **options):
        super().__init__(**options)
        self.free, self.gate = free, threading.Event()

    def generate(self, ids, **options):
        for count, token in enumerate(super().generate(ids, **options)):
            if count >= self.free:
                assert self.gate.wait(60)
            yield token
