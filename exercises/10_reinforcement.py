# %% [markdown]
r"""
# Exercises for chapter 10: reinforcement learning

Here you write the parts of a run that learns from a score: the gradient, the advantage, the loss,
the gauges, the reward and the report. Nothing below needs a trained model. `check` says which
properties your answer has, `hint` helps three times, `progress()` shows your points.
"""

# %%
#| given
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.tasks import final_answer


# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. REINFORCE by hand

A bandit has $K$ arms. The policy is a softmax over $K$ logits $\theta$. You see $N$ pulls: which
arm each took and how many coins it gave. The estimate of the gradient of the mean pay is

$$g = \frac{1}{N} \sum_{i=1}^{N} (r_i - b)\, \nabla_\theta \log \pi_\theta(a_i).$$

Work out $\nabla_\theta \log \pi_\theta(a)$ for a softmax on paper first; it is short. Then return
$g$ without calling autograd. The same slope, one token after another, is all that moves a language
model in this chapter. It points uphill: a step of `+ lr * g` earns more.
"""


# %%
#| exercise id=10-reinforce points=2 minutes=15 level=2 answer=reinforce_gradient
def reinforce_gradient(
    logits: Tensor, arms: Tensor, coins: Tensor, baseline: float = 0.0
) -> Tensor:
    """Estimate the gradient of the mean pay from pulls.

    Args:
        logits: (K,) float32, the policy is their softmax.
        arms: (N,) int64, the arm of each pull.
        coins: (N,) float32, what each pull paid.
        baseline: subtracted from every pull's coins.
    Returns:
        (K,) float32.
    """
    # BEGIN SOLUTION
    slopes = F.one_hot(arms, len(logits)) - logits.softmax(-1)  # (N, K)
    return ((coins - baseline)[:, None] * slopes).mean(0)
    # END SOLUTION


# %%
check("10-reinforce", reinforce_gradient)

# %%
#| checks 10-reinforce
LOGITS = torch.tensor([0.5, -1.0, 0.0, 2.0])


def by_autograd(arms, coins, baseline):
    theta = LOGITS.clone().requires_grad_()
    with torch.enable_grad():
        gain = ((coins - baseline) * theta.log_softmax(-1)[arms]).mean()
        return torch.autograd.grad(gain, theta)[0]


def same(answer, arms, coins, baseline):
    arms, coins = torch.tensor(arms), torch.tensor(coins)
    return close(answer(LOGITS, arms, coins, baseline), by_autograd(arms, coins, baseline))


@says(
    "one pull pushes all arms",
    "The arm pulled goes up, the others go down: the slope is 1 at that arm, minus p everywhere.",
)
def _(reinforce_gradient):
    for arm in range(4):
        assert same(reinforce_gradient, [arm], [3.0], 0.0)
        without = reinforce_gradient(LOGITS, torch.tensor([arm]), torch.tensor([3.0]))
        assert close(
            without, reinforce_gradient(LOGITS, torch.tensor([arm]), torch.tensor([3.0]), 0)
        )


@says(
    "many pulls are averaged",
    "The estimate is a mean over pulls: ten times the pulls must not give ten times the step.",
)
def _(reinforce_gradient):
    assert same(reinforce_gradient, [0, 3, 3, 1, 2, 3], [1.0, 0.0, 2.0, 5.0, 1.0, 1.0], 0.0)


@says(
    "the baseline is taken off the coins",
    "A pull that pays less than the baseline must push its own arm down.",
)
def _(reinforce_gradient):
    assert same(reinforce_gradient, [2], [1.0], 4.0)
    assert same(reinforce_gradient, [1], [1.0], 1.0)


# %%
#| hints 10-reinforce
hints = [
    "log pi(a) is the logit of a minus a log-sum-exp. What is the derivative of each by theta_j?",
    "The log-sum-exp has the softmax as its gradient, so the slope is `one_hot(a) - softmax`.",
    "Weigh the (N, K) table of slopes by `(coins - baseline)[:, None]`, then `.mean(0)`.",
]


# %%
#| wrong 10-reinforce: many pulls are averaged
def reinforce_gradient(logits, arms, coins, baseline=0.0):
    slopes = F.one_hot(arms, len(logits)) - logits.softmax(-1)
    return ((coins - baseline)[:, None] * slopes).sum(0)


# %%
#| wrong 10-reinforce: the baseline is taken off the coins
def reinforce_gradient(logits, arms, coins, baseline=0.0):
    slopes = F.one_hot(arms, len(logits)) - logits.softmax(-1)
    return (coins[:, None] * slopes).mean(0) - baseline


# %%
#| right 10-reinforce
def reinforce_gradient(logits, arms, coins, baseline=0.0):
    p, g = torch.exp(logits - torch.logsumexp(logits, 0)), torch.zeros(len(logits))
    for arm, coin in zip(arms.tolist(), coins.tolist()):
        for j in range(len(logits)):
            g[j] += (coin - baseline) * ((1.0 if j == arm else 0.0) - p[j])
    return g / len(arms)


# %% [markdown]
r"""
## 2. The group is the baseline

