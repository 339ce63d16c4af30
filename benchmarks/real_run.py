"""Every stage on real text and real questions, in calls of limited length; then one table.

    python benchmarks/real_run.py --data CORPUS --chat FOLDER --until base    # one call
    python benchmarks/real_run.py --data CORPUS --chat FOLDER --minutes 9     # ... and another

CORPUS holds parquet shards with a column `text`, the last one for validation. FOLDER holds `sft/`
and `chat_eval/` (gsm8k, mmlu, arc) with the columns that these data sets have on the hub.
`--tokenizer` takes a file of ranks instead of training one. The sizes are for about ten minutes of
one H200 and should fit 80 GB; `--set` changes any setting of the recipe. The rates follow the root
of the batch. All stages of a call run in one process, which compiles the model once.

When the minutes are up, the stage under way is stopped and the exit code is 3: call again, and it
goes on from its last checkpoint. `--until STAGE` ends after that stage. Measurements are kept one
by one, too. The last call prints a Markdown report; its last line is JSON.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpu import batch_rates, tokenizer_of

from nanochat.chat import parse, render_prompt, reply_text
from nanochat.common import UserError, pick_device, read_json, write_json
from nanochat.recipe import MODELS, STAGES, Recipe, Run, real_task, rows_at_once
from nanochat.report import markdown_table, stage_scores
from nanochat.rl import count_right, pass_at_k, problem_prompt, task_problems
from nanochat.tasks import ARC, GSM8K, MMLU, TinyWorldTask, proportion_interval
from nanochat.tinyworld import World

ROOT = Path(__file__).resolve().parent.parent
AGAIN = 3  # the exit code that says: not finished, call again
SETTINGS = dict(
    name="real",
    depth=12,
    batch_tokens=2**16,
    micro_batch=32,
    pretrain_steps=940,
    mid_steps=480,  # of 2**16 tokens; an epoch of its mixture takes about 430
    sft_steps=250,
    rl_steps=80,
    rl_questions=32,
    rl_samples=16,
    rl_task="spelling",
    max_tokens=160,
    tokenizer_chars=100_000_000,
    val_tokens=2**20,
    exam_items=1000,  # MMLU and ARC are asked whole
    saves=2,
    evals=4,
    processes=1,
)
QUESTIONS = (
    "Who are you?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Tom has 12 apples and gives 5 to Anna. How many apples does Tom have now?",
    "What is photosynthesis?",
    "How many times does the letter e occur in the word needle?",
    "Give me three tips for sleeping well.",
    "Who was Isaac Newton?",
)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe of the arguments: the sizes above, the two folders, and every --set.

    The rates of the base follow the root of the batch. Those of RL, whose batch is another, are
    factors on them and must not: they are divided by it.
    """
    folders = dict(data=f"folder:{args.data}", chat=f"folder:{args.chat}")
    changes = {**SETTINGS, **folders, **dict(pair.split("=", 1) for pair in args.set)}
    recipe = Recipe.for_profile("gpu1")
    rates = batch_rates(recipe, int(changes["batch_tokens"]))
    settings = {**rates, **changes}
    unscaled = recipe.matrix_lr / float(settings["matrix_lr"])
    return recipe.changed(**{"rl_lr": recipe.rl_lr * unscaled, **settings})


