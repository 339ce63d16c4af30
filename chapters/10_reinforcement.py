# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 10. Reinforcement learning

By the end of this chapter a model solves more sums than before, by a margin that luck does not
explain, although we have not shown it one more solution: we have only told it which of its own
answers were right. And we have watched it cheat when we paid for the wrong thing.

First the finished thing, on a model that knows nothing at all. It writes one random token; we pay
1 when the token begins with a digit, and 0 otherwise. No example is ever shown.
"""

# %%
import nanochat.rl as finished
from nanochat.engine import Engine
from nanochat.model import GPT, GPTConfig, init_weights
from nanochat.optim import build_optimizer
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

world = World(0)
tokenizer = Tokenizer.train((document(world, i) for i in range(1500)), vocab_size=512)
newborn = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
init_weights(newborn, seed=1)


def starts_with_digit(parts, problem):
    return float(bool(parts) and parts[0]["text"].strip()[:1].isdigit())


anything = [{"question": "Say something.", "answer": ""}]
history = finished.train_rl(
    newborn, build_optimizer(newborn), Engine(newborn, tokenizer), anything,
    n_steps=40, questions_per_step=1, samples=32, max_tokens=1, lr=1.0, reward=starts_with_digit,
)  # fmt: skip
for first in range(0, 40, 10):
    rewards = [metrics["reward"] for metrics in history[first : first + 10]]
    print(f"steps {first:2d} to {first + 9}: mean reward {sum(rewards) / 10:.2f}")

# %% [markdown]
r"""
**You will be able to**
1. derive the REINFORCE gradient and check a sampled gradient against the exact one;
2. say what a baseline changes (the variance) and what it does not (the mean);
3. write a reward that a program can verify, and find out how it can be cheated;
4. train a chat model on its own replies, with tool output masked;
5. report pass@1 and pass@k with intervals, and tell an improvement from noise.

Prerequisites: chapters 1 to 9. Reading: 25 minutes. Running: under 60 seconds on two CPU cores, no
network, under 1.5 GB.
"""

# %% tags=["parameters"]
profile = "quick"
seed = 0
seq_len = 96
depth, width = 2, 96
sft_steps, rl_steps = 100, 27
questions_per_step, samples = 16, 8
n_test = 60

# %%
#| default_exp rl

# %%
#| export
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from nanochat.chat import parse, render_prompt, reply_text
from nanochat.common import MetricsLog, Progress, UserError
from nanochat.evaluation import KERNELS, bootstrap_interval, centered
from nanochat.optim import lr_multiplier, muon_momentum
from nanochat.tasks import ChatTask, final_answer
from nanochat.train import SingleProcess

# %% [markdown]
r"""
## Learning from a score

Fine-tuning says *write exactly this*. Often we cannot say that, but we can say *that was right*.
Take the smallest case: two slot machines. Arm 0 pays 1 coin with probability 0.2, arm 1 with
probability 0.8. Our policy has one parameter $\theta$ and pulls arm 1 with probability
$p = \sigma(\theta)$. We want more coins on average:

$$J(\theta) = \mathbb{E}_{a \sim \pi_\theta}[r(a)] = 0.2\,(1 - p) + 0.8\,p, \qquad
\frac{dJ}{d\theta} = 0.6\,p\,(1 - p).$$

Here we know the pay-outs, so we know the gradient. A learner sees only its own pulls and coins. The
trick is to write the gradient as an average over pulls, with $\nabla \pi = \pi\,\nabla \log \pi$:

$$\nabla J = \sum_a r(a)\,\nabla \pi_\theta(a)
= \sum_a \pi_\theta(a)\,r(a)\,\nabla \log \pi_\theta(a)
= \mathbb{E}_{a \sim \pi_\theta}\big[\,r(a)\,\nabla \log \pi_\theta(a)\,\big].$$

Pull, get a coin, push up the log-probability of what you did in proportion to the coin. This is
**REINFORCE** (Williams 1992). Nothing in it needs the reward to be differentiable.
"""

# %%
import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure

pays = torch.tensor([0.2, 0.8])
theta = torch.tensor(-1.0)
p = torch.sigmoid(theta)
exact = 0.6 * p * (1 - p)


def pull(n, generator):
    """Return arms (n,) and coins (n,) of n pulls."""
    arms = (torch.rand(n, generator=generator) < p).long()
    return arms, (torch.rand(n, generator=generator) < pays[arms]).float()


arms, coins = pull(100_000, torch.Generator().manual_seed(seed))
slope = arms - p  # d log pi(a) / d theta, for a sigmoid
estimate = (coins * slope).mean()
print(f"exact gradient {exact:.4f}   mean of 100,000 pulls {estimate:.4f}")

# %%
assert abs(estimate - exact) < 4 * (coins * slope).std() / 100_000**0.5

# %% [markdown]
r"""
The mean is right. But one pull says little: its spread is about three times the gradient. Much of
the spread is avoidable. A coin from either arm pushes the policy *towards the arm that was
pulled*, and only the difference between the pushes teaches anything. So we subtract a **baseline**
$b$ from the coin. The mean does not move, because $\mathbb{E}[\nabla \log \pi] = 0$; the variance
does.
"""

# %%
baselines = torch.linspace(-1, 2, 61)
spreads = torch.stack([((coins - b) * slope).std() for b in baselines])
means = torch.stack([((coins - b) * slope).mean() for b in baselines])
fig, ax = figure(
    "With the mean reward as baseline one pull is worth two",
    "baseline b (coins)",
    "gradient estimate of one pull",
    alt="The mean stays flat over the baseline; the spread has a minimum near the mean reward",
)
ax.plot(baselines, spreads, color=COLORS[0], label="standard deviation")
ax.plot(baselines, means, color=COLORS[1], label="mean")
ax.axvline(float(coins.mean()), color="grey", linestyle=":", label="mean reward")
ax.set_ylim(0, 0.9)
ax.legend(loc="upper center", ncol=3, fontsize=8)
plt.show()
none, mean = (((coins - b) * slope).var() for b in (0, coins.mean()))
print(f"variance without a baseline over variance with the mean reward: {none / mean:.1f}")

# %% [markdown]
r"""
> **Exercise 10.1.** The spread is smallest at a baseline above the mean reward. Derive that
> baseline by setting the derivative of $\mathbb{E}[(r - b)^2 (\nabla \log \pi)^2]$ to zero, and say
> which of the two arms pulls it up.

