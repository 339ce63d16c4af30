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
Each line is a **recipe**: all the settings of one run. Its name is one word, and the word decides
sizes, rates, steps and data. `laptop` is the run of `make capstone`; `speedrun` is a model of
GPT-2's quality.

This appendix is about the hours around learning: the run that dies at three in the morning, the
second GPU, the colleague who asks what the number in the table means.

**What you will be able to do**

- derive batch, steps and rates of a run from its depth, and say which rule gave each;
- predict the memory of a training step, its time and its price, and check them against what came;
- write a stage that is skipped when it is done and resumes when it is not, and test that
  resuming is exact;
- run the same stage in one process or in many;
- make every table of a report a function of one log;
- turn each mistake of a user into one sentence.

**Before you start**: chapters 5 (the training loop and checkpoints), 6 (processes) and 9 (the chat
stages). Reading takes 40 minutes, running about 20 seconds on two CPU cores. Sections 1 to 10 are
the chapter; section 11, the command line, is there to look things up.
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

import torch

from nanochat.budget import GRID_GRAMS, sizes_of
from nanochat.common import UserError
from nanochat.kernels import peak_flops
from nanochat.model import GPT, GPTConfig

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

A run is a row of **stages**, each of which takes up what the one before has left. The last four
train a model.
"""

# %%
#| export
STAGES = ("tokenizer", "data", "base", "mid", "sft", "rl")
MODELS = ("base", "mid", "sft", "rl")

# %% [markdown]
r"""
Together they have some forty settings. If each stage kept its own, two of them would one day
disagree, so all live in one flat list, with a type and a default each. What is not in this list
cannot be set; what is in it is written to disk with the run.
"""


# %%
#| export
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


# %% [markdown]
r"""
Most of the settings are not free. Choose the depth $L$, and with it the width $C = 64L$ and the
parameters that count, those of the matrices and the head, $N = 12\,L\,C^2 + V C$ with a vocabulary
of $V = 32{,}768$. Experiments on small models (appendix A2) then give rules for the rest:

$$D = 12\,N,\qquad B = 2^{\operatorname{round}\log_2\left(2^{19}\,(D/D_{12})^{0.383}\right)},\qquad
\text{rate} \propto \sqrt{B},\qquad \lambda \propto \frac{\sqrt{B}}{D},\ \lambda \le \tfrac12.$$

$D$ is the number of training tokens, 12 for each parameter. $B$ is the batch in tokens: a larger
model wants a larger one, as the gradient's noise matters more when the loss is low. $D_{12}$
belongs to the model of depth 12, where everything was tuned with $B = 2^{19}$. The rates grow with
the root of the batch, and the weight decay $\lambda$ shrinks so that a run forgets at the same pace
relative to its length, up to one half (chapter 5 says why).

Depth 20, for example: $C = 1280$ and $N = 435$ million. So $D$ is 5.2 billion tokens, four times
$D_{12}$, and the rule asks for a batch of $2^{19} \cdot 4^{0.383} \approx 2^{19.8}$ tokens,
rounded to $2^{20}$. That makes 4,980 steps. All rates are $\sqrt 2$ times those of depth 12, and
the decay is $0.28 \cdot \sqrt 2 / 4 \approx 0.10$.
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
The steps move in a saw: they grow with the text, and fall where the batch doubles.

