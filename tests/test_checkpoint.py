"""nanochat.checkpoint: what was saved comes back, and nothing half-written is ever seen."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint
from nanochat.checkpoint import (
    BackgroundSaver,
    best_step,
    latest_step,
    load_checkpoint,
    save_checkpoint,
    saved_steps,
)
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


def test_who_does_not_train_leaves_the_optimizer_s_file_unread(tmp_path):
    model, state = trained()
    folder = save_checkpoint(tmp_path, 7, model, state, {})
    (folder / "optimizer.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not the file that was saved"):
        load_checkpoint(tmp_path)
    found = load_checkpoint(tmp_path, optimizer=False)
    assert found.optimizer_state == {}
    ids = torch.arange(8)[None]
    assert torch.equal(found.model(ids), model(ids))  # the rotary angles are there too


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
    whole = (folder / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # one bit of one weight: still a perfect safetensors file
    for content in (b"junk", whole[:-8], bytes(flipped)):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is broken .model.safetensors is not the file that"):
            load_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is broken"):
        load_checkpoint(tmp_path)


def test_an_optimizer_that_is_gone_is_not_taken_for_none(tmp_path):
    model, state = trained()
    (save_checkpoint(tmp_path, 1, model, state, {}) / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="is broken .*optimizer.safetensors"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, optimizer=False).meta["step"] == 1
    save_checkpoint(tmp_path, 2, model, None, {})
    assert load_checkpoint(tmp_path).optimizer_state == {}


def test_a_copy_beside_the_checkpoints_is_no_checkpoint(tmp_path):
    folder = save_checkpoint(tmp_path, 10, *trained(), {})
    for name in ("step_000010 (copy)", "step_000010.bak", "step_"):
        shutil.copytree(folder, tmp_path / name)
    assert saved_steps(tmp_path) == [10] and best_step(tmp_path) is None


def test_what_was_just_saved_stays_beside_a_later_step_of_another_run(tmp_path):
    model, state = trained()
    save_checkpoint(tmp_path, 100, model, state, {})
    assert save_checkpoint(tmp_path, 10, model, state, {}).exists()
    assert saved_steps(tmp_path) == [10, 100]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    model, state = trained()
    for name in (".step_000001.old", ".step_000007.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 9, model, state, {})
    assert [f.name for f in tmp_path.iterdir()] == ["step_000009"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    model, state = trained()
    for step, score in ((10, 2.0), (20, 1.2), (30, 1.5), (40, None), (50, 1.9)):
        save_checkpoint(tmp_path, step, model, state, {}, keep=2, score=score)
    assert saved_steps(tmp_path) == [20, 40, 50] and best_step(tmp_path) == 20
    save_checkpoint(tmp_path, 60, model, state, {}, score=1.1)
    assert saved_steps(tmp_path) == [60] and best_step(tmp_path) == 60
    assert best_step(tmp_path / "none") is None


def test_a_background_save_holds_what_was_there_when_it_was_called(tmp_path, monkeypatch):
    write, started, go_on = checkpoint.save_file, threading.Event(), threading.Event()

    def slow(tensors, path):
        started.set()
        go_on.wait(10)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    model, state = trained()
    before = model.head.weight.detach().clone()
    moment = state["head.weight.mean"].clone()
    saver = BackgroundSaver()
    saver.save(tmp_path, 5, model, state, {"note": 1})
    assert started.wait(10) and saved_steps(tmp_path) == []  # still at it
    with torch.no_grad():  # training goes on
        model.head.weight.add_(1)
        state["head.weight.mean"].add_(1)
    go_on.set()
    saver.wait()
    found = load_checkpoint(tmp_path)
    assert torch.equal(found.model.head.weight, before) and found.meta["note"] == 1
    assert torch.equal(found.optimizer_state["head.weight.mean"], moment)


def test_an_error_of_a_background_save_comes_out_at_the_next_call(tmp_path):
    (tmp_path / "file").write_text("in the way")
    saver = BackgroundSaver()
    saver.save(tmp_path / "file", 5, *trained(), {})
    with pytest.raises(UserError, match="cannot save the checkpoint of step 5"):
        saver.save(tmp_path, 6, *trained(), {})
    saver.save(tmp_path, 6, *trained(), {})
    saver.wait()
    saver.wait()
    assert saved_steps(tmp_path) == [6]


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


@pytest.mark.skipif(os.name != "posix", reason="kill -9 and fork are POSIX")
def test_twenty_kills_change_nothing(tmp_path):
    """A run killed 20 times, also inside of saves, ends with the weights of one never killed."""
    program = Path(__file__).with_name("kill_training.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["kills"] == 20 and found["equal"]
    assert found["inside_a_save"] >= 3 and found["lost_steps"] <= found["save_every"]