A model answers each question `S` times. A reply's advantage is its reward minus the mean reward of
its own group. With `variant="grpo"` it is then divided by the group's standard deviation (that of
the `S` numbers themselves, divided by `S` and not by `S - 1`) plus `1e-6`.

A group that is all right, or all wrong, has nothing to compare. Its advantages are 0, and never
NaN: one NaN in a batch of a thousand replies destroys the model in one step.
"""


# %%
#| exercise id=10-advantages points=2 minutes=10 level=1 answer=group_advantages
def group_advantages(rewards: Tensor, variant: str = "reinforce") -> Tensor:
    """Compare each reply with its group.

    Args:
        rewards: (G, S) float32, S replies to each of G questions.
        variant: "reinforce" (minus the mean) or "grpo" (divided by the deviation as well).
    Returns:
        (G, S) float32.
    """
    # BEGIN SOLUTION
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if variant == "grpo":
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-6)
    return advantages
    # END SOLUTION


# %%
check("10-advantages", group_advantages)

# %%
#| checks 10-advantages
import statistics


@says(
    "each group has its own mean",
    "Easy and hard questions have different means; compare a reply with its own group only.",
)
def _(group_advantages):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.3, 0.1, 0.2, 0.6]])
    expected = [[r - statistics.fmean(row) for r in row] for row in rewards.tolist()]
    assert close(group_advantages(rewards, "reinforce"), torch.tensor(expected))


@says(
    "grpo divides by the group's deviation",
    "The root of the mean squared distance from the mean; torch's `std` divides by S - 1.",
)
def _(group_advantages):
    rows = [[3.0, 1.0, 0.0, 0.0, 2.0], [6.0, 0.0, 0.0, 0.0, 0.0]]
    expected = [[(r - statistics.fmean(row)) / statistics.pstdev(row) for r in row] for row in rows]
    assert close(group_advantages(torch.tensor(rows), "grpo"), torch.tensor(expected), 1e-4)


@says(
    "equal rewards teach nothing",
    "With equal rewards the deviation is 0 or a rounding error; dividing by it gives NaN or noise.",
)
def _(group_advantages):
    for reward in (0.0, 1.0, -0.37, 0.7):
        for variant in ("reinforce", "grpo"):
            found = group_advantages(torch.full((1, 7), reward), variant)
            assert bool((found.abs() < 0.2).all()), f"{variant}, all {reward}: {found.tolist()}"


# %%
#| hints 10-advantages
hints = [
    "Which dimension of (G, S) runs over the replies to one question?",
    "`keepdim=True` keeps a mean of shape (G, 1), which broadcasts against (G, S).",
    "`(r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, unbiased=False) + 1e-6)`.",
]


# %%
#| wrong 10-advantages: each group has its own mean
def group_advantages(rewards, variant="reinforce"):
    advantages = rewards - rewards.mean()
    if variant == "grpo":
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=False) + 1e-6)
    return advantages


# %%
#| wrong 10-advantages: grpo divides by the group's deviation
def group_advantages(rewards, variant="reinforce"):
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if variant == "grpo":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return advantages


# %%
#| wrong 10-advantages: equal rewards teach nothing
def group_advantages(rewards, variant="reinforce"):
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if variant == "grpo":
        advantages = advantages / rewards.std(dim=1, keepdim=True, unbiased=False)
    return advantages


# %%
#| right 10-advantages
def group_advantages(rewards, variant="reinforce"):
    rows = []
    for row in rewards.double():
        away = row - row.sum() / len(row)
        deviation = float(away.square().mean() ** 0.5)
        rows.append(away / (deviation + 1e-6) if variant == "grpo" else away)
    return torch.stack(rows).float()


# %% [markdown]
r"""
## 3. Every token, or every reply?

The loss of a batch of replies is minus a weighted sum of log-probabilities,

$$L = -\sum_i A_i \sum_{t \text{ sampled}} w_i \log p_{i,t}.$$

