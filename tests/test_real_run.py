"""benchmarks/real_run.py: its clock, its child process and what it makes of counts."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


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
    try:
        with pytest.raises(KeyboardInterrupt if end == signal.SIGINT else SystemExit) as caught:
            real_run.train(SimpleNamespace(directory=tmp_path), ["base"], real_run.Clock(0.01))
    finally:
        signal.signal(signal.SIGTERM, old[0])
        if end:
            signal.signal(signal.SIGALRM, old[1])
    assert started[0].returncode == -signal.SIGKILL
    assert os.read(alive, 1) == b""  # hangs if a child of the child still holds it
    os.close(alive)
    started[0].stderr.close()
    if end != signal.SIGINT:
        assert caught.value.code == (143 if end else real_run.AGAIN)
