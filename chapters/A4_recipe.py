# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A4. The recipe of a run

By the end of this appendix you have turned the stages of the book into one run that a single
name describes, and you have shown three things about it: its size follows from one number, its
memory and its price are known before it starts, and a power cut in the middle does not change a
single weight of the model that comes out.
"""

# %%
from nanochat.recipe import PROFILES, Recipe, estimate

for profile in PROFILES:
    recipe = Recipe.for_profile(profile)
    plan = estimate(recipe)
    size, text = plan["parameters"] / 1e6, plan["tokens"] / 1e6
    print(
        f"{profile:9s} depth {recipe.depth:2d} {size:8.1f} M parameters {text:9.1f} M tokens",
        end=" ",
    )
    print(f"{plan['flops']:.1e} FLOPs")

# %% [markdown]
r"""
One word each, and everything else is decided: sizes, rates, steps, data. `laptop` is the run of
`make capstone`; `speedrun` is a model of GPT-2's quality.

Nothing in this appendix is about learning. It is about the hours around it: the run that dies at
three in the morning, the second GPU, the colleague who asks what the number in the table means.
Whoever trains models spends more time on these than on attention.

**What you will be able to do**

- derive batch, steps and rates of a run from its depth, and say which rule gave each;
- predict the memory of a training step part by part, and check it against a measurement;
- write a stage that is skipped when it is done and resumes when it is not, and test that
  resuming is exact;
- run the same stage in one process or in many;
- make every table of a report a function of one log;
- turn each mistake of a user into one sentence.

**Before you start**: chapters 5 (the training loop and checkpoints), 6 (processes) and 9 (the chat
stages). Reading takes 30 minutes, running about half a minute on two CPU cores.
"""

# %% tags=["parameters"]
profile = "quick"
steps = 40  # pretraining steps of the small run below

# %%
#| default_exp recipe

# %%
#| export
import difflib
import math
import os
import platform
import shutil
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
from nanochat.engine import Engine
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
    TinyWorldTask,
    chat_exam,
    evaluate_chat,
    names_answer,
    tinyworld_mixture,
)
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer
from nanochat.train import TRACKERS, SingleProcess, TrackedLog, fit, open_tracker

# %%
import collections
import contextlib
import tempfile

import matplotlib.pyplot as plt
from safetensors.torch import load_file, save_file

from nanochat.common import COLORS, figure
from nanochat.data import file_digest

# %% [markdown]
r"""
## 1. One dial

A run has some forty settings. If each script kept its own, two of them would one day disagree, so
all of them live in one flat list, with a type and a default each: those of the `laptop` profile.
What is not in this list cannot be set; what is in it is written to disk with the run.
"""

# %%
#| export
STAGES = ("tokenizer", "data", "base", "mid", "sft", "rl")
MODELS = ("base", "mid", "sft", "rl")


@dataclass
class Settings:
    """Every number of a run.

    Rates are the optimizer's initial rates at width 768 (chapter 4); `*_lr` of later stages are
    factors on them. Steps are optimizer steps of `batch_tokens` tokens over all processes.
    `model` is "classic" or "modern" (chapter 3). `micro_batch` 0 means as many rows as fit,
    `processes` 0 one for each GPU; `fsdp` 1 cuts the model over them, 2 recomputes activations too
    (chapter 6). `compile` is "auto" on GPUs only ("yes" and "no" decide it), `tracker` names a tool
    that shows the run (chapter 5), `grid_grams` is the g of CO2 for a kWh where you are.
    `own_chats` is a JSONL file of conversations that replace the identity, `lora_rank` above 0
    fine-tunes (sft) with LoRA, `rl_task` is arithmetic, spelling or gsm8k (chapters 9 and 10).
    `mine` is a folder of solved exercises whose functions replace the book's (section 2).
    """

    name: str = "laptop"
    data: str = "tinyworld"
    chat: str = "tinyworld"
    own_chats: str = ""
    seed: int = 0
    model: str = "classic"
    depth: int = 4
    aspect: int = 64
    head_dim: int = 64
    seq_len: int = 256
    vocab_size: int = 2048
    tokenizer_chars: int = 2_000_000
    batch_tokens: int = 4096
    micro_batch: int = 16
    pretrain_steps: int = 600
    mid_steps: int = 120
    sft_steps: int = 120
    rl_steps: int = 30
    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    head_lr: float = 0.008
    weight_decay: float = 0.0
    warmdown: float = 0.5
    mid_lr: float = 0.5
    sft_lr: float = 0.3
    lora_rank: int = 0
    rl_task: str = "arithmetic"
    rl_lr: float = 0.05
    rl_questions: int = 16
    rl_samples: int = 8
    max_tokens: int = 96
    exam_items: int = 120
    val_tokens: int = 65_536
    evals: int = 4
    saves: int = 4
    processes: int = 1
    fsdp: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compile: str = "auto"
    tracker: str = ""
    grid_grams: float = GRID_GRAMS
    mine: str = ""


# %% [markdown]
r"""
Most of the settings are not free. Choose the depth $L$, and with it the width $C = 64L$ and the
parameters that count, those of the matrices and the head, $N = 12\,L\,C^2 + V C$. Experiments on
small models (appendix A2) then give rules for the rest:

$$D = 12\,N,\qquad B = 2^{\operatorname{round}\log_2\left(2^{19}\,(D/D_{12})^{0.383}\right)},\qquad
\text{rate} \propto \sqrt{B},\qquad \lambda \propto \frac{\sqrt{B}}{D},\ \lambda \le \tfrac12.$$

$D$ is the number of training tokens, 12 for each parameter. $B$ is the batch in tokens: a larger
model wants a larger one, as the gradient's noise matters more when the loss is low. $D_{12}$
belongs to the model of depth 12, where everything was tuned with $B = 2^{19}$. The rates grow with
the root of the batch, and the weight decay $\lambda$ shrinks so that a run forgets at the same pace
relative to its length, up to the half that chapter 5 found to be the most a small model bears. What
is *derived* depends on nothing but the depth and the ratio.
"""


# %%
#| export
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


# %%
#| test
rules = scaled_settings(20)  # published for depth 20: 4,980 steps of 2^20 tokens, decay 0.100
assert (rules["pretrain_steps"], rules["batch_tokens"]) == (4980, 2**20)
assert abs(rules["weight_decay"] - 0.100) < 0.001
assert scaled_settings(24, ratio=8.0)["pretrain_steps"] == 5568  # the published speedrun

# %%
depths = range(4, 33, 2)
settings = [scaled_settings(d) for d in depths]
fig, ax = figure(
    "From depth 12 to 24 the text grows 6.6 times, the batch twice, the steps 3.3 times",
    "depth (layers)",
    "relative to depth 12",
    alt="Three rising lines over depth on a log scale: tokens steepest, steps and batch in jumps.",
)
for label, of in (
    ("training tokens", lambda s: s["pretrain_steps"] * s["batch_tokens"]),
    ("batch", lambda s: s["batch_tokens"]),
    ("steps", lambda s: s["pretrain_steps"]),
):
    ax.semilogy(depths, [of(s) / of(scaled_settings(12)) for s in settings], ".-", label=label)
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
The steps move in a saw: the batch jumps by a factor of two, and at each jump the steps halve.

A `Recipe` is the settings with three ways to make one: `for_depth` turns the dial, `for_profile`
takes a ready set by name, `changed` replaces single fields. `changed` also reads text, as a command
line hands it over, and refuses what it does not know: a misspelt setting that is silently ignored
costs a night.
"""


# %%
#| export
@dataclass
class Recipe(Settings):
    """The settings of a run: `for_profile` names a ready set, `for_depth` derives one."""

    @classmethod
    def for_profile(cls, profile: str, **changes: Any) -> "Recipe":
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

    def changed(self, **changes: Any) -> "Recipe":
        """Return a copy with some fields changed; UserError for one that does not exist.

        Text is read as the field's type ("12" is 12), so that the command line can pass it on.
        """
        kinds = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        for name, value in changes.items():
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, 1)
                raise UserError(
                    f"a recipe has no {name!r}; "
                    + (f"perhaps you mean {near[0]!r}." if near else f"it has {', '.join(kinds)}.")
                )
            try:
                changes[name] = kinds[name](value)
                if kinds[name] is int and float(value) != changes[name]:
                    raise ValueError(value)
            except (TypeError, ValueError, OverflowError):
                wanted = kinds[name].__name__
                raise UserError(f"{name} must be {wanted}, got {value!r}.") from None
        return replace(self, **changes)

    def config(self, vocab_size: int) -> GPTConfig:
        """Return the model's sizes; the vocabulary is what the tokenizer reached."""
        build = GPTConfig.modern if self.model == "modern" else GPTConfig.classic
        return build(
            self.depth, vocab_size, self.seq_len, aspect=self.aspect, head_dim=self.head_dim
        )


# %%
#| test
assert Recipe().changed(depth="6").depth == 6
for wrong in ({"dept": 6}, {"depth": "six"}, {"depth": 6.5}):
    try:
        Recipe().changed(**wrong)
        raise AssertionError(wrong)
    except UserError as error:
        assert str(error).endswith(".")

# %% [markdown]
r"""
Two tables hold the choices that no rule makes: what every run on GPUs shares, and what each
profile changes. `classic` is the first recipe of nanochat, from October 2025; its constants came
before the rules, so it states its own.
"""

# %%
#| export
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

# %%
#| export
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
        rl_steps=100,
        rl_lr=0.1,
        max_tokens=64,
        exam_items=100,
        val_tokens=16_384,
    ),
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