With `normalize="tokens"` every $w_i$ is 1: a token weighs the same in whatever reply it stands
(DAPO, and nanochat). With `"sequences"` $w_i$ is one over the number of sampled tokens of reply
$i$: every reply weighs the same, so the tokens of a long wrong reply are punished less, and models
learn to ramble. The caller divides by the number of tokens or of replies later; you do not.

A target of -1 marks what was not sampled: the prompt, tool output, padding. It has no part in
the sum and none in the length. The loss is differentiated with respect to `logprobs`, so use
tensor operations only. This is the book's `policy_loss`: once it passes, it can train the capstone.
"""


# %%
#| exercise id=10-policy-loss points=2 minutes=15 level=2 answer=policy_loss replaces=rl.policy_loss
def policy_loss(
    logprobs: Tensor, targets: Tensor, advantages: Tensor, normalize: str = "tokens"
) -> Tensor:
    """Return minus the weighted sum of log p * advantage over sampled tokens.

    Args:
        logprobs: (B, T) float32, log p of each target.
        targets: (B, T) int64, -1 where nothing was sampled.
        advantages: (B,) float32.
        normalize: "tokens" or "sequences".
    Returns:
        a scalar tensor, float32.
    """
    # BEGIN SOLUTION
    sampled = (targets >= 0).float()
    weights = sampled * advantages[:, None]
    if normalize == "sequences":
        weights = weights / sampled.sum(dim=1, keepdim=True).clamp(min=1)
    return -(logprobs * weights).sum()
    # END SOLUTION


# %%
check("10-policy-loss", policy_loss)

# %%
#| checks 10-policy-loss
ADVANTAGES = torch.tensor([0.75, -0.25, -0.5])


def negative(*shape):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 4


def by_hand(logprobs, lengths, normalize):
    total = 0.0
    for row, length, advantage in zip(logprobs.tolist(), lengths, ADVANTAGES.tolist()):
        total -= advantage * sum(row[:length]) / (length if normalize == "sequences" else 1)
    return torch.tensor(total)


@says(
    "tokens: every token weighs the same",
    "A plain sum of log p times the reply's advantage, with a minus before it and no mean.",
)
def _(policy_loss):
    logprobs, targets = negative(3, 5), torch.full((3, 5), 7)
    assert close(policy_loss(logprobs, targets, ADVANTAGES), by_hand(logprobs, (5, 5, 5), "tokens"))


@says(
    "sequences: every reply weighs the same",
    "Divide by the number of tokens that this reply sampled, not by the width of the batch.",
)
def _(policy_loss):
    lengths, logprobs, targets = (5, 2, 1), negative(3, 5), torch.full((3, 5), 7)
    for row, length in enumerate(lengths):
        logprobs[row, length:], targets[row, length:] = 0.0, -1
    expected = by_hand(logprobs, lengths, "sequences")
    assert close(policy_loss(logprobs, targets, ADVANTAGES, "sequences"), expected)


@says(
    "what was not sampled does not count",
    "Positions with target -1 still carry a log-probability; it must not reach the sum.",
)
def _(policy_loss):
    logprobs, targets = negative(3, 5), torch.full((3, 5), 7)
    targets[:, 3:] = -1
    assert close(policy_loss(logprobs, targets, ADVANTAGES), by_hand(logprobs, (3, 3, 3), "tokens"))
    for normalize in ("tokens", "sequences"):
        clean = torch.where(targets < 0, 0.0, logprobs)
        found, expected = (
            policy_loss(x, targets, ADVANTAGES, normalize) for x in (logprobs, clean)
        )
        assert close(found, expected), normalize


@says(
    "token 0 is a token",
    "Only -1 means `not sampled`; the id 0 is an ordinary token of the vocabulary.",
)
def _(policy_loss):
    logprobs, targets = negative(3, 5), torch.zeros(3, 5, dtype=torch.long)
    assert close(policy_loss(logprobs, targets, ADVANTAGES), by_hand(logprobs, (5, 5, 5), "tokens"))


@says(
    "an empty reply adds nothing",
    "A reply of which nothing was sampled has length 0, and 0 / 0 is NaN for the whole batch.",
)
def _(policy_loss):
    found = policy_loss(torch.zeros(3, 5), torch.full((3, 5), -1), ADVANTAGES, "sequences")
    assert close(found, torch.tensor(0.0))


# %%
#| hints 10-policy-loss
hints = [
    "Build a (B, T) table of weights first. Where is it 0, and what is it elsewhere?",
    "`(targets >= 0).float()` is the mask; its sum along dim 1 is the length of each reply.",
    "weights = mask * advantages[:, None], over the length (at least 1) for sequences; then -sum.",
]


# %%
#| wrong 10-policy-loss: sequences: every reply weighs the same
def policy_loss(logprobs, targets, advantages, normalize="tokens"):
    weights = (targets >= 0).float() * advantages[:, None]
    if normalize == "sequences":
        weights = weights / targets.shape[1]
    return -(logprobs * weights).sum()


# %%
#| wrong 10-policy-loss: what was not sampled does not count
def policy_loss(logprobs, targets, advantages, normalize="tokens"):
    weights = advantages[:, None].expand(targets.shape)
    if normalize == "sequences":
        weights = weights / (targets >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return -(logprobs * weights).sum()


# %%
#| wrong 10-policy-loss: token 0 is a token
def policy_loss(logprobs, targets, advantages, normalize="tokens"):
    sampled = (targets > 0).float()
    weights = sampled * advantages[:, None]
    if normalize == "sequences":
        weights = weights / sampled.sum(dim=1, keepdim=True).clamp(min=1)
    return -(logprobs * weights).sum()


# %%
#| wrong 10-policy-loss: an empty reply adds nothing
def policy_loss(logprobs, targets, advantages, normalize="tokens"):
    sampled = (targets >= 0).float()
    weights = sampled * advantages[:, None]
    if normalize == "sequences":
        weights = weights / sampled.sum(dim=1, keepdim=True)
    return -(logprobs * weights).sum()


# %%
#| right 10-policy-loss
def policy_loss(logprobs, targets, advantages, normalize="tokens"):
    kept = torch.where(targets == -1, 0.0, logprobs)
    replies = kept.sum(1)
    if normalize == "sequences":
        replies = replies / (targets != -1).sum(1).clamp(min=1)
    return -(replies @ advantages)


# %% [markdown]
r"""
## 4. Who wrote this token?

