"""The command line: every stage as a command with the same flags everywhere.

Exported from chapters/A4_recipe.py (chapter A4, The recipe of a run); edit there, not here.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from nanochat.budget import sizes_of
from nanochat.common import UserError, doctor, pick_device, pick_dtype, write_json
from nanochat.core import (
    chat_core,
    fetch_core,
    kept_result,
    load_core,
    load_hub_model,
    model_digest,
    run_core,
)
from nanochat.distributed import LaunchError, setup
from nanochat.engine import Engine, bench
from nanochat.evaluation import core_table, tinyworld_core
from nanochat.recipe import (
    MODELS,
    Recipe,
    Run,
    check_recipe,
    estimate,
    estimate_table,
    exchange,
    judge,
    run_stage,
    run_stage_here,
    runs_directory,
    training_speed,
)
from nanochat.report import markdown_table, write_report
from nanochat.rl import evaluate_samples
from nanochat.serve import run_server
from nanochat.tasks import ARC, GSM8K, MMLU, ChatTask, HumanEval, TinyWorldTask, evaluate_chat
from nanochat.tinyworld import World
from nanochat.ui import ChatSettings, plain_text, terminal_chat

__all__ = [
    "CHAT_EXAMS",
    "DISK_ERRORS",
    "bench_options",
    "build_parser",
    "capstone_notebook",
    "chat_exams",
    "chat_options",
    "chat_result",
    "core_tasks",
    "do_bench",
    "do_capstone",
    "do_chat",
    "do_chat_core",
    "do_core",
    "do_doctor",
    "do_estimate",
    "do_eval",
    "do_report",
    "do_serve",
    "do_stage",
    "eval_options",
    "execute_capstone",
    "main",
    "model_options",
    "named_recipe",
    "newest_model",
    "open_model",
    "open_run",
    "questions_digest",
    "quick_speed",
    "run_options",
    "serve_options",
]


def named_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that `--profile` and `--set` name."""
    changes = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set needs FIELD=VALUE, got {setting!r}; try --set depth=4.")
        changes[name] = value
    return Recipe.for_profile(args.profile, **changes)


def open_run(args: argparse.Namespace, start: bool = False) -> Run:
    """Return the run that the command line names: `--folder FOLDER`, or a profile with changes.

    `start` makes a new one; without it a run that is not there is a UserError.
    """
    if args.folder:
        if args.set:
            raise UserError(
                "--folder takes the recipe of that run; leave --set out, or leave --folder."
            )
        return Run(args.folder)
    recipe = named_recipe(args)
    if start:
        return Run.open(recipe)
    folder = runs_directory() / recipe.name
    if not (folder / "recipe.json").exists():
        raise UserError(
            f"there is no run in {folder} yet; start one with `python -m nanochat capstone`, or "
            f"name the folder of another with --folder."
        )
    return Run(folder)


def newest_model(run: Run) -> str:
    """Return the last stage of a run that has a trained model; UserError when none has."""
    stages = [stage for stage in MODELS if run.done(stage)]
    if not stages:
        raise UserError(
            f"the run in {run.directory} has no trained model yet; "
            f"train one with `python -m nanochat capstone --folder {run.directory}`."
        )
    return stages[-1]


def open_model(args: argparse.Namespace) -> tuple[Run, str]:
    """Return the run that the command line names and the stage: `--stage`, or the last trained."""
    run = open_run(args)
    return run, args.stage or newest_model(run)


def do_stage(args: argparse.Namespace, stage: str) -> None:
    """Run a stage, or this rank's part of it under torchrun."""
    run = open_run(args, start=True)
    if "RANK" not in os.environ:
        prepared = ["tokenizer", "data"] if stage == "base" else []
        for each in [*prepared, stage]:
            if each == stage or not run.done(each):
                run_stage(run, each)
    elif not (run.directory / stage / "trained.json").exists():
        world = setup(run.recipe.device)
        run_stage_here(run, stage, world)
        if world.world_size > 1:
            world.close()


def capstone_notebook() -> Path:
    """Return the capstone notebook of this copy of the book; UserError without one."""
    path = Path(__file__).resolve().parent.parent / "chapters" / "12_capstone.ipynb"
    if not path.exists():
        raise UserError(
            f"the capstone notebook is not at {path}; run this from a clone of the book."
        )
    return path


