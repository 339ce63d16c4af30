"""mid, sft (with LoRA) and rl, killed at random moments and resumed, end as if left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL")
def test_killing_any_stage_changes_nothing(tmp_path):
    program = Path(__file__).with_name("kill_stages.py")
    command = [sys.executable, str(program), str(tmp_path), "--kills", "2", "--rank", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"mid", "sft", "rl"}
    for stage, found in report.items():
        assert found["kills"] == 2, stage
        assert found["weights"] and found["optimizer"] and found["metrics"], stage


ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