A reply with a calculator call holds tokens that the model did not choose: the engine forced the
result in. Trained on, they teach the model to make results up. Here is a `reply_targets` as a first
version of such a program had it:

```python
def reply_targets(prompt, reply, mask):
    row = prompt + reply
    return [-1] * len(prompt) + row[len(prompt) + 1 :]
```

The row without its last token is the input, and the target at position `t` is the token at
`t + 1`, or -1 where there is nothing to learn. Two things are wrong with this version: one
concerns the mask, the other the first token of the reply. Mend it. For the prompt `[1, 2, 3]`, the
reply `[10, 11, 12]` and the mask `[1, 0, 1]` the targets are `[-1, -1, 10, -1, 12]`.
"""


# %%
#| exercise id=10-tool-mask points=2 minutes=15 level=2 answer=reply_targets
def reply_targets(prompt: list, reply: list, mask: list) -> list:
    """Return the target of each input position of the row prompt + reply.

    Args:
        prompt: token ids of the question; at least one.
        reply: token ids of the answer.
        mask: for each reply token 1 if the model sampled it, 0 if the engine forced it.
    Returns:
        len(prompt) + len(reply) - 1 ids, -1 where nothing is learnt.
    """
    # BEGIN SOLUTION
    learnt = [token if sampled else -1 for token, sampled in zip(reply, mask)]
    return [-1] * (len(prompt) - 1) + learnt
    # END SOLUTION


# %%
check("10-tool-mask", reply_targets)

# %%
#| checks 10-tool-mask
PROMPT, REPLY = [1, 2, 3, 4], [10, 11, 12, 13, 14, 15]
NOTHING_FORCED, TOOL = [1] * 6, [1, 1, 0, 0, 1, 1]


@says(
    "one target for each input",
    "The inputs are the row without its last token, so there is one target fewer than tokens.",
)
def _(reply_targets):
    assert len(reply_targets(PROMPT, REPLY, NOTHING_FORCED)) == 9


@says(
    "the first token of the reply is learnt",
    "The last token of the prompt is the input whose target is the first token of the reply.",
)
def _(reply_targets):
    assert reply_targets(PROMPT, REPLY, NOTHING_FORCED)[3] == 10


@says("the prompt is not learnt", "What the user wrote is no choice of the policy.")
def _(reply_targets):
    assert reply_targets(PROMPT, REPLY, NOTHING_FORCED)[:3] == [-1, -1, -1]


@says(
    "forced tokens are not learnt",
    "Where the mask is 0 the target is -1, at the input before the forced token.",
)
def _(reply_targets):
    assert reply_targets(PROMPT, REPLY, TOOL)[5:7] == [-1, -1]


@says(
    "after the tool the model goes on learning",
    "The tokens after the tool's output were sampled again; only the forced ones are left out.",
)
def _(reply_targets):
    assert reply_targets(PROMPT, REPLY, TOOL)[-2:] == [14, 15]


# %%
#| hints 10-tool-mask
hints = [
    "Write the row and the targets below each other on paper, one column a position.",
    "Of the prompt's n tokens only n - 1 are targets of something; all of those are -1.",
    "`[-1] * (len(prompt) - 1)`, then for each reply token the token or -1.",
]


# %%
#| wrong 10-tool-mask: forced tokens are not learnt
def reply_targets(prompt, reply, mask):
    return [-1] * (len(prompt) - 1) + reply


# %%
#| wrong 10-tool-mask: the prompt is not learnt
def reply_targets(prompt, reply, mask):
    return prompt[1:] + [token if sampled else -1 for token, sampled in zip(reply, mask)]


# %%
#| wrong 10-tool-mask: after the tool the model goes on learning
def reply_targets(prompt, reply, mask):
    end = mask.index(0) if 0 in mask else len(reply)
    return [-1] * (len(prompt) - 1) + reply[:end] + [-1] * (len(reply) - end)


# %%
#| wrong 10-tool-mask: the first token of the reply is learnt
def reply_targets(prompt: list, reply: list, mask: list) -> list:
    learnt = [token if sampled else -1 for token, sampled in zip(reply, mask)]
    return [-1] * len(prompt) + learnt[1:]


# %%
#| right 10-tool-mask
def reply_targets(prompt, reply, mask):
    row, flags = prompt + reply, [0] * len(prompt) + mask
    return [row[t + 1] if flags[t + 1] else -1 for t in range(len(row) - 1)]


# %% [markdown]
r"""
## 5. How far has it drifted?

