"""One dial, every stage: recipes, profiles and the stages that they run.

Exported from chapters/A4_recipe.py (chapter A4, The recipe of a run); edit there, not here.
"""

import difflib
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from nanochat.budget import (
    GRID_GRAMS,
    footprint,
    largest_that_fits,
    memory_estimate,
    sizes_of,
    step_fits,
)
from nanochat.chat import parse, render_prompt, reply_text
from nanochat.checkpoint import (
    BackgroundSaver,
    Checkpoint,
    best_step,
    latest_step,
    load_checkpoint,
    save_checkpoint,
)
from nanochat.common import (
    MetricsLog,
    Progress,
    UserError,
    format_seconds,
    pick_device,
    pick_dtype,
    read_json,
    read_metrics,
    seed_everything,
    synchronize,
    write_json,
)
from nanochat.data import (
    Prefetch,
    TokenBatches,
    TokenShards,
    TokenStream,
    ValidationBatches,
    check_space,
    open_source,
    prepare_tokens,
)
from nanochat.distributed import (
    LaunchError,
    ShardedMuonAdamW,
    build_sharded_optimizer,
    gather_model,
    launch,
    shard_model,
)
from nanochat.engine import Engine, prepared_copy
from nanochat.evaluation import bits_per_byte, evaluate_core, tinyworld_core
from nanochat.finetune import (
    ConversationBatches,
    add_lora,
    held_out_loss,
    load_lora_state,
    lora_groups,
    lora_state,
    merged_copy,
)
from nanochat.kernels import peak_flops
from nanochat.model import GPT, GPTConfig
from nanochat.optim import MuonAdamW, build_optimizer, lr_multiplier, param_groups
from nanochat.rl import evaluate_pass, problem_prompt, task_problems, train_rl
from nanochat.tasks import (
    ARC,
    GSM8K,
    MMLU,
    SHARES,
    ExamTask,
    JsonLines,
    Messages,
    Mixture,
    Reordered,
    TinyWorldTask,
    chat_exam,
    evaluate_chat,
    names_answer,
    tinyworld_mixture,
)
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer
from nanochat.train import TRACKERS, SingleProcess, TrackedLog, fit, open_tracker

__all__ = [
    "COMMANDS",
    "GPU_PROFILES",
    "GPU_SETTINGS",
    "HUB_TASKS",
    "MACHINE_FIELDS",
    "MODELS",
    "PRICE_PER_HOUR",
    "PROFILES",
    "QUESTIONS",
    "Recipe",
    "Run",
    "STAGES",
    "Settings",
    "TIMES",
    "Training",
    "chance_levels",
    "chat_mixture",
    "check_recipe",
    "compiles",
    "compute_dtype",
    "estimate",
    "estimate_table",
    "exam_scores",
    "exchange",
    "exchange_questions",
    "finetune",
    "finish_training",
    "free_memory",
    "held_out_batches",
    "is_cut",
    "judge",
    "launch_stage",
    "machine_facts",
    "passes_per_step",
    "peak_memory",
    "pick_micro_batch",
    "prepare_data",
    "pretrain",
    "price_of",
    "process_count",
    "read_recipe",
    "read_setting",
    "real_exam_scores",
    "real_mixture",
    "real_task",
    "reinforce",
    "rl_problems",
    "room_for",
    "rows_at_once",
    "run_stage",
    "run_stage_here",
    "runs_directory",
    "scaled_settings",
    "scaling_params",
    "stage_before",
    "stage_log",
    "stage_micro_batch",
    "stage_optimizer",
    "starting_point",
    "train_stage",
    "train_tokenizer",
    "training_speed",
    "training_tokens",
    "use_mine",
    "utilisation",
    "with_lora",
]


STAGES = ("tokenizer", "data", "base", "mid", "sft", "rl")
MODELS = ("base", "mid", "sft", "rl")


@dataclass
class Settings:
    """Every number of a run, and every word.

    Rates are the optimizer's initial rates at width 768 (chapter 4); `*_lr` of later stages are
    factors on them. Steps are optimizer steps of `batch_tokens` tokens over all processes. `fsdp` 1
    cuts the model over the GPUs, 2 recomputes activations too (chapter 6).
    """

    name: str = "laptop"  # of the folder of the run
    data: str = "tinyworld"  # or hub:NAME, or folder:PATH (chapter 2)
    chat: str = "tinyworld"  # conversations; or hub, or folder:PATH
    own_chats: str = ""  # a JSONL file of conversations that replace the identity (chapter 9)
    seed: int = 0
    model: str = "classic"  # or modern (chapter 3)
    depth: int = 4  # layers
    aspect: int = 64  # width for each layer
    head_dim: int = 64
    seq_len: int = 256  # tokens in a row
    vocab_size: int = 2048
    tokenizer_chars: int = 2_000_000  # that the tokenizer is trained on
    batch_tokens: int = 4096
    micro_batch: int = 16  # rows at once; 0: as many as fit
    pretrain_steps: int = 600
    mid_steps: int = 120
    sft_steps: int = 120
    rl_steps: int = 30
    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    head_lr: float = 0.008
    weight_decay: float = 0.0
    warmdown: float = 0.5  # share of the steps in which the rate falls
    mid_lr: float = 0.5
    sft_lr: float = 0.3
    lora_rank: int = 0  # above 0: sft trains an adapter (chapter 9)
    rl_task: str = "arithmetic"  # or spelling, or gsm8k (chapter 10)
    rl_lr: float = 0.05
    rl_questions: int = 16  # for a step
    rl_samples: int = 8  # replies to each question
    max_tokens: int = 96  # of a reply
    exam_items: int = 120  # of each exam
    val_tokens: int = 65_536
    evals: int = 4  # times that a stage is measured on held-out data
    saves: int = 4  # checkpoints of a stage
    processes: int = 1  # 0: one for each GPU
    fsdp: int = 0
    device: str = "auto"
    dtype: str = "auto"  # or float32, or bfloat16
    compile: str = "auto"  # on GPUs only; or yes, or no
    tracker: str = ""  # a tool that shows the run (chapter 5)
    grid_grams: float = GRID_GRAMS  # g of CO2 for a kWh where you are
    mine: str = ""  # a folder of solved exercises (section 2)


def scaling_params(depth: int) -> int:
    """Return the parameters of a depth that count: those of the matrices and the head."""
    config = GPTConfig.for_depth(depth, 32768, 2048)
    return 12 * depth * config.n_embd**2 + 32768 * config.n_embd