def execute_capstone(run: Run, executed: Path) -> None:
    """Run the capstone notebook for a run and leave it at `executed`, as far as it came.

    Raises UserError when a cell fails or the notebook's process dies.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # a socket file in place of a port: out of reach of other users of the machine
    transport = Config({"KernelManager": {"transport": "ipc"}} if os.name == "posix" else {})
    try:
        papermill.execute_notebook(
            str(capstone_notebook()),
            str(executed),
            parameters={"run_directory": str(run.directory.resolve())},
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            request_save_on_cell_execute=False,
            config=transport,
        )
    except papermill.PapermillExecutionError as error:
        raise UserError(
            f"the capstone stopped in cell {error.exec_count} ({error.ename}: {error.evalue}); "
            f"the notebook up to there is {executed}; the same command goes on from there."
        ) from None
    except DeadKernelError:
        raise UserError(
            "the notebook's process died, most often because memory ran out; close other programs "
            "or set a smaller micro_batch, then run again: finished stages are skipped."
        ) from None


def do_capstone(args: argparse.Namespace) -> None:
    """Run the capstone notebook with papermill; print where everything is and an exchange."""
    run = open_run(args, start=True)  # refuses a bad profile or setting before a kernel starts
    executed = run.directory / "capstone.ipynb"
    execute_capstone(run, executed)
    print(f"\nexecuted notebook  {executed}")
    for path in write_report(run):
        print(f"report             {path}")
    for answer in exchange(run, newest_model(run)):
        print(f"\n> {answer['question']}")
        for call in answer["calculator"]:
            print(f"  [calculator: {call}]")
        print(f"{answer['reply']}")


def do_chat(args: argparse.Namespace) -> None:
    """Chat in the terminal, or answer one prompt."""
    run, stage = open_model(args)
    settings = ChatSettings(temperature=args.temperature, max_tokens=args.max_tokens)
    terminal_chat(run.engine(stage, remember=1), prompt=args.prompt, settings=settings)


def chat_options(command: argparse.ArgumentParser) -> None:
    """Add the flags of `chat`."""
    command.add_argument("-p", "--prompt", help="answer this and leave")
    command.add_argument("-t", "--temperature", type=float, default=0.0)
    command.add_argument("--max-tokens", type=int, default=128)


def do_serve(args: argparse.Namespace) -> None:
    """Serve the web page and the OpenAI-compatible endpoint."""
    run = open_run(args)
    stages = [args.stage] if args.stage else [s for s in MODELS if run.done(s)][::-1]
    engines = {stage: run.engine(stage, remember=8) for stage in stages or [newest_model(run)]}
    run_server(engines, host=args.host, port=args.port, token=args.token, origins=args.origin)


def serve_options(command: argparse.ArgumentParser) -> None:
    """Add the flags of `serve`."""
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--token", help="asked of every visitor; made up off loopback")
    about = "a web site whose pages may call it, such as https://my.site"
    command.add_argument("--origin", action="append", default=[], help=about)


def do_bench(args: argparse.Namespace) -> None:
    """Measure how fast a stage's model writes; the last line is JSON."""
    run, stage = open_model(args)
    loaded = run.engine(stage)
    most = loaded.model.config.seq_len
    if args.prompt < 1 or args.new < 2 or args.prompt + args.new > most:
        raise UserError(
            f"--prompt {args.prompt} and --new {args.new} do not fit: at least 1 and 2 tokens, "
            f"together at most the model's context window of {most}."
        )
    if min(args.batch) < 1 or args.repeats < 1:
        raise UserError("--batch and --repeats must be 1 or more.")
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=max(args.batch))
    print(json.dumps(bench(engine, args.batch, args.prompt, args.new, args.repeats)))


def bench_options(command: argparse.ArgumentParser) -> None:
    """Add the flags of `bench`."""
    command.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    command.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    command.add_argument("--new", type=int, default=32, help="tokens to write")
    command.add_argument("--repeats", type=int, default=3)


def core_tasks(name: str, limit: int | None, world: Any) -> Any:
    """Return the tasks of CORE: of "tinyworld", of a folder, or with no name the public ones."""
    if name == "tinyworld":
        return tinyworld_core(World(), limit or 200)
    if not name:
        if world.is_main:
            fetch_core()
        world.barrier()
    return load_core(name or fetch_core())


def do_core(args: argparse.Namespace) -> None:
    """Score the tasks of CORE with a run's model or one of Hugging Face; results are kept."""
    run, stage = (None, "") if args.hf else open_model(args)
    world = setup(run.recipe.device if run else "auto")
    tasks = core_tasks(args.core, args.limit, world)
    if run:
        engine = run.engine(stage)
        model, tokenizer, folder = engine.model, engine.tokenizer, run.directory / "core" / stage
    else:
        dtype = torch.float32 if world.device.type == "cpu" else pick_dtype(world.device)
        model, tokenizer = load_hub_model(args.hf, world.device, dtype)
        folder = runs_directory() / "core" / re.sub(r"[^\w.-]+", "--", args.hf).strip("-.")
    folder = Path(args.results or folder)
    result = run_core(model, tokenizer, tasks, folder, args.limit, world)
    if world.is_main:
        print(f"{core_table(result)}\n\nresults  {folder}")
    if world.world_size > 1:
        world.close()


