"""Kill the stages mid, sft and rl of a tiny run at random moments and compare each with the stage
of a run that was left alone (see test_kill_stages.py). Prints one JSON object.

    python tests/kill_stages.py FOLDER [--kills 5] [--stages mid sft rl] [--rank 0]

`--rank 4` fine-tunes with LoRA. Children are forked, so that each starts at once."""

import argparse
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from tiny_run import TINY

from nanochat import recipe as recipes
from nanochat.checkpoint import load_checkpoint, saved_steps
from nanochat.recipe import STAGES, Recipe, Run, run_stage, run_stage_here

LONGER = dict(mid_steps=30, sft_steps=30, rl_steps=12, saves=12, evals=1, exam_items=4)


def forked(work):
    """Do `work` in a forked child; return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def slow_saves():
    """Let a save take longer, so that many a kill hits one."""
    save = recipes.save_checkpoint

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return save(*args, **kwargs)

    recipes.save_checkpoint = slow


def kill_and_resume(run, stage, kills, chance):
    """Run a stage, killing it `kills` times after it has got somewhere; return what was hit."""
    folder, done, inside = run.directory / stage, 0, 0
    while not (folder / "trained.json").exists():
        child = forked(lambda: (slow_saves(), run_stage_here(Run(run.directory), stage)))
        before = saved_steps(folder)
        if done < kills:
            while saved_steps(folder) == before and not (folder / "trained.json").exists():
                time.sleep(0.005)  # it must get somewhere, or the kills never end
            time.sleep(chance.random() * 0.15)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            done, inside = done + 1, inside + any(folder.glob(".step_*.tmp"))
        else:
            assert status == 0, status
    return dict(kills=done, inside_a_save=inside)


def same_tensors(one, other):
    """Say whether two dicts of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def compare(straight, killed, stage):
    """Say whether weights, optimizer, result and scores of a stage are the same in both runs."""
    pair = [load_checkpoint(run.directory / stage) for run in (straight, killed)]
    results = [run_stage(run, stage) for run in (straight, killed)]
    vary = ("seconds", "judge_seconds", "peak_bytes", "tokens_per_second")
    told = [{k: v for k, v in result.items() if k not in vary} for result in results]
    return {
        "weights": same_tensors(*(found.model.state_dict() for found in pair)),
        "optimizer": same_tensors(*(found.optimizer_state for found in pair)),
        "metrics": told[0] == told[1],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--stages", nargs="+", default=["mid", "sft", "rl"])
    parser.add_argument("--rank", type=int, default=0, help="of LoRA in the stage sft")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {**TINY, **LONGER, "lora_rank": args.rank}
    straight = Run.open(
        Recipe.for_profile("smoke", name="tiny", **options), args.folder / "straight"
    )
    last = max(STAGES.index(stage) for stage in args.stages)
    for stage in STAGES[: last + 1]:
        run_stage(straight, stage)
    chance, report = random.Random(0), {}
    for stage in args.stages:
        shutil.copytree(straight.directory, args.folder / stage)
        for later in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(args.folder / stage / later, ignore_errors=True)
        killed = Run(args.folder / stage)
        report[stage] = kill_and_resume(killed, stage, args.kills, chance)
        report[stage].update(compare(straight, killed, stage))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