KL(policy || reference) says how far RL has moved the model. We only have samples of the policy, and
for each sampled token its log-probability under both models. With
$d = \log p_\text{ref} - \log p_\text{policy}$, the mean of $-d$ is the KL, but many single
samples of it are negative. The estimate $e^{d} - 1 - d$ has the same mean and is never
negative, so it swings less. (Why the same mean? Because $e^{d}$ has the mean 1 under the policy.)

Return two Python floats, summed over the sampled tokens: this estimate of the KL, and the entropy,
which is the sum of minus the policy's log-probabilities. They go into a JSON log, so tensors will
not do. This is the book's `kl_and_entropy`.
"""


# %%
#| exercise id=10-kl points=2 minutes=12 level=2 answer=kl_and_entropy replaces=rl.kl_and_entropy
def kl_and_entropy(logprobs: Tensor, reference: Tensor, targets: Tensor) -> tuple:
    """Estimate KL(policy || reference) and the policy's entropy from its samples, in nats.

    Args:
        logprobs, reference: (B, T) float32, log p of each target under policy and reference.
        targets: (B, T) int64, -1 where nothing was sampled.
    Returns:
        (kl, entropy), two floats, summed over sampled tokens.
    """
    # BEGIN SOLUTION
    sampled = targets >= 0
    difference = (reference - logprobs)[sampled]
    kl = (difference.exp() - 1 - difference).sum()
    return float(kl), float(-logprobs[sampled].sum())
    # END SOLUTION


# %%
check("10-kl", kl_and_entropy)


# %%
#| checks 10-kl
def two_models(rows, width):
    draw = torch.Generator().manual_seed(2)
    return [-torch.rand(rows, width, generator=draw) * 3 for _ in range(2)]


ALL = torch.full((2, 6), 5)


@says(
    "the KL is the estimate that is never negative",
    "d is the reference's log p minus the policy's; sum exp(d) - 1 - d.",
)
def _(kl_and_entropy):
    policy, reference = two_models(2, 6)
    expected = sum(
        math.exp(r - p) - 1 - (r - p)
        for p, r in zip(policy.flatten().tolist(), reference.flatten().tolist())
    )
    assert close(kl_and_entropy(policy, reference, ALL)[0], expected, 1e-4)


@says(
    "the entropy is that of the policy",
    "Minus the sum of the log-probabilities under the model that sampled; it is positive.",
)
def _(kl_and_entropy):
    policy, reference = two_models(2, 6)
    assert close(kl_and_entropy(policy, reference, ALL)[1], -math.fsum(policy.flatten().tolist()))


@says(
    "only sampled tokens count",
    "Where the target is -1 nothing was sampled: neither sum may see what stands there.",
)
def _(kl_and_entropy):
    policy, reference = two_models(2, 6)
    targets = ALL.clone()
    targets[:, :2], targets[:, 4:] = 0, -1
    found = kl_and_entropy(policy, reference, targets)
    alone = kl_and_entropy(policy[:, :4], reference[:, :4], ALL[:, :4])
    assert all(close(a, float(b)) for a, b in zip(found, alone, strict=True))


@says("two plain floats", "A tensor cannot be written as JSON: convert at the end.")
def _(kl_and_entropy):
    kl, entropy = kl_and_entropy(*two_models(2, 6), ALL)
    assert type(kl) is float and type(entropy) is float


# %%
#| hints 10-kl
hints = [
    "Select the sampled positions first; both sums run over them alone.",
    "`(reference - logprobs)[targets >= 0]` is d for each sampled token.",
    "`(d.exp() - 1 - d).sum()` and `-logprobs[targets >= 0].sum()`, each inside `float(...)`.",
]


# %%
#| wrong 10-kl: the KL is the estimate that is never negative
def kl_and_entropy(logprobs, reference, targets):
    sampled = targets >= 0
    return float((logprobs - reference)[sampled].sum()), float(-logprobs[sampled].sum())


# %%
#| wrong 10-kl: the KL is the estimate that is never negative
def kl_and_entropy(logprobs, reference, targets):
    sampled = targets >= 0
    d = (logprobs - reference)[sampled]
    return float((d.exp() - 1 - d).sum()), float(-logprobs[sampled].sum())


# %%
#| wrong 10-kl: only sampled tokens count
def kl_and_entropy(logprobs, reference, targets):
    d = reference - logprobs
    return float((d.exp() - 1 - d).sum()), float(-logprobs.sum())


# %%
#| wrong 10-kl: two plain floats
def kl_and_entropy(logprobs, reference, targets):
    sampled = targets >= 0
    d = (reference - logprobs)[sampled]
    return (d.exp() - 1 - d).sum(), -logprobs[sampled].sum()


# %%
#| wrong 10-kl: the entropy is that of the policy
def kl_and_entropy(logprobs: Tensor, reference: Tensor, targets: Tensor) -> tuple:
    sampled = targets >= 0
    difference = (reference - logprobs)[sampled]
    kl = (difference.exp() - 1 - difference).sum()
    return float(kl), float(-reference[sampled].sum())


# %%
#| right 10-kl
def kl_and_entropy(logprobs, reference, targets):
    sampled = (targets != -1).double()
    d = reference.double() - logprobs.double()
    kl = ((torch.expm1(d) - d) * sampled).sum()
    return kl.item(), (-logprobs.double() * sampled).sum().item()


# %% [markdown]
r"""
## 6. pass@k without waste

