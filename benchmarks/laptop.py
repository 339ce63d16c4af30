"""What the laptop capstone reaches, over several seeds: one row a claim, one column a seed.

    python benchmarks/laptop.py --seeds 0 1 2

Runs the stages of the `laptop` profile for each seed (runs that are finished are only read), then
prints a Markdown table from their logs. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import read_metrics
from nanochat.recipe import STAGES, Recipe, Run, exchange, run_stage, runs_directory
from nanochat.report import markdown_table, stage_scores


def finished_run(seed: int, folder: Path, profile: str) -> Run:
    """Return the run of a seed, with every stage done and the last exchange in its log."""
    recipe = Recipe.for_profile(profile, seed=seed, name=f"{profile}-seed{seed}")
    run = Run.open(recipe, folder / recipe.name)
    for stage in STAGES:
        run_stage(run, stage)
    if not read_metrics(run.log.path, "exchange", stage="rl"):
        exchange(run, "rl")
    return run


def claims(run: Run) -> dict[str, float]:
    """Return the numbers that the book claims for a run, all from its log."""
    scores = stage_scores(run)
    start = read_metrics(run.log.path, "eval", stage="base", step=0)[0]["bits_per_byte"]
    sft, rl = scores["sft"], scores["rl"]
    answers = {e["question"]: e for e in read_metrics(run.log.path, "exchange", stage="rl")}
    done = [run.done(stage) for stage in STAGES]
    return {
        "bits per byte at initialisation": start,
        "bits per byte after pretraining": scores["base"]["bits_per_byte"],
        "... as a share of the start": scores["base"]["bits_per_byte"] / start,
        "exam after SFT": sft["exam"],
        "exam, chance": sft["exam_chance"]["exam"],
        "... above chance": sft["exam"] - sft["exam_chance"]["exam"],
        "arithmetic pass@1 after SFT": sft["arithmetic"],
        "arithmetic pass@1 after RL": rl["arithmetic"],
        "... gained by RL": rl["arithmetic"] - sft["arithmetic"],
        "right answers of three": float(sum(e["right"] for e in answers.values())),
        "seconds of all stages": sum(d["seconds"] + d.get("judge_seconds", 0.0) for d in done),
        "peak memory (GiB)": max(d["peak_bytes"] for d in done) / 2**30,
    }


def main() -> None:
    """Run or read the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    args = parser.parse_args()
    folder = args.folder or runs_directory()
    found = {seed: claims(finished_run(seed, folder, args.profile)) for seed in args.seeds}
    rows = [["claim", *(f"seed {seed}" for seed in found)]]
    rows += [[name, *(f"{c[name]:.3f}" for c in found.values())] for name in found[args.seeds[0]]]
    print(markdown_table(rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
