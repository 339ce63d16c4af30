"""nanochat.rl: pass@k, advantages, the policy gradient, and a policy that learns."""

import itertools
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import rl
from nanochat.chat import render
from nanochat.common import UserError
from nanochat.engine import Completion, Engine
from nanochat.model import GPT, GPTConfig, init_weights
from nanochat.optim import build_optimizer
from nanochat.tasks import GSM8K, HumanEval
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["0 1 2 3 4 5 6 7 8 9 #### what is the number?"], vocab_size=270)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_against_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            right = [1] * c + [0] * (n - c)
            subsets = list(itertools.combinations(right, k))
            assert rl.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)]:
        with pytest.raises(UserError):
            rl.pass_at_k(*bad)


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 8, 3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * rl.pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def text(value):
    return [{"type": "text", "text": value}]


def test_rewards_read_the_models_own_text_only():
    problem = {"question": "1+1", "answer": "2"}
    assert rl.answer_reward(text("it is\n#### 2"), problem) == 1
    assert rl.answer_reward(text("#### 3"), problem) == 0
    forced = [{"type": "python_output", "text": "#### 2"}, *text("so it is 2")]
    assert rl.answer_reward(forced, problem) == 0 and rl.format_reward(forced, problem) == 0
    assert rl.format_reward(text("#### 3"), problem) == 1
    both = rl.combine_rewards((rl.answer_reward, 1.0), (rl.format_reward, 0.5))
    assert both(text("#### 2"), problem) == 1.5 and both(text("#### 9"), problem) == 0.5
    assert rl.length_reward(text("x" * 50), problem) == -0.5


def test_problems_are_the_conversations_with_an_answer(tmp_path):
    answers = ["so\n#### 5", "no mark here"]
    pq.write_table(pa.table({"question": ["a", "b"], "answer": answers}), tmp_path / "test.parquet")
    task = GSM8K(tmp_path, "test")
    assert rl.task_problems(task) == [{"question": "a", "answer": "5"}]
    plain = task.conversation
    task.conversation = lambda index: {"answer": None, **plain(index)}  # a task of one's own
    assert rl.task_problems(task) == [{"question": "a", "answer": "5"}]
    with pytest.raises(UserError, match="'gsm8k' has no answers"):
        rl.task_problems(task, start=1)


def rollout(reward, ids=(3, 4), mask=(1, 1), prompt=(0, 1)):
    return rl.Rollout(0, list(prompt), list(ids), list(mask), [], reward)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8))
def test_advantages_have_mean_zero_in_each_group(rewards):
    for variant in ("reinforce", "grpo"):
        rollouts = [rollout(r) for r in rewards]
        rl.set_advantages(rollouts, 4, variant)
        for start in (0, 4):
            group = [r.advantage for r in rollouts[start : start + 4]]
            assert sum(group) == pytest.approx(0, abs=1e-4)
            if len(set(rewards[start : start + 4])) == 1:
                assert group == [0.0] * 4
    with pytest.raises(UserError, match="ppo"):
        rl.set_advantages(rollouts, 4, "ppo")


@pytest.mark.parametrize("variant", ["reinforce", "grpo"])
def test_equal_rewards_teach_nothing_however_their_mean_is_rounded(variant):
    for samples in range(2, 17):
        for reward in (0.1, -12.3, 12.3, 15.7, 100.1, 1e7 + 0.1):
            group = [rollout(reward) for _ in range(samples)]
            rl.set_advantages(group, samples, variant)
            assert [r.advantage for r in group] == [0.0] * samples


def test_a_group_next_to_one_of_equal_rewards_keeps_its_advantages():
    group = [rollout(r) for r in (12.3, 12.3, 12.3, 12.3, 12.3, 13.3)]
    rl.set_advantages(group, 3, "grpo")
    values = [r.advantage for r in group]
    assert values[:3] == [0.0] * 3
    assert values[3:] == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5], rel=1e-4)


def test_grpo_gives_every_mixed_group_the_same_size():
    rollouts = [rollout(r) for r in (1, 0, 0, 0, 10, 0, 0, 0)]
    rl.set_advantages(rollouts, 4, "grpo")
    values = [r.advantage for r in rollouts]
    assert values[:4] == pytest.approx(values[4:], rel=1e-4)


