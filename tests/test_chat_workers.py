"""Fine-tuning and reinforcement in several processes: the same global batch, the same result."""

import json
from pathlib import Path

import pytest
from chat_workers import work
from safetensors.torch import load_file

from nanochat.distributed import launch, setup

WORKERS = str(Path(__file__).with_name("chat_workers.py"))


def read(folder):
    weights = [load_file(folder / f"{name}.safetensors") for name in ("start", "tuned", "model")]
    return weights, json.loads((folder / "history.json").read_text())


def test_two_processes_fine_tune_and_reinforce_as_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    work(tmp_path / "one", setup("cpu"))
    env = {"OMP_NUM_THREADS": "1"}
    launch(WORKERS, [str(tmp_path / "two")], 2, lambda line: None, env=env)
    (alone, one), (together, two) = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["history"] == pytest.approx(two["history"], rel=1e-4)
    assert one["history"][2] < one["history"][0]
    assert any(step["useful"] for step in one["rl"])  # else there was no update to compare
    for first, second in zip(one["rl"], two["rl"]):
        assert first.keys() == second.keys()
        for name in first:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), (name, first)
    assert {"kl", "entropy", "reward"} <= one["rl"][-2].keys() and one["rl"][-2]["kl"] > 0
    assert one["passed"] == pytest.approx(two["passed"])
    for place, (before, after) in enumerate(zip(alone[1:], together[1:])):
        for name in before:
            moved = (before[name] - alone[place][name]).norm()
            assert (before[name] - after[name]).norm() < 1e-3 * moved, name