# %% [markdown]
r"""
Runs on GPUs train the modern model. `laptop` stays with the classic one, the one that the chapters
build first. Two minutes on two CPU cores bring the modern one a little further: 3 % fewer tokens a
second, 10 % fewer bits per byte (`benchmarks/RESULTS.md`); `model=modern` asks for it.
"""

# %%
small, large = vars(Recipe.for_depth(12)), vars(Recipe.for_depth(24))
for field in small:
    if small[field] != large[field]:
        print(f"{field:15s} {small[field]!s:>10.10} -> {large[field]!s:<.10}")

# %% [markdown]
r"""
One number was turned, and everything that follows from it has followed.

> **Exercise A4.1.** A friend has one GPU for one hour, at 40 % of $10^{15}$ FLOP/s. Which depth
> should she train? *(`estimate` below counts the FLOPs; try depths 8 to 14.)*

## 2. The folder of a run

A run is a folder, and the folder is all there is: no database, no state in a notebook. Its
`recipe.json` says what was asked for. Its `metrics.jsonl` says what happened, one line an event.
Everything else is what a stage left behind.

Before a folder is made, `check_recipe` looks for numbers that cannot work. "The batch does not
divide by the processes" is a sentence worth reading in the first second, not after the tokenizer
has been trained. And it says which number would do.
"""


# %%
#| export
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
    """Return the dtype of the matrix products: the recipe's, "auto" being the device's best."""
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
    if not recipe.name or recipe.name != Path(recipe.name).name or "\\" in recipe.name:
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


# %% [markdown]
r"""
One more thing is decided before the work begins: whose code does it. Many exercises of the book ask
for a function that the package has. `make capstone MINE=1`, or a recipe with `mine="work"`, looks
through your notebooks in `work/` for them. Each answer is checked again, in a process of its own.
One that passes takes the place of the book's function wherever a module holds it, later in every
rank too. One that does not pass stops the run, with the property that it lacks. One that is not
written yet is left alone. Which of your functions did the work stands in the log and the report.
"""


# %%
#| export
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


# %% [markdown]
r"""
`Run.open` starts a run or takes one up. Here lies a trap: start `laptop`, change the depth, start
`laptop` again. A tool that goes on regardless trains a model that no recipe describes. So a run
remembers its recipe and refuses another one, with the difference in the message. Some fields may
differ: they say *where* a run computes, not *what* it learns, so a run may be taken up on a machine
with more GPUs.

A checkpoint knows the fingerprint of its tokenizer (chapter 1). With another vocabulary every id
would mean another word, the loss would be absurd and nothing would crash; so `Run.checkpoint`
compares.
"""

# %%
#| export
MACHINE_FIELDS = (  # where, not what, is learnt
    *("micro_batch", "processes", "fsdp", "device", "dtype", "compile", "tracker", "grid_grams"),
)


class Run:
    """A run on disk: its recipe, its artifacts, its log (the folder is drawn in appendix A4)."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        settings = read_json(self.directory / "recipe.json")
        strange = set(settings) - {field.name for field in fields(Recipe)}
        if strange:
            raise UserError(
                f"{self.directory / 'recipe.json'} has settings that this version does not know "
                f"({', '.join(sorted(strange))}); use the version that started the run."
            )
        self.recipe = Recipe(**settings)
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
            old, new = asdict(cls(directory).recipe), asdict(recipe)
            names = [k for k in new if old[k] != new[k] and k not in MACHINE_FIELDS]
            differ = [f"{k} is {old[k]!r}, asked {new[k]!r}" for k in names]
            if differ:
                raise UserError(
                    f"run {recipe.name!r} in {directory} was started with another recipe "
                    f"({'; '.join(differ[:3])}); choose another name or delete that folder."
                )
        write_json(path, asdict(recipe))
        return cls(directory)

    def done(self, stage: str) -> dict[str, Any] | None:
        """Return a finished stage's results, None while it is not finished."""
        path = self.directory / stage / "done.json"
        return read_json(path) if path.exists() else None

    def tokenizer(self) -> Tokenizer:
        """Load the run's tokenizer."""
        return Tokenizer.load(self.directory / "tokenizer")

    def checkpoint(self, stage: str, device: str | torch.device = "cpu") -> Checkpoint:
        """Load a stage's newest checkpoint; UserError when it belongs to another vocabulary."""
        found = load_checkpoint(self.directory / stage, device=device)
        ours, theirs = self.tokenizer().fingerprint(), found.meta.get("tokenizer")
        if ours != theirs:
            raise UserError(
                f"the {stage} checkpoint was trained with another tokenizer "
                f"({str(theirs)[:12]}, the run has {ours[:12]}); delete {self.directory / stage}."
            )
        return found

    def engine(self, stage: str, remember: int = 0) -> Engine:
        """Load a stage's model, ready to chat; it may `remember` prompts (chapter 8)."""
        use_mine(self.recipe)
        device = pick_device(self.recipe.device)
        model = self.checkpoint(stage, device).model.eval()
        model.compute_dtype = compute_dtype(self.recipe, device)
        return Engine(model, self.tokenizer(), remember=remember)


# %%
#| test
with tempfile.TemporaryDirectory() as folder:
    Run.open(Recipe(), folder)
    assert Run.open(Recipe(processes=2), folder).recipe.processes == 2  # where, not what
    for wrong in (Recipe(depth=5), Recipe(batch_tokens=1000), Recipe(rl_samples=1)):
        try:
            Run.open(wrong, folder)
            raise AssertionError(wrong)
        except UserError:
            pass

# %% [markdown]
r"""
## 3. Stages are functions

Each stage is a function from a run to a small dict of results. It reads files that earlier stages
left and writes its own; nothing else passes between stages. That is why any of them can be run
alone, again, or in another process.

| stage | reads | leaves behind |
| --- | --- | --- |
| `tokenizer` | the source | `tokenizer/` |
| `data` | the source, the tokenizer | `tokens/` |
| `base` | tokens | `base/step_NNNNNN/` |
| `mid` | `base`, conversations | `mid/step_NNNNNN/` |
| `sft` | `mid`, conversations | `sft/step_NNNNNN/` |
| `rl` | `sft`, word problems | `rl/step_NNNNNN/` |

The first two are short.
"""


# %%
#| export
def train_tokenizer(run: Run) -> dict[str, Any]:
    """Train the run's tokenizer on the first `tokenizer_chars` characters of its source."""
    recipe = run.recipe
    source = open_source(recipe.data)

    def texts(bar: Progress):
        for text in source.documents("train"):
            yield text[:10_000]
            bar.update(min(len(text), 10_000, bar.total - bar.done))
            if bar.done >= recipe.tokenizer_chars:
                return

    with Progress(recipe.tokenizer_chars, "tokenizer", "character") as bar:
        tokenizer = Tokenizer.train(texts(bar), recipe.vocab_size)
    tokenizer.save(run.directory / "tokenizer")
    sample = "".join(t for t, _ in zip(source.documents("val"), range(200)))
    n_tokens = len(tokenizer.encode(sample))
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": len(sample.encode("utf-8")) / max(n_tokens, 1),
    }


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


# %% [markdown]
r"""
Tokens of a large run take gigabytes. Is there no room for them, the run need not end: chapter 2 has
a `TokenStream`, which makes them while the model trains, at the price of some processor time.
"""


# %%
#| export
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


def training_tokens(run: Run) -> TokenShards | TokenStream:
    """Return the tokens to train on: those on disk, or a stream that makes them."""
    if (run.directory / "tokens" / "train").exists():
        return TokenShards.load(run.directory / "tokens", "train")
    return TokenStream(open_source(run.recipe.data), run.tokenizer())


# %% [markdown]
r"""
## 4. Will it fit?

Chapter 5 has the count of memory, part by part (`memory_estimate`), and measures what fits by real
steps (`largest_that_fits`, `step_fits`). Here they meet a recipe. The batch is a matter of
learning, and stays: a smaller **micro-batch** just takes more passes until the optimizer steps. So
the rows that may go through at once are the divisors of a process's part of the batch. On a GPU the
estimate is the guess at which the trials begin, and a trial is a step of the very model that will
be trained, compiled if it will be, with the memory of the optimizer set aside. On a CPU, where too
much memory ends in a standstill and not in an error, the estimate decides.
"""


