"""What a job does when ranks, launchers and whole nodes are killed under it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import distributed
from nanochat.common import UserError
from nanochat.distributed import LaunchError, compare_ranks, launch, refuse_to_repeat

TESTS = Path(__file__).parent
WORKERS = str(TESTS / "distributed_workers.py")
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and sessions of POSIX")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill_ranks")
    env = {**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parents[1])}
    program = [sys.executable, str(TESTS / "kill_ranks.py"), str(folder)]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@posix_only
def test_ten_killed_ranks_leave_no_trace(killed):
    """Restarted from the last checkpoint each time, the run ends with the same bits."""
    job = killed["killed"]
    assert killed["restarts"] >= 10 and job["finished"]  # more if a port was taken meanwhile
    assert job["lost_steps"] and max(job["lost_steps"]) <= killed["save_every"]
    assert job["loss_gap"] == 0 and job["weight_gap"] == 0


@posix_only
@pytest.mark.parametrize(("name", "ranks"), [("changed", 3), ("nodes", 1)])
def test_a_job_goes_on_with_another_number_of_ranks(killed, name, ranks):
    """Launched again with three, or one of two nodes lost: the same curve within rounding."""
    job = killed[name]
    assert job["finished"] and job["ranks_at_the_end"] == ranks
    assert max(job["lost_steps"], default=0) <= killed["save_every"]
    assert job["loss_gap"] < 1e-4 and job["weight_gap"] < 1e-3


@posix_only
def test_launch_starts_a_killed_rank_again(tmp_path):
    lines = []
    launch(WORKERS, ["killed_once", str(tmp_path)], 2, lines.append, restarts=1)
    assert sum("done killed_once" in line for line in lines) == 2


def test_a_mistake_is_not_tried_again(tmp_path):
    """The second attempt ends before it does anything, with the sentence of the first."""
    lines = []
    with pytest.raises(LaunchError, match="UserError: the batch of 7 does not divide") as caught:
        launch(WORKERS, ["mistaken", str(tmp_path)], 1, lines.append, restarts=1)
    assert caught.value.rank == 0
    assert sum("working" in line for line in lines) == 1


def test_refusing_looks_at_the_attempt_before(tmp_path, monkeypatch):
    def attempt(n, message):
        file = tmp_path / f"attempt_{n}" / "0" / "error.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"message": {"message": message}}))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(n))

    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    refuse_to_repeat()  # a job that torchrun did not start
    attempt(0, "ValueError: a crash")
    refuse_to_repeat()
    attempt(1, "UserError: no such folder.")
    refuse_to_repeat()
    attempt(2, "never written")
    with pytest.raises(UserError, match="^no such folder.$"):
        refuse_to_repeat()


@pytest.mark.parametrize("what", ["python", "torch", "code", "device"])
def test_an_odd_node_is_named(what):
    usual = dict(python="3.12", torch="2.11.0", code="abc", device="NVIDIA H100")
    ranks = [dict(usual, host=f"node{rank // 8}") for rank in range(32)]
    compare_ranks(ranks)
    for rank in range(16, 24):
        ranks[rank][what] = "other"
    with pytest.raises(UserError, match=f"on node2 has {what} other, and 24 of 32 ranks have"):
        compare_ranks(ranks)


def test_a_job_with_an_odd_node_stops_before_it_starts(tmp_path):
    with pytest.raises(LaunchError, match="rank 1 on .* has code 0ddc0de.*make all nodes the same"):
        launch(WORKERS, ["odd_code", str(tmp_path)], 2, lambda line: None)