pass@k is the chance that at least one of `k` sampled replies is right. You have `n` replies, `n` at
least `k`, of which `c` are right. Estimating the share of right ones and putting it into
$1 - (1 - c/n)^k$ is biased: it promises too little, most of all for small `n`. The unbiased
estimate asks: of all ways to choose `k` of the `n` replies, what share holds at least one right
one? This is the book's `pass_at_k`; the report card of the capstone uses it.
"""


# %%
#| exercise id=10-pass-at-k points=2 minutes=10 level=1 answer=pass_at_k replaces=rl.pass_at_k
def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, of which c are right, hold at least one right one.

    0 <= c <= n and 1 <= k <= n.
    """
    # BEGIN SOLUTION
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
    # END SOLUTION


# %%
check("10-pass-at-k", pass_at_k)

# %%
#| checks 10-pass-at-k
from itertools import combinations


def by_counting(n, c, k):
    chosen = list(combinations([True] * c + [False] * (n - c), k))
    return sum(any(one) for one in chosen) / len(chosen)


@says("pass@1 is the share of right ones", "With k = 1 the answer is c / n.")
def _(pass_at_k):
    for n, c in ((8, 3), (5, 5), (5, 0)):
        assert close(pass_at_k(n, c, 1), c / n, 1e-9)


@says(
    "counts every choice of k samples",
    "Count the choices that hold no right reply; the samples are not put back between draws.",
)
def _(pass_at_k):
    for n, c, k in ((5, 2, 2), (8, 1, 4), (9, 4, 3), (6, 4, 3), (7, 3, 6)):
        found, expected = pass_at_k(n, c, k), by_counting(n, c, k)
        assert close(found, expected, 1e-9), f"n={n} c={c} k={k}: {found}, counted {expected}"


@says(
    "all right is 1 and none right is 0",
    "With no wrong reply, or no right one, chance has no part in it, whatever k.",
)
def _(pass_at_k):
    for k in (2, 5):
        assert close(pass_at_k(5, 5, k), 1.0, 1e-12) and close(pass_at_k(5, 0, k), 0.0, 1e-12)