CHAT_EXAMS = {  # class, data set on the hub, its subset, folder in a local copy
    "arc_easy": (ARC, "allenai/ai2_arc", "ARC-Easy", "arc"),
    "arc_challenge": (ARC, "allenai/ai2_arc", "ARC-Challenge", "arc"),
    "mmlu": (MMLU, "cais/mmlu", "all", "mmlu"),
    "gsm8k": (GSM8K, "openai/gsm8k", "main", "gsm8k"),
    "humaneval": (HumanEval, "openai/openai_humaneval", "", "humaneval"),
}


def chat_exams(source: str) -> dict[str, ChatTask]:
    """Return the six tasks of ChatCORE by name; `source` is "hub" or a folder of parquet files."""
    tasks: dict[str, ChatTask] = {}
    for name, (kind, hub, subset, local) in CHAT_EXAMS.items():
        if source == "hub":
            tasks[name] = kind(f"hub:{hub}", "test", subset)
        else:
            tasks[name] = kind(Path(source) / local, "test", subset if kind is ARC else "")
    tasks["spelling"] = TinyWorldTask(World(), "spelling", "test", size=256, start=30_000_000)
    return tasks


def chat_result(
    engine: Engine, task: ChatTask, limit: int | None, samples: int, world: Any
) -> dict[str, Any]:
    """Put one task to a model: letters once, replies of up to 512 tokens `samples` times."""
    generative = task.kind == "generative"
    how = dict(max_tokens=512 if generative else 1, world=world)
    if generative and samples > 1:
        return evaluate_samples(engine, task, limit, samples, **how)
    return evaluate_chat(engine, engine.tokenizer, task, limit, **how)


def questions_digest(task: ChatTask, limit: int | None) -> str:
    """Return a SHA-256 over what a task asks, and over the right answers."""
    digest = hashlib.sha256()
    for index in range(len(task))[:limit]:
        digest.update(json.dumps(task.conversation(index), sort_keys=True).encode())
    return digest.hexdigest()


def do_chat_core(args: argparse.Namespace) -> None:
    """Put the tasks of ChatCORE to a run's model; each result is kept, and the mean is printed."""
    run, stage = open_model(args)
    world, engine, results = setup(run.recipe.device), run.engine(stage), {}
    folder = Path(args.results or run.directory / "chat_core" / stage)
    common = {"model": model_digest(engine.model), "limit": args.limit, "samples": args.samples}
    for name, task in chat_exams(args.chat).items():
        about = {**common, "task": questions_digest(task, args.limit)}
        path = folder / f"{name}.json"
        result = kept_result(path, about)
        seen = world.sum(torch.tensor(float(result is not None)))  # by every process, or not done
        if seen < world.world_size:
            result = chat_result(engine, task, args.limit, args.samples, world)
            if world.is_main:
                write_json(path, {**about, "result": result})
        results[name] = result
        if world.is_main:
            more = "".join(f"  pass@{k} {v:.3f}" for k, v in result.get("pass_at", {}).items())
            span = f"({result['low']:.3f} to {result['high']:.3f})"
            print(f"{name:14s} {result['accuracy']:.3f} {span} of {result['n']:,}{more}")
    if world.is_main:
        mean = chat_core(results)
        write_json(folder / "chat_core.json", {**mean, **common})
        print(f"{'ChatCORE':14s} {mean['core']:.4f} ({mean['low']:.4f} to {mean['high']:.4f})")
    if world.world_size > 1:
        world.close()


def do_eval(args: argparse.Namespace) -> None:
    """Judge a stage's model and print its scores; --core and --chat score the public tasks."""
    if args.chat is not None and (args.core is not None or args.hf):
        raise UserError("--chat judges a run's model by itself; leave --core and --hf out.")
    if args.chat is None and args.samples != 1:
        raise UserError("--samples goes with --chat; add it, or leave --samples out.")
    if args.chat is not None or args.core is not None:
        return do_core(args) if args.chat is None else do_chat_core(args)
    if args.hf or args.limit or args.results:
        raise UserError("--hf, --limit and --results go with --core; add it, or leave them out.")
    for name, value in judge(*open_model(args)).items():
        print(f"{name:24s} {value:.4f}" if isinstance(value, float) else f"{name:24s} {value}")


def eval_options(command: argparse.ArgumentParser) -> None:
    """Add the flags of `eval`."""
    about = "score CORE (chapter 7): a folder of tasks, tinyworld, or alone the public ones"
    command.add_argument("--core", nargs="?", const="", metavar="FOLDER", help=about)
    command.add_argument("--hf", metavar="NAME", help="a Hugging Face model, name or folder")
    command.add_argument("--limit", type=int, help="at most so many items of each task")
    about = "score ChatCORE (chapter 7): a folder of parquet files, or alone from the hub"
    command.add_argument("--chat", nargs="?", const="hub", metavar="FOLDER", help=about)
    command.add_argument("--samples", type=int, default=1, help="for --chat: pass@k")
    command.add_argument("--results", metavar="FOLDER", help="where the results are kept")