def scaled_settings(depth: int, ratio: float = 12.0) -> dict[str, Any]:
    """Return the settings that follow from a depth: nanochat's scaling rules.

    `ratio` is training tokens per parameter of the matrices and the head. Fitted around depth 12
    with batches of 2^19 tokens; the ceiling on the decay is for depths below 9 (chapter 5).
    """
    growth = scaling_params(depth) / scaling_params(12)  # of the tokens, too
    tokens = ratio * scaling_params(depth)
    batch = 2 ** round(math.log2(2**19 * growth**0.383))
    rate = math.sqrt(batch / 2**19)
    return {
        "batch_tokens": batch,
        "pretrain_steps": max(1, int(tokens // batch)),
        "matrix_lr": 0.02 * rate,
        "embedding_lr": 0.3 * rate,
        "head_lr": 0.008 * rate,
        "weight_decay": min(0.5, 0.28 * rate / growth),
    }


def read_setting(name: str, value: Any, kind: type) -> Any:
    """Return a setting's value as its type, `kind`; text is read ("12" is 12).

    Raises UserError for a value that is not of that type, as 6.5 is no int.
    """
    try:
        found = kind(value)
        if kind is int and isinstance(value, float) and value != found:
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be {kind.__name__}, got {value!r}.") from None
    return found


@dataclass
class Recipe(Settings):
    """The settings of a run: `for_profile` names a ready set, `for_depth` derives one."""

    @classmethod
    def for_profile(cls, profile: str, /, **changes: Any) -> "Recipe":
        """Return the recipe of a profile (smoke, laptop, gpu1, speedrun, classic), with changes.

        Raises UserError for an unknown profile or an unknown field.
        """
        if profile not in PROFILES:
            raise UserError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}.")
        settings = dict(PROFILES[profile])
        depth = settings.pop("derive_from", None)
        base = cls.for_depth(depth) if depth else cls()
        return base.changed(**{"name": profile, **settings}).changed(**changes)

    @classmethod
    def for_depth(
        cls, depth: int, ratio: float = 12.0, flops: float = 0.0, hours: float = 0.0
    ) -> "Recipe":
        """Derive a recipe for GPUs and the hub's data from the depth alone.

        The horizon is `ratio` tokens per parameter, or what `flops` pay for, or what eight H100
        do in so many `hours` at 40 % of their peak; the last one that is given counts.
        """
        if depth < 1:
            raise UserError(f"depth must be a number from 1 up, got {depth}.")
        recipe = cls(name=f"d{depth}", depth=depth, **GPU_SETTINGS)
        flops = hours * 3600 * 8 * 0.4 * peak_flops("H100", torch.bfloat16) if hours else flops
        if flops:
            per_token = sizes_of(recipe.config(recipe.vocab_size)).flops_per_token()
            ratio = flops / per_token / scaling_params(depth)
        return recipe.changed(**scaled_settings(depth, ratio))

    def changed(self, /, **changes: Any) -> "Recipe":
        """Return a copy with some fields changed; UserError for one that does not exist.

        Text is read as the field's type ("12" is 12), so that the command line can pass it on.
        """
        kinds = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        for name in changes:
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, 1)
                known = f"perhaps you mean {near[0]!r}" if near else f"it has {', '.join(kinds)}"
                raise UserError(f"a recipe has no {name!r}; {known}.")
        return replace(self, **{k: read_setting(k, v, kinds[k]) for k, v in changes.items()})

    def config(self, vocab_size: int) -> GPTConfig:
        """Return the model's sizes; the vocabulary is what the tokenizer reached."""
        build = GPTConfig.modern if self.model == "modern" else GPTConfig.classic
        return build(
            self.depth, vocab_size, self.seq_len, aspect=self.aspect, head_dim=self.head_dim
        )


GPU_SETTINGS: dict[str, Any] = dict(
    data="hub:karpathy/climbmix-400b-shuffle",
    chat="hub",
    model="modern",
    head_dim=128,
    seq_len=2048,
    vocab_size=32768,
    tokenizer_chars=2_000_000_000,
    micro_batch=0,
    mid_steps=800,
    sft_steps=700,
    rl_steps=400,
    warmdown=0.65,
    max_tokens=256,
    exam_items=500,
    val_tokens=20 * 2**19,
    evals=10,
    processes=0,
)


GPU_PROFILES: dict[str, dict[str, Any]] = {
    "gpu1": dict(derive_from=12, processes=1, tokenizer_chars=400_000_000),
    "speedrun": dict(derive_from=24),
    "classic": dict(
        derive_from=20,
        data="hub:karpathy/fineweb-edu-100b-shuffle",
        model="classic",
        vocab_size=65536,
        batch_tokens=524_288,
        pretrain_steps=21_400,
        embedding_lr=0.2,
        head_lr=0.004,
        matrix_lr=0.02,
        weight_decay=0.0,
        warmdown=0.2,
    ),
}


PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        depth=2,
        seq_len=128,
        vocab_size=1024,
        tokenizer_chars=300_000,
        batch_tokens=1024,
        micro_batch=8,
        pretrain_steps=60,
        mid_steps=10,
        sft_steps=10,
        rl_steps=2,
        rl_questions=4,
        rl_samples=4,
        max_tokens=32,
        exam_items=12,
        val_tokens=8192,
        evals=2,
        saves=2,
    ),
    "laptop": dict(
        aspect=32,
        pretrain_steps=600,
        mid_steps=130,
        sft_steps=130,
        rl_steps=160,
        max_tokens=64,
        exam_items=100,
        val_tokens=16_384,
    ),
    **GPU_PROFILES,
}