Values also come from a command line, as text. `read_setting` reads them by the type of the
default, so that "12" is a number, and refuses what it cannot read: "6.5" is no depth.
"""


# %%
#| export
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


# %% [markdown]
r"""
A `Recipe` is the settings with three ways to make one: `for_depth` turns the dial, `for_profile`
takes a ready set, a **profile**, by name, `changed` replaces single fields. A name that it does not
know is an error: a misspelt setting that is silently ignored costs a night. `config` gives the
sizes of the model.
"""


# %%
#| export
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
The choices that no rule makes stand in tables. First, what every run on GPUs shares, with real text
and conversations from the Hugging Face hub.
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

# %% [markdown]
r"""
The three profiles for GPUs start from these and name a depth; `derive_from` has the rules applied
to it. `classic` is the first recipe of nanochat, from October 2025. Its constants came before the
rules, so it states its own.
"""

# %%
#| export
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

# %% [markdown]
r"""
The other two run on a CPU. `smoke` is for tests: every stage, as short as possible. `laptop` is the
one you get without asking.
"""

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
        rl_steps=160,
        max_tokens=64,
        exam_items=100,
        val_tokens=16_384,
    ),
    **GPU_PROFILES,
}


# %% [markdown]
r"""
Runs on GPUs train the modern model. `laptop` stays with the classic one, the one that the chapters
build first. The modern one gets further in the same time: up to a tenth fewer bits per byte, and
nine sums of ten right after fine-tuning, before reinforcement learning has begun
(`benchmarks/RESULTS.md`). On a laptop we want to see every stage at work; `model=modern` asks for
the better model.
"""

# %%
small, large = vars(Recipe.for_depth(12)), vars(Recipe.for_depth(24))
for field in small:
    if small[field] != large[field]:
        print(f"{field:15s} {small[field]!s:>10.10} -> {large[field]!s:<.10}")

# %% [markdown]
r"""
One number was turned, and six followed. How long such a run trains, its horizon, can be asked for
in three ways: as tokens for each parameter, as FLOPs, or as a time.
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
> **Exercise A4.1.** A friend has one GPU for one hour, at 40 % of $10^{15}$ FLOP/s. Which depth
> should she train? *(`estimate` of section 4 counts the FLOPs; try depths 8 to 14.)*

## 2. The folder of a run

A run is a folder, and the folder is all there is: no database, no state in a notebook. Its
`recipe.json` says what was asked for. Its `metrics.jsonl` says what happened, one line an event.
The rest is what the stages left behind. The folders of all runs lie side by side:
"""

# %%
#| export
from nanochat.checkpoint import Checkpoint, load_checkpoint
from nanochat.common import MetricsLog, pick_device, pick_dtype, read_json, write_json
from nanochat.engine import Engine, prepared_copy
from nanochat.tokenizer import Tokenizer
from nanochat.train import TRACKERS


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


# %% [markdown]
r"""
Two settings mean something else on each machine: `processes=0` is one process for each GPU, and
`dtype="auto"` is what the device multiplies best (chapter 5).
"""


# %%
#| export
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


# %% [markdown]
r"""
Before a folder is made, `check_recipe` looks for numbers that cannot work. "The batch does not
divide by the processes" is a sentence worth reading in the first second, not after the tokenizer
has been trained.
"""


# %%
#| export
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


# %% [markdown]
r"""
One more thing is decided before the work begins: whose code does it. Many exercises of the book ask
for a function that the package has. With `mine="work"`, or `make capstone MINE=1`, a run takes your
answers from the notebooks in `work/`. One that passes its checks stands in for the book's function,
in every process. One that fails them stops the run. One that is not written yet is left alone. Log
and report name those that did the work.
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
remembers its recipe and refuses another one. Some fields may differ: they say *where* a run
computes, not *what* it learns, so it may be taken up on a machine with more GPUs.
"""

# %%
#| export
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


# %% [markdown]
r"""
A `Run` knows where everything lies in its folder and loads it: the tokenizer, a stage's checkpoint,
an engine to chat with. A stage with the mark `done.json` is finished.

A checkpoint knows the fingerprint of its tokenizer (chapter 1). With another vocabulary every id
would mean another word, the loss would be absurd and nothing would crash; so `Run.checkpoint`
compares.
"""


# %%
#| export
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

The first two are short. The tokenizer reads the beginning of the text, and of no document more
than 10,000 characters, so that one long document does not decide the vocabulary. If you have put a
tokenizer into the folder, it stays.
"""

# %%
#| export
from nanochat.common import Progress
from nanochat.data import TokenShards, TokenStream, check_space, open_source, prepare_tokens


# %%
#| export
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


# %% [markdown]
r"""
Then the text becomes tokens on disk, as many as the steps will read. Where there is no room for
them, a `TokenStream` (chapter 2) makes them while the model trains, at the price of processor time.
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


# %%
#| export
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


# %% [markdown]
r"""
## 4. Before the run: memory, time, money

Chapter 5 counts the memory of a step part by part (`memory_estimate`) and finds by real steps what
fits (`largest_that_fits`, `step_fits`). Here both meet a recipe.

