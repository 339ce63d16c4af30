"""Checkpoints as safetensors and JSON: atomic, resumable, never pickled.

Exported from chapters/05_pretraining.py (chapter 05, Pretraining); edit there, not here.
"""

import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import UserError, read_json, write_json
from nanochat.data import file_digest
from nanochat.model import GPT, GPTConfig

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "best_step",
    "latest_step",
    "load_checkpoint",
    "put_aside",
    "remove_leftovers",
    "save_checkpoint",
    "saved_steps",
]


@dataclass
class Checkpoint:
    """What a checkpoint folder holds: the model on its device, optimizer tensors, and the meta."""

    model: GPT
    optimizer_state: dict[str, Tensor]
    meta: dict[str, Any]


def saved_steps(directory: str | Path) -> list[int]:
    """Return the steps that have a complete checkpoint in a folder, in ascending order."""
    folders = (f for f in Path(directory).glob("step_*") if f.name[5:].isdecimal())
    return sorted(int(f.name[5:]) for f in folders if (f / "meta.json").exists())


def latest_step(directory: str | Path) -> int | None:
    """Return the newest complete checkpoint's step, None when there is none."""
    return max(saved_steps(directory), default=None)


def best_step(directory: str | Path) -> int | None:
    """Return the step whose checkpoint has the lowest score, None when none was given a score."""
    scores = {}
    for step in saved_steps(directory):
        score = read_json(Path(directory) / f"step_{step:06d}" / "meta.json").get("score")
        if score is not None:
            scores[step] = score
    return min(scores, key=scores.get, default=None)


def remove_leftovers(directory: Path) -> None:
    """Delete what a process left that was killed while it wrote or deleted a checkpoint."""
    for folder in directory.glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def put_aside(folder: Path) -> Path:
    """Rename a checkpoint out of sight, if it is there; return its new name, to be deleted."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    return aside


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: GPT,
    optimizer_state: dict[str, Tensor] | None,
    meta: dict[str, Any],
    keep: int = 1,
    score: float | None = None,
) -> Path:
    """Write `step_NNNNNN/` with model, optimizer and meta; the newest `keep` stay, and the best.

    `optimizer_state` is what `optimizer.named_state(model)` gives; None saves the model alone. The
    best is the one with the lowest `score`, if scores are given (bits per byte, say).

    All files are written under a temporary name, synced, then renamed at once: a process killed at
    any moment leaves the checkpoints before, or the new one, too. (Of a step that is saved again
    the old one goes first.) A full disk raises UserError and leaves nothing behind.
    """
    directory = Path(directory)
    final, temporary = directory / f"step_{step:06d}", directory / f".step_{step:06d}.tmp"
    remove_leftovers(directory)
    try:
        temporary.mkdir(parents=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        if optimizer_state is not None:
            state = {k: v.detach().cpu().contiguous() for k, v in optimizer_state.items()}
            save_file(state, temporary / "optimizer.safetensors")
        versions = {"torch": torch.__version__}
        facts = {"step": step, "config": model.config.to_dict(), "versions": versions, **meta}
        files = sorted(temporary.glob("*.safetensors"))
        hashes = {file.name: file_digest(file, "sha256") for file in files}
        facts |= {"sha256": hashes, "score": score}
        write_json(temporary / "meta.json", facts)
        for file in files:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        old = put_aside(final)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot save the checkpoint of step {step} in {directory}: {reason}; "
            f"free some space or choose another folder, then run again: training resumes."
        ) from error
    best = best_step(directory)
    for past in saved_steps(directory)[:-keep]:
        if past not in (best, step):
            shutil.rmtree(put_aside(directory / f"step_{past:06d}"), ignore_errors=True)
    return final


def load_checkpoint(
    directory: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    optimizer: bool = True,
) -> Checkpoint:
    """Read a checkpoint (the newest, unless a step is named) and build its model on `device`.

    Who does not train on leaves the state of the `optimizer`, more than half of all, unread. Raises
    UserError when there is no checkpoint or a file is broken. Only tensors and JSON are read:
    nothing in a checkpoint is executed.
    """
    directory = Path(directory)
    step = latest_step(directory) if step is None else step
    folder = directory / f"step_{step or 0:06d}"
    if step is None or not (folder / "meta.json").exists():
        found = ", ".join(map(str, saved_steps(directory))) or "none"
        raise UserError(f"no checkpoint {step or ''} in {directory} (steps there: {found}).")
    meta = read_json(folder / "meta.json")
    optimizer_file = folder / "optimizer.safetensors"
    try:
        optimizer = optimizer and optimizer_file.name in meta["sha256"]
        for name, expected in meta["sha256"].items():
            wanted = optimizer or name != optimizer_file.name
            if wanted and file_digest(folder / name, "sha256") != expected:
                raise OSError(f"{name} is not the file that was saved")
        with torch.device("meta"):  # sizes only: fresh weights would be drawn for nothing
            model = GPT(GPTConfig(**meta["config"]))
        model.to_empty(device=device).load_state_dict(load_file(folder / "model.safetensors"))
        model.restore_angles()
        state = load_file(optimizer_file) if optimizer else {}
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {folder} is broken ({error}); delete this folder and run again."
        ) from error
    return Checkpoint(model, state, meta)


class BackgroundSaver:
    """Saves checkpoints in a thread. Call `wait` before the result is needed, and at the end."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self,
        directory: str | Path,
        step: int,
        model: GPT,
        state: dict | None,
        meta: dict,
        **options,
    ) -> None:
        """Copy model and optimizer state now and write them later; as `save_checkpoint`."""
        self.wait()

        def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

        weights = copied(model.state_dict())
        frozen = SimpleNamespace(config=model.config, state_dict=lambda: weights)
        state = None if state is None else copied(state)

        def write() -> None:
            try:
                save_checkpoint(directory, step, frozen, state, meta, **options)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=write, name=f"save step {step}")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the write under way, if there is one; raise what it raised."""
        if self.thread:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error:
            raise error