# %%
#| export
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
    free, kind = 0.8 * free_memory(device) / (1 if device.type == "cuda" else ranks), {}
    kind.update(dtype=compute_dtype(recipe, device), compiled=compiles(recipe, device))

    def needs(n: int) -> int:
        return sum(memory_estimate(config, n, **kind).values())

    guess = max((n for n in sizes if needs(n) <= free), default=0)
    found = largest_that_fits(sizes, fits or (lambda n: n <= guess), guess)
    if found is None:
        need, have = needs(1) / 2**30, free / 0.8 / 2**30
        raise UserError(
            f"depth {config.n_layer} with seq_len {config.seq_len} needs about {need:.1f} GiB of "
            f"memory, {have:.1f} GiB are free; choose a smaller depth or seq_len."
        )
    return found


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free; on a GPU what this process holds already counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Say whether training compiles the model: as the recipe says, "auto" on GPUs only."""
    return recipe.compile == "yes" or (recipe.compile == "auto" and device.type == "cuda")


# %% [markdown]
r"""
How good is the guess? On a CPU chapter 5 finds it within a few per cent of the allocator. Here is
the control: memory that was measured on GPUs, with compiled models. The first line is a run of this
book, the others are reports of nanochat's runs, whose tables are kept in 16 bits, and whose sizes
nobody fitted anything to.
"""

# %%
published = (  # (what, depth, vocabulary, rows, GB): peaks of real runs, all of the classic model
    ("ours, depth 12, 32 rows", 12, 32768, 32, 32.7),
    ("depth 20, 32 rows, 65,536 ids", 20, 65536, 32, 75.4),
    ("depth 20,  8 rows, 65,536 ids", 20, 65536, 8, 29.6),
)
for what, depth, vocab_size, rows, measured in published:
    size = GPTConfig.classic(depth, vocab_size, 2048)
    guess = sum(memory_estimate(size, rows, compiled=True).values()) / 1e9
    print(f"{what:30s} estimated {guess:3.0f} GB, measured {measured} GB: {guess / measured:.2f}")

# %% [markdown]
r"""
Near enough to start from, and not near enough to rely on: hence the trials. (The first line is no
test: the count of compiled logits was chosen in its light.) If memory runs out all the same,
because another program takes some, `fit` halves the micro-batch and goes on.
"""

# %%
fig, ax = figure(
    "By the estimate a 24 GB card takes 16 rows at depth 12, 4 at depth 20",
    "micro-batch (rows of 2,048 tokens)",
    "memory (GB)",
    alt="Three lines that rise with the micro-batch, and two dashed lines for cards.",
)
rows = (1, 2, 4, 8, 16, 32)
for depth in (12, 20, 24):
    config = GPTConfig.for_depth(depth, 32768, 2048)
    needs = [sum(memory_estimate(config, n, compiled=True).values()) / 1e9 for n in rows]
    ax.loglog(rows, needs, ".-", label=f"depth {depth}", base=2)
for size in (24, 80):
    ax.axhline(size, color=COLORS[-1], linestyle="--", linewidth=1)
    ax.text(1, size * 1.05, f"a card of {size} GB", fontsize=8)
ax.set_xticks(rows, rows)
ax.set_yticks((4, 16, 64, 256), ("4", "16", "64", "256"))
ax.legend(fontsize=8, frameon=False, loc="lower right")
plt.show()

# %% [markdown]
r"""
> **Exercise A4.2.** A row of 2,048 tokens of a model with 65,536 ids: what takes more memory at
> depth 12, the activations of all layers or the logits? *(What would you change in chapter 3's loss
> for a 12 GB card?)*

After the run we want the truth beside the estimate: the most memory it held, and the **model FLOPs
utilisation** (MFU), the share of the hardware's peak that went into the formula's FLOPs.
"""


# %%
#| export
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
    """Return the share of the devices' peak that training uses (MFU), None where unknown."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), torch.bfloat16)
    return flops * speed / (peak * world.world_size) if peak else None


# %% [markdown]
r"""
The other half of a forecast is time, and what time costs. FLOPs divided by what the GPUs deliver
are seconds; on a CPU we measure two steps instead of guessing. Pretraining writes this estimate to
the log before its first step, so that anybody can hold it against what came (section 9), and
`python -m nanochat estimate --profile speedrun` prints it without starting anything.
"""


# %%
#| export
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
    assumptions; `grid_grams` of the recipe is yours to set.
    """
    device, ranks = pick_device(recipe.device), process_count(recipe)
    config = recipe.config(recipe.vocab_size)
    sizes, gpu = sizes_of(config), device.type == "cuda"
    flops = sizes.flops_per_token() * recipe.pretrain_steps * recipe.batch_tokens
    kind = dict(dtype=compute_dtype(recipe, device), compiled=compiles(recipe, device))
    peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16) if gpu else None
    rate = speed * sizes.flops_per_token() if speed else (peak or 0) * ranks * utilisation
    price = price_of(torch.cuda.get_device_name(device)) if gpu else 0.0
    bill = dict.fromkeys(("hours", "dollars", "kwh", "co2_kg"))
    if rate:
        count, watts = (ranks, 1300.0) if gpu else (1, 65.0)
        bill = footprint(flops / rate, count, price or 0.0, watts, recipe.grid_grams)
        bill["dollars"] = None if price is None else bill["dollars"]
    eight = 8 * utilisation * peak_flops("H100", torch.bfloat16)
    return {
        "tokens": recipe.pretrain_steps * recipe.batch_tokens,
        "parameters": sizes.num_params()["total"],
        "flops": flops,
        "memory": sum(memory_estimate(config, recipe.micro_batch or 1, **kind).values()),
        **bill,
        "8xH100": footprint(flops / eight, 8, PRICE_PER_HOUR["H100"], grid=recipe.grid_grams),
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


# %% [markdown]
r"""
## 5. A training stage resumes

