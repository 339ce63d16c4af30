"""nanochat.recipe: the rules of a recipe, and a run that is skipped, broken, resumed, shared."""

import math
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from tiny_run import TINY, copy_of, finished_run, one_thread, tiny_recipe  # noqa: F401

from nanochat import recipe as recipe_module
from nanochat.budget import memory_estimate
from nanochat.checkpoint import best_step, latest_step, saved_steps
from nanochat.common import UserError, read_json, read_metrics, write_json
from nanochat.model import GPT, GPTConfig
from nanochat.recipe import (
    MODELS,
    PROFILES,
    STAGES,
    Recipe,
    Run,
    estimate,
    estimate_table,
    exchange,
    judge,
    pick_micro_batch,
    process_count,
    run_stage,
    run_stage_here,
    scaled_settings,
    stage_optimizer,
    training_speed,
    utilisation,
)

CPU = torch.device("cpu")


# The rules of a recipe.


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_optimizer_of_several_ranks_is_compiled_like_that_of_one(ranks):
    config = GPTConfig(vocab_size=128, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    facts = dict(rank=0, device=CPU, bucket_bytes=1 << 20, reduce_dtype=torch.float32)
    world = SimpleNamespace(world_size=ranks, **facts)
    for choice in ("yes", "no"):
        optimizer = stage_optimizer(GPT(config), Recipe(compile=choice), world, lora=False)
        assert all(group["compiled"] == (choice == "yes") for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "depth, steps, batch, tokens, decay",
    [  # published figures of the original at 12 tokens a parameter
        (12, 2520, 2**19, 1.32e9, 0.280),
        (20, 4980, 2**20, 5.22e9, 0.100),
        (24, 8352, 2**20, 8.76e9, 0.060),
        (32, 9600, 2**21, 20.1e9, 0.037),
    ],
)
def test_one_dial_gives_the_published_sizes(depth, steps, batch, tokens, decay):
    recipe = Recipe.for_depth(depth)
    assert (recipe.pretrain_steps, recipe.batch_tokens) == (steps, batch)
    assert recipe.config(recipe.vocab_size).n_embd == 64 * depth
    assert recipe.matrix_lr == pytest.approx(0.02 * math.sqrt(batch / 2**19))
    assert recipe.weight_decay == pytest.approx(decay, rel=0.03)
    assert estimate(recipe)["tokens"] == pytest.approx(tokens, rel=0.01)


def test_the_ratio_scales_the_tokens_and_nothing_else():
    few, many = scaled_settings(24, ratio=8.0), scaled_settings(24, ratio=12.0)
    assert few.pop("pretrain_steps") == 5568  # published: 5,568 steps at ratio 8
    assert many.pop("pretrain_steps") == 8352
    assert few == many


def test_the_classic_profile_is_the_launch_recipe():
    recipe = Recipe.for_profile("classic")
    plan = estimate(recipe)
    assert plan["parameters"] == 560_988_160
    assert plan["tokens"] == pytest.approx(11.22e9, rel=0.001)
    assert plan["flops"] == pytest.approx(3.92e19, rel=0.01)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_a_recipe_that_can_be_opened(profile, tmp_path):
    recipe = Recipe.for_profile(profile)
    assert recipe.name == profile
    assert recipe.batch_tokens % recipe.seq_len == 0
    assert Run.open(recipe, tmp_path / "run").recipe == recipe


@given(st.sampled_from([f.name for f in fields(Recipe) if f.name != "name"]), st.integers(1, 10**6))
def test_text_is_read_by_the_type_of_the_field(name, value):
    kind = type(getattr(Recipe(), name))
    changed = Recipe().changed(**{name: str(value)})
    assert getattr(changed, name) == kind(value) and type(getattr(changed, name)) is kind
    assert {**asdict(changed), name: None} == {**asdict(Recipe()), name: None}


def test_a_whole_number_may_be_large():
    assert Recipe().changed(seed=str(10**23)).seed == 10**23


@pytest.mark.parametrize("value", ["four", "4.5", 4.5, None, math.inf, math.nan, [4]])
def test_a_value_of_the_wrong_type_is_one_sentence(value):
    with pytest.raises(UserError, match="depth must be int, got"):
        Recipe().changed(depth=value)


def test_unknown_names_are_one_sentence_with_the_known_ones():
    with pytest.raises(UserError, match="unknown profile 'desktop'; choose one of smoke, laptop"):
        Recipe.for_profile("desktop")
    with pytest.raises(UserError, match="a recipe has no 'dept'; perhaps you mean 'depth'"):
        Recipe.for_profile("smoke", dept=3)
    with pytest.raises(UserError, match="a recipe has no 'xyz'; it has name, data, chat"):
        Recipe.for_profile("smoke", xyz=3)
    with pytest.raises(UserError, match="depth must be a number from 1 up, got 0"):
        Recipe.for_depth(0)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(depth=0), "depth must be a number from 1 up, got 0"),
        (dict(pretrain_steps=-5), "pretrain_steps must be a number from 1 up, got -5"),
        (dict(micro_batch=-1), "micro_batch must be a number from 0 up"),
        (dict(matrix_lr=-0.1), "matrix_lr must be a number from 0 up"),
        (dict(matrix_lr=math.nan), "matrix_lr must be a number"),
        (dict(head_dim=33), "head_dim must be even"),
        (dict(rl_samples=1), "rl_samples at least 2"),
        (dict(batch_tokens=1000), "no multiple of 128 .seq_len 128 x 1 processes.; try 1024"),
        (dict(processes=3), "batch_tokens 512 is no multiple of 384"),
        (dict(processes=4), "rl_questions 2 is no multiple of 4 .processes.; try 4"),
        (dict(device="tpu"), "device 'tpu' is not available; found cpu"),
        (dict(dtype="int8"), "dtype must be auto, float32 or bfloat16"),
        (dict(model="large"), "model must be one of classic, modern; got 'large'"),
        (dict(compile="maybe"), "compile must be one of auto, yes, no; got 'maybe'"),
        (dict(tracker="excel"), "tracker must be one of nothing, wandb, tensorboard, trackio"),
        (dict(name=""), "name must be a plain folder name"),
        (dict(name="../elsewhere"), "name must be a plain folder name"),
        (dict(name=".."), "name must be a plain folder name"),
        (dict(name="a\\b"), "name must be a plain folder name"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_any_work(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        Run.open(tiny_recipe(**changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 64), st.integers(0, 70), st.integers(1, 4))
@settings(deadline=None)
def test_the_micro_batch_divides_this_process_s_part(rows, micro_batch, ranks):
    recipe = tiny_recipe(batch_tokens=128 * rows * ranks, micro_batch=micro_batch)
    chosen = pick_micro_batch(recipe, recipe.config(512), CPU, ranks)
    assert rows % chosen == 0 and chosen <= (micro_batch or rows)


def test_a_batch_that_does_not_divide_says_what_would():
    recipe = tiny_recipe(batch_tokens=640)
    with pytest.raises(UserError, match="640 is no multiple of seq_len 128 x 2 processes = 256"):
        pick_micro_batch(recipe, recipe.config(512), CPU, 2)


def test_the_micro_batch_follows_the_memory_that_is_free(monkeypatch):
    recipe = Recipe.for_depth(12).changed(device="cpu", dtype="float32")
    config = recipe.config(32768)
    chosen = []
    for gib in (16, 64, 256):
        memory = type("Memory", (), {"available": gib * 2**30})
        monkeypatch.setattr(recipe_module.psutil, "virtual_memory", lambda m=memory: m)
        chosen.append(pick_micro_batch(recipe, config, CPU, 1))
        used = sum(memory_estimate(config, chosen[-1], torch.float32).values())
        assert used <= gib * 2**30
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]
    memory.available = 2**30
    with pytest.raises(UserError, match="depth 12 with seq_len 2048 needs about .* 1.0 GiB are"):
        pick_micro_batch(recipe, config, CPU, 1)


def test_the_micro_batch_is_what_a_trial_says_not_what_the_estimate_says():
    recipe, tried = tiny_recipe(batch_tokens=128 * 48, micro_batch=0), []

    def fits(rows):
        tried.append(rows)
        return rows <= 12

    assert pick_micro_batch(recipe, recipe.config(512), CPU, 1, fits) == 12
    assert tried[0] == 48 and len(set(tried)) == len(tried)  # the estimate is the first guess
    assert pick_micro_batch(recipe, recipe.config(512), CPU, 1, lambda rows: rows <= 1) == 1
    with pytest.raises(UserError, match="needs about .* choose a smaller depth or seq_len"):
        pick_micro_batch(recipe, recipe.config(512), CPU, 1, lambda rows: False)


@pytest.mark.parametrize("depth", range(1, 41))
def test_the_rules_are_sane_at_every_depth(depth):
    rules = scaled_settings(depth)
    published = 0.28 * math.sqrt(rules["batch_tokens"] / 2**19)
    published /= recipe_module.scaling_params(depth) / recipe_module.scaling_params(12)
    assert 0 < rules["weight_decay"] <= 0.5
    assert depth < 9 or rules["weight_decay"] == pytest.approx(published)  # nanochat's, where tuned
    assert published > 0.5 or rules["weight_decay"] == pytest.approx(published)
    assert 2**15 <= rules["batch_tokens"] <= 2**23 and rules["pretrain_steps"] >= 100
    assert 0 < rules["matrix_lr"] < 0.1 and 0 < rules["embedding_lr"] < 1.5


def test_the_horizon_is_a_ratio_flops_or_a_time():
    by_ratio = Recipe.for_depth(12, ratio=12.0)
    plan = estimate(by_ratio)
    by_flops = Recipe.for_depth(12, flops=plan["flops"])
    by_time = Recipe.for_depth(12, hours=plan["8xH100"]["hours"])
    for other in (by_flops, by_time):
        assert other.pretrain_steps == pytest.approx(by_ratio.pretrain_steps, abs=1)
        assert other.changed(pretrain_steps=by_ratio.pretrain_steps) == by_ratio
    assert Recipe.for_depth(12, flops=1.0).pretrain_steps == 1
    twice = Recipe.for_depth(12, hours=2 * plan["8xH100"]["hours"])
    assert twice.pretrain_steps == pytest.approx(2 * by_ratio.pretrain_steps, abs=2)


def test_the_model_is_one_field():
    assert Recipe(model="classic").config(512) == GPTConfig.classic(4, 512, 256, head_dim=64)
    assert Recipe(model="modern").config(512) == GPTConfig.modern(4, 512, 256, head_dim=64)
    models = {name: Recipe.for_profile(name).model for name in PROFILES}
    assert models["speedrun"] == models["gpu1"] == "modern" and models["classic"] == "classic"


def test_the_estimate_knows_when_it_cannot_know():
    plan = estimate(tiny_recipe())
    assert plan["hours"] is None and plan["dollars"] is None and plan["co2_kg"] is None  # a CPU
    assert plan["parameters"] == GPT(tiny_recipe().config(512)).num_params()["total"]
    flops_per_token = GPT(tiny_recipe().config(512)).flops_per_token()
    assert plan["flops"] == flops_per_token * plan["tokens"]
    assert utilisation(tiny_recipe().config(512), 1, 1.0, type("W", (), {"device": CPU})) is None
    measured = estimate(tiny_recipe(grid_grams=100.0), speed=1000.0)
    assert 3600 * measured["hours"] == pytest.approx(plan["tokens"] / 1000.0)
    assert measured["dollars"] == 0.0
    assert measured["co2_kg"] == pytest.approx(measured["hours"] * 0.065 * 0.1)
    eight = plan["8xH100"]
    assert eight["dollars"] == pytest.approx(eight["hours"] * 24)
    assert eight["co2_kg"] == pytest.approx(eight["kwh"] * 0.436)


def test_an_estimate_is_two_columns():
    rows = estimate_table(estimate(tiny_recipe()))
    assert {len(row) for row in rows} == {3} and [row[1] for row in rows[1:]] == ["-"] * 4
    known = estimate_table(estimate(tiny_recipe(), speed=1.0))
    assert known[1][1] == "1h 42m"  # 6,144 tokens at one a second


def test_the_speed_of_a_pass_is_measured():
    recipe = tiny_recipe()
    assert training_speed(recipe, recipe.config(512), CPU) > 0


def test_the_number_of_processes_is_that_of_the_gpus_unless_named(monkeypatch):
    assert process_count(tiny_recipe(processes=3)) == 3
    assert process_count(tiny_recipe(processes=0, device="cpu")) == 1
    monkeypatch.setattr(recipe_module, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(recipe_module.torch.cuda, "device_count", lambda: 8)
    assert process_count(tiny_recipe(processes=0)) == 8
    assert process_count(tiny_recipe(processes=2)) == 2


# A run on disk.


def test_another_recipe_under_the_same_name_is_refused_and_the_difference_named(tmp_path):
    Run.open(tiny_recipe(), tmp_path / "tiny")
    before = (tmp_path / "tiny" / "recipe.json").read_text()
    with pytest.raises(UserError, match=r"depth is 1, asked 3; seed is 0|seed is 0.*depth is 1"):
        Run.open(tiny_recipe(depth=3, seed=9), tmp_path / "tiny")
    assert (tmp_path / "tiny" / "recipe.json").read_text() == before


def test_a_run_goes_on_with_another_micro_batch_or_number_of_processes(tmp_path):
    Run.open(tiny_recipe(), tmp_path / "tiny")
    again = Run.open(tiny_recipe(micro_batch=1, processes=2), tmp_path / "tiny")
    assert (again.recipe.micro_batch, Run(again.directory).recipe.processes) == (1, 2)


def test_runs_are_kept_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUNS", str(tmp_path / "here"))
    assert Run.open(tiny_recipe()).directory == tmp_path / "here" / "tiny"


def test_a_recipe_of_another_version_is_one_sentence(tmp_path):
    write_json(tmp_path / "recipe.json", {**asdict(tiny_recipe()), "flux": 1})
    with pytest.raises(UserError, match="settings that this version does not know .flux."):
        Run(tmp_path)
    with pytest.raises(UserError, match="recipe.json does not exist"):
        Run(tmp_path / "nowhere")


# All the stages.


def test_checkpoints_carry_the_score_of_their_step_and_the_best_one_stays(tmp_path, monkeypatch):
    for stage in ("base", "mid", "sft"):
        folder = finished_run().directory / stage
        evals = read_metrics(finished_run().log.path, "eval", stage=stage)
        name = "bits_per_byte" if stage == "base" else "reply_loss"
        found = {e["step"]: e[name] for e in evals}
        assert len(found) == 3 and all(0 < score < 8 for score in found.values())
        for step in saved_steps(folder):
            assert read_json(folder / f"step_{step:06d}" / "meta.json")["score"] == found[step]
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data")
    scores = iter([3.0, 1.0, 2.0])  # as if it got worse after the middle
    monkeypatch.setattr(recipe_module, "bits_per_byte", lambda *given: next(scores))
    write_json(run.directory / "recipe.json", asdict(tiny_recipe(saves=2)))
    result = run_stage_here(Run(run.directory), "base")
    assert saved_steps(run.directory / "base") == [6, 12] and result["steps"] == 12
    assert best_step(run.directory / "base") == 6
    (said,) = read_metrics(run.log.path, "warning", kind="best")
    assert said["text"] == "the best checkpoint of base is that of step 6, not the last"


def test_the_estimate_is_in_the_log_before_the_first_step():
    events = [e["event"] for e in read_metrics(finished_run().log.path, stage="base")]
    assert events.index("estimate") < events.index("step")
    (plan,) = read_metrics(finished_run().log.path, "estimate")
    assert plan["hours"] > 0 and plan["memory"] > 0 and plan["tokens"] == 12 * 512


def test_a_disk_without_room_makes_tokens_while_training(tmp_path, monkeypatch, capsys):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer")
    shutil.rmtree(run.directory / "tokens")

    def full(folder, n_bytes, what):
        raise UserError(f"{what} needs 1.0 MB, but only 0.0 MB are free.")

    monkeypatch.setattr(recipe_module, "check_space", full)
    assert run_stage(run, "data")["train_tokens"] == 0
    assert "tokens are made while the model trains" in capsys.readouterr().out
    assert not (run.directory / "tokens" / "train").exists()
    result = run_stage_here(run, "base")
    assert result["steps"] == 12 and result["loss"] < 5.0  # ln 512 is 6.2


def test_a_tracker_gets_the_events_of_the_stages(tmp_path, monkeypatch):
    run, shown = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data"), []
    monkeypatch.setattr(recipe_module, "open_tracker", lambda name, run, folder: shown.append)
    run = Run.open(tiny_recipe(tracker="trackio"), run.directory)
    run_stage_here(run, "base")
    events = read_metrics(run.log.path, stage="base")
    assert [e["event"] for e in shown] == [e["event"] for e in events][-len(shown) :]
    assert {"estimate", "eval", "step"} <= {e["event"] for e in shown}


def test_every_stage_leaves_a_mark_a_model_and_scores():
    run = finished_run()
    for stage in STAGES:
        done = run.done(stage)
        assert done["seconds"] > 0 and done["peak_bytes"] > 0
        assert ("scores" in done) == (stage in MODELS)
    for stage in MODELS:
        scores = run.done(stage)["scores"]
        assert {"bits_per_byte", "exam", "arithmetic", "identity"} <= set(scores)
        assert all(0 <= scores[k] <= 1 for k in scores if k[:4] in ("exam", "arit", "iden", "spel")
                   and not isinstance(scores[k], dict))  # fmt: skip
        assert run.checkpoint(stage).meta["stage"] == stage
    evals = read_metrics(run.log.path, "eval", stage="base")
    assert [e["step"] for e in evals] == [0, 6, 12]
    assert evals[-1]["bits_per_byte"] < 0.7 * evals[0]["bits_per_byte"]


def test_judging_puts_the_same_items_to_a_model_each_time(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", *STAGES)
    assert judge(run, "sft") == run.done("sft")["scores"]


def test_the_exchange_is_three_questions_and_goes_to_the_log(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", *STAGES)
    said = exchange(run, "rl")
    assert [a["question"] for a in said][::2] == ["Who are you?", "What is 17 plus 25?"]
    assert [e["reply"] for e in read_metrics(run.log.path, "exchange")] == [
        a["reply"] for a in said
    ]


def test_a_second_time_every_stage_is_skipped_and_no_file_changes(capsys):
    run = finished_run()
    files = sorted(f for f in run.directory.rglob("*") if f.is_file())
    before = [(f, f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    results = [run_stage(Run(run.directory), stage) for stage in STAGES]
    after = [(f, f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    assert before == after and results == [run.done(stage) for stage in STAGES]
    assert capsys.readouterr().out.splitlines() == [
        f"{stage}: finished before, skipped" for stage in STAGES
    ]


def test_stages_have_an_order(tmp_path):
    run = Run.open(tiny_recipe(), tmp_path / "tiny")
    with pytest.raises(UserError, match="stage 'sft' needs 'tokenizer' first"):
        run_stage(run, "sft")
    with pytest.raises(UserError, match="unknown stage 'dpo'; choose one of tokenizer, data"):
        run_stage(run, "dpo")


def weights(run, stage):
    folder = run.directory / stage
    return load_file(folder / f"step_{latest_step(folder):06d}" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


KILLED = """
import os, signal, sys
from nanochat import recipe
save = recipe.save_checkpoint
def save_then_die(*args, **kwargs):
    save(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
recipe.save_checkpoint = save_then_die
recipe.run_stage(recipe.Run(sys.argv[1]), "base")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_stage_killed_in_the_middle_resumes_to_the_same_weights(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data")
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.directory)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert [f.name for f in (run.directory / "base").glob("*")] == ["step_000004"]
    earlier = read_json(run.directory / "base" / "step_000004" / "meta.json")["seconds"]
    result = run_stage(run, "base")
    assert same(weights(run, "base"), weights(finished_run(), "base"))
    whole = run_stage(finished_run(), "base")
    assert {k: result[k] for k in ("loss", "scores")} == {k: whole[k] for k in ("loss", "scores")}
    assert result["seconds"] > earlier > 0  # the time before the kill counts


class Broken(Exception):
    """What stops a stage in these tests."""


@pytest.mark.parametrize("stage, at", [("mid", 1), ("sft", 2), ("rl", 1)])
def test_every_training_stage_resumes_exactly(stage, at, tmp_path, monkeypatch):
    before = STAGES[: STAGES.index(stage)]
    run = copy_of(finished_run(), tmp_path / "tiny", *before)
    save = recipe_module.save_checkpoint

    def save_then_break(folder, step, *args, **named):
        save(folder, step, *args, **named)
        if step == at:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "save_checkpoint", save_then_break)
        with pytest.raises(Broken):
            run_stage_here(run, stage)
    run_stage_here(run, stage)
    assert same(weights(run, stage), weights(finished_run(), stage))


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_a_stage_killed_after_its_last_checkpoint_has_nothing_left_to_do(stage, tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", *STAGES)
    old = read_json(run.directory / stage / "trained.json")
    for mark in ("trained.json", "done.json"):
        (run.directory / stage / mark).unlink()
    steps = len(read_metrics(run.log.path))
    result = run_stage_here(run, stage)
    assert {**result, "peak_bytes": 0} == {**old, "peak_bytes": 0}
    assert len(read_metrics(run.log.path)) == steps


def test_a_checkpoint_of_another_vocabulary_is_one_clear_sentence(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", *STAGES)
    folder = run.directory / "sft"
    path = folder / f"step_{latest_step(folder):06d}" / "meta.json"
    write_json(path, {**read_json(path), "tokenizer": "0" * 64})
    with pytest.raises(UserError, match="sft checkpoint was trained with another tokenizer .0000"):
        run.engine("sft")
    (run.directory / "sft" / "done.json").unlink()
    (run.directory / "sft" / "trained.json").unlink()
    with pytest.raises(UserError, match="another tokenizer"):
        run_stage(run, "sft")


def test_two_processes_learn_what_one_learns(tmp_path, capsys):
    alone = finished_run()
    run = copy_of(alone, tmp_path / "tiny", "tokenizer", "data")
    run = Run.open(tiny_recipe(processes=2), run.directory)
    result = run_stage(run, "base")
    said = capsys.readouterr().out
    assert "base 12/12 steps" in said and "[rank 1] base" not in said
    reference = run_stage(alone, "base")
    assert result["loss"] == pytest.approx(reference["loss"], abs=1e-4)
    assert read_metrics(run.log.path, "eval", stage="base")[-1]["bits_per_byte"] == pytest.approx(
        reference["scores"]["bits_per_byte"], abs=1e-4
    )
    one, two = weights(alone, "base"), weights(run, "base")
    start = GPT(alone.recipe.config(512), seed=0).state_dict()
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert (one[name] - two[name]).norm() < 1e-3 * moved, name


def test_a_mistake_in_a_process_of_several_is_one_sentence(tmp_path):
    run = copy_of(finished_run(), tmp_path / "tiny", "tokenizer", "data")
    run = Run.open(tiny_recipe(processes=2), run.directory)
    for file in (run.directory / "tokens" / "train").glob("*.bin"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"^token shard .* has 0 bytes, expected .* again\.$"):
        run_stage(run, "base")


def test_real_text_and_real_conversations(shared_data, tmp_path):
    if not all((shared_data / part).is_dir() for part in ("corpus", "sft", "chat_eval")):
        pytest.skip("the folder of real data has no corpus, sft and chat_eval")
    recipe = tiny_recipe(
        data=f"folder:{shared_data / 'corpus'}", chat=f"folder:{shared_data}", **REAL
    )
    run = Run.open(recipe, tmp_path / "real")
    for stage in ("tokenizer", "data", "base"):
        run_stage(run, stage)
    assert 1.0 < run.done("tokenizer")["bytes_per_token"] < 5.0
    evals = read_metrics(run.log.path, "eval", stage="base")
    assert evals[-1]["bits_per_byte"] < evals[0]["bits_per_byte"]
    for stage in ("mid", "sft"):
        result = run_stage_here(run, stage)
        assert math.isfinite(result["loss"]) and result["steps"] == TINY["mid_steps"]


REAL = dict(tokenizer_chars=200_000, vocab_size=600)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    run = Run.open(tiny_recipe(data=f"folder:{tmp_path / 'none'}"), tmp_path / "run")
    with pytest.raises(UserError, match="data folder .*none does not exist; check the path"):
        run_stage(run, "tokenizer")
    run = copy_of(finished_run(), tmp_path / "chat", "tokenizer", "data", "base")
    write_json(run.directory / "recipe.json", asdict(tiny_recipe(chat="folder:nowhere")))
    with pytest.raises(UserError, match="chat must be tinyworld, hub or folder:PATH with an exist"):
        run_stage(Run(run.directory), "mid")


def test_a_tokenizer_that_is_there_is_taken_as_it_is(tmp_path):
    given = finished_run().tokenizer()
    run = Run.open(tiny_recipe(vocab_size=300), tmp_path / "run")
    given.save(run.directory / "tokenizer")
    assert run_stage(run, "tokenizer")["vocab_size"] == given.vocab_size != 300
    assert run.tokenizer().fingerprint() == given.fingerprint()