def do_report(args: argparse.Namespace) -> None:
    """Write the report card of a run."""
    for path in write_report(open_run(args)):
        print(path)


def quick_speed(recipe: Recipe, memory: int) -> float:
    """Measure tokens per second in seconds; of a model over 2 GiB by the FLOPs of a small one."""
    small = recipe
    if memory > 2 << 30:
        small = recipe.changed(depth=4, seq_len=512, micro_batch=4)
    config, device = small.config(small.vocab_size), pick_device(recipe.device)
    whole, part = (sizes_of(r.config(r.vocab_size)).flops_per_token() for r in (recipe, small))
    return training_speed(small, config, device) * part / whole


def do_estimate(args: argparse.Namespace) -> None:
    """Print what pretraining of a recipe will take; on a CPU its speed is measured for that."""
    recipe = open_run(args).recipe if args.folder else named_recipe(args)
    check_recipe(recipe)
    plan = estimate(recipe)
    size, text = plan["parameters"] / 1e6, plan["tokens"] / 1e6
    print(f"{size:.1f} M parameters, {text:,.1f} M tokens, {plan['flops']:.2g} FLOPs")
    print(f"{plan['memory'] / 2**30:.2f} GiB with {recipe.micro_batch or 1} rows at a time\n")
    if pick_device(recipe.device).type != "cuda":
        plan = estimate(recipe, speed=quick_speed(recipe, plan["memory"]))
    print(markdown_table(estimate_table(plan)))


def do_doctor(args: argparse.Namespace) -> None:
    """Check the environment; exit with 1 when something is missing."""
    facts = doctor()
    for name, found, fine, fix in facts:
        print(f"{'ok ' if fine else 'BAD'} {name:12s} {found}" + ("" if fine else f": {fix}"))
    if not all(fine for _, _, fine, _ in facts):
        raise SystemExit(1)


def run_options(command: argparse.ArgumentParser) -> None:
    """Add the flags that name a run."""
    command.add_argument("--profile", default="laptop", help="a ready recipe (chapter A4)")
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    command.add_argument("--folder", help="folder of a run, in place of a profile")


def model_options(command: argparse.ArgumentParser) -> None:
    """Add the flags that name a model: its run and its stage."""
    run_options(command)
    command.add_argument("--stage", choices=MODELS, help="default: the last one trained")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line: one subcommand a stage, and the tools around a run."""
    about = "Train a small ChatGPT, stage by stage, and talk to it."
    parser = argparse.ArgumentParser(prog="python -m nanochat", description=about)
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add(name: str, about: str, action: Any, *options: Any) -> None:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(action=action)
        for option in options:
            option(command)

    for name, stage, about in (
        ("tokenizer", "tokenizer", "train the tokenizer"),
        ("data", "data", "turn the text into tokens on disk"),
        ("pretrain", "base", "train the base model"),
        ("midtrain", "mid", "teach the base model the form of a conversation"),
        ("sft", "sft", "teach it to answer"),
        ("rl", "rl", "improve its sums by reinforcement learning"),
    ):
        add(name, about, lambda args, stage=stage: do_stage(args, stage), run_options)
    add("capstone", "run every stage as a notebook", do_capstone, run_options)
    add("eval", "judge a model", do_eval, model_options, eval_options)
    add("chat", "chat in the terminal", do_chat, model_options, chat_options)
    about = "serve a web chat and an OpenAI-compatible endpoint"
    add("serve", about, do_serve, model_options, serve_options)
    add("bench", "measure how fast a model writes", do_bench, model_options, bench_options)
    add("report", "write the report card of a run", do_report, run_options)
    about = "say what pretraining will take, here and on 8xH100"
    add("estimate", about, do_estimate, run_options)
    add("doctor", "check the environment", do_doctor)
    return parser


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR)


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake a user can mend is one sentence and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.command:
        parser.print_help()
        return 0
    try:
        args.action(args)
    except UserError as error:
        if "RANK" in os.environ:
            raise  # a rank of several: its hook passes the sentence on to the launcher
        print(f"nanochat: {plain_text(str(error))}", file=sys.stderr)  # an endpoint's, perhaps
        return 2
    except LaunchError as error:
        print(f"nanochat: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what, where = error.strerror, error.filename or "the folder of the run"
        advice = "free some space or choose another folder ($NANOCHAT_RUNS), then run again"
        sentence = f"cannot write to {where}: {what}; {advice}."
        if "RANK" in os.environ:
            raise UserError(sentence) from error
        print(f"nanochat: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