For a language model the action is a whole reply: tokens $y_1 \dots y_n$ with
$\log \pi(y) = \sum_t \log p(y_t \mid y_{<t})$. The baseline is free of charge if we let the model
answer the same question several times. The mean reward of the group is the baseline, and a reply's
**advantage** is what it earned above it:

$$L = -\frac{1}{N} \sum_i A_i \sum_{t \text{ sampled}} \log p(y_{i,t} \mid y_{i,<t}), \qquad
A_i = r_i - \bar r_{\text{group}},$$

with $N$ the number of sampled tokens. Say one reply of four is right: the mean is 0.25, the right
one has the advantage 0.75, each wrong one -0.25. No second network that predicts rewards (a
*critic*) is needed. Methods of this family differ in little, and their names hide it:

| name | baseline | advantage divided by | what counts alike |
|---|---|---|---|
| REINFORCE (1992) | none | - | tokens |
| RLOO (2024) | mean of the *other* replies | - | tokens |
| nanochat, Dr. GRPO (2025): our `"reinforce"` | mean of the group | - | tokens |
| GRPO (2024): our `"grpo"` | mean of the group | deviation of the group | replies |

RLOO's advantage is ours times $n/(n-1)$, the same push. Dividing by the deviation lets a question
that is nearly always answered right, or wrong, count as much as one that is open. GRPO also has a
clip and a KL penalty in the loss, for several updates on the same replies; with one update, as
here, the clip never acts. Below we compare the two kinds of advantages, with tokens that count
alike in both.

## Problems and rewards

A problem is a question and an answer that a program can compare. The reward must be **verifiable**:
1 if the number after `####` in the model's own text is the answer. Tool output does not
count as own text, or the model could let the calculator print the marks.
"""


# %%
#| export
def task_problems(task: ChatTask, n: int | None = None, start: int = 0) -> list[dict]:
    """Return conversations start .. start + n of a task as problems {"question", "answer"}.

    Those without an `answer` are left out; UserError if none has one (arithmetic, spelling and
    GSM8K have).
    """
    problems = []
    for index in range(start, len(task) if n is None else min(start + n, len(task))):
        conversation = task.conversation(index)
        if conversation.get("answer") is not None:
            question = conversation["messages"][-2]["content"]
            problems.append({"question": question, "answer": str(conversation["answer"])})
    if not problems:
        raise UserError(f"Task {task.name!r} has no answers that can be checked.")
    return problems


def problem_prompt(problem: dict, tokenizer) -> list[int]:
    """Return the ids of a problem's question as a chat prompt (ends with assistant_start)."""
    messages = [{"role": "user", "content": problem["question"]}]
    return render_prompt({"messages": messages}, tokenizer)


# %% [markdown]
r"""
A reward reads the parts of a reply and the problem, and returns a number. Only `answer_reward` is
the one that we mean. The others pay for form and for brevity; we need them to show what happens
when one pays for the wrong thing.
"""


# %%
#| export
def answer_reward(parts: Sequence[dict], problem: dict) -> float:
    """Return 1.0 if the number after #### in the reply's own text is the answer, else 0.0."""
    return float(final_answer(reply_text(parts)) == problem["answer"])


def format_reward(parts: Sequence[dict], problem: dict) -> float:
    """Return 1.0 if the reply's own text has some number after ####, right or wrong, else 0.0."""
    return float(final_answer(reply_text(parts)) is not None)


def length_reward(parts: Sequence[dict], problem: dict) -> float:
    """Return minus the number of characters of the reply in hundreds (shorter is better)."""
    return -sum(len(part["text"]) for part in parts) / 100


def combine_rewards(*weighted: tuple[Callable, float]) -> Callable[[Sequence[dict], dict], float]:
    """Return the reward that is the weighted sum of rewards, given as (reward, weight)."""
    return lambda parts, problem: sum(w * reward(parts, problem) for reward, w in weighted)


# %%
#| test
_problem = {"question": "1+1", "answer": "2"}
assert answer_reward([{"type": "text", "text": "two\n#### 2"}], _problem) == 1
assert answer_reward([{"type": "python_output", "text": "#### 2"}], _problem) == 0  # not its own
assert format_reward([{"type": "text", "text": "#### 99"}], _problem) == 1

# %% [markdown]
r"""
## Rollouts

A **rollout** is one sampled reply with everything the update needs: its ids, and the mask that says
which of them the model sampled. The engine forces tool output into the reply; those tokens
were not the policy's choice, so they must not be trained. All replies of a step are decoded in one
batch, because decoding one by one would take most of the time.
"""


# %%
#| export
@dataclass
class Rollout:
    """One sampled reply to problem number `problem`: its ids, and what it earned.

    `mask` is 1 where the policy sampled the id and 0 where the engine forced it; `parts` are what
    `parse` makes of the ids.
    """

    problem: int
    prompt: list[int]
    ids: list[int]
    mask: list[int]
    parts: list[dict]
    reward: float = 0.0
    advantage: float = 0.0


