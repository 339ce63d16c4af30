"""Reinforcement learning on verifiable answers: rewards, advantages and pass@k.

Exported from chapters/10_reinforcement.py (chapter 10, Reinforcement learning); edit there, not
here.
"""

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

__all__ = [
    "Rollout",
    "answer_reward",
    "check_rl",
    "combine_rewards",
    "count_right",
    "drift",
    "evaluate_pass",
    "evaluate_samples",
    "format_reward",
    "kl_and_entropy",
    "length_reward",
    "pad_rollouts",
    "pass_at_k",
    "policy_gradient",
    "policy_loss",
    "problem_prompt",
    "question_indices",
    "rl_step",
    "rollout_metrics",
    "sample_rollouts",
    "set_advantages",
    "task_problems",
    "token_logprobs",
    "train_rl",
    "update_policy",
]


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


def check_rl(problems: Sequence[dict], n_questions: int, samples: int, world_size: int) -> None:
    """Raise UserError unless a step of RL can be made of these numbers."""
    if n_questions % world_size:
        raise UserError(
            f"{n_questions} questions a step do not divide among {world_size} processes; "
            "choose a multiple."
        )
    if not len(problems) or samples < 2:
        raise UserError("RL needs at least one problem and 2 samples of each, to compare them.")


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


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, of which c are right, hold at least one right one.

    Unbiased for the chance with k fresh samples: 1 - C(n-c, k) / C(n, k). Chen et al. 2021.
    Raises UserError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


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