class Clock:
    """Says how much of this call is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.margin = 6 * minutes  # seconds: a tenth

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def check(self, what: str) -> None:
        """Leave with exit code AGAIN when less than a tenth of the time is left."""
        if self.left() <= self.margin:
            print(f"the time is nearly up before {what}; call again to go on.", flush=True)
            raise SystemExit(AGAIN)


def train(run: Run, stages: list[str], clock: Clock) -> None:
    """Run stages in one child process; stop it when the time is up, and whenever we are stopped."""
    code = (
        "import sys; from nanochat.recipe import Run, run_stage; run = Run(sys.argv[1]); "
        "[run_stage(run, stage) for stage in sys.argv[2:]]"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", code, str(run.directory), *stages]
    child = subprocess.Popen(command, env=env, start_new_session=os.name == "posix")
    try:
        code = child.wait(max(clock.left(), 1))
    except subprocess.TimeoutExpired:
        print("stopped, the time is up; call again to go on.", flush=True)
        raise SystemExit(AGAIN) from None
    finally:
        if child.returncode is None:  # it has a session of its own: no signal to us reaches it
            if os.name == "posix":
                os.killpg(child.pid, signal.SIGKILL)  # checkpoints survive this at any moment
            else:
                child.kill()
            child.wait()
    if code:
        raise SystemExit(code)


@torch.no_grad()
def tool_calls(engine, n: int, max_tokens: int) -> dict[str, float]:
    """Return the share of replies to sums that hold a call which the calculator could answer."""
    task = TinyWorldTask(World(), "arithmetic", "test", size=n)
    prompts = [render_prompt(task.conversation(i), engine.tokenizer) for i in range(n)]
    done = engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0.0)
    formed = 0
    for reply in done:
        kinds = [part["type"] for part in parse(reply.ids, engine.tokenizer)]
        calls = [i for i, kind in enumerate(kinds) if kind == "python"]
        answered = [kinds[i + 1 : i + 2] == ["python_output"] for i in calls]
        formed += bool(calls) and all(answered)
    low, high = proportion_interval(formed, n)
    return dict(share=formed / n, low=low, high=high, n=n)


def mean_and_error(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """Return the mean of values and its standard error, over groups of values that may be alike.

    With groups of one value this is the usual standard error of a mean.
    """
    if not len(values):
        return math.nan, math.nan
    mean = float(np.mean(values))
    sums: dict[str, float] = dict.fromkeys(groups, 0.0)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    n = len(sums)
    squares = sum(each * each for each in sums.values())
    return mean, math.sqrt(squares * n / max(n - 1, 1)) / len(values)


def solved(found: dict, k: int) -> list[float]:
    """Return pass@k of each problem, from how many of its replies were right."""
    return [pass_at_k(found["samples"], count, k) for count in found["right"]]


def passes(run: Run, engine, task: str) -> dict:
    """Let the model answer held-out problems of GSM8K or of the spelling, eight times each.

    Returns pass@1 and pass@8 with standard errors, and to compare models by: how many replies to
    each problem are right, and its group. No question is asked twice. Questions about one word of
    the spelling, of which there are few, are a group; each question of GSM8K is a group.
    """
    most, rows = run.recipe.max_tokens, rows_at_once(engine.model.device)
    if task == "gsm8k":
        problems = task_problems(
            real_task(run.recipe, GSM8K, "test"), run.recipe.exam_items * 2 // 5
        )
    else:
        size, most = run.recipe.exam_items * 3 // 5, min(most, 80)
        problems = task_problems(TinyWorldTask(World(), task, "test", size=size))
    room = run.recipe.seq_len - min(most, run.recipe.seq_len // 4)
    problems = {p["question"]: p for p in problems}  # each once
    problems = [p for p in problems.values() if len(problem_prompt(p, engine.tokenizer)) <= room]
    groups = [each["question"] for each in problems]
    if task == "spelling":  # the longest thing in quotation marks is the word
        groups = [max(re.findall(r'"(\w+)"', question), key=len) for question in groups]
    right = count_right(engine, problems, 8, most, batch=rows)
    found = dict(samples=8, n=len(right), n_groups=len(set(groups)), right=right, groups=groups)
    for k in (1, 8):
        found[f"pass@{k}"], found[f"error@{k}"] = mean_and_error(solved(found, k), groups)
    return found


def dialogues(engine, max_tokens: int) -> list[list[str]]:
    """Return [question, reply, calls] for the ten questions, answered greedily."""
    asked = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    prompts = [render_prompt(each, engine.tokenizer) for each in asked]
    found = []
    done = engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0.0)
    for question, reply in zip(QUESTIONS, done):
        parts = parse(reply.ids, engine.tokenizer)
        calls = " ".join(part["text"] for part in parts if part["type"] == "python")
        found.append([question, reply_text(parts).strip(), calls])
    return found


def measurements(run: Run, stage: str) -> dict:
    """Return {name: function of an engine} of what is measured beyond the table of a stage."""
    most, n = run.recipe.max_tokens, run.recipe.exam_items // 2
    work = {f"{stage} calls": lambda engine: tool_calls(engine, n, most)}
    if stage in ("sft", "rl"):
        for task in ("gsm8k", "spelling"):
            work[f"{stage} {task} replies"] = lambda engine, task=task: passes(run, engine, task)
    work[f"{stage} dialogues"] = lambda engine: dialogues(engine, most)
    return work


def measure(run: Run, clock: Clock) -> dict:
    """Make the measurements that are missing, one by one; return all."""
    path = run.directory / "measured.json"
    found = read_json(path) if path.exists() else {}
    rows = rows_at_once(pick_device(run.recipe.device))
    for stage in MODELS[1:]:
        work = {k: make for k, make in measurements(run, stage).items() if k not in found}
        if not work:
            continue
        clock.check(f"measuring {stage}")  # an engine takes a while to build
        engine = run.engine(stage, max_batch=rows)
        for name, make in work.items():
            clock.check(f"measuring {name}")
            began = time.monotonic()
            found[name] = make(engine)
            write_json(path, found)
            print(f"measured {name} in {time.monotonic() - began:.1f} s", flush=True)
    return found


def without_reading(run: Run, kind: type) -> tuple[float, float]:
    """Return what two models that never read score: a guesser, and one that names one letter.

    Not all questions have four choices; the letter is the one that is right most often.
    """
    task = real_task(run.recipe, kind, "test")
    items = [task.item(i) for i in range(len(task))]
    guesses = [1 / len(choices) for _, choices, _, _ in items]
    golds = Counter(gold for _, _, gold, _ in items)
    return sum(guesses) / len(items), max(golds.values()) / len(items)


def standard_errors(score: float, chance: float, n: int) -> float:
    """Return how many standard errors of guessing a share of n items is above chance."""
    return (score - chance) / math.sqrt(chance * (1 - chance) / n)


def gain(before: dict, after: dict, k: int) -> tuple[float, float]:
    """Return the gain in pass@k from before to after, and the same in standard errors.

    Both have answered the same problems: the gain is the mean of the differences problem by
    problem, and what an easy or a hard problem adds to both drops out.
    """
    if before["groups"] != after["groups"]:
        raise UserError("Before and after were not asked the same problems.")
    pairs = zip(solved(before, k), solved(after, k))
    mean, error = mean_and_error([b - a for a, b in pairs], before["groups"])
    return mean, mean / max(error, 1e-9)


def report(run: Run, found: dict) -> dict:
    """Print the table of all stages and what the issue asks for; return the numbers."""
    scores = stage_scores(run)
    done = {stage: run.done(stage) for stage in STAGES}
    names = ["bits_per_byte", "mmlu", "arc_easy", "gsm8k", "arithmetic", "spelling", "identity"]
    rows = [["metric", *MODELS]]
    for name in names:
        cells = [scores[stage].get(name) for stage in MODELS]
        rows.append([name, *("-" if cell is None else f"{cell:.3f}" for cell in cells)])
    for name in ("seconds", "judge_seconds"):
        rows.append([name, *(f"{done[stage][name]:.0f}" for stage in MODELS)])
    print(markdown_table(rows))
    above = {}
    for name, kind in (("mmlu", MMLU), ("arc_easy", ARC)):
        chance, letter = without_reading(run, kind)
        for stage in MODELS[1:]:
            score, n = scores[stage][name], scores[stage][f"{name}_n"]
            above[f"{name}, {stage}"] = standard_errors(score, chance, n)
            over = standard_errors(score, letter, n)
            print(f"- {name}, {stage}: {above[f'{name}, {stage}']:+.1f} standard errors above "
                  f"chance ({chance:.3f}), {over:+.1f} above always naming the commonest "
                  f"letter ({letter:.3f}); n = {n}")  # fmt: skip
    for stage in MODELS[1:]:
        calls = found[f"{stage} calls"]
        print(f"- {stage}: {calls['share']:.1%} of replies to sums call the calculator well "
              f"({calls['low']:.1%} to {calls['high']:.1%})")  # fmt: skip
    gains = {}
    for task in ("gsm8k", "spelling"):
        before, after = found[f"sft {task} replies"], found[f"rl {task} replies"]
        for k in (1, 8):
            name = f"pass@{k}"
            difference, errors = gains[f"{task} {name}"] = gain(before, after, k)
            print(f"- RL on {run.recipe.rl_task}, {task} {name}: {before[name]:.3f} -> "
                  f"{after[name]:.3f}, {difference:+.3f}, {errors:+.1f} standard errors; "
                  f"n = {before['n']} in {before['n_groups']} groups")  # fmt: skip
    for question, reply, calls in found["rl dialogues"]:
        print(f"\n> {question}" + (f"\n> [calculator: {calls}]" if calls else "") + f"\n\n{reply}")
    seconds = {stage: done[stage]["seconds"] for stage in STAGES}
    numbers = {
        name: {key: value for key, value in part.items() if not isinstance(value, list)}
        for name, part in found.items()
        if not name.endswith("dialogues")
    }
    return dict(scores=scores, above=above, gains=gains, seconds=seconds, measured=numbers)


def leave(number: int, frame) -> None:
    """Leave as Ctrl-C does when a signal comes: by an exception, which `train` sees."""
    raise SystemExit(128 + number)


def main() -> int:
    """Go on with the run for so many minutes; report when everything is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of text, parquet")
    parser.add_argument("--chat", type=Path, required=True, help="folder with sft/ and chat_eval/")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real", help="of the run")
    parser.add_argument("--tokenizer", type=Path, help="folder or file of ranks; default: train")
    parser.add_argument("--until", choices=STAGES, help="end after this stage; default: report")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this call")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    clock = Clock(args.minutes)
    try:
        run = Run.open(recipe_of(args), args.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.tokenizer and not run.done("tokenizer"):
        tokenizer_of(args.tokenizer).save(run.directory / "tokenizer")
    stages = STAGES[: STAGES.index(args.until) + 1] if args.until else STAGES
    missing = [stage for stage in stages if not run.done(stage)]
    if missing:
        train(run, missing, clock)
    if args.until:
        seconds = {stage: round(run.done(stage)["seconds"]) for stage in stages}
        print(f"done until {args.until}; seconds of the stages: {seconds}")
        return 0
    print(json.dumps(report(run, measure(run, clock))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