# %% [markdown]
r"""
Each reply draws from random numbers of its own, made of the seed and the question's place. So two
processes sample what one would have sampled, and a run that was killed goes on with the replies
that it would have had (`tests/test_chat_workers.py`, `tests/kill_stages.py`).
"""


# %%
#| export
def sample_rollouts(
    engine,
    problems: Sequence[dict],
    samples: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    reward: Callable = answer_reward,
    places: Sequence[int] | None = None,
) -> list[Rollout]:
    """Let the model answer each problem `samples` times; return len(problems) * samples rollouts.

    The rollouts of one problem stand together. All replies are decoded in one batch. Each reply
    has its own random numbers, made of `seed`, its problem's place (default: 0, 1, ...) and its
    number, so it does not depend on how problems are shared among processes.
    """
    tokenizer, places = engine.tokenizer, range(len(problems)) if places is None else places
    prompts = [problem_prompt(problem, tokenizer) for problem in problems for _ in range(samples)]
    seeds = [seed * 1_000_003 + place * samples + i for place in places for i in range(samples)]
    completions = engine.generate_batch(
        prompts, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seeds
    )
    rollouts = []
    for number, (prompt, done) in enumerate(zip(prompts, completions)):
        parts, problem = parse(done.ids, tokenizer), number // samples
        value = float(reward(parts, problems[problem]))
        rollouts.append(Rollout(problem, prompt, list(done.ids), list(done.mask), parts, value))
    return rollouts


# %% [markdown]
r"""
Advantages, group by group. When all replies of a group earn the same, right or wrong, every
advantage is 0. Such a question teaches nothing today.
"""


# %%
#| export
def set_advantages(rollouts: Sequence[Rollout], samples: int, variant: str = "reinforce") -> None:
    """Write each rollout's advantage: its reward minus the mean of its group of `samples`.

    "reinforce" leaves it there; "grpo" divides by the group's standard deviation as well
    (Shao et al. 2024). A group whose rewards are all equal gets 0 in both: it teaches nothing.
    """
    if variant not in ("reinforce", "grpo"):
        raise UserError(f"variant must be 'reinforce' or 'grpo', not {variant!r}.")
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    rewards = rewards.view(-1, samples)  # (groups, samples)
    means = rewards.mean(dim=1, keepdim=True)
    equal = torch.isclose(rewards, means, rtol=1e-9, atol=1e-9).all(dim=1, keepdim=True)
    advantages = (rewards - means).masked_fill(equal, 0.0)  # a mean is rounded, too
    if variant == "grpo":
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-6)
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage if abs(advantage) > 1e-9 else 0.0


# %%
for variant in ("reinforce", "grpo"):
    group = [Rollout(0, [], [], [], [], reward) for reward in (1, 0, 0, 0, 1, 1, 1, 1)]
    set_advantages(group, 4, variant)
    print(f"{variant:10s}", [round(rollout.advantage, 2) for rollout in group])

# %% [markdown]
r"""
The second group is all right, so it has no say. For the update, rollouts become rows of one length:
prompt, reply, padding. Targets are -1 wherever the policy did not choose.
"""


# %%
#| export
def pad_rollouts(rollouts: Sequence[Rollout], pad_id: int, device):
    """Return (inputs, targets, advantages) of rollouts: int64 (B, T), int64 (B, T), float (B,).

    targets are -1 at the prompt, at forced tool tokens and after the end.
    """
    length = max(len(r.prompt) + len(r.ids) for r in rollouts)
    rows = np.full((len(rollouts), length), pad_id, dtype=np.int64)
    sampled = np.zeros((len(rollouts), length), dtype=bool)
    for number, r in enumerate(rollouts):
        start, end = len(r.prompt), len(r.prompt) + len(r.ids)
        rows[number, :end] = r.prompt + r.ids
        sampled[number, start:end] = r.mask
    targets = np.where(sampled, rows, -1)[:, 1:]
    advantages = torch.tensor([r.advantage for r in rollouts], device=device)
    inputs = torch.from_numpy(rows[:, :-1].copy()).to(device)
    return inputs, torch.from_numpy(targets).to(device), advantages


# %% [markdown]
r"""
## The loss

The policy is the distribution that we sample from. At a temperature other than 1 that is the
softmax of `logits / temperature`, so this is what we differentiate. We divide the sum by the number
of sampled tokens of the step. Every token then weighs the same, and a long right reply teaches more
than a short one. Dividing per reply instead ("sequences") makes each reply weigh the same: a wrong
reply of 100 tokens pushes each of them down a tenth as hard as one of 10 tokens. That is one way in
which models learn to ramble (Liu et al. 2025).

Replies have all lengths, so here too we leave out the attention kernel that plans anew for each
shape (`KERNELS`, chapter 7).
"""


# %%
#| export
@sdpa_kernel(KERNELS)  # every batch has another length: no kernel that plans anew for each
def token_logprobs(model, inputs, targets, temperature: float = 1.0) -> torch.Tensor:
    """Return log p(target) under the sampling distribution, float32 (B, T), 0 where target is -1.

    At a temperature other than 1 the policy that acts is softmax(logits / temperature), so that is
    what we differentiate.
    """
    if temperature == 1.0:
        return -model(inputs, targets, reduction="none").view(inputs.shape)
    logits = model(inputs).float() / temperature  # (B, T, V)
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    )
    return -losses.view(inputs.shape)