The batch is a matter of learning, and stays. What memory decides is the **micro-batch**, the rows
that go through the model at once: a smaller one takes more passes until the optimizer steps. Take
a batch of 4,096 tokens in rows of 256, for two processes: each has 8 rows of it, so 8, 4, 2 or 1
may go through at once, the divisors of 8.

How many fit depends on the memory that is free, and on whether the model is compiled.
"""

# %%
#| export
import psutil

from nanochat.budget import footprint, largest_that_fits, memory_estimate, step_fits
from nanochat.common import format_seconds, synchronize
from nanochat.optim import build_optimizer


# %%
#| export
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
On a CPU, where too much memory ends in a standstill and not in an error, the estimate decides, with
a fifth of the free memory left over. On a GPU it is only the first guess for trials, each of them a
step of the model itself.
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


# %% [markdown]
r"""
How good is the guess? On a CPU chapter 5 finds it within a few per cent of the allocator. Here is
the control: memory that was measured on GPUs, with compiled models. The first line is a run of this
book from before chapter 3 had a loss made for the compiler: by our count its logits took 4 GB more
than today's. The others are reports of nanochat's runs, whose tables are kept in 16 bits.
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
Near enough to start from, not near enough to rely on: hence the trials. Of the modern model, depth
12 and 32 rows again, the estimate said 32.8 GB before a run that took 31.8
(`benchmarks/RESULTS.md`). And if memory runs out in the middle of training, because another program
takes some, `fit` halves the micro-batch and goes on.

The next picture is the estimate alone. CUDA itself needs part of a card too, so a point just below
a dashed line is too high: eight rows at depth 20, 23 GB by the estimate, are no plan for 24 GB.
"""

# %%
fig, ax = figure(
    "By the estimate a 24 GB card takes 16 rows at depth 12, 8 at depth 20",
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
    ax.text(1, size * 1.1, f"a card of {size} GB", fontsize=8)
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
utilisation** (MFU). That is the share of the hardware's peak that went into the formula's FLOPs. A
model of $1.8 \cdot 10^9$ FLOPs per token that learns 220,000 tokens a second does $4 \cdot 10^{14}$
FLOP/s, 40 % of an H100.
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
    """Return the share of the devices' peak that training uses (MFU), None where unknown.

    `flops` is the model's per token, `speed` the tokens per second of all processes together.
    """
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), torch.bfloat16)
    return flops * speed / (peak * world.world_size) if peak else None


# %% [markdown]
r"""
The other half of a forecast is time, and what time costs. FLOPs divided by what the GPUs deliver
are seconds, and seconds are rent:
"""


# %%
#| export
PRICE_PER_HOUR = {"H100": 3.00, "H200": 3.50, "A100": 1.79, "V100": 0.55}  # dollars, typical 2026


def price_of(device_name: str) -> float | None:
    """Return a typical rent in dollars per hour of a GPU, None for one not in the table."""
    return next((p for name, p in PRICE_PER_HOUR.items() if name in device_name), None)


# %% [markdown]
r"""
What a CPU delivers nobody can look up, so we measure two steps and count the faster one. The passes
and the optimizer's update are timed apart, because a batch may take many passes, and takes one
update.
"""


# %%
#| export
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


# %% [markdown]
r"""
`estimate` puts it together, for this machine and for eight H100. Pretraining writes it to the log
before its first step, to be held against what came (section 9).
"""


# %%
#| export
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


# %% [markdown]
r"""
`python -m nanochat estimate --profile speedrun` prints it as a table, without starting anything.
"""


# %%
#| export
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

All four training stages begin and end alike. Each asks one question first: is there a checkpoint of
*this* stage? Then resume it: weights, the optimizer's moments, the step, the place in the data,
even the time already spent, for an honest bill. If not, start from the model of the stage before;
only `base` may make a new one.
"""

# %%
#| export
from nanochat.checkpoint import BackgroundSaver, best_step, latest_step, save_checkpoint
from nanochat.common import seed_everything
from nanochat.distributed import (
    ShardedMuonAdamW,
    build_sharded_optimizer,
    gather_model,
    shard_model,
)
from nanochat.finetune import add_lora, load_lora_state, lora_groups, lora_state, merged_copy
from nanochat.optim import MuonAdamW, param_groups
from nanochat.train import SingleProcess, TrackedLog, fit, open_tracker