def runs_directory() -> Path:
    """Return where runs are kept: $NANOCHAT_RUNS, else `runs/` beside book.toml, else here."""
    if os.environ.get("NANOCHAT_RUNS"):
        return Path(os.environ["NANOCHAT_RUNS"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "book.toml").exists():
            return folder / "runs"
    return here / "runs"


def process_count(recipe: Recipe) -> int:
    """Return how many processes train: the recipe's number, 0 meaning one per GPU."""
    if recipe.processes:
        return recipe.processes
    return max(1, torch.cuda.device_count()) if pick_device(recipe.device).type == "cuda" else 1


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: the recipe's, "auto" being the device's best.

    Raises UserError for a name that is none of auto, float32 and bfloat16.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if recipe.dtype not in ("auto", *named):
        raise UserError(f"dtype must be auto, {' or '.join(named)}, got {recipe.dtype!r}.")
    return named.get(recipe.dtype) or pick_dtype(device)


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for numbers that cannot work, before any work is done."""
    may_be_zero = ("seed", "micro_batch", "lora_rank", "processes", "fsdp", "evals", "saves")
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        lowest = int(isinstance(value, int) and field.name not in may_be_zero)
        if not isinstance(value, str) and not lowest <= value < math.inf:
            raise UserError(f"{field.name} must be a number from {lowest} up, got {value}.")
    if recipe.name in ("", "..") or recipe.name != Path(recipe.name).name or "\\" in recipe.name:
        raise UserError(f"name must be a plain folder name, got {recipe.name!r}.")
    if recipe.head_dim % 2 or recipe.rl_samples < 2:
        raise UserError(
            f"head_dim must be even and rl_samples at least 2; got head_dim {recipe.head_dim} "
            f"and rl_samples {recipe.rl_samples}."
        )
    compute_dtype(recipe, pick_device(recipe.device))
    for name, known in (
        ("model", ("classic", "modern")),
        ("compile", ("auto", "yes", "no")),
        ("tracker", ("", *TRACKERS)),
    ):
        value = getattr(recipe, name)
        if value not in known:
            choices = ", ".join(choice or "nothing" for choice in known)
            raise UserError(f"{name} must be one of {choices}; got {value!r}.")
    ranks = process_count(recipe)
    for name, unit in (("batch_tokens", recipe.seq_len * ranks), ("rl_questions", ranks)):
        value = getattr(recipe, name)
        if value % unit:
            why = f"seq_len {recipe.seq_len} x {ranks} processes" if unit > ranks else "processes"
            near = max(round(value / unit), 1) * unit
            raise UserError(f"{name} {value} is no multiple of {unit} ({why}); try {near}.")


def use_mine(recipe: Recipe) -> list[str]:
    """Put the learner's functions in `recipe.mine` in place of the book's; return which.

    Without `mine` the book's are put back. Raises UserError for an answer that fails its checks,
    for a folder that is not there, and without a clone of the book, where the exercises are.
    """
    if not recipe.mine and "book.mine" not in sys.modules:
        return []
    try:
        from book.mine import switch
    except ModuleNotFoundError as error:
        if error.name not in ("book", "book.mine"):
            raise
        raise UserError(
            f"mine={recipe.mine!r} needs the exercises of the book, and its folder book/ is not "
            f"beside nanochat/; run this from a clone of the book."
        ) from None
    return switch(recipe.mine)


MACHINE_FIELDS = (  # where, not what, is learnt
    *("micro_batch", "processes", "fsdp", "device", "dtype", "compile", "tracker", "grid_grams"),
)


def read_recipe(path: Path) -> Recipe:
    """Read a `recipe.json`; UserError when it has settings that this version does not know."""
    settings = read_json(path)
    strange = set(settings) - {field.name for field in fields(Recipe)}
    if strange:
        raise UserError(
            f"{path} has settings that this version does not know "
            f"({', '.join(sorted(strange))}); use the version that started the run."
        )
    return Recipe(**settings)


class Run:
    """A run on disk: its recipe, its artifacts, its log (the folder is drawn in appendix A4)."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.recipe = read_recipe(self.directory / "recipe.json")
        self.log = MetricsLog(self.directory / "metrics.jsonl")

    @classmethod
    def open(cls, recipe: Recipe, directory: str | Path | None = None) -> "Run":
        """Start a run or take up one that was started with the same recipe.

        It may go on with other MACHINE_FIELDS. Raises UserError when a run of that name has
        another recipe, and names what differs; also for a recipe that cannot work.
        """
        check_recipe(recipe)
        use_mine(recipe)
        directory = Path(directory or runs_directory() / recipe.name)
        path = directory / "recipe.json"
        if path.exists():
            old, new = asdict(read_recipe(path)), asdict(recipe)
            names = [k for k in new if old[k] != new[k] and k not in MACHINE_FIELDS]
            differ = [f"{k} is {old[k]!r}, asked {new[k]!r}" for k in names]
            if differ:
                raise UserError(
                    f"run {recipe.name!r} in {directory} was started with another recipe "
                    f"({'; '.join(differ[:3])}); choose another name or delete that folder."
                )
        if not path.exists() or old != new:
            write_json(path, asdict(recipe))
        return cls(directory)

    def done(self, stage: str) -> dict[str, Any] | None:
        """Return a finished stage's results, None while it is not finished."""
        path = self.directory / stage / "done.json"
        return read_json(path) if path.exists() else None

    def tokenizer(self) -> Tokenizer:
        """Load the run's tokenizer."""
        return Tokenizer.load(self.directory / "tokenizer")

    def checkpoint(
        self, stage: str, device: str | torch.device = "cpu", optimizer: bool = True
    ) -> Checkpoint:
        """Load a stage's newest checkpoint; UserError when it belongs to another vocabulary."""
        found = load_checkpoint(self.directory / stage, device=device, optimizer=optimizer)
        ours, theirs = self.tokenizer().fingerprint(), found.meta.get("tokenizer")
        if ours != theirs:
            raise UserError(
                f"the {stage} checkpoint was trained with another tokenizer "
                f"({str(theirs)[:12]}, the run has {ours[:12]}); delete {self.directory / stage}."
            )
        return found

    def engine(self, stage: str, **options: Any) -> Engine:
        """Load a stage's model, ready to chat; `options` are those of the Engine (chapter 8)."""
        use_mine(self.recipe)
        device = pick_device(self.recipe.device)
        model = self.checkpoint(stage, device, optimizer=False).model.eval()
        model.compute_dtype = dtype = compute_dtype(self.recipe, device)
        if device.type == "cuda":  # weights of half the bytes, as a rule
            model = prepared_copy(model, dtype)
        return Engine(model, self.tokenizer(), **options)


def train_tokenizer(run: Run) -> dict[str, Any]:
    """Train the run's tokenizer on the first `tokenizer_chars` characters of its source.

    One that lies in the run's folder already is taken as it is.
    """
    recipe, source = run.recipe, open_source(run.recipe.data)

    def texts(bar: Progress):
        for text in source.documents("train"):
            yield text[:10_000]
            bar.update(min(len(text), 10_000, bar.total - bar.done))
            if bar.done >= recipe.tokenizer_chars:
                return

    folder = run.directory / "tokenizer"
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    else:
        with Progress(recipe.tokenizer_chars, "tokenizer", "character") as bar:
            tokenizer = Tokenizer.train(texts(bar), recipe.vocab_size)
        tokenizer.save(folder)
    sample = "".join(t for t, _ in zip(source.documents("val"), range(200)))
    n_tokens = max(len(tokenizer.encode(sample)), 1)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": len(sample.encode("utf-8")) / n_tokens,
    }


def room_for(run: Run, n_tokens: int, tokenizer: Tokenizer) -> bool:
    """Say whether the disk has room for so many training tokens; if not, print what follows."""
    folder = run.directory / "tokens" / "train"
    if folder.exists():  # begun before: it goes on
        return True
    try:
        n_bytes = n_tokens * (2 if tokenizer.vocab_size <= 1 << 16 else 4)
        check_space(run.directory, n_bytes, f"keeping {n_tokens:,} tokens")
        return True
    except UserError as error:
        print(f"{error} Until then tokens are made while the model trains.", flush=True)
        return False


def prepare_data(run: Run) -> dict[str, Any]:
    """Turn the source into memory-mapped tokens: what pretraining reads, and validation."""
    recipe, tokenizer, source = run.recipe, run.tokenizer(), open_source(run.recipe.data)
    wanted = {"val": recipe.val_tokens + recipe.seq_len + 1}
    wanted["train"] = recipe.pretrain_steps * recipe.batch_tokens + recipe.seq_len + 1
    sizes = {}
    for split, n in wanted.items():
        if split == "train" and not room_for(run, n, tokenizer):
            return {**sizes, "train_tokens": 0}
        with Progress(n, f"data {split}", "token") as bar:
            shown = SimpleNamespace(update=lambda k: bar.update(min(k, bar.total - bar.done)))
            shards = prepare_tokens(source, tokenizer, run.directory / "tokens", split, n, shown)
        sizes[f"{split}_tokens"] = len(shards)
    return sizes