def policy_loss(logprobs, targets, advantages, normalize: str = "tokens") -> torch.Tensor:
    """Return minus the sum over sampled tokens of log p * advantage (scalar), not yet averaged.

    logprobs float (B, T), targets int64 (B, T) with -1 where nothing was sampled, advantages (B,).
    "tokens": every token weighs the same. "sequences": every reply weighs the same, so a token of
    a long reply weighs less.
    """
    sampled = (targets >= 0).float()
    weights = sampled * advantages[:, None]
    if normalize == "sequences":
        weights = weights / sampled.sum(dim=1, keepdim=True).clamp(min=1)
    return -(logprobs * weights).sum()


# %%
#| test
# The gradient of the expected reward over ALL one-token replies, against our loss summed over them.
_model = GPT(GPTConfig(50, 16, 1, 1, 1, 16))
init_weights(_model, seed=3)
_prompt, _pay = [1, 2, 3], (torch.arange(50) % 5 == 0).float()
_p = _model(torch.tensor([_prompt]))[0, -1].softmax(-1)
(-(_p * _pay).sum()).backward()
_exact = _model.head.weight.grad.clone()
_model.zero_grad()
_all = [Rollout(0, _prompt, [i], [1], []) for i in range(50)]
for _rollout, _chance, _reward in zip(_all, _p.tolist(), _pay.tolist()):
    _rollout.advantage = _chance * (_reward - 0.2)  # any baseline will do
_x, _y, _a = pad_rollouts(_all, 0, "cpu")
policy_loss(token_logprobs(_model, _x, _y), _y, _a).backward()
assert torch.allclose(_model.head.weight.grad, _exact, atol=1e-5)

# %% [markdown]
r"""
Two gauges show the state of the policy. The **KL divergence** from the policy we started with says
how far RL has moved it. The **entropy** says how much it still varies its replies; at zero all
replies of a group are the same, and learning stops. Both are averages over what the policy samples,
so the rollouts we have anyway are enough to estimate them: `kl_and_entropy` for one batch, `drift`
for all rollouts of a step.
"""


# %%
#| export
def kl_and_entropy(logprobs, reference, targets) -> tuple[float, float]:
    """Estimate from samples, summed over sampled tokens: KL(policy || reference) and entropy, nats.

    `logprobs` and `reference` float (B, T): log p of the sampled tokens under both. With
    d = reference - policy, exp(d) - 1 - d has the KL as its mean, and is never negative
    (Schulman 2020, "k3"). Minus the mean log p is the entropy.
    """
    sampled = targets >= 0
    difference = (reference - logprobs)[sampled]
    kl = (difference.exp() - 1 - difference).sum()
    return float(kl), float(-logprobs[sampled].sum())


# %%
#| export
@torch.no_grad()
def drift(
    model,
    reference,
    rollouts: Sequence[Rollout],
    pad_id: int,
    temperature: float = 1.0,
    world=None,
    micro_batch: int = 64,
) -> dict[str, float]:
    """Return dict(kl, entropy) per sampled token in nats, estimated on rollouts of `model`.

    kl is how far the policy has moved from `reference`, the model that RL started from. With a
    `world` each process gives its own rollouts; the means are over those of all.
    """
    totals = torch.zeros(3, dtype=torch.float64)  # kl, entropy, sampled tokens
    for start in range(0, len(rollouts), micro_batch):
        batch = rollouts[start : start + micro_batch]
        inputs, targets, _ = pad_rollouts(batch, pad_id, model.device)
        policy = token_logprobs(model, inputs, targets, temperature)
        origin = token_logprobs(reference, inputs, targets, temperature)
        sums = kl_and_entropy(policy, origin, targets)
        totals += torch.tensor([*sums, int((targets >= 0).sum())], dtype=torch.float64)
    totals = world.sum(totals.float().to(model.device)) if world else totals
    kl, entropy, n = totals.tolist()
    return dict(kl=kl / max(n, 1), entropy=entropy / max(n, 1))


# %% [markdown]
r"""
The gradient is added up in micro-batches, as in chapter 5. Rollouts without an advantage add
nothing, so they never reach the model.
"""


# %%
#| export
def policy_gradient(
    model,
    rollouts: Sequence[Rollout],
    pad_id: int,
    scale: float,
    temperature: float = 1.0,
    normalize: str = "tokens",
    micro_batch: int = 64,
) -> float:
    """Add the gradient of the policy loss times `scale` to `model`; return the scaled loss.

    Rollouts with advantage 0 have no gradient and are left out; the others go through the model in
    micro-batches of similar length, so that little padding is computed.
    """
    useful = sorted((r for r in rollouts if r.advantage), key=lambda r: len(r.prompt) + len(r.ids))
    total = 0.0
    for start in range(0, len(useful), micro_batch):
        batch = useful[start : start + micro_batch]
        inputs, targets, advantages = pad_rollouts(batch, pad_id, model.device)
        logprobs = token_logprobs(model, inputs, targets, temperature)
        loss = policy_loss(logprobs, targets, advantages, normalize) * scale
        loss.backward()
        total += float(loss.detach())
    return total


# %% [markdown]
r"""
## The loop

A step: choose questions, sample, compare, update once, forget. "Once" matters: the rollouts come
from the policy that is being updated (**on-policy**), so the formula above holds as it stands.
Methods that take several steps on the same rollouts (PPO) need a ratio and a clip to correct for
it. We choose the questions first: every problem once an epoch, in an order that the seed decides.
"""


# %%
#| export
def question_indices(step: int, n_problems: int, n_questions: int, seed: int = 0) -> list[int]:
    """Return the indices of the questions of a step: every problem once per epoch, shuffled.

    Depends on the arguments only, so a resumed run asks what the broken one would have asked.
    """
    indices = []
    for position in range(step * n_questions, (step + 1) * n_questions):
        epoch, place = divmod(position, n_problems)
        if not indices or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n_problems)
        indices.append(int(order[place]))
    return indices


