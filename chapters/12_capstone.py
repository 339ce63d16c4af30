# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 12. The capstone

One notebook trains a chat model from nothing: tokenizer, base model, midtraining, fine-tuning,
reinforcement learning. By the end you have a model that answers you, a table that shows what
each stage brought, and a report card with what it cost.

Run it from a terminal in the folder of the book,

    papermill chapters/12_capstone.ipynb runs/out.ipynb -p profile laptop

or cell by cell in JupyterLab. It is the same notebook on a laptop, on one GPU and on eight: the
`profile` decides, and the notebook finds the GPUs by itself. Stop it whenever you like: stages
that are finished are skipped the next time, and a stage that was interrupted goes on from its last
checkpoint.
"""

# %% [markdown]
r"""
**What you will be able to do**

- run all stages with one command and take up a run that was interrupted;
- say of each stage which number it moves, against which level of chance, and at what cost;
- put the same question to the model before and after each stage;
- train on your own text by changing one parameter.

**Before you start**: nothing is needed to run it; to understand it, chapters 1 to 10 explain one
stage each, and appendix A4 how a run is organised. The `laptop` profile takes under 10 minutes on
two CPU cores, without a GPU and without a network. `smoke` takes under a minute and learns next to
nothing; the printed copy of this notebook shows it, so its replies are nonsense and its scores stay
near chance.

| profile | machine | data | depth | what to expect |
| --- | --- | --- | --- | --- |
| `smoke` | two CPU cores | tiny world | 2 | proof that every stage runs |
| `laptop` | two CPU cores | tiny world | 4 | a model that knows its small world and counts |
| `gpu1` | one GPU of 24 to 80 GB | the hub, or a folder | 12 | coherent English, chat, tools |
| `speedrun` | 8xH100 | the hub | 24 | the quality of GPT-2, then chat |
| `classic` | 8xH100 | the hub | 20 | the first recipe of nanochat |
"""

# %% [markdown]
r"""
## 1. Parameters

`data` is where the text comes from (`tinyworld`, `folder:PATH` with parquet shards, `hub:NAME`),
`chat` where the conversations come from (`tinyworld`, `folder:PATH`, `hub`). Empty means: what the
profile says. `overrides` changes any other number of the recipe, for example
`{"pretrain_steps": 2000}` (with papermill: `-y "{overrides: {pretrain_steps: 2000}}"`).
"""

# %% tags=["parameters"]
profile = "laptop"
name = ""  # the run's folder is runs/<name>; empty: the profile's name
data = ""
chat = ""
seed = 0
overrides = {}
run_directory = ""  # take up the run in this folder, whatever the parameters above say

# %%
import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown, display

from nanochat.recipe import MODELS, Recipe, Run, estimate, exchange, process_count, run_stage
from nanochat.report import (
    cost_table,
    machine_facts,
    markdown_table,
    plot_stages,
    plot_training,
    stage_table,
    write_report,
)

# %%
if run_directory:
    run = Run(run_directory)
else:
    given = {"name": name, "data": data, "chat": chat, "seed": seed}
    changes = {key: value for key, value in given.items() if value != ""}
    run = Run.open(Recipe.for_profile(profile, **{**changes, **overrides}))
recipe = run.recipe
display(Markdown(markdown_table([["this machine", ""], *map(list, machine_facts().items())])))

# %% [markdown]
r"""
## 2. What it will take

Before anything runs, we count. Parameters, tokens and FLOPs follow from the recipe (chapters 3
and 5). On a GPU whose speed we know, the count gives hours and dollars, at 40 % of the peak.
"""

# %%
plan = estimate(recipe)
print(
    f"depth {recipe.depth}: {plan['parameters'] / 1e6:.1f} M parameters, {plan['tokens']:,} tokens"
)
print(f"{plan['flops']:.2g} FLOPs of pretraining in {process_count(recipe)} process(es)")
if plan["hours"]:
    dollars = f", about ${plan['dollars']:.2f}" if plan["dollars"] else ""
    print(f"about {plan['hours']:.2f} hours{dollars}")

# %% [markdown]
r"""
## 3. Tokenizer and data

The tokenizer is trained on the first characters of the text itself (chapter 1). Then all the text
that the run will see becomes one long row of numbers on disk (chapter 2).
"""

# %%
found = run_stage(run, "tokenizer")
print(f"{found['vocab_size']:,} tokens, {found['bytes_per_token']:.2f} bytes of text per token")
found = run_stage(run, "data")
print(f"{found['train_tokens']:,} tokens to train on, {found['val_tokens']:,} to validate")

# %% [markdown]
r"""
## 4. Pretraining: the base model