def training_tokens(run: Run) -> TokenShards | TokenStream:
    """Return the tokens to train on: those on disk, or a stream that makes them."""
    if (run.directory / "tokens" / "train").exists():
        return TokenShards.load(run.directory / "tokens", "train")
    return TokenStream(open_source(run.recipe.data), run.tokenizer())


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free; on a GPU what this process holds already counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Say whether training compiles the model: as the recipe says, "auto" on GPUs only."""
    return recipe.compile == "yes" or (recipe.compile == "auto" and device.type == "cuda")


def pick_micro_batch(
    recipe: Recipe,
    config: GPTConfig,
    device: torch.device,
    ranks: int,
    fits: Callable[[int], bool] | None = None,
) -> int:
    """Return the rows per forward pass: the recipe's, or the most that fit into the memory.

    `fits(rows)` tries a number of rows; without it the estimate decides. The result divides this
    rank's part of the batch, so that accumulation comes out even. Raises UserError when the batch
    is no whole number of rows per process, or not even a row fits.
    """
    rows, rest = divmod(recipe.batch_tokens, recipe.seq_len * ranks)
    if rest or not rows:
        raise UserError(
            f"batch_tokens {recipe.batch_tokens} is no multiple of seq_len {recipe.seq_len} x "
            f"{ranks} processes = {recipe.seq_len * ranks}; choose a multiple of that."
        )
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    if recipe.micro_batch:
        return max(n for n in sizes if n <= recipe.micro_batch)
    kind = dict(dtype=compute_dtype(recipe, device), compiled=compiles(recipe, device))
    needs = {n: sum(memory_estimate(config, n, **kind).values()) for n in sizes}
    free = free_memory(device) / (1 if device.type == "cuda" else ranks)
    guess = max((n for n in sizes if needs[n] <= 0.8 * free), default=0)
    found = largest_that_fits(sizes, fits or (lambda n: n <= guess), guess)
    if found is None:
        raise UserError(
            f"depth {config.n_layer} with seq_len {config.seq_len} needs about "
            f"{needs[1] / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; choose a "
            f"smaller depth or seq_len."
        )
    return found


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: on the GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def utilisation(config: GPTConfig, flops: int, speed: float, world: Any) -> float | None:
    """Return the share of the devices' peak that training uses (MFU), None where unknown.

    `flops` is the model's per token, `speed` the tokens per second of all processes together.
    """
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), torch.bfloat16)
    return flops * speed / (peak * world.world_size) if peak else None


PRICE_PER_HOUR = {"H100": 3.00, "H200": 3.50, "A100": 1.79, "V100": 0.55}  # dollars, typical 2026


def price_of(device_name: str) -> float | None:
    """Return a typical rent in dollars per hour of a GPU, None for one not in the table."""
    return next((p for name, p in PRICE_PER_HOUR.items() if name in device_name), None)


def training_speed(recipe: Recipe, config: GPTConfig, device: torch.device) -> float:
    """Measure the tokens per second of whole steps: passes and optimizer, the faster of two."""
    model, rows = GPT(config).to(device), recipe.micro_batch or 1
    model.compute_dtype = compute_dtype(recipe, device)
    optimizer, passes, updates = build_optimizer(model), [], []
    idx = torch.zeros(rows, config.seq_len, dtype=torch.int64, device=device)
    for _ in range(2):
        began = time.perf_counter()
        model(idx, idx, reduction="sum").backward()
        synchronize(device)
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        passes.append(middle - began)
        updates.append(time.perf_counter() - middle)
    n_passes = recipe.batch_tokens / (rows * config.seq_len)
    return recipe.batch_tokens / (n_passes * min(passes) + min(updates))


def estimate(
    recipe: Recipe, utilisation: float = 0.4, speed: float | None = None
) -> dict[str, Any]:
    """Estimate pretraining before it starts: size, memory, hours, dollars, kWh and kg of CO2.

    On GPUs that are known, hours assume `utilisation` of their peak. `speed` in tokens per second
    (`training_speed`) replaces that; without it a CPU's hours are None. "8xH100" holds the same for
    that machine. Rent, power (1.3 kW a GPU, 65 W for a machine without) and the grid's carbon are
    assumptions; `grid_grams` of the recipe is yours to set. Memory is in bytes, per process.
    """
    device, config = pick_device(recipe.device), recipe.config(recipe.vocab_size)
    sizes, tokens = sizes_of(config), recipe.pretrain_steps * recipe.batch_tokens
    flops, grid = sizes.flops_per_token() * tokens, recipe.grid_grams
    kind = dict(dtype=compute_dtype(recipe, device), compiled=compiles(recipe, device))
    count, watts, price, peak = 1, 65.0, 0.0, None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        count, watts, price = process_count(recipe), 1300.0, price_of(name)
        peak = peak_flops(name, torch.bfloat16)
    rate = speed * sizes.flops_per_token() if speed else (peak or 0) * count * utilisation
    bill = dict.fromkeys(("hours", "dollars", "kwh", "co2_kg"))
    if rate:
        bill = footprint(flops / rate, count, price or 0.0, watts, grid)
        bill["dollars"] = None if price is None else bill["dollars"]
    eight = 8 * utilisation * peak_flops("H100", torch.bfloat16)
    return {
        "tokens": tokens,
        "parameters": sizes.num_params()["total"],
        "flops": flops,
        "memory": sum(memory_estimate(config, recipe.micro_batch or 1, **kind).values()),
        **bill,
        "8xH100": footprint(flops / eight, 8, PRICE_PER_HOUR["H100"], grid=grid),
    }


def estimate_table(plan: dict[str, Any]) -> list[list[str]]:
    """Return an estimate as rows of text: this machine beside eight H100."""
    rows = [["before the run", "this machine", "8 x H100 (assumed 40 %)"]]
    for key, label, unit in (
        ("hours", "time", 3600.0),
        ("dollars", "rent in dollars", 1.0),
        ("kwh", "energy in kWh", 1.0),
        ("co2_kg", "kg of CO2 (assumed grid)", 1.0),
    ):
        values = (plan[key], plan["8xH100"][key])
        show = format_seconds if key == "hours" else "{:.3g}".format
        rows.append([label, *("-" if v is None else show(v * unit) for v in values)])
    return rows


def stage_before(stage: str) -> str | None:
    """Return the stage whose model a training stage starts from, None for the first."""
    return MODELS[MODELS.index(stage) - 1] if stage != MODELS[0] else None


def with_lora(recipe: Recipe, stage: str) -> bool:
    """Say whether a stage trains an adapter and not the model."""
    return stage == "sft" and recipe.lora_rank > 0


def is_cut(recipe: Recipe, stage: str, world: Any) -> bool:
    """Say whether a stage's model is cut over the processes."""
    uncut = stage == "rl" or with_lora(recipe, stage)
    return recipe.fsdp > 0 and world.world_size > 1 and not uncut