# %% [markdown]
r"""
Some numbers make no step: one sample a question has nothing to be compared with.
"""


# %%
#| export
def check_rl(problems: Sequence[dict], n_questions: int, samples: int, world_size: int) -> None:
    """Raise UserError unless a step of RL can be made of these numbers."""
    if n_questions % world_size:
        raise UserError(
            f"{n_questions} questions a step do not divide among {world_size} processes; "
            "choose a multiple."
        )
    if not len(problems) or samples < 2:
        raise UserError("RL needs at least one problem and 2 samples of each, to compare them.")


# %% [markdown]
r"""
With several processes each one answers its share of the questions. Only sums are exchanged: the
metrics in `rollout_metrics`, the gradient in `update_policy`.
"""


# %%
#| export
def rollout_metrics(rollouts: Sequence[Rollout], problems: Sequence[dict], engine, world) -> dict:
    """Return what a step's rollouts show, over all processes, as dict of float.

    reward, correct (answer_reward) and length (sampled tokens) per reply; useful: the share of
    replies with an advantage; ended: the share that ended by themselves; replies and tokens.
    """
    stop = engine.tokenizer.special("assistant_end")
    totals = [
        sum(r.reward for r in rollouts),
        sum(answer_reward(r.parts, problems[r.problem]) for r in rollouts),
        sum(sum(r.mask) for r in rollouts),
        sum(r.advantage != 0 for r in rollouts),
        sum(stop in r.ids[-1:] for r in rollouts),
        len(rollouts),
    ]
    totals = world.sum(torch.tensor(totals, dtype=torch.float32, device=world.device)).tolist()
    names, n = ("reward", "correct", "length", "useful", "ended"), totals[-1]
    metrics = {name: total / n for name, total in zip(names, totals)}
    return {**metrics, "replies": int(n), "tokens": int(totals[2])}


def update_policy(
    model, optimizer, rollouts, pad_id, metrics, world, temperature=1.0, normalize="tokens"
) -> None:
    """Take one optimizer step on the rollouts of all processes.

    The loss is divided by their sampled tokens ("tokens") or replies ("sequences"), see
    `policy_loss`. Without a group in which rewards differ there is nothing to learn: no step.
    """
    if metrics["useful"]:
        count = metrics["tokens"] if normalize == "tokens" else metrics["replies"]
        scale = world.world_size / max(count, 1)  # average_gradients divides by world_size
        policy_gradient(model, rollouts, pad_id, scale, temperature, normalize)
        for param in model.parameters():  # a process without useful rollouts joins in with zeros
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        world.average_gradients(model)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# %% [markdown]
r"""
One step of RL, put together from the parts above: sample, compare, measure, update once.
"""


# %%
#| export
def rl_step(
    model,
    optimizer,
    engine,
    problems: Sequence[dict],
    *,
    samples: int,
    places: Sequence[int],
    seed: int,
    world,
    reference=None,
    max_tokens: int = 96,
    temperature: float = 1.0,
    top_k: int | None = None,
    reward: Callable = answer_reward,
    variant: str = "reinforce",
    normalize: str = "tokens",
) -> dict:
    """Sample replies to this process's questions, update the policy once; return the metrics.

    `places` and `seed` decide the random numbers (`sample_rollouts`), `variant` the advantages
    (`set_advantages`), `normalize` what counts alike (`policy_loss`). The metrics are those of
    `rollout_metrics` and, with a `reference`, of `drift`.
    """
    engine.refresh()
    rollouts = sample_rollouts(
        engine, problems, samples, max_tokens, temperature, top_k, seed, reward, places
    )
    set_advantages(rollouts, samples, variant)
    metrics, pad_id = rollout_metrics(rollouts, problems, engine, world), engine.tokenizer.bos_id
    if reference is not None:
        metrics |= drift(model, reference, rollouts, pad_id, temperature, world)
    update_policy(model, optimizer, rollouts, pad_id, metrics, world, temperature, normalize)
    return metrics


# %% [markdown]
r"""
And the loop around it: the rate falls in a line to zero, every process takes its questions, and now
and then we measure, evaluate and save. Before the engine is asked, `refresh` lets it take over the
weights as they are now (chapter 8).
"""


