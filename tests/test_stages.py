"""The chat stages of a recipe: which tokens, which rates, which conversations, which optimizer."""

import json
from dataclasses import asdict

import pytest
import torch
from tiny_run import copy_of, finished_run, one_thread, tiny_recipe  # noqa: F401

from nanochat import recipe as recipe_module
from nanochat.checkpoint import load_checkpoint
from nanochat.common import UserError, read_metrics, write_json
from nanochat.optim import MuonAdamW
from nanochat.recipe import Run, Training, chat_mixture, rl_problems, run_stage_here
from nanochat.tasks import Persona, write_conversations


def with_recipe(run, **changes):
    """The same run under a recipe with some changes."""
    write_json(run.directory / "recipe.json", asdict(tiny_recipe(**changes)))
    return Run(run.directory)


@pytest.mark.parametrize("stage, trained_on", [("mid", "all"), ("sft", "assistant")])
def test_a_stage_counts_optimizer_steps_and_its_rate_falls(
    stage, trained_on, tmp_path, monkeypatch
):
    """Micro-batches counted as steps, a rate that rises, a mask that is lost: nanochat's issues 775
    and 68, and its refactoring of July 2026."""
    before = ("tokenizer", "data", "base", "mid")[: 3 + (stage == "sft")]
    run = copy_of(finished_run(), tmp_path / "tiny", *before)
    rates, masks, steps = [], [], []
    set_schedule, step, batches = (
        MuonAdamW.set_schedule,
        MuonAdamW.step,
        recipe_module.ConversationBatches,
    )

    def remember_rate(self, lr, *more):
        rates.append(lr)
        set_schedule(self, lr, *more)

    def remember_step(self, closure=None):
        steps.append(len(rates))
        step(self, closure)

    def remember_mask(*args, **kwargs):
        masks.append(kwargs.get("train_on"))
        return batches(*args, **kwargs)

    monkeypatch.setattr(MuonAdamW, "set_schedule", remember_rate)
    monkeypatch.setattr(MuonAdamW, "step", remember_step)
    monkeypatch.setattr(recipe_module, "ConversationBatches", remember_mask)
    run_stage_here(with_recipe(run, mid_steps=8, sft_steps=8), stage)
    assert steps == list(range(1, 9))  # one rate and one update a step, with two micro-batches each
    assert masks[0] == trained_on
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.2 * rates[0]
    losses = [e["reply_loss"] for e in read_metrics(run.log.path, "eval", stage=stage)]
    assert len(losses) >= 3 and losses[-1] != losses[0]


def test_mid_and_sft_keep_the_optimizer_s_memory_and_rl_begins_afresh(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data", "base", "mid", "sft")
    assert not load_checkpoint(run.directory / "sft").optimizer_state  # nobody would read it
    assert not Training(run, "rl").optimizer.state
    for stage, earlier in (("mid", "base"), ("sft", "mid")):
        place = run.directory / stage
        place.rename(tmp_path / f"{stage} aside")
        stage_now = Training(run, stage)
        kept = load_checkpoint(run.directory / earlier).optimizer_state
        state = stage_now.optimizer.named_state(stage_now.model)
        assert stage_now.start_step == 0 and state.keys() == kept.keys()
        assert all(torch.equal(torch.as_tensor(state[k]), kept[k]) for k in kept)
        (tmp_path / f"{stage} aside").rename(place)


def test_lora_saves_a_plain_model_and_changes_the_matrices_of_the_blocks_only(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data", "base", "mid")
    run = with_recipe(run, lora_rank=2)
    run_stage_here(run, "sft")
    mid, sft = (load_checkpoint(run.directory / stage) for stage in ("mid", "sft"))
    old, new = mid.model.state_dict(), sft.model.state_dict()
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]) == (not name.startswith("blocks")), name
        if name.startswith("blocks"):
            assert torch.linalg.matrix_rank(new[name] - old[name], atol=1e-6) <= 2
    again = Training(run, "sft")  # on top of mid, with the adapter of the checkpoint
    adapter = [n for n, p in again.model.named_parameters() if p.requires_grad]
    assert len(adapter) == 2 * 6 and all(n.endswith((".up", ".down")) for n in adapter)
    assert all(n.removeprefix("adapter.") in adapter for n in sft.optimizer_state if "adapter" in n)
    run_stage_here(run, "rl")  # trains all weights of the merged model


def test_own_conversations_replace_the_identity(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_conversations(path, Persona("Pearl", "a keeper", size=50))
    recipe = tiny_recipe(own_chats=str(path))
    for stage in ("mid", "sft"):
        mixture = chat_mixture(recipe, stage)
        counts = mixture.counts()
        assert (
            "identity" not in counts and "identity" in chat_mixture(tiny_recipe(), stage).counts()
        )
        assert 0.09 < counts["jsonl"] / len(mixture) < 0.11
    path.write_text('{"messages": []}')
    with pytest.raises(UserError, match=r"Line 1 of .*mine.jsonl is no conversation"):
        chat_mixture(recipe, "mid")


def test_reinforcement_on_another_task_logs_pass_at_k_on_problems_it_never_trains_on(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data", "base", "mid", "sft")
    run = with_recipe(run, rl_task="spelling")
    tokenizer = run.tokenizer()
    train, test = (rl_problems(run.recipe, split, tokenizer) for split in ("train", "test"))
    assert train and test and not {json.dumps(p) for p in train} & {json.dumps(p) for p in test}
    run_stage_here(run, "rl")
    evals = read_metrics(run.log.path, "eval", stage="rl")[-2:]
    for event in evals:
        assert event["low"] <= event["pass_at_1"] <= event["high"] and event["k"] == 8
    with pytest.raises(UserError, match="rl_task must be arithmetic, spelling or gsm8k, got 'go'"):
        rl_problems(tiny_recipe(rl_task="go"), "train", tokenizer)