def starting_point(run: Run, stage: str, world: Any) -> tuple[GPT, Checkpoint | None, bool]:
    """Return a stage's model, the checkpoint it starts from, and whether that is the stage's own.

    The checkpoint is None for a new model. An adapter lies on top of the model of the stage before,
    whatever the checkpoint. Raises UserError when the stage before has left none.
    """
    recipe, cut = run.recipe, is_cut(run.recipe, stage, world)
    place = torch.device("cpu") if cut else world.device  # shard_model moves its part
    resumed = latest_step(run.directory / stage) is not None
    source = stage if resumed else stage_before(stage)
    found = run.checkpoint(source, place) if source else None
    if with_lora(recipe, stage):
        model = run.checkpoint(stage_before(stage), place).model
        model = add_lora(model, recipe.lora_rank, seed=recipe.seed)
    elif found:
        model = found.model
    else:
        model = GPT(recipe.config(run.tokenizer().vocab_size), seed=recipe.seed).to(place)
    model.compute_dtype = compute_dtype(recipe, world.device)
    if cut:
        shard_model(model, world, recompute=recipe.fsdp > 1)
    return model, found, resumed


def stage_log(run: Run, stage: str, world: Any) -> MetricsLog:
    """Return the log of a stage, with the recipe's tracker behind it; on other ranks it is mute."""
    if not world.is_main:
        return MetricsLog(None)
    log = run.log
    if run.recipe.tracker:
        log = TrackedLog(log.path, open_tracker(run.recipe.tracker, run.recipe.name, run.directory))
    return log.bind(stage=stage)


def stage_optimizer(model: GPT, recipe: Recipe, world: Any, lora: bool) -> MuonAdamW:
    """Return the optimizer of a stage, sharded over the processes when there are several."""
    rates = (recipe.matrix_lr, recipe.embedding_lr, recipe.head_lr, recipe.weight_decay)
    several, compiled = world.world_size > 1, compiles(recipe, world.device)
    if several and not lora:
        return build_sharded_optimizer(model, world, *rates, compiled=compiled)
    groups = lora_groups(model) if lora else param_groups(model, *rates, compiled)
    return ShardedMuonAdamW(groups, world) if several else MuonAdamW(groups)


class Training:
    """What the four training stages share: a model, its optimizer, where they start and save.

    A stage with a checkpoint of its own resumes it; a fresh one starts from the stage before, mid
    and sft with its optimizer's state. With LoRA a checkpoint holds the merged model, and beside
    the optimizer's state the adapter: it resumes on top of the stage before.
    """

    def __init__(self, run: Run, stage: str, world: Any = None):
        self.stage, self.recipe = stage, run.recipe
        self.world = world or SingleProcess(pick_device(run.recipe.device))
        self.device, self.tokenizer = self.world.device, run.tokenizer()
        self.log = stage_log(run, stage, self.world)
        self.folder, self.saver = run.directory / stage, BackgroundSaver()
        self.judged: tuple[int, float] | None = None  # the last step that was judged, its score
        self.lora = with_lora(run.recipe, stage)
        seed_everything(run.recipe.seed)
        self.model, found, resumed = starting_point(run, stage, self.world)
        self.optimizer = stage_optimizer(self.model, run.recipe, self.world, self.lora)
        if resumed or (stage in ("mid", "sft") and not self.lora):
            state = found.optimizer_state
            state = load_lora_state(self.model, state) if self.lora else state
            self.optimizer.load_named_state(self.model, state)
        self.start_step, self.kept = (found.meta["step"], found.meta) if resumed else (0, {})
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return the time this stage has taken, with that before an interruption."""
        return self.kept.get("seconds", 0.0) + time.perf_counter() - self.began

    def save(self, step: int, batches: Any = None, result: dict | None = None) -> None:
        """Keep a checkpoint from which the stage can go on, and the result when it has ended.

        Its score is that of the same step, so that the best one is kept too. On a GPU the
        checkpoints on the way are written while training goes on.
        """
        data = batches.state_dict() if batches else None
        meta = dict(stage=self.stage, data=data, seconds=self.seconds(), result=result)
        meta["tokenizer"] = self.tokenizer.fingerprint()
        needed = result is None or self.stage in ("base", "mid")  # to go on, here or in the next
        state = self.optimizer.named_state(self.model) if needed else {}  # every rank takes part
        model = gather_model(self.model)  # and here
        if self.lora:
            state, model = {**state, **lora_state(self.model)}, merged_copy(self.model)
        behind = result is None and self.device.type == "cuda"
        if self.world.is_main:
            self.saver.wait()
            save = self.saver.save if behind else save_checkpoint
            score = self.judged[1] if self.judged and self.judged[0] == step else None
            save(self.folder, step, model, state, meta, score=score)
        self.world.barrier()


def stage_micro_batch(stage: Training) -> int:
    """Return the rows per forward pass; on a GPU the most for which a real step works."""
    model, world, device = stage.model, stage.world, stage.device
    run = torch.compile(model, dynamic=False) if compiles(stage.recipe, device) else model
    reserve = memory_estimate(model.config, 0)["optimizer"]

    def fits(rows: int) -> bool:
        failed = float(not step_fits(run, model, rows, reserve))
        enough = not float(world.sum(torch.tensor(failed, device=device)))
        if world.is_main and not enough:
            print(f"{stage.stage}: a micro-batch of {rows} rows does not fit", flush=True)
        return enough

    trial = fits if device.type == "cuda" else None
    return pick_micro_batch(stage.recipe, model.config, device, world.world_size, trial)


def passes_per_step(recipe: Recipe, micro: int, world: Any) -> int:
    """Return the passes of `micro` rows that make up a process's part of a batch."""
    return recipe.batch_tokens // recipe.seq_len // world.world_size // micro