# %%
#| export
def stage_before(stage: str) -> str | None:
    """Return the stage whose model a training stage starts from, None for the first."""
    return MODELS[MODELS.index(stage) - 1] if stage != MODELS[0] else None


# %% [markdown]
r"""
Two options change the model. LoRA freezes it and trains thin matrices beside its own (chapter 9).
FSDP cuts it over the GPUs (chapter 6). The model of reinforcement learning is never cut, as each
process samples replies alone; nor is LoRA's, whose gradients and state are small.
"""


# %%
#| export
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


# %% [markdown]
r"""
A stage's log notes the stage in every line, and passes each event on to the tracker, if the recipe
names one (chapter 5). Of several processes the main one alone writes.
"""


# %%
#| export
def stage_log(run: Run, stage: str, world: Any) -> MetricsLog:
    """Return the log of a stage, with the recipe's tracker behind it; on other ranks it is mute."""
    if not world.is_main:
        return MetricsLog(None)
    log = run.log
    if run.recipe.tracker:
        log = TrackedLog(log.path, open_tracker(run.recipe.tracker, run.recipe.name, run.directory))
    return log.bind(stage=stage)


# %% [markdown]
r"""
The optimizer has three forms. One process has all of its state. Several keep a shard each, and of a
model that is cut each keeps the state of its part (chapter 6).
"""


# %%
#| export
def stage_optimizer(model: GPT, recipe: Recipe, world: Any, lora: bool) -> MuonAdamW:
    """Return the optimizer of a stage, sharded over the processes when there are several."""
    rates = (recipe.matrix_lr, recipe.embedding_lr, recipe.head_lr, recipe.weight_decay)
    several, compiled = world.world_size > 1, compiles(recipe, world.device)
    if several and not lora:
        return build_sharded_optimizer(model, world, *rates, compiled=compiled)
    groups = lora_groups(model) if lora else param_groups(model, *rates, compiled)
    return ShardedMuonAdamW(groups, world) if several else MuonAdamW(groups)


# %% [markdown]
r"""
A class holds these together. The optimizer keeps its memory from base to mid to SFT (chapter 9). It
begins afresh for reinforcement learning, where gradients are of another kind, and for LoRA, which
trains other tensors. `save` writes what `__init__` reads, and the score of the step if it has one;
the memory, more than half of a checkpoint, only if somebody goes on with it.
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


# %% [markdown]
r"""
On a GPU, trials with the stage's own model find the micro-batch, with the memory of the optimizer
set aside. Rows fit if they fit for every process. How many passes make a batch follows.
"""


# %%
#| export
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


# %%
#| export
def passes_per_step(recipe: Recipe, micro: int, world: Any) -> int:
    """Return the passes of `micro` rows that make up a process's part of a batch."""
    return recipe.batch_tokens // recipe.seq_len // world.world_size // micro