@says(
    "works for thousands of samples",
    "Factorials of thousands do not fit into a float; let whole numbers cancel first.",
)
def _(pass_at_k):
    n, c, k = 4000, 10, 400
    wrong = math.prod((n - c - i) / (n - i) for i in range(k))
    assert close(pass_at_k(n, c, k), 1 - wrong, 0.05)


# %%
#| hints 10-pass-at-k
hints = [
    "It is easier to count the choices in which every reply is wrong.",
    "There are `math.comb(n, k)` choices in all. How many of them draw from the wrong ones only?",
    "One minus `comb(n - c, k) / comb(n, k)`; `math.comb` is 0 when there are too few to choose.",
]


# %%
#| wrong 10-pass-at-k: counts every choice of k samples
def pass_at_k(n, c, k):
    return 1 - (1 - c / n) ** k


# %%
#| wrong 10-pass-at-k: works for thousands of samples
def pass_at_k(n, c, k):
    if n - c < k:
        return 1.0
    f = math.factorial
    return 1 - (f(n - c) / f(n - c - k)) / (f(n) / f(n - k))


# %%
#| right 10-pass-at-k
def pass_at_k(n, c, k):
    every_one_wrong = 1.0
    for i in range(k):
        every_one_wrong *= max(n - c - i, 0) / (n - i)
    return 1 - every_one_wrong


# %% [markdown]
r"""
## 7. A reward that cannot be milked

This reward was in use for a day, and the share of "right" replies rose to 97 %:

```python
def paid_for_the_number(parts, problem):
    text = "".join(part["text"] for part in parts)
    return float(problem["answer"] in text)
```

The model had found out that it is paid wherever the digits of the answer stand: in a list of all
numbers to 200, inside a longer number, in what the calculator printed. Write the reward that we
mean: 1.0 if the number after the last `####` in the model's **own text** (its parts joined) is the
answer, else 0.0.

`parts` is a list of `{"type": ..., "text": ...}`. The types are `"text"` (the model's words),
`"python"` (its calls) and `"python_output"` (forced results). From chapter 9 you have
`final_answer(text)`: the number after the last `####` as text without commas, or None. This is
the book's `answer_reward`.
"""


# %%
#| exercise id=10-reward points=2 minutes=10 level=1 answer=answer_reward replaces=rl.answer_reward
def answer_reward(parts: list, problem: dict) -> float:
    """Return 1.0 if the number after #### in the reply's own text is the answer, else 0.0.

    Args:
        parts: the reply, a list of dict(type, text); may be empty.
        problem: dict(question, answer), the answer being text such as "42".
    """
    # BEGIN SOLUTION
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return float(final_answer(text) == problem["answer"])
    # END SOLUTION


# %%
check("10-reward", answer_reward)

# %%
#| checks 10-reward
PROBLEM = {"question": "What is 17 plus 25?", "answer": "42"}


def says_text(*texts):
    return [{"type": "text", "text": text} for text in texts]


@says(
    "a right reply is paid 1.0",
    "The number may carry commas; the text parts are joined as they are.",
)
def _(answer_reward):
    tool = {"type": "python_output", "text": "42"}
    assert close(
        answer_reward([*says_text("17 and 25: "), tool, *says_text("#### 42")], PROBLEM), 1
    )
    assert close(answer_reward(says_text("#### 4", "2"), PROBLEM), 1)
    assert close(answer_reward(says_text("#### 1,042"), {"question": "", "answer": "1042"}), 1)


@says(
    "a number that only contains the answer is not paid",
    "Compare whole numbers: 42 stands inside 142 and 423.",
)
def _(answer_reward):
    for number in ("142", "423", "4"):
        assert close(answer_reward(says_text(f"#### {number}"), PROBLEM), 0)


@says(
    "without the marks there is no pay",
    "Whoever lists numbers without #### has not answered; a last number is not a final answer.",
)
def _(answer_reward):
    for text in ("It is 42", " ".join(map(str, range(43)))):
        assert close(answer_reward(says_text(text), PROBLEM), 0)


@says(
    "tool calls and tool output are not paid",
    "The calculator could print the marks: look at the parts of type text only.",
)
def _(answer_reward):
    for kind in ("python", "python_output"):
        parts = [{"type": kind, "text": "#### 42"}]
        assert close(answer_reward(parts, PROBLEM), 0)


@says("silence earns nothing", "An empty reply has no parts; the reward is 0.0, not an error.")
def _(answer_reward):
    assert close(answer_reward([], PROBLEM), 0) and close(answer_reward(says_text(""), PROBLEM), 0)