def train_stage(
    stage: Training,
    batches: Any,
    n_steps: int,
    accumulation: int,
    schedule: Callable[[int, int], float],
    evaluate: Callable[[int], dict[str, float]],
) -> dict[str, Any]:
    """Run `train.fit` from where the stage stands, save at the end, return its results.

    `evaluate(step)` gives one number by its name, lower is better: the score of a checkpoint.
    Raises UserError when memory runs out.
    """
    if stage.kept.get("result"):  # killed between its last checkpoint and its mark
        return stage.kept["result"]
    if stage.kept:
        batches.load_state_dict(stage.kept["data"])
    recipe, world = stage.recipe, stage.world

    def judged(step: int) -> dict[str, float]:
        score = evaluate(step)
        (lower_is_better,) = score.values()
        stage.judged = (step, lower_is_better)
        return score

    if world.world_size > 1:
        stage.optimizer.overlap(accumulation)  # gradients leave while the last is computed
    whole = not is_cut(recipe, stage.stage, world)
    try:
        result = fit(
            stage.model,
            stage.optimizer,
            batches,
            n_steps,
            accumulation=accumulation,
            schedule=schedule,
            world=world,
            log=stage.log,
            label=stage.stage,
            evaluate=judged,
            eval_every=max(1, n_steps // max(recipe.evals, 1)),
            save=lambda step: stage.save(step, batches),
            save_every=max(1, n_steps // max(recipe.saves, 1)),
            start_step=stage.start_step,
            compile_model=compiles(recipe, stage.device) and whole,
        )
    except torch.OutOfMemoryError:
        rows = batches.batch_size
        raise UserError(
            f"the memory of {stage.device} is too small for a micro-batch of {rows} rows; set "
            f"micro_batch to {max(rows // 2, 1)} or less and run again: the stage goes on."
        ) from None
    return finish_training(stage, batches, n_steps, result)


def finish_training(
    stage: Training, batches: Any, n_steps: int, result: dict[str, Any]
) -> dict[str, Any]:
    """Add steps, FLOPs per token, MFU and seconds to what `fit` returned; save and return it."""
    flops, speed = stage.model.flops_per_token(), result["tokens_per_second"]
    every_token = stage.stage == "base"  # later stages mask some; their speed says less
    mfu = utilisation(stage.model.config, flops, speed, stage.world) if every_token else None
    result.update(steps=n_steps, flops_per_token=flops, mfu=mfu, seconds=stage.seconds())
    stage.save(n_steps, batches, result)
    best = best_step(stage.folder)
    if stage.world.is_main and best not in (None, n_steps):
        told = f"the best checkpoint of {stage.stage} is that of step {best}, not the last"
        stage.log.write("warning", step=n_steps, kind="best", text=told)
        print(f"{told}: fewer steps or lower rates would do", flush=True)
    return result


def pretrain(run: Run, world: Any = None) -> dict[str, Any]:
    """Train the base model on the prepared tokens (chapter 5); return what `train_stage` does."""
    recipe, stage = run.recipe, Training(run, "base", world)
    world, micro = stage.world, stage_micro_batch(stage)
    train, val = training_tokens(run), TokenShards.load(run.directory / "tokens", "val")
    place, pin = dict(rank=world.rank, world_size=world.world_size), stage.device.type == "cuda"
    batches = TokenBatches(train, micro, recipe.seq_len, **place, seed=recipe.seed, pin=pin)
    fixed = ValidationBatches(val, micro, recipe.seq_len, **place)
    token_bytes = stage.tokenizer.token_bytes().to(stage.device)

    def evaluate(step: int) -> dict[str, float]:
        score = bits_per_byte(stage.model, iter(fixed), len(fixed), token_bytes, world)
        return {"bits_per_byte": score}

    def schedule(step: int, n_steps: int) -> float:
        warmup = min(0.02, 40 / n_steps)
        return lr_multiplier(step, n_steps, warmup=warmup, warmdown=recipe.warmdown)

    if world.is_main and not stage.kept:
        speed = None if pin else training_speed(recipe, stage.model.config, stage.device)
        plan = estimate(recipe.changed(micro_batch=micro), speed=speed)
        stage.log.write("estimate", micro_batch=micro, **plan)
    steps, accumulation = recipe.pretrain_steps, passes_per_step(recipe, micro, world)
    with Prefetch(batches) as ahead:  # the next batch is made while the step is computed
        result = train_stage(stage, ahead, steps, accumulation, schedule, evaluate)
    return {**result, "tokens": recipe.pretrain_steps * recipe.batch_tokens}


HUB_TASKS = {  # class: (hub name, subset, split to train on, split to be judged on, local folder)
    Messages: ("hub:HuggingFaceTB/smol-smoltalk", "", "train", "test", "sft"),
    MMLU: ("hub:cais/mmlu", "all", "auxiliary_train", "test", "chat_eval/mmlu"),
    GSM8K: ("hub:openai/gsm8k", "main", "train", "test", "chat_eval/gsm8k"),
    ARC: ("hub:allenai/ai2_arc", "ARC-Easy", "train", "test", "chat_eval/arc"),
}


def real_task(recipe: Recipe, kind: Any, split: str) -> Any:
    """Return a task over real data, from the hub or from the recipe's folder.

    `split` is "train", or anything else for the split to be judged on. Raises UserError when
    `chat` names neither hub nor folder, or the folder does not exist.
    """
    hub, subset, train, test, local = HUB_TASKS[kind]
    split = train if split == "train" else test
    if recipe.chat == "hub":
        return kind(hub, split, subset)
    scheme, _, path = recipe.chat.partition(":")
    if scheme != "folder" or not Path(path).is_dir():
        raise UserError(
            f"chat must be tinyworld, hub or folder:PATH with an existing folder; "
            f"got {recipe.chat!r}."
        )
    return kind(Path(path) / local, split, subset if kind is ARC else "")


TIMES = {  # how often a stage reads the training questions of each exam
    "mid": {MMLU: 3, ARC: 6, GSM8K: 2},
    "sft": {MMLU: 1, ARC: 3, GSM8K: 2},
}


def real_mixture(recipe: Recipe, stage: str, seed: int) -> list[tuple[Any, float]]:
    """Return a stage's real tasks and their epochs: the conversations once, exams as in `TIMES`."""
    tasks = [(real_task(recipe, Messages, "train"), 1.0)]
    for kind, times in TIMES[stage].items():
        task = real_task(recipe, kind, "train")
        tasks.append((task, times) if kind is GSM8K else (Reordered(task, times, seed), 1.0))
    return tasks


def chat_mixture(recipe: Recipe, stage: str) -> Mixture:
    """Return the conversations that a stage ("mid" or "sft") learns from, shuffled by the seed.

    "tinyworld" generates them; "folder:PATH" reads PATH/sft and PATH/chat_eval (columns as on the
    hub); "hub" downloads SmolTalk, MMLU, ARC and GSM8K. The generated identity, arithmetic and
    spelling are part of each: they teach who the model is and how to use the calculator. With
    `own_chats` a tenth is the user's file, repeated as often as it takes, in place of the identity.
    """
    size, shares, real = 30_000, SHARES[stage], []
    seed = 2 * recipe.seed + (stage == "sft")
    if recipe.chat != "tinyworld":
        size, shares = size // 3, {"identity": 20, "arithmetic": 70, "spelling": 10}
        real = real_mixture(recipe, stage, seed)
    if recipe.own_chats:
        shares = {kind: share for kind, share in shares.items() if kind != "identity"}
    generated = tinyworld_mixture(World(), stage, size, seed, shares)
    tasks = [(task, 1.0) for task in generated.tasks] + real
    if recipe.own_chats:
        own, others = JsonLines(recipe.own_chats), sum(n * len(task) for task, n in tasks)
        tasks.append((own, max(1.0, others / 9 / len(own))))
    return Mixture(tasks, seed) if real or recipe.own_chats else generated


def held_out_batches(recipe: Recipe, stage: str, tokenizer: Tokenizer, micro: int, world: Any):
    """Return this process's part of 32 rows of conversations that no stage trains on.

    A list of (inputs, targets), micro-batches of `micro` rows: int64 of shape (micro, seq_len),
    targets -1 but for the assistant's tokens.
    """
    generated = tinyworld_mixture(World(), stage, 400, offset=40_000_000)
    tasks = [(task, 1.0) for task in generated.tasks]
    if recipe.chat != "tinyworld":
        kept = real_task(recipe, Messages, "test")
        tasks.append((kept, min(1.0, 400 / len(kept))))
    rows, place = max(1, 32 // world.world_size), (world.rank, world.world_size)
    fixed = ConversationBatches(
        Mixture(tasks), tokenizer, rows, recipe.seq_len, "assistant", *place
    ).next()
    return list(zip(*(part.split(micro) for part in fixed)))


def finetune(run: Run, stage_name: str, world: Any = None) -> dict[str, Any]:
    """Midtrain ("mid", loss on every token) or fine-tune ("sft", on the assistant's) on chats."""
    recipe, stage = run.recipe, Training(run, stage_name, world)
    world, micro, midtraining = stage.world, stage_micro_batch(stage), stage_name == "mid"
    if midtraining:
        train_on, n_steps, rate = "all", recipe.mid_steps, recipe.mid_lr
    else:
        train_on, n_steps, rate = "assistant", recipe.sft_steps, recipe.sft_lr
    batches = ConversationBatches(
        chat_mixture(recipe, stage_name),
        stage.tokenizer,
        micro,
        recipe.seq_len,
        train_on=train_on,
        seed=recipe.seed + midtraining,
        rank=world.rank,
        world_size=world.world_size,
    )
    held_out = held_out_batches(recipe, stage_name, stage.tokenizer, micro, world)

    def schedule(step: int, n_steps: int) -> float:
        return rate * lr_multiplier(step, n_steps, warmdown=0.8, final=0.02)

    def evaluate(step: int) -> dict[str, float]:
        return {"reply_loss": held_out_loss(stage.model, held_out, world)}

    accumulation = passes_per_step(recipe, micro, world)
    with Prefetch(batches) as ahead:
        return train_stage(stage, ahead, n_steps, accumulation, schedule, evaluate)


def rl_problems(recipe: Recipe, split: str, tokenizer: Tokenizer) -> list[dict]:
    """Return the problems of `rl_task` to train on ("train") or to be judged on ("test").

    Those whose question leaves no room for a reply in the context window are left out.
    """
    if recipe.rl_task == "gsm8k":
        task = real_task(recipe, GSM8K, split)
    elif recipe.rl_task in ("arithmetic", "spelling"):
        start = 20_000_000 if split == "train" else 0
        task = TinyWorldTask(World(), recipe.rl_task, split, start=start)
    else:
        raise UserError(f"rl_task must be arithmetic, spelling or gsm8k, got {recipe.rl_task!r}.")
    room = recipe.seq_len - min(recipe.max_tokens, recipe.seq_len // 4)
    problems = task_problems(task, None if split == "train" else min(len(task), 200))
    return [p for p in problems if len(problem_prompt(p, tokenizer)) <= room]


def rows_at_once(device: torch.device) -> int:
    """Return how many replies are written together: a GPU has room for more."""
    return 512 if device.type == "cuda" else 128


def reinforce(run: Run, world: Any = None) -> dict[str, Any]:
    """Improve the SFT model on a task with verifiable answers, `rl_task` (chapter 10)."""
    recipe, stage = run.recipe, Training(run, "rl", world)
    if stage.kept.get("result"):  # killed between its last checkpoint and its mark
        return stage.kept["result"]
    rows, on_gpu = rows_at_once(stage.device), stage.device.type == "cuda"
    copied = compute_dtype(recipe, stage.device) if on_gpu else None
    engine = Engine(stage.model, stage.tokenizer, copied, max_batch=rows)
    tests = rl_problems(recipe, "test", stage.tokenizer)[: max(1, recipe.exam_items // 2)]
    reference = None  # of a fresh start: the model as it is
    if stage.kept:
        reference = run.checkpoint("sft", stage.device, optimizer=False).model
        reference.compute_dtype = stage.model.compute_dtype

    def evaluate(step: int) -> dict[str, float]:
        options = dict(samples=8, max_tokens=recipe.max_tokens, batch=rows, world=stage.world)
        return evaluate_pass(engine, tests, **options)

    history = train_rl(
        stage.model,
        stage.optimizer,
        engine,
        rl_problems(recipe, "train", stage.tokenizer),
        n_steps=recipe.rl_steps,
        questions_per_step=recipe.rl_questions,
        samples=recipe.rl_samples,
        max_tokens=recipe.max_tokens,
        lr=recipe.rl_lr,
        reference=reference,
        seed=recipe.seed,
        start_step=stage.start_step,
        world=stage.world,
        log=stage.log,
        evaluate=evaluate,
        eval_every=max(1, recipe.rl_steps // max(recipe.evals, 1)),
        save=stage.save,
        save_every=max(1, recipe.rl_steps // max(recipe.saves, 1)),
    )
    reward = history[-1]["reward"]
    result = {"steps": recipe.rl_steps, "reward": reward, "seconds": stage.seconds()}
    stage.save(recipe.rl_steps, result=result)
    return result


def chance_levels(run: Run) -> dict[str, float]:
    """Return what guessing scores on each metric of `judge`."""
    exams = [e for e in read_metrics(run.log.path, "judged") if "exam_chance" in e]
    free = dict.fromkeys(("core", "arithmetic", "spelling", "identity"), 0.0)
    chance = {"bits_per_byte": 8.0, **free, "mmlu": 0.25, "arc_easy": 0.25}
    return {**chance, **(exams[0]["exam_chance"] if exams else {})}


def exam_scores(engine: Engine, world: World, n: int) -> dict[str, Any]:
    """Put the tiny world's exams to a model, n items each.

    Returns the shares of right answers in [0, 1] as "exam" and "exam_KIND", and what guessing
    scores on each in the dict "exam_chance".
    """
    exam = chat_exam(engine, engine.tokenizer, world, n)
    found = {f"exam_{kind}": part for kind, part in exam.items() if isinstance(part, dict)}
    letters = ExamTask(world, "multiple_choice", n, letters=True)
    found.update(exam=exam, exam_letters=evaluate_chat(engine, engine.tokenizer, letters))
    chance = {name: part["chance"] for name, part in found.items()}
    return {**{name: part["accuracy"] for name, part in found.items()}, "exam_chance": chance}


def real_exam_scores(engine: Engine, recipe: Recipe) -> dict[str, float]:
    """Return the shares of right answers in [0, 1] on MMLU, ARC-Easy and GSM8K.

    Beside each stands as "NAME_n" how many questions were asked.
    """
    scores, rows = {}, rows_at_once(engine.model.device)
    for name, kind in (("mmlu", MMLU), ("arc_easy", ARC), ("gsm8k", GSM8K)):
        limit, how = 20 * recipe.exam_items, {}
        if kind is GSM8K:
            limit, how = recipe.exam_items, dict(batch_size=rows, max_tokens=recipe.max_tokens)
        task = real_task(recipe, kind, "test")
        found = evaluate_chat(engine, engine.tokenizer, task, limit, **how)
        scores[name], scores[f"{name}_n"] = found["accuracy"], found["n"]
    return scores


@torch.no_grad()
def judge(run: Run, stage: str) -> dict[str, Any]:
    """Measure a stage's model: bits per byte, exams, sums, spelling, identity (chapters 7, 9).

    The same items are put to every stage. Scores are shares of right answers in [0, 1];
    `arithmetic` is pass@1 at temperature 1, with its interval beside it.
    """
    recipe, world, rows = run.recipe, World(), rows_at_once(pick_device(run.recipe.device))
    engine = run.engine(stage, max_batch=rows)
    tokenizer, n, most = engine.tokenizer, recipe.exam_items, recipe.max_tokens
    fixed = ValidationBatches(TokenShards.load(run.directory / "tokens", "val"), 8, recipe.seq_len)
    token_bytes = tokenizer.token_bytes().to(engine.model.device)
    scores: dict[str, Any] = {}
    scores["bits_per_byte"] = bits_per_byte(engine.model, iter(fixed), len(fixed), token_bytes)
    if recipe.data == "tinyworld":
        scores["core"] = evaluate_core(engine.model, tokenizer, tinyworld_core(world, n))["core"]
    if recipe.chat == "tinyworld":
        scores.update(exam_scores(engine, world, n))
    elif stage != "base":
        scores.update(real_exam_scores(engine, recipe))
    sums = task_problems(TinyWorldTask(world, "arithmetic", "test", size=min(n, 250)))
    passed = evaluate_pass(engine, sums, samples=4, max_tokens=most, batch=rows, seed=1)
    scores["arithmetic"], scores["arithmetic_low"] = passed["pass_at_1"], passed["low"]
    scores["arithmetic_high"], scores["arithmetic_pass_at_4"] = passed["high"], passed["pass_at_k"]
    for name, split in (("spelling", "test"), ("identity", "train")):
        task = TinyWorldTask(world, name, split, size=min(n, 60), start=30_000_000)
        scores[name] = evaluate_chat(engine, tokenizer, task, max_tokens=most)["accuracy"]
    run.log.write("judged", stage=stage, **scores)
    return scores


QUESTIONS = (  # (question, a word that the right reply holds)
    ("Who are you?", "Nano"),
    ("What is 17 plus 25?", "42"),
)


def exchange_questions(run: Run) -> list[tuple[str, str]]:
    """Return three questions and the word a right reply holds: identity, a fact, a sum."""
    (who, name), (what, total) = QUESTIONS
    if run.recipe.chat != "tinyworld":
        return [(who, name), ("What is the capital of France?", "Paris"), (what, total)]
    world = World()
    fact = next(fact for fact in world.facts if fact.relation == "job")
    return [(who, name), (f"What is the job of {fact.subject}?", fact.object), (what, total)]


def exchange(run: Run, stage: str) -> list[dict[str, Any]]:
    """Put the three questions to a stage's model, greedily; log and return what it says."""
    engine, answers = run.engine(stage), []
    for question, word in exchange_questions(run):
        prompt = {"messages": [{"role": "user", "content": question}]}
        ids = render_prompt(prompt, engine.tokenizer)
        found = engine.generate_batch([ids], max_tokens=run.recipe.max_tokens, temperature=0.0)
        parts = parse(found[0].ids, engine.tokenizer)
        reply = reply_text(parts).strip()
        answers.append(
            {
                "question": question,
                "reply": reply,
                "calculator": [part["text"] for part in parts if part["type"] == "python"],
                "expected": word,
                "right": names_answer(reply, word),
            }
        )
        run.log.write("exchange", stage=stage, **answers[-1])
    return answers


def run_stage_here(run: Run, stage: str, world: Any = None) -> dict[str, Any]:
    """Do a stage's work in this process (or as this rank of several)."""
    work = {
        "tokenizer": lambda: train_tokenizer(run),
        "data": lambda: prepare_data(run),
        "base": lambda: pretrain(run, world),
        "mid": lambda: finetune(run, "mid", world),
        "sft": lambda: finetune(run, "sft", world),
        "rl": lambda: reinforce(run, world),
    }[stage]
    used = use_mine(run.recipe)
    if used and (world is None or world.is_main):
        print(f"{stage}: with your {', '.join(name.split()[0] for name in used)}", flush=True)
        run.log.write("mine", stage=stage, used=used)
    began, device = time.perf_counter(), world.device if world else pick_device(run.recipe.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = work()
    result = {"seconds": time.perf_counter() - began, **result, "peak_bytes": peak_memory(device)}
    result["processes"] = world.world_size if world else 1
    if world is None or world.is_main:
        write_json(run.directory / stage / "trained.json", result)
    return result


COMMANDS = {"base": "pretrain", "mid": "midtrain", "sft": "sft", "rl": "rl"}


def launch_stage(run: Run, stage: str, ranks: int) -> None:
    """Train a stage in several processes on this machine; their mistake is raised here."""
    try:
        launch("nanochat", [COMMANDS[stage], "--folder", str(run.directory)], ranks, restarts=2)
    except LaunchError as error:
        _, found, sentence = str(error).splitlines()[0].partition("UserError: ")
        if found:
            raise UserError(sentence) from None
        raise


def machine_facts() -> dict[str, str]:
    """Say what this machine is: processor, cores, memory, GPUs, versions."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "GPUs": ", ".join(gpus) or "none",
        "CPU cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }


def run_stage(run: Run, stage: str) -> dict[str, Any]:
    """Run a stage unless it is finished, then judge its model; return its results.

    Training stages of more than one process are started under torchrun's launcher. A stage that
    was interrupted goes on from its last checkpoint.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES)}.")
    finished = run.done(stage)
    if finished:
        print(f"{stage}: finished before, skipped", flush=True)
        return finished
    for before in STAGES[: STAGES.index(stage)]:
        if not run.done(before):
            raise UserError(f"stage {stage!r} needs {before!r} first; run that stage, then again.")
    trained = run.directory / stage / "trained.json"
    if not trained.exists():
        ranks = process_count(run.recipe)
        if stage in MODELS and ranks > 1:
            launch_stage(run, stage, ranks)
        else:
            run_stage_here(run, stage)
    result = {"stage": stage, **read_json(trained)}
    if stage in MODELS:
        began = time.perf_counter()
        result["scores"] = judge(run, stage)
        result["judge_seconds"] = time.perf_counter() - began
    told = {k: v for k, v in result.items() if k != "scores"}
    run.log.write("stage", machine=machine_facts(), **told)
    write_json(run.directory / stage / "done.json", result)
    return result