# %% [markdown]
r"""
`train_stage` hands all of it to the one loop of chapter 5. A run killed *between* its last
checkpoint and its mark has nothing left to do: its result lies in the checkpoint. And when memory
runs out for good, the sentence names the number to change, one of those that may be changed.
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


# %% [markdown]
r"""
At the end the result is saved with the last checkpoint. If the best one, kept beside it, is an
earlier one, the stage has gone on for too long, and says so.
"""


# %%
#| export
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


# %% [markdown]
r"""
What is left for a stage to say is what makes it special: its data, its schedule, its validation.
Pretraining reads tokens and validates on a *fixed* set of rows, whatever the micro-batch and the
number of processes; otherwise losses of two runs could not be compared (chapter 2).
"""

# %%
#| export
from nanochat.data import Prefetch, TokenBatches, ValidationBatches
from nanochat.evaluation import bits_per_byte
from nanochat.optim import lr_multiplier


# %%
#| export
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


# %% [markdown]
r"""
The chat stages learn from mixtures of conversations (chapter 9). The tiny world generates them;
real ones come from the hub, or from a folder with the same files:
"""

# %%
#| export
from nanochat.finetune import ConversationBatches, held_out_loss
from nanochat.tasks import (
    ARC,
    GSM8K,
    MMLU,
    SHARES,
    JsonLines,
    Messages,
    Mixture,
    Reordered,
    TinyWorldTask,
    tinyworld_mixture,
)
from nanochat.tinyworld import World

# %%
#| export
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


# %% [markdown]
r"""
With real conversations some generated ones stay in the mixture: nobody else will teach the model
its name and its calculator. Exams come several times, their choices reordered (chapter 9): what a
letter stands for takes a small model many questions to learn. With conversations of your own, a
tenth of the mixture is yours: beside nine thousand others a file of fifty is repeated twenty times.
"""


# %%
#| export
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


# %% [markdown]
r"""
What is held out is generated from numbers that no stage reaches, or is the test split of the real
conversations. Only the assistant's words count, so that the losses of both stages can be compared.
"""


# %%
#| export
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


# %% [markdown]
r"""
Midtraining and fine-tuning differ in which conversations, which tokens count, how many steps, and
which rate. Both go down to 2 % of that rate over the last four fifths.
"""


# %%
#| export
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


# %% [markdown]
r"""
Reinforcement learning practises one task. Its problems are generated, apart from those it is judged
on, or those of GSM8K. Some of these leave no room for a reply, and are left out.
"""

# %%
#| export
from nanochat.rl import evaluate_pass, problem_prompt, task_problems, train_rl


# %%
#| export
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


# %% [markdown]
r"""
It has its own loop (chapter 10), but starts, saves and resumes by the same rule. What takes its
time is writing replies, so as many as possible are written together. On a GPU they come from a copy
of the model in the dtype of the products, which takes over the weights before it is asked: half the
bytes a step, and steps that are recorded once for the whole stage.
"""


# %%
#| export
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


# %% [markdown]
r"""
## 6. Every stage is judged alike

"SFT brought 30 points" means something only if both models answered the same questions, in the
same wording, with the same number of tries. So there is one `judge`, and each stage's model goes
through all of it: the base model is asked to chat too, and fails, and that is a result. The items
are chosen by fixed seeds, never by the seed of the run.

Beside every score stands what guessing would bring.
"""

# %%
#| export
from nanochat.chat import parse, render_prompt, reply_text
from nanochat.common import read_metrics
from nanochat.evaluation import evaluate_core, tinyworld_core
from nanochat.tasks import ExamTask, chat_exam, evaluate_chat, names_answer


# %%
#| export
def chance_levels(run: Run) -> dict[str, float]:
    """Return what guessing scores on each metric of `judge`."""
    exams = [e for e in read_metrics(run.log.path, "judged") if "exam_chance" in e]
    free = dict.fromkeys(("core", "arithmetic", "spelling", "identity"), 0.0)
    chance = {"bits_per_byte": 8.0, **free, "mmlu": 0.25, "arc_easy": 0.25}
    return {**chance, **(exams[0]["exam_chance"] if exams else {})}


# %% [markdown]
r"""
The exams of the tiny world (chapter 9) have three kinds of questions; one is asked a second time,
with letters to choose from. Runs on real conversations sit MMLU, ARC-Easy and GSM8K in their place.
A letter takes a single pass, a written reply a hundred: so twenty times as many letters are asked
for. With the settings for GPUs that is up to 10,000, all of ARC-Easy and most of MMLU, and the
intervals are narrow.
"""


# %%
#| export
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


# %% [markdown]
r"""
`judge` adds bits per byte and CORE (chapter 7), sums, each tried four times (chapter 10), spelling,
and questions about the model itself. Only the base model of a run on real conversations is spared
the exams, which take long.
"""


# %%
#| export
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


# %% [markdown]
r"""
Numbers do not show what a model is like. So three questions go to each stage too, and the log keeps
the replies: who it is, a fact, a sum.
"""

# %%
#| export
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


# %% [markdown]
r"""
The replies are greedy, so that the same model always says the same.
"""


# %%
#| export
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


# %% [markdown]
r"""
## 7. Done, broken, or in many processes