# %%
#| export
def train_rl(
    model,
    optimizer,
    engine,
    problems: Sequence[dict],
    *,
    n_steps: int,
    questions_per_step: int = 16,
    samples: int = 8,
    lr: float = 0.05,
    reference=None,
    drift_every: int = 5,
    seed: int = 0,
    start_step: int = 0,
    world=None,
    log: MetricsLog | None = None,
    label: str = "rl",
    evaluate: Callable[[int], dict] | None = None,
    eval_every: int = 0,
    save: Callable[[int], None] | None = None,
    save_every: int = 0,
    **options,
) -> list[dict]:
    """Train a chat model on problems with verifiable answers; return the metrics of every step.

    On-policy REINFORCE: each step, `questions_per_step` questions (over all processes) get
    `samples` sampled replies each, and one `rl_step` with `options` follows: max_tokens, reward,
    variant, ... `lr` scales the optimizer's initial rates, falling in a line to 0. KL to
    `reference` (default: a copy of the model now; when resuming give the model that RL started
    from) and entropy are measured every `drift_every` steps (0: never). Events "rl_step" and
    "eval" go to `log`; `evaluate`, `save` and `start_step` are as in `nanochat.train.fit`.
    Everything random depends on `seed` and the step alone, so resuming is exact. Raises UserError.
    """
    world, log, history = world or SingleProcess(model.device), log or MetricsLog(None), []
    check_rl(problems, questions_per_step, samples, world.world_size)
    if drift_every and reference is None:
        reference = copy.deepcopy(model).requires_grad_(False)
    places = range(world.rank, questions_per_step, world.world_size)
    with Progress(n_steps, label, quiet=10.0 if world.is_main else float("inf")) as bar:
        bar.skip(start_step)
        for step in range(start_step, n_steps):
            if evaluate and eval_every and step % eval_every == 0:
                engine.refresh()
                log.write("eval", step=step, **evaluate(step))
            factor = lr * lr_multiplier(step, n_steps, warmdown=1.0, final=0.0)
            optimizer.set_schedule(factor, muon_momentum(step))
            chosen = question_indices(step, len(problems), questions_per_step, seed)
            mine = [problems[chosen[place]] for place in places]
            options["reference"] = reference if drift_every and step % drift_every == 0 else None
            draw = dict(samples=samples, places=places, seed=seed + step, world=world)
            metrics = rl_step(model, optimizer, engine, mine, **draw, **options)
            history.append(dict(step=step, lr=factor, **metrics))
            log.write("rl_step", **history[-1])
            if world.is_main:
                bar.update(reward=metrics["reward"])
            if save and save_every and (step + 1) % save_every == 0 and step + 1 < n_steps:
                save(step + 1)
    if evaluate:
        engine.refresh()
        log.write("eval", step=n_steps, **evaluate(n_steps))
    return history


# %% [markdown]
r"""
## pass@k

One number hides too much. **pass@1** is the chance that one sampled reply is right; **pass@k** the
chance that at least one of $k$ is. Suppose 2 of 5 samples are right. Of the 10 pairs among them, 3
hold no right one, so the estimate of pass@2 is 7/10. Looking at the first pair only would have said
0 or 1. In general, with $n \ge k$ samples, $c$ of them right (Chen et al. 2021):

$$\text{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}.$$
"""


# %%
#| export
def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, of which c are right, hold at least one right one.

    Unbiased for the chance with k fresh samples: 1 - C(n-c, k) / C(n, k). Chen et al. 2021.
    Raises UserError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# %%
#| test
from itertools import combinations

_hits = [any(pair) for pair in combinations([1, 1, 0, 0, 0], 2)]
assert abs(pass_at_k(5, 2, 2) - sum(_hits) / len(_hits)) < 1e-12

# %% [markdown]
r"""
So we count the right replies of every problem; everything else follows from the counts. `right` is
any reward that says 1 or 0.
"""