def test_only_sampled_tokens_are_targets():
    rollouts = [rollout(1, ids=(5, 6, 7, 8), mask=(1, 0, 0, 1)), rollout(0, prompt=(0, 1, 2))]
    rollouts[0].advantage = 2.0
    inputs, targets, advantages = rl.pad_rollouts(rollouts, 9, "cpu")
    assert inputs.tolist() == [[0, 1, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert targets.tolist() == [[-1, 5, -1, -1, 8], [-1, -1, 3, 4, -1]]
    assert advantages.tolist() == [2.0, 0.0]


def tiny_model(seed=0, seq_len=16):
    model = GPT(GPTConfig(TOKENIZER.vocab_size, seq_len, 1, 1, 1, 16))
    init_weights(model, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_gradient_is_the_gradient_of_the_expected_reward(temperature):
    """Weighted by its probability, the sum over ALL one-token replies is the exact gradient."""
    model, prompt = tiny_model(), [0, 1, 2]
    vocab = TOKENIZER.vocab_size
    rewards = torch.tensor([float(token % 7 == 0) for token in range(vocab)])
    logits = model(torch.tensor([prompt]))[0, -1] / temperature
    probabilities = logits.softmax(-1)
    (-(probabilities * rewards).sum()).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    baseline = float((probabilities.detach() * rewards).sum())  # changes nothing in the mean
    rollouts = [rollout(0, (token,), (1,), prompt) for token in range(vocab)]
    for r, p, reward in zip(rollouts, probabilities.tolist(), rewards.tolist()):
        r.advantage = p * (reward - baseline)
    rl.policy_gradient(model, rollouts, 0, 1.0, temperature, micro_batch=50)
    for p, gradient in zip(model.parameters(), exact):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_forced_tokens_padding_and_micro_batches_do_not_change_the_gradient():
    model = tiny_model()
    rollouts = [rollout(0, (5, 6, 7), (1, 0, 1)), rollout(0, (8,), (1,), (0, 1, 2, 3, 4))]
    rollouts[0].advantage, rollouts[1].advantage = 1.0, -0.5
    grads = []
    for micro_batch in (1, 8):
        model.zero_grad()
        rl.policy_gradient(model, rollouts, 0, 1.0, micro_batch=micro_batch)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    model.zero_grad()
    logp = model(torch.tensor([[0, 1, 5, 6]])).log_softmax(-1)[0]
    other = model(torch.tensor([[0, 1, 2, 3, 4]])).log_softmax(-1)[0]
    (-(logp[1, 5] + logp[3, 7]) + 0.5 * other[4, 8]).backward()
    explicit = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grads[0], explicit, rtol=1e-3, atol=1e-6)


def test_normalisation_by_sequences_weighs_replies_alike():
    logprobs = torch.full((2, 4), -1.0)
    targets = torch.tensor([[1, 1, 1, 1], [1, -1, -1, -1]])
    advantages = torch.ones(2)
    assert rl.policy_loss(logprobs, targets, advantages, "tokens") == 5
    assert rl.policy_loss(logprobs, targets, advantages, "sequences") == 2


def test_kl_and_entropy_estimates_have_the_right_mean():
    torch.manual_seed(0)
    p, q = torch.randn(2, 12).log_softmax(-1)
    exact_kl = float((p.exp() * (p - q)).sum())
    exact_entropy = float(-(p.exp() * p).sum())
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True)[None]
    kl, entropy = rl.kl_and_entropy(p[drawn], q[drawn], drawn)
    assert kl / 200_000 == pytest.approx(exact_kl, rel=0.02)
    assert entropy / 200_000 == pytest.approx(exact_entropy, rel=0.02)
    same, _ = rl.kl_and_entropy(p[drawn], p[drawn], drawn)
    assert same == 0


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 9))
def test_every_question_once_in_an_epoch(n_problems, n_questions):
    steps = n_problems  # n_problems * n_questions draws are whole epochs
    drawn = [i for s in range(steps) for i in rl.question_indices(s, n_problems, n_questions, 4)]
    for start in range(0, len(drawn), n_problems):
        assert sorted(drawn[start : start + n_problems]) == list(range(n_problems))


class Copier:
    """An engine for the toy: one sampled token, always of the model as it is now."""

    def __init__(self, model):
        self.model, self.tokenizer = model, TOKENIZER

    def refresh(self):
        """The model itself is used: nothing to copy."""

    def generate_batch(self, prompts, max_tokens, temperature, top_k, seed):
        done = []
        for prompt, number in zip(prompts, seed):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt]))[0, -1] / temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            logprob = float(logits.log_softmax(-1)[token])
            done.append(Completion([token], [1], TOKENIZER.decode([token]), [logprob]))
        return done


def digit_reward(parts, problem):
    return float(bool(parts) and parts[0]["text"].strip()[:1].isdigit())


