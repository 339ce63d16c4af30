"""The recipes for clusters, run on one machine whose "nodes" are two launcher agents."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY

from nanochat import distributed
from nanochat.common import UserError
from nanochat.train import SingleProcess

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "chapters" / "cluster"
posix_only = pytest.mark.skipif(os.name != "posix", reason="the recipes are bash scripts")
SRUN = """#!/bin/bash
# Runs a command on two make-believe nodes; when one fails the other is ended.
set -m
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" &
for node in 0 1; do
    wait -n || { for job in $(jobs -p); do kill -- -$job; done; exit 1; }
done
"""


@pytest.fixture
def env(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    settings = dict(PORT=str(port), GPUS="1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    settings.update(PYTHON=sys.executable, NANOCHAT_RUNS=str(tmp_path / "runs"), LARGEST="2000000")
    settings.update(PYTHONPATH=str(ROOT), AT_LEAST="0.000001", TORCH_CPP_LOG_LEVEL="ERROR")
    return {**os.environ, **settings}


def run(command, env, cwd=ROOT):
    options = dict(cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    return subprocess.run(command, **options)


@posix_only
def test_the_slurm_script_trains_on_two_nodes(tmp_path, env):
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho node1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env.update(PATH=f"{tmp_path}:{env['PATH']}", SLURM_JOB_NODELIST="node[0-1]")
    env.update(SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7", PROFILE="smoke", STAGES="pretrain")
    settings = {**TINY, "pretrain_steps": 3, "evals": 1, "fsdp": 2}
    done = run(
        ["bash", CLUSTER / "slurm.sh", *(f"--set={k}={v}" for k, v in settings.items())], env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["rank"] for line in lines if line["what"] == "rank"] == [0, 1]
    assert any(line["what"] == "all_reduce" for line in lines)
    (found,) = (tmp_path / "runs").glob("*/base/done.json")
    assert json.loads(found.read_text())["processes"] == 2


@posix_only
def test_the_skypilot_file_starts_its_nodes(env):
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["resources"]["accelerators"] == "H100:8" and task["setup"] == "make env"
    env.update(task["envs"])
    env.update(STAGES="", AT_LEAST="1000000", SKYPILOT_NODE_IPS="127.0.0.1")
    env.update(SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0", SKYPILOT_TASK_ID="t")
    env["SKYPILOT_NUM_GPUS_PER_NODE"] = "2"
    done = run(["bash", "-c", task["run"]], env)
    assert done.returncode != 0
    assert "GB/s and you asked for 1e+06" in done.stderr  # and so it stops before it trains


def test_all_ranks_must_see_the_folder(tmp_path):
    class Blind(SingleProcess):
        def sum(self, value):
            return value + 8  # of so many other ranks that see nothing

    folder = str(tmp_path / "runs")
    distributed.compare_folders(SingleProcess("cpu"), folder)
    with pytest.raises(UserError, match="8 of 1 ranks do not see"):
        distributed.compare_folders(Blind("cpu"), folder)
    assert list((tmp_path / "runs").iterdir()) == []
