"""nanochat.common: devices, files that are never half-written, logs, progress."""

import errno
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat import common
from nanochat.common import (
    MetricsLog,
    Progress,
    UserError,
    atomic_write,
    format_seconds,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    read_json,
    read_metrics,
    seed_everything,
    usable_cores,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_an_absent_device_is_one_clear_sentence():
    with pytest.raises(UserError, match="'tpu' is not available; found cpu"):
        pick_device("tpu")
    with pytest.raises(UserError, match="cpu:x"):
        pick_device("cpu:x")
    assert pick_device("cpu").type == "cpu"


def test_the_dtype_is_one_the_device_multiplies():
    dtype = pick_dtype(torch.device("cpu"))
    assert dtype in (torch.bfloat16, torch.float32)
    assert (torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype)).dtype == dtype


def test_usable_cores_are_those_lent_to_us(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows
    for counted, expected in ((64, 64), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda counted=counted: counted)
        assert usable_cores() == expected


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so soon"
)
def test_freed_memory_is_kept():
    program = (
        "import resource, sys, torch\n"
        "from nanochat.common import keep_freed_memory\n"
        "assert sys.argv[1] == 'return' or keep_freed_memory()\n"
        "for _ in range(20): torch.ones(2**23)\n"  # until everything has its place
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2**23)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    def faults(how):
        run = [sys.executable, "-c", program, how]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    returned = faults("return")
    if not returned:
        pytest.skip("this system does not count page faults")
    assert faults("keep") < returned / 3


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(common.sys, "platform", "darwin")
    assert not keep_freed_memory()
    monkeypatch.setattr(common.sys, "platform", "linux")
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert not keep_freed_memory()


@given(value=JSON)
def test_json_comes_back_as_written(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "deep" / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    atomic_write(path, "old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(common.os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*state.json"):
        atomic_write(tmp_path / "file" / "state.json", "new")


def test_missing_and_broken_json_say_so(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "broken.json")


NO_NAMES = {"folder": ".", "nothing": "", "nul": "a\0b", "long": "x" * 300, "half": "a\ud800b"}


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: write_json(name, 1), lambda: read_json(name)):
        with pytest.raises(UserError, match="cannot (read|write) "):
            use()
    assert os.listdir(tmp_path) == []


def test_json_too_deep_to_read_says_so(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_half_a_character_comes_back_as_written(tmp_path):
    write_json(tmp_path / "half.json", {"typed": "caf\udce9"})
    assert read_json(tmp_path / "half.json") == {"typed": "caf\udce9"}
    (tmp_path / "half.json").read_text(encoding="utf-8")  # other programs can read it too


def test_the_log_keeps_events_in_order_and_survives_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", stage="base")
    log.write("step", step=1, loss=2.0)
    log.bind(stage="sft").write("step", step=2, loss=1.0)
    log.write("eval", bits_per_byte=0.5)
    with open(log.path, "a") as file:
        file.write('{"event": "step", "st')
    assert [e["step"] for e in read_metrics(log.path, "step")] == [1, 2]
    assert [e["step"] for e in read_metrics(log.path, "step", stage="sft")] == [2]
    assert len(read_metrics(log.path)) == 3
    log.write("step", step=3)  # after a restart: the torn line must not swallow this one
    assert [e["step"] for e in read_metrics(log.path, "step")] == [1, 2, 3]
    assert log.path.read_text().count("\n") == 5
    assert read_metrics(tmp_path / "absent.jsonl") == []
    for line in log.path.read_text().splitlines()[:3]:
        assert json.loads(line)["stage"] in ("base", "sft")


def test_the_log_keeps_any_text_and_survives_half_a_character(tmp_path):
    log, said = MetricsLog(tmp_path / "metrics.jsonl"), "a\u2028b\x85c\r\nd 고양이"
    log.write("sample", text=said)  # some of these end a line for str.splitlines
    log.write("sample", text="cut")
    log.path.write_bytes(log.path.read_bytes()[:-5] + "é".encode()[:1])
    assert [e["text"] for e in read_metrics(log.path)] == [said]


def test_a_log_without_a_path_keeps_nothing(tmp_path):
    MetricsLog(None).write("step", step=1)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_sparse_and_plain_in_a_pipe(capsys):
    with Progress(1000, "pretrain", quiet=1000.0) as bar:
        for _ in range(1000):
            bar.update(loss=1.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pretrain 1,000/1,000 steps | loss 1.5 | ")


def test_progress_of_a_resumed_run_counts_only_its_own_time():
    bar = Progress(100, "pretrain")
    bar.skip(90)
    bar.start -= 10.0
    bar.done += 5
    assert bar.text().endswith("10s left")  # 5 steps took 10 s, 5 are left


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7800, "2h 10m")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text


def test_one_seed_fixes_every_generator():
    import random

    import numpy as np

    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_a_figure_has_axes_named():
    import matplotlib

    matplotlib.use("Agg")
    fig, ax = common.figure("Loss falls", "step", "loss (nats)", alt="a falling line")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats)")
    assert fig.get_label() == "a falling line"


def test_two_machines_may_write_one_file(tmp_path, monkeypatch):
    """Process ids may be the same on both, so the name before the renaming must not be."""
    names = []
    monkeypatch.setattr(os, "getpid", lambda: 35)
    monkeypatch.setattr(os, "replace", lambda old, new: names.append(old))
    for _ in range(2):
        atomic_write(tmp_path / "recipe.json", "{}")
    assert len(set(names)) == 2