All four training stages begin and end alike, so they share a class. It asks one question: is there
a checkpoint of *this* stage? Then resume it: weights, the optimizer's moments, the step, the place
in the data, even the time already spent, for an honest bill. If not, start from the model of the
stage before; the optimizer keeps its memory too, from base to mid to SFT (chapter 9), but begins
afresh for reinforcement learning, where gradients are of another kind. The original project could
resume pretraining only, approximately, and on the same number of GPUs; here it is one rule for all
stages.
"""


# %%
#| export
class Training:
    """What the four training stages share: a model, its optimizer, where they start and save.

    A stage with a checkpoint of its own resumes it; a fresh one starts from the stage before, mid
    and sft with its optimizer's state. With LoRA a checkpoint holds the merged model, and beside
    the optimizer's state the adapter: it resumes on top of the stage before.
    """

    def __init__(self, run: Run, stage: str, world: Any = None):
        self.run, self.stage, self.recipe = run, stage, run.recipe
        self.world = world or SingleProcess(pick_device(run.recipe.device))
        self.device, self.tokenizer = self.world.device, run.tokenizer()
        self.log = self.open_log() if self.world.is_main else MetricsLog(None)
        self.folder, self.saver = run.directory / stage, BackgroundSaver()
        self.judged: tuple[int, float] | None = None  # the last step that was judged, its score
        seed_everything(run.recipe.seed)
        self.lora = stage == "sft" and run.recipe.lora_rank > 0
        # Replies are sampled by each process alone, so the model of RL is never cut; nor is LoRA's,
        # whose gradients and state are small.
        uncut = self.lora or stage == "rl"
        self.cut = run.recipe.fsdp > 0 and self.world.world_size > 1 and not uncut
        place = torch.device("cpu") if self.cut else self.device  # shard_model moves its part
        resumed = latest_step(self.folder) is not None
        before = MODELS[MODELS.index(stage) - 1] if stage != "base" else None
        if resumed or before:
            found = run.checkpoint(stage if resumed else before, place)
            self.model = found.model
        else:
            self.model = GPT(run.recipe.config(self.tokenizer.vocab_size), seed=run.recipe.seed)
            self.model.to(place)
        if self.lora:
            frozen = run.checkpoint(before, self.device).model
            self.model = add_lora(frozen, run.recipe.lora_rank, seed=run.recipe.seed)
        self.model.compute_dtype = compute_dtype(run.recipe, self.device)
        if self.cut:
            shard_model(self.model, self.world, recompute=run.recipe.fsdp > 1)
        self.optimizer = self.build_optimizer()
        self.began, self.start_step, self.kept = time.perf_counter(), 0, {}
        if resumed or (stage in ("mid", "sft") and not self.lora):
            state = found.optimizer_state
            state = load_lora_state(self.model, state) if self.lora else state
            self.optimizer.load_named_state(self.model, state)
        if resumed:
            self.start_step, self.kept = found.meta["step"], found.meta

    def open_log(self) -> MetricsLog:
        """Return the run's log, with the recipe's tracker behind it if there is one."""
        log, recipe = self.run.log, self.recipe
        if recipe.tracker:
            track = open_tracker(recipe.tracker, recipe.name, self.run.directory)
            log = TrackedLog(log.path, track)
        return log.bind(stage=self.stage)

    def micro_batch(self) -> int:
        """Return the rows per forward pass; on a GPU the most for which a real step works."""
        model, config, ranks = self.model, self.model.config, self.world.world_size
        compiled = compiles(self.recipe, self.device)
        run = torch.compile(model, dynamic=False) if compiled else model
        reserve = memory_estimate(config, 0)["optimizer"]

        def fits(rows: int) -> bool:
            failed = float(not step_fits(run, model, rows, reserve))
            enough = not float(self.world.sum(torch.tensor(failed, device=self.device)))
            if self.world.is_main and not enough:
                print(f"{self.stage}: a micro-batch of {rows} rows does not fit", flush=True)
            return enough

        trial = fits if self.device.type == "cuda" else None
        return pick_micro_batch(self.recipe, config, self.device, ranks, trial)

    def build_optimizer(self) -> MuonAdamW:
        """Return the optimizer, sharded over the processes when there are several."""
        r = self.recipe
        rates = (r.matrix_lr, r.embedding_lr, r.head_lr, r.weight_decay)
        if self.world.world_size > 1 and not self.lora:
            return build_sharded_optimizer(self.model, self.world, *rates)
        groups = lora_groups(self.model) if self.lora else param_groups(self.model, *rates)
        several = self.world.world_size > 1
        return ShardedMuonAdamW(groups, self.world) if several else MuonAdamW(groups)

    def seconds(self) -> float:
        """Return the time this stage has taken, with that before an interruption."""
        return self.kept.get("seconds", 0.0) + time.perf_counter() - self.began

    def save(self, step: int, batches: Any = None, result: dict | None = None) -> None:
        """Keep a checkpoint from which the stage can go on, and the result when it has ended.

        Its score is that of the same step, so that the best one is kept too. On a GPU the
        checkpoints on the way are written while training goes on.
        """
        meta = {
            "stage": self.stage,
            "tokenizer": self.tokenizer.fingerprint(),
            "data": batches.state_dict() if batches else None,
            "seconds": self.seconds(),
            "result": result,
        }
        state = self.optimizer.named_state(self.model)  # every rank takes part, and in the next
        model = gather_model(self.model)
        if self.lora:
            state, model = {**state, **lora_state(self.model)}, merged_copy(self.model)
        behind = result is None and self.device.type == "cuda"
        if self.world.is_main:
            self.saver.wait()
            save = self.saver.save if behind else save_checkpoint
            score = self.judged[1] if self.judged and self.judged[0] == step else None
            save(self.folder, step, model, state, meta, score=score)
        self.world.barrier()


# %% [markdown]
r"""
`train_stage` hands all of it to the one loop of chapter 5. Two edges are easy to forget. A run
killed *between* its last checkpoint and its mark has nothing left to do: its result lies in the
checkpoint. Each checkpoint carries the held-out score of its step, so that the best one is kept
beside the newest; if the best is not the last, the run has gone on for too long, and says so. And
when memory runs out all the same, the sentence names the number to change, which is one of the four
that may be changed.
"""


# %%
#| export
def train_stage(
    stage: Training,
    batches: Any,
    n_steps: int,
    accumulation: int,
    schedule: Callable[[int, int], float],
    evaluate: Callable[[int], dict[str, float]],
) -> dict[str, Any]:
    """Run `train.fit` from where the stage stands, save at the end, return its results.

    `evaluate(step)` gives "bits_per_byte", the score of a checkpoint.
    """
    if stage.kept.get("result"):  # killed between its last checkpoint and its mark
        return stage.kept["result"]
    if stage.kept:
        batches.load_state_dict(stage.kept["data"])
    recipe = stage.recipe

    def judged(step: int) -> dict[str, float]:
        score = evaluate(step)
        (lower_is_better,) = score.values()
        stage.judged = (step, lower_is_better)
        return score

    if stage.world.world_size > 1:
        stage.optimizer.overlap(accumulation)  # gradients leave while the last is computed
    try:
        result = fit(
            stage.model,
            stage.optimizer,
            batches,
            n_steps,
            accumulation=accumulation,
            schedule=schedule,
            world=stage.world,
            log=stage.log,
            label=stage.stage,
            evaluate=judged,
            eval_every=max(1, n_steps // max(recipe.evals, 1)),
            save=lambda step: stage.save(step, batches),
            save_every=max(1, n_steps // max(recipe.saves, 1)),
            start_step=stage.start_step,
            compile_model=compiles(recipe, stage.device) and not stage.cut,
        )
    except torch.OutOfMemoryError:
        rows = batches.batch_size
        raise UserError(
            f"the memory of {stage.device} is too small for a micro-batch of {rows} rows; set "
            f"micro_batch to {max(rows // 2, 1)} or less and run again: the stage goes on."
        ) from None
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


# %% [markdown]
r"""
What is left for a stage to say is what makes it special: its data, its schedule, its validation.
Pretraining reads tokens and validates on a *fixed* set of rows, whatever the micro-batch and the
number of processes; otherwise losses of two runs could not be compared (chapter 2).
"""


# %%
#| export
def pretrain(run: Run, world: Any = None) -> dict[str, Any]:
    """Train the base model on the prepared tokens (chapter 5)."""
    recipe, stage = run.recipe, Training(run, "base", world)
    world = stage.world
    rows = recipe.batch_tokens // recipe.seq_len // world.world_size
    micro = stage.micro_batch()
    train, val = training_tokens(run), TokenShards.load(run.directory / "tokens", "val")
    place = dict(rank=world.rank, world_size=world.world_size)
    pin = stage.device.type == "cuda"
    batches = TokenBatches(train, micro, recipe.seq_len, **place, seed=recipe.seed, pin=pin)
    fixed = ValidationBatches(val, micro, recipe.seq_len, **place)
    token_bytes = stage.tokenizer.token_bytes().to(stage.device)

    def evaluate(step: int) -> dict[str, float]:
        score = bits_per_byte(stage.model, iter(fixed), len(fixed), token_bytes, world)
        return {"bits_per_byte": score}

    def schedule(step: int, n_steps: int) -> float:
        return lr_multiplier(
            step, n_steps, warmup=min(0.02, 40 / n_steps), warmdown=recipe.warmdown
        )

    if world.is_main and not stage.kept:
        speed = None if pin else training_speed(recipe, stage.model.config, stage.device)
        plan = estimate(recipe.changed(micro_batch=micro), speed=speed)
        stage.log.write("estimate", micro_batch=micro, **plan)
    steps, accumulation = recipe.pretrain_steps, rows // micro
    with Prefetch(batches) as ahead:  # the next batch is made while the step is computed
        result = train_stage(stage, ahead, steps, accumulation, schedule, evaluate)
    return {**result, "tokens": recipe.pretrain_steps * recipe.batch_tokens}


# %% [markdown]
r"""
The chat stages learn from mixtures (chapter 9). With real conversations from the hub or a folder,
the generated ones stay in the mixture: nobody else will teach the model its name and its
calculator.
"""


# %%
#| export
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
        size, shares = size // 3, {"identity": 20, "arithmetic": 50, "spelling": 30}
        kinds = [Messages, MMLU, GSM8K, ARC] if stage == "mid" else [Messages, GSM8K, ARC]
        real = [(real_task(recipe, kind, "train"), 1.0) for kind in kinds]
    if recipe.own_chats:
        shares = {kind: share for kind, share in shares.items() if kind != "identity"}
    generated = tinyworld_mixture(World(), stage, size, seed, shares)
    tasks = [(task, 1.0) for task in generated.tasks] + real
    if recipe.own_chats:
        own, others = JsonLines(recipe.own_chats), sum(len(task) for task, _ in tasks)
        tasks.append((own, max(1.0, others / 9 / len(own))))
    return Mixture(tasks, seed) if real or recipe.own_chats else generated


def held_out_batches(recipe: Recipe, stage: str, tokenizer: Tokenizer, micro: int, world: Any):
    """Return this process's part of 32 rows of conversations that no stage trains on, as batches.

    Only the assistant's tokens count, in both stages, so that their losses can be compared.
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


HUB_TASKS = {  # class: (hub name, subset, split to train on, split to be judged on, local folder)
    Messages: ("hub:HuggingFaceTB/smol-smoltalk", "", "train", "test", "sft"),
    MMLU: ("hub:cais/mmlu", "all", "auxiliary_train", "test", "chat_eval/mmlu"),
    GSM8K: ("hub:openai/gsm8k", "main", "train", "test", "chat_eval/gsm8k"),
    ARC: ("hub:allenai/ai2_arc", "ARC-Easy", "train", "test", "chat_eval/arc"),
}


