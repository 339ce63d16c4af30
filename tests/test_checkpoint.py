"""nanochat.checkpoint: what was saved comes back, and nothing half-written is ever seen."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from nanochat import checkpoint
from nanochat.checkpoint import latest_step, load_checkpoint, save_checkpoint, saved_steps
from nanochat.common import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer

SMALL = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def trained():
    model = GPT(SMALL)
    optimizer = build_optimizer(model)
    idx = torch.arange(32).view(2, 16)
    model(idx, idx).backward()
    optimizer.step()
    return model, optimizer.named_state(model)


def test_model_state_and_meta_come_back(tmp_path):
    model, state = trained()
    save_checkpoint(tmp_path, 7, model, state, {"data": {"row": 3}})
    found = load_checkpoint(tmp_path)
    assert found.meta["step"] == 7 and found.meta["data"] == {"row": 3}
    assert found.meta["versions"]["torch"] == torch.__version__
    for a, b in zip(model.parameters(), found.model.parameters()):
        assert torch.equal(a, b)
    assert state.keys() == found.optimizer_state.keys()
    assert all(torch.equal(state[name], found.optimizer_state[name]) for name in state)


def test_only_safe_formats_are_written(tmp_path):
    folder = save_checkpoint(tmp_path, 1, *trained(), {})
    assert sorted(f.name for f in folder.iterdir()) == [
        "meta.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


def test_the_newest_are_kept(tmp_path):
    model, state = trained()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, model, state, {}, keep=2)
    assert saved_steps(tmp_path) == [20, 30] and latest_step(tmp_path) == 30
    assert load_checkpoint(tmp_path, 20).meta["step"] == 20


def test_absent_and_broken_checkpoints_say_so(tmp_path):
    assert latest_step(tmp_path / "none") is None
    with pytest.raises(UserError, match="no checkpoint .* \\(steps there: none\\)"):
        load_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, 1, *trained(), {})
    with pytest.raises(UserError, match="steps there: 1"):
        load_checkpoint(tmp_path, 5)
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="is broken"):
        load_checkpoint(tmp_path)


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    model, state = trained()
    save_checkpoint(tmp_path, 1, model, state, {})

    def no_space(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, model, state, {})
    assert [f.name for f in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(tmp_path).meta["step"] == 1


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from nanochat.checkpoint import save_checkpoint
        from nanochat.model import GPT, GPTConfig
        model = GPT(GPTConfig(512, 32, 2, 2, 2, 64))
        state = {"moment": model.head.weight.detach().clone()}
        step = 0
        while True:
            step += 1
            save_checkpoint(sys.argv[1], step, model, state, {})
            print(step, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if int(line) >= 5:
            break
    time.sleep(0.003)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert load_checkpoint(tmp_path).meta["step"] >= 5
