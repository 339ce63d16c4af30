"""benchmarks/real_run.py: its clock, its child process and what it makes of counts."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.tinyworld import World


@pytest.fixture
def real_run(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("real_run", folder / "real_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, None])
def test_whatever_ends_the_program_its_child_ends_with_it(real_run, monkeypatch, tmp_path, end):
    """Two signals, and the time that is up; the child's own child must not stay either."""
    alive, writer = os.pipe()  # the read end says "closed" when nobody holds the write end
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho up >&2\nsleep 60 & sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    started, popen = [], subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options, stderr=subprocess.PIPE, pass_fds=[writer]))
        os.close(writer)
        started[0].stderr.readline()  # it runs
        if end:
            old.append(signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), end)))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        return started[0]

    old = [signal.signal(signal.SIGTERM, real_run.leave)]
    monkeypatch.setattr(subprocess, "Popen", start)
    # A job in the background has SIGINT ignored; the program is for people in the foreground.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt if end == signal.SIGINT else SystemExit) as caught:
            real_run.train(SimpleNamespace(directory=tmp_path), ["base"], real_run.Clock(0.01))
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, old[0])
        if end:
            signal.signal(signal.SIGALRM, old[1])
    assert started[0].returncode == -signal.SIGKILL
    assert os.read(alive, 1) == b""  # hangs if a child of the child still holds it
    os.close(alive)
    started[0].stderr.close()
    if end != signal.SIGINT:
        assert caught.value.code == (143 if end else real_run.AGAIN)


def test_the_error_of_a_mean_is_over_groups(real_run):
    values = np.random.default_rng(0).normal(size=60)
    mean, error = real_run.mean_and_error(values, range(60))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 60**0.5)
    # the same values three times over are no news, if one says that they belong together
    tripled, groups = np.tile(values, 3), list(range(60)) * 3
    assert real_run.mean_and_error(tripled, groups) == pytest.approx((mean, error))
    assert real_run.mean_and_error(tripled, range(180))[1] < 0.6 * error


def test_a_gain_is_over_pairs(real_run):
    found = lambda right: dict(samples=8, right=right, groups=list("abcd"))  # noqa: E731
    before, after = found([0, 2, 4, 6]), found([1, 4, 5, 8])  # 1, 2, 1, 2 of 8 more
    gain, errors = real_run.gain(before, after, 1)
    assert gain == pytest.approx(1.5 / 8)
    assert errors == pytest.approx(1.5 / (np.std([1, 2, 1, 2], ddof=1) / 2))
    assert real_run.gain(before, after, 8)[0] == pytest.approx(1 / 4)  # solved at all: 3, then 4
    assert real_run.gain(before, before, 1) == (0, 0)
    with pytest.raises(UserError, match="same problems"):
        real_run.gain(before, {**after, "groups": list("abce")}, 1)


def test_no_question_is_asked_twice_and_those_about_a_word_are_a_group(real_run, monkeypatch):
    asked = []

    def count_right(engine, problems, samples, max_tokens, batch):
        asked.extend(problems)
        return [samples * (number % 2) for number in range(len(problems))]

    monkeypatch.setattr(real_run, "count_right", count_right)
    monkeypatch.setattr(real_run, "problem_prompt", lambda problem, tokenizer: [0])
    model = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(recipe=SimpleNamespace(max_tokens=99, exam_items=1000, seq_len=512))
    found = real_run.passes(run, SimpleNamespace(model=model, tokenizer=None), "spelling")
    questions = [problem["question"] for problem in asked]
    assert len(set(questions)) == len(questions) == found["n"] == len(found["right"]) > 500
    for problem, word in zip(asked, found["groups"]):
        assert f'"{word}"' in problem["question"]
    assert set(found["groups"]) <= set(World().index["words"]["test"])
    assert found["n_groups"] == len(set(found["groups"]))
    assert found["pass@1"] == found["pass@8"] == pytest.approx(0.5, abs=0.01)


def test_chance_counts_the_choices_of_each_question(real_run, monkeypatch):
    items = [("?", ["a"] * n, gold, "") for n, gold in ((4, 0), (4, 1), (5, 1), (2, 1))]

    class Exam:
        __len__ = lambda self: len(items)  # noqa: E731
        item = lambda self, i: items[i]  # noqa: E731

    monkeypatch.setattr(real_run, "real_task", lambda recipe, kind, split: Exam())
    chance, letter = real_run.without_reading(SimpleNamespace(recipe=None), Exam)
    assert chance == pytest.approx((0.25 + 0.25 + 0.2 + 0.5) / 4) and letter == 0.75


def test_no_engine_is_built_when_the_time_is_nearly_up(real_run, monkeypatch, tmp_path):
    built, work = [], {"one": lambda engine: 1, "two": lambda engine: 2}
    names = lambda run, stage: {f"{stage} {name}": make for name, make in work.items()}  # noqa: E731
    monkeypatch.setattr(real_run, "measurements", names)
    run = SimpleNamespace(
        directory=tmp_path,
        recipe=SimpleNamespace(device="cpu"),
        engine=lambda stage, max_batch: built.append(stage),
    )
    clock = real_run.Clock(1.0)
    clock.end -= 55  # 5 seconds of 60 are left
    with pytest.raises(SystemExit) as caught:
        real_run.measure(run, clock)
    assert caught.value.code == real_run.AGAIN and not built
    found = real_run.measure(run, real_run.Clock(1.0))
    assert built == list(real_run.MODELS[1:]) and len(found) == 2 * len(built)
    assert real_run.measure(run, clock) == found  # with nothing to do, time does not matter