The work of a stage happens in `run_stage_here`, in this process or as one rank of several. When it
is done, `trained.json` appears, written whole or not at all (chapter 0).
"""

# %%
#| export
from nanochat.distributed import LaunchError, launch


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


# %% [markdown]
r"""
For several processes we start the command line under torchrun's launcher: the ranks run
`python -m nanochat pretrain --folder RUN`, open the same folder and find the same recipe. Rank 0
alone writes. If a rank stops with a mistake of the user, the same sentence is raised here.
"""


# %%
#| export
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


# %% [markdown]
r"""
A speed says little without its machine, so the log names it.
"""


# %%
#| export
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


# %% [markdown]
r"""
`run_stage` is what a person calls. It leaves a second mark, `done.json`, when the model has also
been judged. A stage with that mark is skipped. The order at the end is deliberate: first the log,
then the mark. A kill between them logs the stage twice, and readers take the later line; the other
way round the log would miss it for ever.
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


# %% [markdown]
r"""
Now a small run, in a folder that goes away at the end.
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
One of the two resumes as described. The other is the baseline, the way in which many tools resume:
the weights alone; the optimizer starts with empty moments, the data begin anew.
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

## 9. Was the forecast right?

FLOPs per token times tokens, divided by what the GPUs deliver: a run's hours are a short sum. The
FLOPs can be checked; the utilisation has to be guessed.
"""

# %%
#| test
plan = estimate(Recipe.for_profile("classic"))
assert plan["parameters"] == 560_988_160  # published
assert abs(plan["flops"] / 3.92e19 - 1) < 0.01  # published

# %% [markdown]
r"""
We assume eight H100 at \$3.00 an hour and 1.3 kW each, 40 % utilisation, and the world's mean of
436 g of CO2 for a kWh (sources in chapter 5). Two published runs are the control: nearly these
recipes, on the same machine.
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

And this machine? Before the demo run of section 7 the estimate was written to the log. Now it can
be held against what came.
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
(On a CPU the process holds Python, PyTorch and the data besides.)

## 10. The report reads the log

The trainer never draws. It writes lines; plots, tables and report are functions of those lines. So
a report can be made of a run that is still going, of one that died, or again when we think of a
better plot.
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

# %% [markdown]
r"""
The table of scores has a row for each metric and a column for each stage. Of a stage that was
judged twice the last judgement counts.
"""

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


# %%
#| export report
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
The costs come from the log as well, with the machine that did the work; another one may write the
report.
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


# %% [markdown]
r"""
All GPUs are paid for while one of them works, and while a model is judged.
"""


# %%
#| export report
def cost_table(run: Run) -> list[list[str]]:
    """Return time, speed and memory of each finished stage as rows of text, and the rent."""
    rows = [["stage", "time", "judged in", "steps", "trained tokens/s", "MFU", "peak memory"]]
    total, gpus = 0.0, 1
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


def points(events: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps of events and their values of one name, to draw."""
    return [event["step"] for event in events], [event[name] for event in events]


# %% [markdown]
r"""
`plot_training` draws the loss of each step and, as dots, what the held-out data say. Reinforcement
learning has no loss to look at, but a reward, and pass@k.
"""


# %%
#| export report
def plot_training(run: Run, stage: str) -> Any:
    """Draw a stage's training loss (or reward) from the log; returns the figure."""
    if stage == "rl":
        return plot_reward(run)
    events, evals = by_step(run, "step", stage), by_step(run, "eval", stage)
    title = f"{stage}: loss {events[0]['loss']:.2f} at first, {events[-1]['loss']:.2f} at last"
    fig, ax = figure(title, "step", "loss (nats per token)", alt=f"Loss by step of {stage}.")
    ax.plot(*points(events, "loss"))
    if evals and "reply_loss" in evals[0]:
        ax.plot(*points(evals, "reply_loss"), "o-", color=COLORS[1], label="held-out replies")
        ax.legend(fontsize=8)
    elif evals:
        right = ax.twinx()
        right.plot(*points(evals, "bits_per_byte"), "o-", color=COLORS[1])
        right.set_ylabel("validation bits per byte", fontsize=9, color=COLORS[1])
        right.set_ylim(bottom=0)
    return fig