def run(model, n_steps, start_step=0, optimizer=None, **options):
    optimizer = optimizer or build_optimizer(model)
    problems = [{"question": str(i), "answer": "1"} for i in range(3)]
    settings = dict(questions_per_step=2, samples=8, lr=0.3, reward=digit_reward, seed=5)
    return rl.train_rl(
        model, optimizer, Copier(model), problems,
        n_steps=n_steps, start_step=start_step, **{**settings, **options},
    )  # fmt: skip


@pytest.mark.parametrize("variant", ["reinforce", "grpo"])
def test_reward_rises_on_a_policy_that_can_learn(variant):
    model = tiny_model(seq_len=32)
    history = run(model, 40, variant=variant, lr=1.0)
    first = sum(h["reward"] for h in history[:5]) / 5
    last = sum(h["reward"] for h in history[-5:]) / 5
    assert first < 0.3 and last > 0.9
    assert history[0]["kl"] == 0 and history[-5]["kl"] > 0.1
    assert history[-5]["entropy"] < history[0]["entropy"]
    assert all(h["lr"] > 0 for h in history)


def test_resume_in_the_middle_is_exact():
    straight = tiny_model(seq_len=32)
    history = run(straight, 6)
    broken = tiny_model(seq_len=32)
    start = tiny_model(seq_len=32)
    saved = {}
    optimizer = build_optimizer(broken)

    def save(step):
        saved.update(step=step, optimizer=__import__("copy").deepcopy(optimizer.state_dict()))
        saved["model"] = {k: v.clone() for k, v in broken.state_dict().items()}

    run(broken, 6, optimizer=optimizer, save=save, save_every=4)
    resumed = tiny_model(seed=9, seq_len=32)
    resumed.load_state_dict(saved["model"])
    optimizer = build_optimizer(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    tail = run(resumed, 6, start_step=saved["step"], optimizer=optimizer, reference=start)
    assert tail == history[saved["step"] :]
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("variant", "reward", "samples"), [("reinforce", 1.0, 8), ("grpo", -12.3, 6)]
)
def test_no_signal_no_update(variant, reward, samples):
    model = tiny_model(seq_len=32)
    before = [p.clone() for p in model.parameters()]
    pays = dict(reward=lambda parts, problem: reward, samples=samples, variant=variant)
    history = run(model, 2, **pays)
    assert all(h["useful"] == 0 and h["reward"] == pytest.approx(reward) for h in history)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_two_processes_ask_different_questions_and_share_the_loss():
    class Half:
        world_size, is_main, device = 2, False, torch.device("cpu")

        def __init__(self, rank):
            self.rank = rank

        def average_gradients(self, model):
            assert all(p.grad is not None for p in model.parameters())

        def sum(self, value):
            return value * 2

    for rank in (0, 1):
        assert len(run(tiny_model(seq_len=32), 2, world=Half(rank))) == 2
    with pytest.raises(UserError, match="divide"):
        run(tiny_model(), 1, questions_per_step=3, world=Half(0))
    with pytest.raises(UserError, match="at least one problem"):
        run(tiny_model(), 1, samples=1)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_the_update_has_the_same_gradient_for_every_number_of_processes(normalize):
    """Each rank scales by the tokens (or replies) of all, also with nothing useful of its own."""

    class Rank:
        def __init__(self, world_size):
            self.world_size, self.grads = world_size, None

        def average_gradients(self, model):
            self.grads = [p.grad / self.world_size for p in model.parameters()]

    rollouts = [
        rollout(0, tuple(range(3, 4 + i)), (1,) * (1 + i), tuple(range(1 + i % 3)))
        for i in range(8)
    ]
    for number, one in enumerate(rollouts):
        one.advantage = (0.5, -1.0, 0.25, 2.0, 0.0, 0.0, 1.0, -0.5)[number]
    counts = dict(useful=0.75, tokens=sum(len(r.ids) for r in rollouts), replies=len(rollouts))
    found = []
    for size in (1, 2, 4):
        total = None
        for rank in range(size):
            model, world = tiny_model(), Rank(size)
            mine = rollouts[rank * 8 // size : (rank + 1) * 8 // size]
            rl.update_policy(model, build_optimizer(model), mine, 0, counts, world, 1.0, normalize)
            total = [a + b for a, b in zip(total or [0.0] * len(world.grads), world.grads)]
        found.append(torch.cat([g.flatten() for g in total]))
    assert found[0].norm() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-6)


