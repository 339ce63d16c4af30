"""The smallest run that goes through every stage; one is trained once and shared by the tests."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from nanochat.recipe import STAGES, Recipe, Run, run_stage

TINY = dict(
    depth=1,
    head_dim=32,
    seq_len=128,
    vocab_size=512,
    tokenizer_chars=60_000,
    batch_tokens=512,
    micro_batch=2,
    pretrain_steps=12,
    mid_steps=4,
    sft_steps=4,
    rl_steps=2,
    rl_questions=2,
    rl_samples=2,
    max_tokens=8,
    exam_items=4,
    val_tokens=1024,
    evals=2,
    saves=3,
    device="cpu",
    dtype="float32",
)


def tiny_recipe(**changes) -> Recipe:
    return Recipe.for_profile("smoke", **{"name": "tiny", **TINY, **changes})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is no faster with two threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # the same in child processes
        yield
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def finished_run() -> Run:
    """A run with all its stages; read it, and copy it before changing anything."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = Run.open(tiny_recipe(), folder / "tiny")
    for stage in STAGES:
        run_stage(run, stage)
    return run


def copy_of(run: Run, folder: Path, *stages: str) -> Run:
    """A copy of a run with the files of these stages only."""
    shutil.copytree(run.directory, folder)
    for stage in STAGES:
        if stage not in stages:
            shutil.rmtree(folder / stage)
    return Run(folder)