def plot_reward(run: Run) -> Any:
    """Draw the reward of reinforcement learning and pass@k from the log; returns the figure."""
    events, evals = by_step(run, "rl_step", "rl"), by_step(run, "eval", "rl")
    title = f"rl: reward {events[0]['reward']:.2f} at first, {events[-1]['reward']:.2f} at last"
    fig, ax = figure(title, "step", "share of right samples", alt="Reward by step of RL.")
    ax.plot(*points(events, "reward"), label="reward")
    for name in ("pass_at_1", "pass_at_k") if evals else ():
        label = name.replace("_k", f"_{evals[0]['k']}").replace("_at_", "@") + ", held out"
        ax.plot(*points(evals, name), "o-", label=label)
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8)
    return fig


# %% [markdown]
r"""
The last picture sets the stages side by side, with a dashed line where guessing would be.
"""


# %%
#| export report
def plot_stages(run: Run) -> Any:
    """Draw the scores of all stages as bars over chance; returns the figure."""
    scores, chance = stage_scores(run), chance_levels(run)
    keys = ("exam", "mmlu", "arc_easy", "gsm8k", "arithmetic", "spelling", "identity")
    keys = [key for key in keys if any(key in found for found in scores.values())]
    title = "What each stage scores, and what guessing would (dashed)"
    alt = "Bars of the scores by metric, one for each stage, with a line at the level of chance."
    fig, ax = figure(title, "", "share right", (6, 3), alt)
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
everything that goes into Markdown or HTML is escaped first.
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


# %%
#| test
assert "<script>" not in html_table([["said"], ["<script>alert(1)</script>"]])
assert markdown_table([["a|b"], ["c\nd"]]) == "| a\\|b |\n| --- |\n| c d |"

# %% [markdown]
r"""
Two more tables: the last answers to the three questions, and whose code did the work (section 2).
"""


# %%
#| export report
def exchange_rows(run: Run) -> list[list[str]]:
    """Return the last questions and answers of the run as rows of text."""
    rows = [["question", "answer", "calculator", "right"]]
    last = {e["question"]: e for e in read_metrics(run.log.path, "exchange")}
    for event in last.values():
        tools, right = "; ".join(event["calculator"]), "yes" if event["right"] else "no"
        rows.append([event["question"], event["reply"].replace("\n", " "), tools, right])
    return rows


def mine_rows(run: Run) -> list[list[str]]:
    """Return the learner's exercises that the run used and the functions they replaced."""
    used = {name: None for event in read_metrics(run.log.path, "mine") for name in event["used"]}
    return [name.rstrip(")").split(" (") for name in used]


# %% [markdown]
r"""
The page is one file with its pictures inside, and needs no network.
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


# %% [markdown]
r"""
What the report says is a list of titles and tables. `write_report` writes it twice, as Markdown and
as the page with its pictures.
"""


# %%
#| export report
def report_sections(run: Run) -> dict[str, list[list[str]]]:
    """Return the tables of a report by their titles, rows of text with the head first."""
    sections = {
        "What each stage brought": stage_table(run),
        "The last exchange": exchange_rows(run),
        "What it cost": cost_table(run),
        "The machine": [["fact", "value"], *map(list, machine_of(run).items())],
        "The recipe": [["setting", "value"], *([k, str(v)] for k, v in vars(run.recipe).items())],
    }
    if mine_rows(run):
        sections["Your code"] = [["exercise", "in place of"], *mine_rows(run)]
    return sections


def write_report(run: Run) -> tuple[Path, Path]:
    """Write report.md and report.html (one file, pictures inside) from the log; return their paths.

    Every number in them is read from the log and the recipe: nothing is measured again.
    """
    title = f"Report card of run {run.recipe.name}"
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for head, rows in report_sections(run).items():
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
`--profile` and `--set FIELD=VALUE` name a run by its recipe, `--folder` by its folder. A command is
a function `do_NAME` of the parsed flags; flags of its own are added by `NAME_options` beside it.
"""
# %%
#| export cli
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


# %% [markdown]
r"""
A command that starts work may make a folder; one that only looks (`chat`, `report`) may not.
"""


# %%
#| export cli
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


# %% [markdown]
r"""
A stage's command runs `run_stage`, or, started by the launcher of section 7, one rank's part of it.
"""


# %%
#| export cli
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
starts, and a cell that fails becomes one sentence.
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


# %%
#| export cli
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


# %%
#| export cli
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


# %% [markdown]
r"""
Two commands talk (chapter 11, appendix A5). The web page offers all models of a run, the last one
first.
"""