Now the long part: the model reads, and learns to say what comes next (chapter 5). The blue line is
the training loss, the dots are bits per byte (chapter 7) on text it never sees.
"""

# %%
base = run_stage(run, "base")
plot_training(run, "base")
plt.show()

# %% [markdown]
r"""
It can continue a text, but it has never seen a conversation. Ask it something all the same.
"""


# %%
def show(stage):
    """Print the three questions and what the stage's model says."""
    for answer in exchange(run, stage):
        tool = "".join(f" [calculator: {call}]" for call in answer["calculator"])
        print(f"> {answer['question']}\n{tool}{answer['reply'][:200]}\n")


show("base")

# %% [markdown]
r"""
## 5. Midtraining: the form of a conversation

Midtraining reads conversations instead of stories, whole, with the loss on every token (chapter
9). The model learns the special tokens, who speaks when, and how to call the calculator. The dots
are the loss on replies of conversations that no stage trains on.
"""

# %%
run_stage(run, "mid")
plot_training(run, "mid")
plt.show()
show("mid")

# %% [markdown]
r"""
## 6. Supervised fine-tuning: the assistant's part

More conversations of the same kinds, but now only the assistant's words count (chapter 9): the
model stops practising the questions and learns the answers alone.
"""

# %%
run_stage(run, "sft")
plot_training(run, "sft")
plt.show()
show("sft")

# %% [markdown]
r"""
## 7. Reinforcement learning: practice

Word problems have answers that a program can check. The model tries each problem several times;
what led to the right number is made more likely, the rest less (chapter 10). The dots are sums that
it is not trained on: pass@1 is the share of right replies, pass@8 the share of sums that one of
eight replies gets right.
"""

# %%
run_stage(run, "rl")
plot_training(run, "rl")
plt.show()
show("rl")

# %% [markdown]
r"""
## 8. What each stage brought

One column a stage, the same items for each. Read every number against the column of chance.
"""

# %%
display(Markdown(markdown_table(stage_table(run))))
plot_stages(run)
plt.show()

# %% [markdown]
r"""
Three things to look for, in a run of `laptop` or a larger profile. **Bits per byte** is best right
after pretraining and gets worse later: the later stages teach another kind of text. **The
exam** jumps when the model learns the form of question and answer; the facts it has read before.
**Arithmetic** is what reinforcement learning is paid for; look whether anything else falls. Three
runs of `laptop` with different seeds came to (`benchmarks/RESULTS.md`):

| score | chance | three seeds |
| --- | --- | --- |
| exam after fine-tuning | 0.14 | 0.66 to 0.76 |
| arithmetic, pass@1, after fine-tuning | 0.00 | 0.26 to 0.78 |
| arithmetic, pass@1, after reinforcement learning | 0.00 | 0.49 to 0.92 |

## 9. The report card

Everything above, with the time and memory of each stage, as Markdown and as one HTML file.
"""

# %%
paths = write_report(run)
print("written:", ", ".join(path.name for path in paths), "in the run's folder")
display(Markdown(markdown_table(cost_table(run))))

# %% [markdown]
r"""
## 10. Talk to it

The last cell opens a chat (chapter 11). In a notebook that is running, type and press Enter. The
model picker holds all four stages: put the same question to each. From a terminal,
`python -m nanochat chat --folder FOLDER` and `python -m nanochat serve --folder FOLDER` do the
same.
"""

# %%
from nanochat.common import in_live_notebook
from nanochat.ui import ChatWidget

if in_live_notebook():
    display(ChatWidget({stage: run.engine(stage) for stage in MODELS[::-1]}))
else:
    display(HTML("<em>The chat opens when this notebook runs in a front end.</em>"))

# %% [markdown]
r"""
## Recap

One recipe, six stages, one folder with everything a run leaves behind: the tokenizer, a checkpoint
of every stage, `metrics.jsonl` from which all plots and tables were drawn, and the report card.

**Pitfalls**

- *The same name with another recipe.* A run that was begun with other numbers is refused, with the
  difference in the message. Choose another `name`.
- *Comparing scores of different sets.* Every stage is judged on the same items, chosen by a fixed
  seed; a score on other items is another score.
- *A number without its noise.* With 100 items a share of 0.60 is known to about 0.10 either way,
  and another seed moves it further. A small step between two columns says nothing.

**Readings**

- Karpathy 2025, *nanochat*: the project that this book rebuilds, and its discussions.
- OLMo team 2024, *2 OLMo 2 Furious*: every stage of a large open model, with data and recipes.
- Allal et al. 2025, *SmolLM2*: how mixtures of data make a small model better.

**Where to go from here**: your own text with `data="folder:PATH"`; a larger `depth`; the exercises
of each chapter; appendix A2 to predict what ten times the compute would bring, before you rent it;
appendices A3 and A6 to train and to write faster on a GPU.
"""