# %%
#| hints 10-reward
hints = [
    "Two decisions: which parts count as the model's own text, and what is compared with what.",
    "Join the texts of the parts whose type is `text`; then let `final_answer` find the number.",
    "`float(final_answer(own_text) == problem['answer'])`; None equals no answer.",
]


# %%
#| wrong 10-reward: tool calls and tool output are not paid
def answer_reward(parts, problem):
    return float(final_answer("".join(part["text"] for part in parts)) == problem["answer"])


# %%
#| wrong 10-reward: a number that only contains the answer is not paid
def answer_reward(parts, problem):
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return float(problem["answer"] in (final_answer(text) or ""))


# %%
#| wrong 10-reward: without the marks there is no pay
def answer_reward(parts, problem):
    import re

    text = "".join(part["text"] for part in parts if part["type"] == "text").replace(",", "")
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and numbers[-1] == problem["answer"])


# %%
#| wrong 10-reward: a right reply is paid 1.0
def answer_reward(parts: list, problem: dict) -> float:
    text = " ".join(part["text"] for part in parts if part["type"] == "text")
    return float(final_answer(text) == problem["answer"])


# %%
#| right 10-reward
def answer_reward(parts, problem):
    own = [part["text"] for part in parts if part["type"] not in ("python", "python_output")]
    number = final_answer("".join(own))
    return 1.0 if number is not None and number == problem["answer"] else 0.0


# %% [markdown]
r"""
## 8. Read the gauges

A run with an unknown reward logged these means (first four steps, last four steps). The reward is 1
at most. `correct` is the share of replies with the right number; the reward never saw it.

| gauge | first | last |
| --- | ---: | ---: |
| reward | 0.41 | 0.96 |
| correct | 0.38 | 0.04 |
| length (tokens) | 31 | 5 |
| entropy (nats per token) | 0.62 | 0.02 |
| useful (share with an advantage) | 0.81 | 0.06 |

**happened.** What happened?

- (a) The model learnt to add; `correct` is measured wrongly.
- (b) The model found a short text that is paid, and it is rarely right.
- (c) The learning rate was too high and the model now writes noise.

**next.** What would another 500 steps of the same run do?

- (a) Almost nothing: replies of a group earn the same, so advantages are 0.
- (b) Bring `correct` back, since the reward has room for 0.04 more.
- (c) Lengthen the replies, since short ones carry less gradient.

**remedy.** What do you do?

- (a) Add a KL penalty to the hacked model and go on from there.
- (b) Sample at a higher temperature until `useful` rises, and go on.
- (c) Start again from the SFT model and pay for the right answer.

Put a letter for each into the dict.
"""

# %%
#| exercise id=10-gauges points=1 minutes=6 level=1 answer=gauges
# A dict: {"happened": letter, "next": letter, "remedy": letter}
# BEGIN SOLUTION
gauges = {"happened": "b", "next": "a", "remedy": "c"}
# END SOLUTION

# %%
check("10-gauges", gauges)


# %%
#| checks 10-gauges
@says(
    "what happened",
    "Noise has a high entropy and no pay. Which text is short, sure of itself and paid?",
)
def _(gauges):
    assert gauges["happened"].strip().lower() == "b"


@says(
    "what comes next",
    "Look at `useful`: where all replies of a group earn the same, what is the gradient?",
)
def _(gauges):
    assert gauges["next"].strip().lower() == "a"


@says(
    "the remedy",
    "A policy that is never right earns no reward for it; one with no entropy tries nothing new.",
)
def _(gauges):
    assert gauges["remedy"].strip().lower() == "c"


# %%
#| hints 10-gauges
hints = [
    "Read the rows together: sure of itself (entropy), short (length), paid (reward), not right.",
    "The gradient is a sum over replies of advantage times slope. 6 % of the replies have one.",
    "The chapter calls it reward hacking; its last section says where to start from and why.",
]

# %%
#| wrong 10-gauges: what happened
gauges = {"happened": "c", "next": "a", "remedy": "c"}

# %%
#| wrong 10-gauges: what comes next
gauges = {"happened": "b", "next": "b", "remedy": "c"}

# %%
#| wrong 10-gauges: the remedy
gauges = {"happened": "b", "next": "a", "remedy": "a"}

# %%
#| right 10-gauges
gauges = dict(zip(("happened", "next", "remedy"), "bac"))

# %% [markdown]
r"""
## Open question

Take a task of your own that has no number at its end: a summary, a polite reply, a poem in a given
metre. Write down a reward that a program can compute. Then be the model: what is the cheapest text
that earns it? Mend the reward, and be the model again. After how many rounds do you stop, and would
a second model as the judge end the game or only move it? (No marks.)
"""

# %%
progress()