def real_task(recipe: Recipe, kind: Any, split: str) -> Any:
    """Return a task over real data, from the hub or from the recipe's folder.

    Raises UserError when `chat` names neither, or the folder does not exist.
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


# %% [markdown]
r"""
Midtraining and fine-tuning differ in three words: which conversations, which tokens count, which
rate. Reinforcement learning has its own loop (chapter 10) but saves and resumes by the same rule.
"""


# %%
#| export
def finetune(run: Run, stage_name: str, world: Any = None) -> dict[str, Any]:
    """Midtrain ("mid", loss on every token) or fine-tune ("sft", on the assistant's) on chats."""
    recipe, stage = run.recipe, Training(run, stage_name, world)
    world, midtraining = stage.world, stage_name == "mid"
    rows = recipe.batch_tokens // recipe.seq_len // world.world_size
    micro = stage.micro_batch()
    batches = ConversationBatches(
        chat_mixture(recipe, stage_name),
        stage.tokenizer,
        micro,
        recipe.seq_len,
        train_on="all" if midtraining else "assistant",
        seed=recipe.seed + midtraining,
        rank=world.rank,
        world_size=world.world_size,
    )
    n_steps, rate = (
        (recipe.mid_steps, recipe.mid_lr) if midtraining else (recipe.sft_steps, recipe.sft_lr)
    )

    def schedule(step: int, n_steps: int) -> float:
        return rate * lr_multiplier(step, n_steps, warmdown=0.8, final=0.02)

    held_out = held_out_batches(recipe, stage_name, stage.tokenizer, micro, world)

    def evaluate(step: int) -> dict[str, float]:
        return {"reply_loss": held_out_loss(stage.model, held_out, world)}

    return train_stage(stage, batches, n_steps, rows // micro, schedule, evaluate)


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


def reinforce(run: Run, world: Any = None) -> dict[str, Any]:
    """Improve the SFT model on a task with verifiable answers, `rl_task` (chapter 10)."""
    recipe, stage = run.recipe, Training(run, "rl", world)
    if stage.kept.get("result"):
        return stage.kept["result"]
    engine = Engine(stage.model, stage.tokenizer)
    tests = rl_problems(recipe, "test", stage.tokenizer)[: max(1, recipe.exam_items // 2)]

    def evaluate(step: int) -> dict[str, float]:
        options = dict(samples=8, max_tokens=recipe.max_tokens, world=stage.world)
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
        reference=run.checkpoint("sft", stage.device).model,
        seed=recipe.seed,
        start_step=stage.start_step,
        world=stage.world,
        log=stage.log,
        evaluate=evaluate,
        eval_every=max(1, recipe.rl_steps // max(recipe.evals, 1)),
        save=stage.save,
        save_every=max(1, recipe.rl_steps // max(recipe.saves, 1)),
    )
    result = {
        "steps": recipe.rl_steps,
        "reward": history[-1]["reward"],
        "seconds": stage.seconds(),
    }
    stage.save(recipe.rl_steps, result=result)
    return result


# %% [markdown]
r"""
## 6. Every stage is judged alike

"SFT brought 30 points" means something only if both models answered the same questions, in the
same wording, with the same number of tries. So there is one `judge`, and each stage's model goes
through all of it: the base model is asked to chat too, and fails, and that is a result. The items
are chosen by fixed seeds, never by the seed of the run. Beside every score stands what guessing
would bring.
"""


# %%
#| export
def chance_levels(run: Run) -> dict[str, float]:
    """Return what guessing scores on each metric of `judge`."""
    exams = [e for e in read_metrics(run.log.path, "judged") if "exam_chance" in e]
    chance = {
        "bits_per_byte": 8.0,
        "core": 0.0,
        "arithmetic": 0.0,
        "spelling": 0.0,
        "identity": 0.0,
    }
    return {**chance, **(exams[0]["exam_chance"] if exams else {}), "mmlu": 0.25, "arc_easy": 0.25}


@torch.no_grad()
def judge(run: Run, stage: str) -> dict[str, Any]:
    """Measure a stage's model: bits per byte, exams, sums, spelling, identity (chapters 7, 9).

    The same items are put to every stage. Scores are shares of right answers in [0, 1];
    `arithmetic` is pass@1 at temperature 1, with its interval beside it.
    """
    recipe, engine, world = run.recipe, run.engine(stage), World()
    tokenizer, n, scores = engine.tokenizer, recipe.exam_items, {}
    val = TokenShards.load(run.directory / "tokens", "val")
    fixed = ValidationBatches(val, 8, recipe.seq_len)
    token_bytes = tokenizer.token_bytes().to(engine.model.device)
    scores["bits_per_byte"] = bits_per_byte(engine.model, iter(fixed), len(fixed), token_bytes)
    if recipe.data == "tinyworld":
        tasks = tinyworld_core(world, n)
        scores["core"] = evaluate_core(engine.model, tokenizer, tasks)["core"]
    if recipe.chat == "tinyworld":
        exam = chat_exam(engine, tokenizer, world, n)
        kinds = [kind for kind, result in exam.items() if isinstance(result, dict)]
        scores.update({f"exam_{kind}": exam[kind]["accuracy"] for kind in kinds})
        scores["exam"] = exam["accuracy"]
        scores["exam_chance"] = {f"exam_{kind}": exam[kind]["chance"] for kind in kinds}
        scores["exam_chance"]["exam"] = exam["chance"]
        letters = ExamTask(world, "multiple_choice", n, letters=True)
        result = evaluate_chat(engine, tokenizer, letters)
        scores["exam_letters"] = result["accuracy"]
        scores["exam_chance"]["exam_letters"] = result["chance"]
    elif stage != "base":
        for name, kind in (("mmlu", MMLU), ("arc_easy", ARC), ("gsm8k", GSM8K)):
            task = real_task(recipe, kind, "test")
            result = evaluate_chat(engine, tokenizer, task, n, max_tokens=recipe.max_tokens)
            scores[name] = result["accuracy"]
    sums = task_problems(TinyWorldTask(world, "arithmetic", "test", size=n))
    passed = evaluate_pass(engine, sums, samples=4, max_tokens=recipe.max_tokens, seed=1)
    scores["arithmetic"], scores["arithmetic_low"] = passed["pass_at_1"], passed["low"]
    scores["arithmetic_high"], scores["arithmetic_pass_at_4"] = passed["high"], passed["pass_at_k"]
    for name, split in (("spelling", "test"), ("identity", "train")):
        task = TinyWorldTask(world, name, split, size=min(n, 60), start=30_000_000)
        result = evaluate_chat(engine, tokenizer, task, max_tokens=recipe.max_tokens)
        scores[name] = result["accuracy"]
    run.log.write("judged", stage=stage, **scores)
    return scores


# %% [markdown]
r"""
Numbers do not show what a model is like. So three questions go to each stage too, and the log keeps
the replies: who it is, a fact, a sum.
"""

# %%
#| export
QUESTIONS = (  # (question, a word that the right reply holds, words that it must not hold)
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
        tools = [part["text"] for part in parts if part["type"] == "python"]
        reply = reply_text(parts).strip()
        answers.append(
            {
                "question": question,
                "reply": reply,
                "calculator": tools,
                "expected": word,
                "right": names_answer(reply, word),
            }
        )
        run.log.write("exchange", stage=stage, **answers[-1])
    return answers


# %% [markdown]
r"""
## 7. Done, broken, or in many processes

The work of a stage happens in `run_stage_here`, in this process or as one rank of several. When
training ends, `trained.json` appears, written whole or not at all (chapter 0).

For several processes we start the command line under torchrun's launcher: the ranks run
`python -m nanochat pretrain --folder RUN`, open the same folder and find the same recipe. Rank 0
alone writes. The notebook that launched them streams what they print, and if one of them stops with
a mistake of the user, the same sentence is raised here.
"""


# %%
#| export
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


def launch_stage(run: Run, stage: str, ranks: int) -> None:
    """Train a stage in several processes on this machine; their mistake is raised here."""
    try:
        launch("nanochat", [COMMANDS[stage], "--folder", str(run.directory)], ranks, restarts=2)
    except LaunchError as error:
        _, found, sentence = str(error).splitlines()[0].partition("UserError: ")
        if found:
            raise UserError(sentence) from None
        raise


# %% [markdown]
r"""
`run_stage` is what a person calls. It leaves a second mark, `done.json`, when the model has also
been judged. A stage with that mark is skipped. The order of the last two lines is deliberate:
first the log, then the mark. A kill between them logs the stage twice, and the reader takes the
later one; the other way round the log would miss it for ever.
"""


# %%
#| export
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


COMMANDS = {"base": "pretrain", "mid": "midtrain", "sft": "sft", "rl": "rl"}


# %% [markdown]
r"""
Enough said; a small run, in a folder that goes away at the end.
"""

# %%
workplace = tempfile.TemporaryDirectory()
place = Path(workplace.name)
small = dict(vocab_size=512, tokenizer_chars=100_000, pretrain_steps=steps, evals=4, saves=4)
small.update(exam_items=8, val_tokens=4096, max_tokens=16)
run = Run.open(Recipe.for_profile("smoke", name="demo", **small), place / "demo")
for stage in ("tokenizer", "data", "base"):
    run_stage(run, stage)

# %%
for stage in ("tokenizer", "data", "base"):
    run_stage(Run(place / "demo"), stage)

# %% [markdown]
r"""
The second time costs nothing. This is what the folder holds, and what the log says:
"""

# %%
for file in sorted(f for f in run.directory.rglob("*") if f.is_file()):
    print(f"{-(-file.stat().st_size // 1000):6,} kB  {file.relative_to(run.directory)}")
print(dict(collections.Counter(event["event"] for event in read_metrics(run.log.path))))
for event in read_metrics(run.log.path, "eval"):
    print(event)

# %% [markdown]
r"""
## 8. A power cut

Now the claim of the first paragraph. We train the base stage again, and let it die right after
its first checkpoint. (Here an exception stands for the power cut; the tests of the book kill a
process with signal 9.)
"""


# %%
class PowerCut(Exception):
    """What ends a run in this section."""


def broken_run(name, at):
    """Train the demo's base stage in a folder of its own; it dies when step `at` is saved."""
    broken = Run.open(run.recipe, place / name)
    for part in ("tokenizer", "data", "tokens"):
        shutil.copytree(run.directory / part, broken.directory / part)
    save = Training.save

    def save_and_die(stage, step, *rest):
        save(stage, step, *rest)
        if step == at:
            raise PowerCut

    Training.save = save_and_die
    try:
        run_stage_here(broken, "base")
    except PowerCut:
        print(f"{name}: dead, {latest_step(broken.directory / 'base')} of {steps} steps on disk")
    finally:
        Training.save = save
    return broken


cut = steps // 4
exact, careless = broken_run("exact", cut), broken_run("careless", cut)

# %% [markdown]
r"""
One of the two resumes as described. The other is the baseline, how many tools resume: weights
alone, the optimizer starts with empty moments, the data begin anew.
"""

# %%
folder = careless.directory / "base" / f"step_{cut:06d}"
save_file({}, folder / "optimizer.safetensors")  # the moments are forgotten
meta = read_json(folder / "meta.json")
meta["sha256"]["optimizer.safetensors"] = file_digest(folder / "optimizer.safetensors", "sha256")
meta["data"] |= {"epoch": 0, "window": 0, "row": 0}  # and so is the place in the text
write_json(folder / "meta.json", meta)
for resumed in (exact, careless):
    run_stage_here(resumed, "base")


# %%
def weights_of(some_run):
    """The final weights of a run's base stage."""
    return load_file(some_run.directory / "base" / f"step_{steps:06d}" / "model.safetensors")


def losses_of(some_run, start=0):
    """The loss by step from the log: (steps, losses)."""
    events = read_metrics(some_run.log.path, "step", stage="base")
    last = {event["step"]: event["loss"] for event in events if event["step"] >= start}
    return [*last], [*last.values()]


whole, differences = weights_of(run), {}
for resumed in (exact, careless):
    name, other = resumed.directory.name, weights_of(resumed)
    differences[name] = max(float((whole[k] - other[k]).abs().max()) for k in whole)
    print(f"{name:9s} largest difference of a weight {differences[name]:.3g}", end=", ")
    print(f"last loss {losses_of(resumed)[1][-1]:.4f}")
print(f"unbroken  last loss {losses_of(run)[1][-1]:.4f}")

# %%
fig, ax = figure(
    "Resumed exactly, a broken run is the same run",
    "step",
    "loss (nats per token)",
    alt="Three loss curves; the exact resumption lies on the unbroken run, the other beside it.",
)
ax.plot(*losses_of(run), label="never broken", linewidth=3, alpha=0.35)
ax.plot(*losses_of(exact, cut), ".", label="resumed: weights, moments, place")
ax.plot(*losses_of(careless, cut), "-", label="resumed: weights only", linewidth=1)
ax.axvline(cut, color=COLORS[-1], linestyle="--", linewidth=1)
ax.legend(fontsize=8, frameon=False)
plt.show()
assert differences["exact"] == 0.0 < differences["careless"]

# %% [markdown]
r"""
Not close: equal, in every bit. That is the test to write for any training code, because every
piece of state that is forgotten shows up in it. The careless run ends elsewhere, and nothing in
its log says why: it has become another experiment than the one in its recipe.

> **Exercise A4.3.** Which other state could a stage have that we would have to save? *(Think of
> dropout, and of a data loader that reads ahead.)*

## 9. What will it cost?

FLOPs per token times tokens, divided by what the GPUs deliver: a run's hours are a short sum. The
one number that has to be guessed is the utilisation.
"""

# %%
#| test
plan = estimate(Recipe.for_profile("classic"))
assert plan["parameters"] == 560_988_160  # published
assert abs(plan["flops"] / 3.92e19 - 1) < 0.01  # published

# %% [markdown]
r"""
The assumptions: eight H100s at \$3.00 an hour each, 1.3 kW each with their share of the machine,
40 % utilisation, and the world's mean of 436 g of CO2 for a kWh (chapter 5 has the sources). The
published runs are the control: both took place, on the same machine, with nearly these recipes.
"""

# %%
peak = peak_flops("NVIDIA H100", torch.bfloat16)
published = {"classic": "2.9 h at 48 %", "speedrun": "3.0 h"}
print("pretraining  8xH100   FLOPs  at 40 %  dollars  kg CO2  at 48 %  published")
for name in ("gpu1", "classic", "speedrun"):
    plan = estimate(Recipe.for_profile(name))
    cost = plan["8xH100"]
    line = f"{name:18s} {plan['flops']:8.2g} {format_seconds(3600 * cost['hours']):>8s}"
    line += f"{cost['dollars']:9.2f} {cost['co2_kg']:7.1f}"
    line += f"{format_seconds(plan['flops'] / (8 * 0.48 * peak)):>9s}"
    print(f"{line}  {published.get(name, '-')}")

# %% [markdown]
r"""
With the utilisation that was measured, the sum for `classic` gives the published time to a few
minutes; the guess of 40 % is pessimistic on such a machine.

A horizon can be asked for in three ways: as a ratio, as FLOPs, or as a time.
"""

# %%
for name, recipe in (
    ("12 tokens a parameter", Recipe.for_depth(12)),
    ("1e18 FLOPs", Recipe.for_depth(12, flops=1e18)),
    ("a quarter of an hour on 8xH100", Recipe.for_depth(12, hours=0.25)),
):
    print(f"depth 12, {name:31s}: {recipe.pretrain_steps:6,} steps of {recipe.batch_tokens:,}")

# %% [markdown]
r"""
And this machine? Before the demo run of section 7 its speed was measured on two steps, and the
estimate written to the log. Now it can be held against what came.
"""

# %%
(plan,) = read_metrics(run.log.path, "estimate", stage="base")
done = run.done("base")
took = run.recipe.pretrain_steps * run.recipe.batch_tokens / done["tokens_per_second"]
print(f"predicted {3600 * plan['hours']:.1f} s of steps, {plan['memory'] / 1e6:.0f} MB of tensors")
print(
    f"it took   {took:.1f} s of steps, the process held {done['peak_bytes'] / 1e6:.0f} MB at most"
)

# %% [markdown]
r"""
(On a CPU the process holds Python, PyTorch and the data besides; the tensors alone were compared in
chapter 5. On a GPU the two numbers are of the same thing.)

## 10. The report reads the log

The trainer never draws. It writes lines; plots, tables, dashboard and report are functions of those
lines. So a report can be made of a run that is still going, of one that died, or on another
machine, and it can be made again when we think of a better plot.
"""

# %%
#| export report
import base64
import html
import io
import re
from pathlib import Path
from typing import Any

from nanochat.common import COLORS, atomic_write, figure, format_seconds, read_metrics
from nanochat.recipe import MODELS, STAGES, Run, chance_levels, machine_facts, price_of

# %%
#| export report
METRICS = {
    "bits_per_byte": "validation bits per byte",
    "core": "tiny-world CORE (centred)",
    "exam": "tiny-world exam, all",
    "exam_multiple_choice": "... multiple choice",
    "exam_cloze": "... cloze",
    "exam_generative": "... open questions",
    "exam_letters": "choice by letter",
    "mmlu": "MMLU",
    "arc_easy": "ARC-Easy",
    "gsm8k": "GSM8K",
    "arithmetic": "arithmetic, pass@1",
    "arithmetic_pass_at_4": "arithmetic, pass@4",
    "spelling": "spelling and counting",
    "identity": "identity",
}


def stage_scores(run: Run) -> dict[str, dict[str, Any]]:
    """Return the last judgement of each stage that has one, by stage name."""
    return {event["stage"]: event for event in read_metrics(run.log.path, "judged")}


def stage_table(run: Run) -> list[list[str]]:
    """Return the table of scores as rows of text: one row a metric, one column a stage.

    The second column is what guessing scores (for bits per byte: 8, a byte at random).
    """
    scores, chance = stage_scores(run), chance_levels(run)
    stages = [stage for stage in MODELS if stage in scores]
    rows = [["metric", "chance", *stages]]
    for key, label in METRICS.items():
        if any(key in scores[stage] for stage in stages):
            values = [f"{scores[s][key]:.3f}" if key in scores[s] else "-" for s in stages]
            guess = "-" if key == "arithmetic_pass_at_4" else f"{chance.get(key, 0.0):.3f}"
            rows.append([label, guess, *values])
    return rows


# %% [markdown]
r"""
The costs come from the log as well, with the machine that did the work, which need not be the one
that writes the report.
"""


# %%
#| export report
def finished_stages(run: Run) -> dict[str, dict[str, Any]]:
    """Return what the log says of each finished stage, in order: time, speed, memory, machine."""
    ended = {event["stage"]: event for event in read_metrics(run.log.path, "stage")}
    return {stage: ended[stage] for stage in STAGES if stage in ended}


def machine_of(run: Run) -> dict[str, str]:
    """Return the facts of the machine that trained the run's last stage, or of this one."""
    ended = [*finished_stages(run).values()]
    return (ended[-1].get("machine") if ended else None) or machine_facts()


def cost_table(run: Run) -> list[list[str]]:
    """Return time, speed and memory of each finished stage as rows of text, and the rent."""
    rows = [["stage", "time", "judged in", "steps", "trained tokens/s", "MFU", "peak memory"]]
    total, gpus = 0.0, 1  # all GPUs are paid for all the time
    for stage, done in finished_stages(run).items():
        judged, mfu = done.get("judge_seconds"), done.get("mfu")
        total, gpus = total + done["seconds"] + (judged or 0.0), max(gpus, done.get("processes", 1))
        rows.append(
            [
                stage,
                format_seconds(done["seconds"]),
                format_seconds(judged) if judged else "-",
                f"{done['steps']:,}" if "steps" in done else "-",
                f"{done['tokens_per_second']:,.0f}" if "tokens_per_second" in done else "-",
                f"{mfu:.1%}" if mfu else "-",
                f"{done['peak_bytes'] / 2**30:.2f} GiB",
            ]
        )
    rows.append(["all", format_seconds(total), "", "", "", "", ""])
    price = price_of(machine_of(run)["GPUs"])
    if price:
        rows.append(["rent", f"${total / 3600 * gpus * price:.2f}", "", "", "", "", ""])
    return rows


# %% [markdown]
r"""
A run that was broken has done some steps twice. Drawn as they come, the curve would run back; so
of each step the later line counts.
"""


# %%
#| export report
def by_step(run: Run, event: str, stage: str) -> list[dict[str, Any]]:
    """Return a stage's events of one kind, one a step: of a step done twice, the later one."""
    return [*{e["step"]: e for e in read_metrics(run.log.path, event, stage=stage)}.values()]


def plot_training(run: Run, stage: str) -> Any:
    """Draw a stage's training loss (or reward) from the log; returns the figure."""
    if stage == "rl":
        events = by_step(run, "rl_step", stage)
        first, last = events[0]["reward"], events[-1]["reward"]
        title = f"rl: reward {first:.2f} at first, {last:.2f} at last"
        fig, ax = figure(title, "step", "share of right samples", alt="Reward by step of RL.")
        ax.plot([e["step"] for e in events], [e["reward"] for e in events])
        evals = by_step(run, "eval", stage)
        for name in ("pass_at_1", "pass_at_k") if evals else ():
            label = name.replace("_k", f"_{evals[0]['k']}").replace("_at_", "@") + ", held out"
            ax.plot([e["step"] for e in evals], [e[name] for e in evals], "o-", label=label)
        ax.set_ylim(0, 1.02)
        ax.legend(fontsize=8)
        return fig
    events = by_step(run, "step", stage)
    title = f"{stage}: loss {events[0]['loss']:.2f} at first, {events[-1]['loss']:.2f} at last"
    fig, ax = figure(title, "step", "loss (nats per token)", alt=f"Loss by step of {stage}.")
    ax.plot([e["step"] for e in events], [e["loss"] for e in events])
    evals = by_step(run, "eval", stage)
    if evals and "reply_loss" in evals[0]:
        points = [(e["step"], e["reply_loss"]) for e in evals]
        ax.plot(*zip(*points), "o-", color=COLORS[1], label="held-out replies")
        ax.legend(fontsize=8)
    elif evals:
        right = ax.twinx()
        right.plot(
            [e["step"] for e in evals], [e["bits_per_byte"] for e in evals], "o-", color=COLORS[1]
        )
        right.set_ylabel("validation bits per byte", fontsize=9, color=COLORS[1])
        right.set_ylim(bottom=0)
    return fig


def plot_stages(run: Run) -> Any:
    """Draw the scores of all stages as bars over chance; returns the figure."""
    scores, chance = stage_scores(run), chance_levels(run)
    keys = [k for k in ("exam", "mmlu", "arc_easy", "gsm8k", "arithmetic", "spelling", "identity")]
    keys = [k for k in keys if any(k in s for s in scores.values())]
    fig, ax = figure(
        "Each stage moves its number", "", "share right", (6, 3), "Scores of each stage by metric."
    )
    for i, stage in enumerate(s for s in MODELS if s in scores):
        values = [scores[stage].get(key, 0.0) for key in keys]
        ax.bar([x + 0.2 * i for x in range(len(keys))], values, 0.18, label=stage)
    for x, key in enumerate(keys):
        level = chance.get(key, 0.0)
        label = "chance" if x == 0 else None
        ax.plot([x - 0.1, x + 0.7], [level, level], "--", color="#444444", label=label)
    ax.set_xticks([x + 0.3 for x in range(len(keys))], keys)
    ax.legend(fontsize=7, frameon=False, ncols=5)
    ax.set_ylim(0, 1.12)
    return fig


# %% [markdown]
r"""
A model may say anything, also `<script>` or a vertical bar. In a table its words must stay words:
everything that is written into Markdown or HTML is escaped first.
"""


# %%
#| export report
def markdown_cell(text: str) -> str:
    """Return text that a Markdown table shows as it is: no markup, no new column, one line."""
    text = re.sub(r"([\\|`*\[\]~$]|\b_|_\b)", r"\\\1", html.escape(text, quote=False))
    return " ".join(text.split())


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows of text as a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def html_table(rows: list[list[str]]) -> str:
    """Return rows of text as an HTML table, escaped."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def exchange_rows(run: Run) -> list[list[str]]:
    """Return the last questions and answers of the run as rows of text."""
    rows = [["question", "answer", "calculator", "right"]]
    last = {e["question"]: e for e in read_metrics(run.log.path, "exchange")}
    for event in last.values():
        tools, right = "; ".join(event["calculator"]), "yes" if event["right"] else "no"
        rows.append([event["question"], event["reply"].replace("\n", " "), tools, right])
    return rows


# %%
#| export report
def mine_rows(run: Run) -> list[list[str]]:
    """Return the learner's exercises that the run used and the functions they replaced."""
    used = {name: None for event in read_metrics(run.log.path, "mine") for name in event["used"]}
    return [name.rstrip(")").split(" (") for name in used]


# %%
#| test
assert "<script>" not in html_table([["said"], ["<script>alert(1)</script>"]])
assert markdown_table([["a|b"], ["c\nd"]]) == "| a\\|b |\n| --- |\n| c d |"

# %% [markdown]
r"""
The page is one file with its pictures inside: it can be mailed, and it needs no network.
"""

# %%
#| export report
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.2rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}thead{border-bottom:2px solid}
tr:nth-child(even){background:#8881}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}img{background:#fff}}"""


def as_image(fig: Any) -> str:
    """Return a figure as an HTML image that carries its own data, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(fig.get_label())}" src="data:image/png;base64,{data}"></p>'


def write_report(run: Run) -> tuple[Path, Path]:
    """Write report.md and report.html (one file, pictures inside) from the log; return their paths.

    Every number in them is read from the log and the recipe: nothing is measured again.
    """
    sections = {
        "What each stage brought": stage_table(run),
        "The last exchange": exchange_rows(run),
        "What it cost": cost_table(run),
        "The machine": [["fact", "value"], *map(list, machine_of(run).items())],
        "The recipe": [["setting", "value"], *([k, str(v)] for k, v in vars(run.recipe).items())],
    }
    if mine_rows(run):
        sections["Your code"] = [["exercise", "in place of"], *mine_rows(run)]
    title = f"Report card of run {run.recipe.name}"
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for head, rows in sections.items():
        text += [f"## {head}", markdown_table(rows)]
        page += [f"<h2>{html.escape(head)}</h2>", html_table(rows)]
        if head == "What each stage brought":
            trained = [stage for stage in MODELS if stage in finished_stages(run)]
            drawn = [plot_stages(run)] if trained else []
            page += [as_image(fig) for fig in drawn + [plot_training(run, s) for s in trained]]
    paths = run.directory / "report.md", run.directory / "report.html"
    atomic_write(paths[0], "\n\n".join(text) + "\n")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(page)
    atomic_write(paths[1], f"<!doctype html><html lang=en><head>{head}</head>\n{body}</html>\n")
    return paths


# %%
for row in stage_table(run) + cost_table(run)[:4]:
    print("".join(f"{cell:>12.26}" if i else f"{cell:28.26}" for i, cell in enumerate(row[:3])))
for file in write_report(run):
    print(f"{file.name}: {file.stat().st_size // 1000} kB")

# %% [markdown]
r"""
## 11. The command line

`python -m nanochat` lists the commands. Each stage is one, with the same flags everywhere:
`--profile` and `--set FIELD=VALUE` name a run by its recipe, `--folder` by its folder. A command
that starts work may make a folder; one that only looks (`chat`, `report`) may not.
"""

# %%
#| export cli
import argparse
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

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
from nanochat.ui import ChatSettings, terminal_chat


# %%
#| export cli
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
    """Return the last stage of a run that has a trained model."""
    stages = [stage for stage in MODELS if run.done(stage)]
    if not stages:
        raise UserError(
            f"the run in {run.directory} has no trained model yet; "
            f"train one with `python -m nanochat capstone --folder {run.directory}`."
        )
    return stages[-1]


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


# %% [markdown]
r"""
`make capstone` is papermill with this chapter's manners: a wrong setting is refused before a kernel
starts, and a cell that fails becomes one sentence that says where the notebook lies.
"""


# %%
#| export cli
def capstone_notebook() -> Path:
    """Return the capstone notebook of this copy of the book; UserError without one."""
    path = Path(__file__).resolve().parent.parent / "chapters" / "12_capstone.ipynb"
    if not path.exists():
        raise UserError(
            f"the capstone notebook is not at {path}; run this from a clone of the book."
        )
    return path


def do_capstone(args: argparse.Namespace) -> None:
    """Run the capstone notebook with papermill; print where everything is and an exchange."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # a socket file in place of a port: out of reach of other users of the machine
    transport = Config({"KernelManager": {"transport": "ipc"}} if os.name == "posix" else {})
    run = open_run(args, start=True)  # refuses a bad profile or setting before a kernel starts
    executed = run.directory / "capstone.ipynb"
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
    print(f"\nexecuted notebook  {executed}")
    for path in write_report(run):
        print(f"report             {path}")
    for answer in exchange(run, newest_model(run)):
        print(f"\n> {answer['question']}")
        for call in answer["calculator"]:
            print(f"  [calculator: {call}]")
        print(f"{answer['reply']}")


# %% [markdown]
r"""
The rest of the commands are a line or two each: all they do lies in other chapters.
"""


# %%
#| export cli
def do_chat(args: argparse.Namespace) -> None:
    """Chat in the terminal, or answer one prompt."""
    run = open_run(args)
    settings = ChatSettings(temperature=args.temperature, max_tokens=args.max_tokens)
    engine: Engine = run.engine(args.stage or newest_model(run), remember=1)
    terminal_chat(engine, prompt=args.prompt, settings=settings)


def do_serve(args: argparse.Namespace) -> None:
    """Serve the web page and the OpenAI-compatible endpoint."""
    run = open_run(args)
    stages = [args.stage] if args.stage else [s for s in MODELS if run.done(s)][::-1]
    engines = {stage: run.engine(stage, remember=8) for stage in stages or [newest_model(run)]}
    run_server(engines, host=args.host, port=args.port, token=args.token, origins=args.origin)


def do_core(args: argparse.Namespace) -> None:
    """Score the tasks of CORE with a run's model or one of Hugging Face; results are kept."""
    run = None if args.hf else open_run(args)
    world = setup("auto" if run is None else run.recipe.device)
    if args.core == "tinyworld":
        tasks = tinyworld_core(World(), args.limit or 200)
    elif args.core:
        tasks = load_core(args.core)
    else:
        if world.is_main:
            fetch_core()
        world.barrier()
        tasks = load_core(fetch_core())
    if run is None:
        dtype = torch.float32 if world.device.type == "cpu" else pick_dtype(world.device)
        model, tokenizer = load_hub_model(args.hf, world.device, dtype)
        folder = runs_directory() / "core" / re.sub(r"[^\w.-]+", "--", args.hf).strip("-.")
    else:
        engine = run.engine(args.stage or newest_model(run))
        model, tokenizer = engine.model, engine.tokenizer
        folder = run.directory / "core" / (args.stage or newest_model(run))
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


def do_chat_core(args: argparse.Namespace) -> None:
    """Put the tasks of ChatCORE to a run's model; each result is kept, and the mean is printed."""
    run = open_run(args)
    world, stage = setup(run.recipe.device), args.stage or newest_model(run)
    engine, results = run.engine(stage), {}
    folder = Path(args.results or run.directory / "chat_core" / stage)
    about = {"model": model_digest(engine.model), "limit": args.limit, "samples": args.samples}
    for name, task in chat_exams(args.chat).items():
        path = folder / f"{name}.json"
        result = kept_result(path, about)
        if result is None:
            generative = task.kind == "generative"
            how = dict(max_tokens=512 if generative else 1, world=world)
            if generative and args.samples > 1:
                result = evaluate_samples(engine, task, args.limit, args.samples, **how)
            else:
                result = evaluate_chat(engine, engine.tokenizer, task, args.limit, **how)
            world.barrier()  # every process has looked for the file
            if world.is_main:
                write_json(path, {**about, "result": result})
        results[name] = result
        if world.is_main:
            more = "".join(f"  pass@{k} {v:.3f}" for k, v in result.get("pass_at", {}).items())
            span = f"({result['low']:.3f} to {result['high']:.3f})"
            print(f"{name:14s} {result['accuracy']:.3f} {span} of {result['n']:,}{more}")
    if world.is_main:
        mean = chat_core(results)
        write_json(folder / "chat_core.json", {**mean, **about})
        print(f"{'ChatCORE':14s} {mean['core']:.4f} ({mean['low']:.4f} to {mean['high']:.4f})")
    if world.world_size > 1:
        world.close()


def do_eval(args: argparse.Namespace) -> None:
    """Judge a stage's model and print its scores; --core and --chat score the public tasks."""
    from nanochat.recipe import judge

    if args.chat is not None and (args.core is not None or args.hf):
        raise UserError("--chat judges a run's model by itself; leave --core and --hf out.")
    if args.chat is not None or args.core is not None:
        return do_core(args) if args.chat is None else do_chat_core(args)
    if args.hf or args.limit or args.results:
        raise UserError("--hf, --limit and --results go with --core; add it, or leave them out.")
    run = open_run(args)
    for name, value in judge(run, args.stage or newest_model(run)).items():
        print(f"{name:24s} {value:.4f}" if isinstance(value, float) else f"{name:24s} {value}")


def do_bench(args: argparse.Namespace) -> None:
    """Measure how fast a stage's model writes; the last line is JSON."""
    run = open_run(args)
    loaded = run.engine(args.stage or newest_model(run))
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


def do_report(args: argparse.Namespace) -> None:
    """Write the report card of a run."""
    for path in write_report(open_run(args)):
        print(path)


def do_estimate(args: argparse.Namespace) -> None:
    """Print what pretraining of a recipe will take; on a CPU its speed is measured first."""
    recipe = open_run(args).recipe if args.folder else named_recipe(args)
    check_recipe(recipe)
    device, config = pick_device(recipe.device), recipe.config(recipe.vocab_size)
    speed = None if device.type == "cuda" else training_speed(recipe, config, device)
    plan = estimate(recipe, speed=speed)
    size, text = plan["parameters"] / 1e6, plan["tokens"] / 1e6
    print(f"{size:.1f} M parameters, {text:,.1f} M tokens, {plan['flops']:.2g} FLOPs")
    print(f"{plan['memory'] / 2**30:.2f} GiB with {recipe.micro_batch or 1} rows at a time\n")
    print(markdown_table(estimate_table(plan)))


def do_doctor(args: argparse.Namespace) -> None:
    """Check the environment; exit with 1 when something is missing."""
    facts = doctor()
    for name, found, fine, fix in facts:
        print(f"{'ok ' if fine else 'BAD'} {name:12s} {found}" + ("" if fine else f": {fix}"))
    if not all(fine for _, _, fine, _ in facts):
        raise SystemExit(1)


# %% [markdown]
r"""
`main` draws the line between two kinds of failure. A mistake that a user can mend is a
`UserError`: one sentence, exit code 2. Anything else is our mistake and shows its traceback,
because somebody has to find it.
"""


# %%
#| export cli
def build_parser() -> argparse.ArgumentParser:
    """Return the command line: one subcommand a stage, and the tools around a run."""
    about = "Train a small ChatGPT, stage by stage, and talk to it."
    parser = argparse.ArgumentParser(prog="python -m nanochat", description=about)
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add(name: str, about: str, action: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(action=action)
        return command

    def with_run(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command.add_argument("--profile", default="laptop", help="a ready recipe (chapter A4)")
        command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
        command.add_argument("--folder", help="folder of a run, in place of a profile")
        return command

    for command, stage, about in (
        ("tokenizer", "tokenizer", "train the tokenizer"),
        ("data", "data", "turn the text into tokens on disk"),
        ("pretrain", "base", "train the base model"),
        ("midtrain", "mid", "teach the base model the form of a conversation"),
        ("sft", "sft", "teach it to answer"),
        ("rl", "rl", "improve its sums by reinforcement learning"),
    ):
        with_run(add(command, about, lambda a, s=stage: do_stage(a, s)))
    with_run(add("capstone", "run every stage as a notebook", do_capstone))
    for name, about, action in (
        ("eval", "judge a model", do_eval),
        ("chat", "chat in the terminal", do_chat),
        ("serve", "serve a web chat and an OpenAI-compatible endpoint", do_serve),
        ("bench", "measure how fast a model writes", do_bench),
    ):
        command = with_run(add(name, about, action))
        command.add_argument("--stage", choices=MODELS, help="default: the last one trained")
        if name == "eval":
            about = "score CORE (chapter 7): a folder of tasks, tinyworld, or alone the public ones"
            command.add_argument("--core", nargs="?", const="", metavar="FOLDER", help=about)
            command.add_argument(
                "--hf", metavar="NAME", help="a Hugging Face model, name or folder"
            )
            command.add_argument("--limit", type=int, help="at most so many items of each task")
            about = "score ChatCORE (chapter 9): a folder of parquet files, or alone from the hub"
            command.add_argument("--chat", nargs="?", const="hub", metavar="FOLDER", help=about)
            command.add_argument("--samples", type=int, default=1, help="for --chat: pass@k")
            command.add_argument("--results", metavar="FOLDER", help="where the results are kept")
        if name == "chat":
            command.add_argument("-p", "--prompt", help="answer this and leave")
            command.add_argument("-t", "--temperature", type=float, default=0.0)
            command.add_argument("--max-tokens", type=int, default=128)
        if name == "bench":
            command.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
            command.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
            command.add_argument("--new", type=int, default=32, help="tokens to write")
            command.add_argument("--repeats", type=int, default=3)
        if name == "serve":
            command.add_argument("--host", default="127.0.0.1")
            command.add_argument("--port", type=int, default=8000)
            command.add_argument("--token", help="asked of every visitor; made up off loopback")
            about = "a web site whose pages may call it, such as https://my.site"
            command.add_argument("--origin", action="append", default=[], help=about)
    with_run(add("report", "write the report card of a run", do_report))
    with_run(add("estimate", "say what pretraining will take, here and on 8xH100", do_estimate))
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
        print(f"nanochat: {error}", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"nanochat: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what, where = error.strerror, error.filename or "the folder of the run"
        advice = "free some space or choose another folder ($NANOCHAT_RUNS), then run again"
        print(f"nanochat: cannot write to {where}: {what}; {advice}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# %% [markdown]
r"""
What do people get wrong? Let us try.
"""

# %%
os.environ["NANOCHAT_RUNS"] = str(place)
for mistake in (
    "pretrain --profile desktop",
    "pretrain --set dept=6",
    "pretrain --set depth=six",
    "pretrain --set batch_tokens=5000",
    "tokenizer --set data=folder:my/texts --set name=mine",
    "rl --set name=other",
    "chat --folder runs/none",
):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(mistake.split())
    print(f"$ python -m nanochat {mistake}\n[{code}] {said.getvalue()}")

# %% [markdown]
r"""
The last module is the first that runs: it must work, and say one sentence, where Python is too old
or torch is missing. So it imports nothing at the top but `sys`.
"""

# %%
#| export __main__
import sys


# %%
#| export __main__
def start() -> int:
    """Import the command line and run it; say what is missing when that cannot be done."""
    if sys.version_info < (3, 10):  # noqa: UP036
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"nanochat: Python {found} is too old; install 3.10 or newer.", file=sys.stderr)
        return 2
    try:
        from nanochat.cli import main
    except ModuleNotFoundError as error:
        advice = "run `pip install -e .` in the folder of the book"
        print(f"nanochat: the package {error.name!r} is missing; {advice}.", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__" and "__file__" in globals():  # in a notebook there is no __file__
    sys.exit(start())

# %%
workplace.cleanup()

# %% [markdown]
r"""
## Recap

`nanochat` can now run from one word to a model. `Recipe.for_depth`, `Recipe.for_profile` and
`Recipe.changed` make a recipe, `scaled_settings` holds the rules, `check_recipe` refuses what
cannot work. `Run.open` keeps it in a folder; `run_stage` does a stage once, in `process_count`
processes, and resumes it; `judge` and `exchange` say what it brought. `pick_micro_batch` and
`estimate` look ahead. `nanochat.report` draws what the log says
(`stage_table`, `cost_table`, `plot_training`, `write_report`), and `python -m nanochat` puts a
command on each of them.

**Pitfalls**, each of which was shipped once by a real project:

- *A bare assertion when the batch does not divide.* Four threads of users asked what it meant. Say
  which number divides.
- *Speed counted over the wrong thing.* With gradient accumulation one project reported the tokens
  of a single micro-batch per step's time: 594 tokens a second instead of many times that, and a
  time left of weeks. Count the tokens of the whole step.
- *A checkpoint without its configuration and vocabulary.* Old ones stop loading, or load and talk
  nonsense. Save the sizes, the versions and the tokenizer's fingerprint beside the weights.
- *Resuming almost.* Only one stage, only on the same GPUs, the place in the data approximately,
  the second epoch forgotten. Write the test of section 8 first.

**Readings**

- Karpathy, *nanochat* (2025-2026): the recipe, the dial and the rules that this chapter follows.
- Hoffmann et al., *Training Compute-Optimal Large Language Models* (2022): tokens per parameter.
- McCandlish et al., *An Empirical Model of Large-Batch Training* (2018): why the batch may grow.
- Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models* (2022): the
  activations of a transformer counted part by part.
- Chowdhery et al., *PaLM* (2022), appendix B: model FLOPs utilisation defined.
"""