# %%
#| export
def count_right(
    engine,
    problems: Sequence[dict],
    samples: int,
    max_tokens: int,
    temperature: float = 1.0,
    batch: int = 128,
    seed: int = 0,
    right: Callable = answer_reward,
    world=None,
) -> list[int]:
    """Return for each problem how many of `samples` sampled replies are right.

    A question that is longer than the context window counts as never right. With `world` every
    process answers its share. `batch` replies are decoded at once.
    """
    rank, world_size = (world.rank, world.world_size) if world else (0, 1)
    lengths = [len(problem_prompt(problem, engine.tokenizer)) for problem in problems]
    fits = [place for place, n in enumerate(lengths) if n < engine.model.config.seq_len]
    mine, counts = fits[rank::world_size], torch.zeros(len(problems))
    size = max(1, batch // samples)
    for start in range(0, len(mine), size):
        places = mine[start : start + size]
        asked = [problems[place] for place in places]
        options = dict(temperature=temperature, seed=seed, reward=right, places=places)
        for rollout in sample_rollouts(engine, asked, samples, max_tokens, **options):
            counts[places[rollout.problem]] += rollout.reward
    return (world.sum(counts) if world else counts).round().int().tolist()


# %%
#| export
def evaluate_pass(
    engine,
    problems: Sequence[dict],
    samples: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 96,
    batch: int = 128,
    seed: int = 0,
    world=None,
) -> dict:
    """Return dict(pass_at_1, pass_at_k, k, low, high, low_k, high_k, n): how many are solved.

    Each of the n problems gets k = `samples` replies; pass_at_1 is the mean share of right ones,
    pass_at_k the share of problems with at least one. low and high are a 95 % bootstrap interval
    of pass_at_1 over problems, low_k and high_k of pass_at_k.
    """
    options = dict(temperature=temperature, batch=batch, seed=seed, world=world)
    counts = count_right(engine, problems, samples, max_tokens, **options)
    first = [count / samples for count in counts]
    solved = [pass_at_k(samples, count, samples) for count in counts]
    (low, high), (low_k, high_k) = bootstrap_interval(first), bootstrap_interval(solved)
    means = dict(pass_at_1=float(np.mean(first)), pass_at_k=float(np.mean(solved)), k=samples)
    return dict(**means, low=low, high=high, low_k=low_k, high_k=high_k, n=len(problems))


# %% [markdown]
r"""
The same counts serve tasks whose replies a rule of their own judges, such as HumanEval, which runs
programs. `evaluate_samples` reports like `evaluate_chat` of chapter 9, with pass@k beside it.
"""


# %%
#| export
def evaluate_samples(
    engine,
    task: ChatTask,
    limit: int | None,
    samples: int,
    max_tokens: int,
    seed: int = 0,
    world=None,
) -> dict:
    """Answer each problem of a generative task `samples` times at temperature 1 and judge it.

    `limit` takes a random part of the task. Returns accuracy (pass@1) with a 95 % interval over
    problems (low, high), chance, centered, n, and `pass_at`: {"1": share, "2": ..., "4": ...}.
    """
    problems = []
    for row in np.random.default_rng(seed).permutation(len(task))[:limit]:
        item = task.conversation(int(row))
        problems.append({"question": item["messages"][-2]["content"], "item": item})

    def right(parts, problem):
        return task.evaluate(reply_text(parts), problem["item"])

    options = dict(seed=seed, right=right, world=world)
    counts = count_right(engine, problems, samples, max_tokens, **options)
    ks = [2**i for i in range(samples.bit_length())]
    passed = {str(k): float(np.mean([pass_at_k(samples, c, k) for c in counts])) for k in ks}
    low, high = bootstrap_interval([count / samples for count in counts])
    accuracy, chance = passed["1"], task.chance
    result = dict(accuracy=accuracy, chance=chance, centered=centered(accuracy, chance))
    return dict(**result, n=len(counts), low=low, high=high, pass_at=passed)


# %% [markdown]
r"""
## A model that can add a little

RL cannot start from nothing: a policy that never gets a reward has no gradient. So we first show a
newborn model worked solutions, as in chapter 9, and stop early on purpose. It knows the form, and
it makes many mistakes.
"""

# %%
from nanochat.finetune import ConversationBatches
from nanochat.tasks import Mixture, TinyWorldTask
from nanochat.train import fit

worked = TinyWorldTask(world, "arithmetic", size=20_000)
sentences = [
    reply_text(m["content"]) for i in range(2000) for m in worked.conversation(i)["messages"]
]
tokenizer = Tokenizer.train(sentences, vocab_size=512)
model = GPT(GPTConfig(tokenizer.vocab_size, seq_len, depth, n_head=3, n_kv_head=3, n_embd=width))
init_weights(model, seed=seed)
batches = ConversationBatches(Mixture([(worked, 1)], seed), tokenizer, 16, seq_len, "assistant")
fit(model, build_optimizer(model), batches, sft_steps, label="sft")
start = copy.deepcopy(model)

# %%
train_problems = task_problems(TinyWorldTask(world, "arithmetic", size=2000, start=10**6))
test_problems = task_problems(TinyWorldTask(world, "arithmetic", "test", size=n_test))
engine = Engine(model, tokenizer)
for rollout in sample_rollouts(engine, test_problems[:4], 1, max_tokens=40, seed=seed):
    print(test_problems[rollout.problem]["question"])
    print("   ", [part["text"] for part in rollout.parts], "reward", rollout.reward)

# %%
asked = {problem["question"] for problem in train_problems}
assert not asked & {problem["question"] for problem in test_problems}  # nothing to remember

# %% [markdown]
r"""
## More right answers, without one more solution

We train on sums that are not in the test, and measure pass@1 and pass@8 on held-out sums as we go.
A second run differs only in its advantages: those of GRPO. The control is a short run with a **coin
toss** for a reward, which pays about as often as the SFT model is right: the same model and the
same rates, but nothing to learn from.
"""


# %%
def run_rl(reward, n_steps=rl_steps, evaluations=0, variant="reinforce"):
    """Train a copy of the SFT model with a reward; return (model, history, [(step, pass)])."""
    policy, curve = copy.deepcopy(start), []
    engine = Engine(policy, tokenizer)

    def evaluate(step):
        curve.append((step, evaluate_pass(engine, test_problems, 8, max_tokens=40)))
        return {}

    history = train_rl(
        policy, build_optimizer(policy), engine, train_problems, n_steps=n_steps,
        questions_per_step=questions_per_step, samples=samples, max_tokens=40, lr=0.2,
        reward=reward, variant=variant, reference=start, seed=seed,
        evaluate=evaluate if evaluations else None, eval_every=n_steps // max(evaluations, 1),
    )  # fmt: skip
    return policy, history, curve


def share_right(policy):
    """Return for each test question the share of 8 replies that are right, (n_test,)."""
    return np.array(count_right(Engine(policy, tokenizer), test_problems, 8, max_tokens=40)) / 8


# %%
coin = np.random.default_rng(seed)
solver, history, curve = run_rl(answer_reward, evaluations=3)
grouped, _, _ = run_rl(answer_reward, variant="grpo")
pushed, _, _ = run_rl(lambda parts, problem: float(coin.random() < 0.4), rl_steps // 3)
policies = {"SFT": start, "RL": solver, "RL, GRPO": grouped, "coin toss": pushed}
solved = {name: share_right(policy) for name, policy in policies.items()}

# %%
fig, ax = figure(
    "RL raises pass@1 towards what pass@8 promised",
    "RL steps",
    "held-out sums solved (share)",
    alt="pass@1 and pass@8 over RL steps with intervals, and the control",
)
for number, (name, low, high) in enumerate(
    [("pass_at_1", "low", "high"), ("pass_at_k", "low_k", "high_k")]
):
    steps = [step for step, _ in curve]
    middle = [result[name] for _, result in curve]
    bars = [[abs(result[end] - result[name]) for _, result in curve] for end in (low, high)]
    label = ("pass@1", "pass@8")[number]
    ax.errorbar(steps, middle, yerr=bars, marker="o", capsize=3, color=COLORS[number], label=label)
tossed = [solved["SFT"].mean(), solved["coin toss"].mean()]
ax.plot([0, rl_steps // 3], tossed, "--", color="grey", label="pass@1, coin toss")
ax.plot(rl_steps, solved["RL, GRPO"].mean(), "s", color=COLORS[2], label="pass@1, GRPO")
ax.set_ylim(0, 1)
ax.legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
r"""
Is that more than luck? Two models that meet the same questions are best compared question by
question: what an easy or a hard question adds to both drops out of the difference. So beside each
pass@1 stands its **gain** over SFT on the same questions, with the interval of the gain.
"""

# %%
for name, share in solved.items():
    low, high = bootstrap_interval(share)
    line = f"{name:10s} pass@1 {share.mean():.0%} ({low:.0%} to {high:.0%})"
    line += f"   pass@8 {(share > 0).mean():.0%}"
    if name != "SFT":
        gain = share - solved["SFT"]
        low, high = bootstrap_interval(gain)
        line += f"   gain {gain.mean():+.0%} ({low:+.0%} to {high:+.0%})"
    print(line)

# %% [markdown]
r"""
pass@1 gains some ten to fifteen points, and the interval of the gain keeps clear of 0, although
those of the two scores overlap. The two variants end alike: which of them is better cannot be told
from one run on 60 questions. And pass@8 stays about where it was, within the width of its interval,
some ten points to each side. We see no sign that RL taught the model sums that it could never do;
it has made it do *reliably* what it could do *sometimes*. That is why pass@k before training is a
good forecast of what RL with a verifiable reward can give.

The control says that the reward did it, and not the exercise: pushed about by a coin, the model
gains nothing; if anything, it loses a little. The gauges show the price. They go up and down from
step to step, but the policy ends away from where it started, and on the whole its replies vary less
than they did there.
"""

# %%
gauges = {
    "reward": ("The reward rises", "reward (0 to 1)"),
    "kl": ("The policy moves away", "KL (nats per token)"),
    "entropy": ("It varies its replies less", "entropy (nats per token)"),
}
fig, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
for ax, (name, (title, unit)) in zip(axes, gauges.items()):
    points = [(h["step"], h[name]) for h in history if name in h]
    ax.plot(*zip(*points), color=COLORS[0], marker="." if name != "reward" else None)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set(xlabel="RL step", ylabel=unit)
fig.set_label("Reward, KL from the start and entropy over the steps of RL")
plt.show()

# %% [markdown]
r"""
## Paying for the wrong thing

Suppose the answers were hard to check, and somebody said: *pay for the form; whoever writes the
marks properly will get the content right as well.* We do that, from the same SFT model, with the
same settings. The reward is now 1 for a reply with some number after `####`, and a little more the
shorter it is.
"""

# %%
cheap = combine_rewards((format_reward, 1.0), (length_reward, 1.0))
hacker, hacked, _ = run_rl(cheap)
for name in ("reward", "correct", "length"):
    first, last = ([h[name] for h in part] for part in (hacked[:4], hacked[-4:]))
    print(f"{name:8s} {np.mean(first):6.2f} -> {np.mean(last):6.2f}")
for rollout in sample_rollouts(Engine(hacker, tokenizer), test_problems[:3], 1, 40, seed=seed):
    print([part["text"] for part in rollout.parts])

# %% [markdown]
r"""
The reward went up, so by its own account the run was a success. Look at *correct*, which this
reward never saw, and at the replies: less and less of the sum is left in them. The model found the
cheapest text that is paid. This is **reward hacking**: not malice, only optimisation of what we
wrote instead of what we meant.

The cure is to pay for what we mean: the answer. That is the run of the section before, from the
same start. Form needs no pay of its own, because no answer is found without it. Starting from the
*hacked* model would be hard: it rarely earns the right reward any more, so it gets no signal.

> **Exercise 10.2.** Pay 1 for the right answer and a tenth of `length_reward`. Does the model still
> learn its sums, and do its replies get shorter? At which weight does it begin to cheat?
"""

# %%
paid = {"nothing yet": solved["SFT"], "form": share_right(hacker), "the answer": solved["RL"]}
for name, share in paid.items():
    low, high = bootstrap_interval(share)
    print(f"paid for {name:12s} pass@1 {share.mean():.0%} ({low:.0%} to {high:.0%})")

# %% [markdown]
r"""
## Recap

`nanochat.rl` can now

* pay: `answer_reward`, `format_reward`, `length_reward`, `combine_rewards`;
* sample and compare: `task_problems`, `sample_rollouts`, `set_advantages`;
* learn: `policy_loss`, `rl_step`, `train_rl`, watched by `drift`;
* report: `pass_at_k`, `count_right`, `evaluate_pass`, `evaluate_samples`.

## Pitfalls

* **Training on forced tokens.** Tool output was not sampled by the policy. With it in the loss, the
  model learns to make up results. The mask comes from the engine; a test compares the gradient with
  an explicit one.
* **A reward that looks away.** Our own reward once took `#####` for the mark `####`, since it found
  four signs in the five. More signs earned nothing more, but they cost nothing either, and after RL
  a model on real text wrote up to sixteen before its answer. Now four are a mark, and five are not.
* **Test sums in training.** Splits that follow from seeds went wrong in nanochat (chapter 9). Ours
  go by the hash of the sum.
* **A rate below zero.** A schedule that counts past its end turns descent into ascent (chapter 9).
  Ours is clamped.
* **One seed, one number.** With 60 questions the interval of pass@1 is 10 to 20 points wide. A gain
  of five points between two such numbers is a rumour; compare question by question, and repeat with
  other seeds.
* **No signal.** Groups that are all right or all wrong have no gradient. Log the share of useful
  rollouts (`useful`).

## Readings

* Williams 1992, *Simple statistical gradient-following algorithms for connectionist reinforcement
  learning*: REINFORCE.
* Shao et al. 2024, *DeepSeekMath*: GRPO, the group as baseline.
* Liu et al. 2025, *Understanding R1-Zero-like training*: what dividing by length and deviation
  does.
* Chen et al. 2021, *Evaluating large language models trained on code*: pass@k.
* Schulman 2020, *Approximating KL divergence*: the estimator that we use.
* Amodei et al. 2016, *Concrete problems in AI safety*: reward hacking.
"""