def test_drift_is_the_mean_over_all_rollouts_in_micro_batches_of_any_size():
    model, start = tiny_model(), tiny_model(seed=1)
    rollouts = [rollout(0, tuple(range(3, 5 + i)), (1,) * (2 + i)) for i in range(5)]
    whole = rl.drift(model, start, rollouts, 0)
    parts = rl.drift(model, start, rollouts, 0, micro_batch=2)
    assert whole == pytest.approx(parts, rel=1e-4) and whole["kl"] > 0

    class Twice:
        def sum(self, value):
            return 2 * value

    assert rl.drift(model, start, rollouts, 0, world=Twice()) == pytest.approx(whole, rel=1e-4)
    assert rl.drift(model, start, [], 0) == dict(kl=0.0, entropy=0.0)


class Scripted:
    """An engine that gives the texts of a script, one after the other."""

    tokenizer = TOKENIZER

    def __init__(self, texts, seq_len=16):
        self.texts, self.model, self.prompts = (
            itertools.cycle(texts),
            tiny_model(seq_len=seq_len),
            [],
        )

    def generate_batch(self, prompts, max_tokens, temperature, top_k, seed):
        assert temperature == 1.0 and len(set(seed)) == len(prompts)
        self.prompts += prompts
        texts = [next(self.texts) for _ in prompts]
        return [Completion(TOKENIZER.encode(t), [1] * len(t), t, []) for t in texts]


def test_evaluate_pass_counts(monkeypatch):
    problems = [{"question": f"{i}", "answer": "1"} for i in range(10)]
    engine = Scripted(["#### 1", "#### 2", "no", "#### 2"])  # one right in four
    result = rl.evaluate_pass(engine, problems, samples=4, batch=8)
    assert result["pass_at_1"] == 0.25 and result["pass_at_k"] == 1.0
    assert result["k"] == 4 and result["n"] == 10 and result["low"] <= 0.25 <= result["high"]
    monkeypatch.setattr(rl, "pass_at_k", lambda n, c, k: c / n / k)  # as a solved exercise does
    assert rl.evaluate_pass(engine, problems, samples=4)["pass_at_k"] == 0.25 / 4


def test_a_question_longer_than_the_window_is_never_right():
    problems = [{"question": question, "answer": "1"} for question in ("1", "2" * 40, "3")]
    engine = Scripted(["#### 1"])
    assert rl.count_right(engine, problems, 2, 8) == [2, 0, 2] and len(engine.prompts) == 4


def test_programs_are_run_and_pass_at_k_is_the_unbiased_estimate(tmp_path):
    columns = dict(
        prompt=["def double(x):\n"] * 3,
        canonical_solution=["    return 2 * x\n"] * 3,
        test=["def check(f):\n    assert f(3) == 6\n"] * 3,
        entry_point=["double"] * 3,
    )
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    good, bad = "```python\ndef double(x):\n    return x + x\n```", "def double(x): return 7"
    plan = [1, 0, 0, 0] + [1, 1, 0, 0] + [0, 0, 0, 0]
    engine = Scripted([good if right else bad for right in plan], seq_len=64)
    result = rl.evaluate_samples(engine, HumanEval(tmp_path, "test"), None, 4, 99)
    assert result["n"] == 3 and result["accuracy"] == pytest.approx(3 / 12)
    for k in (1, 2, 4):  # by counting the subsets of the samples that hold a right one
        groups = [plan[:4], plan[4:8], plan[8:]]
        subsets = [[any(s) for s in itertools.combinations(g, k)] for g in groups]
        expected = sum(sum(s) / len(s) for s in subsets) / 3
        assert result["pass_at"][str(k)] == pytest.approx(expected)


def test_with_the_real_engine():
    model = tiny_model(seq_len=64)
    engine = Engine(model, TOKENIZER)
    problems = [{"question": "what?", "answer": "1"}] * 2
    rollouts = rl.sample_rollouts(engine, problems, 3, max_tokens=5, seed=1)
    assert len(rollouts) == 6 and all(len(r.ids) == len(r.mask) <= 5 for r in rollouts)
    again = rl.sample_rollouts(engine, problems, 3, max_tokens=5, seed=1)
    assert [r.ids for r in rollouts] == [r.ids for r in again]
    prompt = rl.problem_prompt(problems[0], TOKENIZER)
    reply = {"role": "assistant", "content": ""}
    ids, _ = render({"messages": [{"role": "user", "content": "what?"}, reply]}, TOKENIZER)
    assert ids[: len(prompt)] == prompt == rollouts[0].prompt
    rl.train_rl(model, build_optimizer(model), engine, problems, n_steps=1, samples=2, max_tokens=4,
                questions_per_step=2)  # fmt: skip