# %%
#| export cli
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


# %%
#| export cli
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


# %% [markdown]
r"""
`bench` measures how fast a model writes (chapter 8).
"""


# %%
#| export cli
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


# %% [markdown]
r"""
`eval` alone puts a run's model through `judge`. With `--core` it scores the 22 tasks of CORE
(chapter 7), of a run's model or of one of Hugging Face. Under torchrun each process takes a part of
the items.
"""

# %%
#| export cli
from nanochat.core import (
    chat_core,
    fetch_core,
    kept_result,
    load_core,
    load_hub_model,
    model_digest,
    run_core,
)


# %%
#| export cli
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


# %% [markdown]
r"""
With `--chat` it scores the six tasks of ChatCORE (chapter 7), one of them generated.
"""


# %%
#| export cli
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


# %% [markdown]
r"""
With `--samples` a problem is tried several times, for pass@k (`evaluate_samples` of chapter 10).
Each task's result is kept in a file, so that an evaluation that was broken goes on with the next.
"""


# %%
#| export cli
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


# %%
#| export cli
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


# %%
#| export cli
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


# %% [markdown]
r"""
The last three print: the report's place, the estimate of section 4, and what the environment lacks.
"""


# %%
#| export cli
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


# %% [markdown]
r"""
`build_parser` puts the commands together. All but `doctor` are about a run, some about one model.
"""


# %%
#| export cli
def run_options(command: argparse.ArgumentParser) -> None:
    """Add the flags that name a run."""
    command.add_argument("--profile", default="laptop", help="a ready recipe (chapter A4)")
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    command.add_argument("--folder", help="folder of a run, in place of a profile")


def model_options(command: argparse.ArgumentParser) -> None:
    """Add the flags that name a model: its run and its stage."""
    run_options(command)
    command.add_argument("--stage", choices=MODELS, help="default: the last one trained")


# %%
#| export cli
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


# %% [markdown]
r"""
`main` draws the line between two kinds of failure. A mistake that a user can mend is one sentence
and exit code 2. Anything else is our mistake and shows its traceback, because somebody has to find
it.
"""

# %%
#| export cli
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


# %% [markdown]
r"""
What do people get wrong?
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
The last module is the first that runs. It must say one sentence where Python is too old or torch is
missing, so it imports nothing at the top but `sys`.
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
`Recipe.changed` make a recipe by the rules of `scaled_settings`; `check_recipe` refuses what cannot
work. `Run.open` keeps it in a folder; `run_stage` does a stage once and resumes it; `judge` and
`exchange` say what it brought. `pick_micro_batch` and `estimate` look ahead. `stage_table`,
`cost_table`, `plot_training` and `write_report` show what the log says, and `python -m nanochat`
puts a command on each of them.

**Pitfalls**, each of which was shipped once by a real project:

- *A bare assertion when the batch does not divide.* Four threads of users asked what it meant. Say
  which number divides.
- *Speed counted over the wrong thing.* With gradient accumulation one project reported the tokens
  of a single micro-batch per step's time: 594 a second instead of many times that. Count the tokens
  of the whole step.
- *A checkpoint without its configuration and vocabulary.* Old ones stop loading, or load and talk
  nonsense. Save the sizes, the versions and the tokenizer's fingerprint beside the weights.
- *Resuming almost.* Only one stage, only on the same GPUs, the place in the data approximately,
  the second epoch forgotten. Write the test of section 8 first.

**Readings**

- Karpathy, [nanochat](https://github.com/karpathy/nanochat) (2025-2026): the recipe, the dial and
  the rules that this chapter follows.
- Hoffmann et al., [Training Compute-Optimal Large Language Models](https://arxiv.org/abs/2203.15556)
  (2022): tokens per parameter.
- McCandlish et al., [An Empirical Model of Large-Batch Training](https://arxiv.org/abs/1812.06162)
  (2018): why the batch may grow.
- Korthikanti et al., [Reducing Activation Recomputation in Large Transformer
  Models](https://arxiv.org/abs/2205.05198) (2022): activations counted part by part.
- Chowdhery et al., [PaLM](https://arxiv.org/abs/2204.02311) (2022), appendix B: model FLOPs
  utilisation defined.
"""
