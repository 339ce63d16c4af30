"""nanochat.cli: every command is listed, and every mistake is one sentence and exit code 2."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import TINY, copy_of, finished_run, one_thread, tiny_recipe  # noqa: F401

import nanochat.__main__ as program
from nanochat import cli, common
from nanochat.cli import main
from nanochat.common import UserError, read_json
from nanochat.recipe import STAGES, Recipe, Run

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("tokenizer", "data", "pretrain", "midtrain", "sft", "rl", "capstone"),
    *("eval", "chat", "serve", "bench", "report", "estimate", "doctor"),
)
TINY_SET = [part for k, v in TINY.items() for part in ("--set", f"{k}={v}")]


@pytest.fixture(autouse=True)
def runs_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUNS", str(tmp_path / "runs"))


def sentence(capsys, *argv):
    """The one sentence of a command that a user has to mend."""
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanochat: ") and said.endswith(".\n") and said.count("\n") == 1
    return said


def test_the_program_lists_its_commands_and_says_one_sentence_without_a_traceback(tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "nanochat", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")

    listed = run()
    assert listed.returncode == 0
    assert set(COMMANDS) <= set(listed.stdout.split())
    wrong = run("pretrain", "--profile", "desktop")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == (
        "nanochat: unknown profile 'desktop'; "
        "choose one of smoke, laptop, gpu1, speedrun, classic.\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"python -m nanochat {command}" in said
    assert ("--profile" in said) == (command != "doctor")


@pytest.mark.parametrize("argv", [["fly"], ["chat", "--stage", "dpo"]])
def test_a_command_that_does_not_exist_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and "usage: python -m nanochat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["pretrain", "--profile", "desktop"], "unknown profile 'desktop'"),
        (["capstone", "--profile", "desktop"], "unknown profile 'desktop'"),
        (["pretrain", "--set", "depth"], "--set needs FIELD=VALUE, got 'depth'"),
        (["pretrain", "--set", "dept=4"], "a recipe has no 'dept'; perhaps you mean 'depth'."),
        (["pretrain", "--set", "depth=four"], "depth must be int, got 'four'"),
        (["pretrain", "--set", "profile=smoke"], "a recipe has no 'profile'"),
        (["pretrain", "--set", "self=1"], "a recipe has no 'self'"),
        (["pretrain", "--set", "batch_tokens=1000"], "is no multiple of 256"),
        (["pretrain", "--folder", "nowhere"], "recipe.json does not exist"),
        (["pretrain", "--folder", "nowhere", "--set", "depth=4"], "leave --set out"),
        (["tokenizer", "--set", "data=folder:nowhere"], "data folder nowhere does not exist"),
        (["tokenizer", "--set", "data=parquet"], "data source 'parquet' is unknown"),
        (["rl", *TINY_SET], "stage 'rl' needs 'tokenizer' first"),
        (["chat", "-p", "hello"], "there is no run in"),
        (["report"], "there is no run in"),
        (["serve", "--folder", "nowhere"], "does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(argv, expected, capsys):
    assert expected in sentence(capsys, *argv)


def test_looking_for_a_run_does_not_make_one(tmp_path, capsys):
    sentence(capsys, "chat", "-p", "hello")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["chat", "eval", "serve", "bench"])
def test_a_run_without_models_says_how_to_train_one(command, tmp_path, capsys):
    run = Run.open(tiny_recipe(), tmp_path / "new")
    said = sentence(capsys, command, "--folder", run.directory)
    assert "has no trained model yet; train one with `python -m nanochat capstone" in said
    said = sentence(capsys, command, "--folder", run.directory, "--stage", "sft")
    assert "no checkpoint" in said or "does not exist" in said


def shards(folder, *texts):
    folder.mkdir()
    for number, column in enumerate(texts):
        path = folder / f"shard_{number:05d}.parquet"
        pq.write_table(pa.table({"text": pa.array(column, pa.string())}), path)
    return f"data=folder:{folder}"


def test_an_empty_shard_is_one_sentence(tmp_path, capsys):
    data = shards(tmp_path / "text", ["some words to learn from"] * 500, [])
    said = sentence(capsys, "pretrain", *TINY_SET, "--set", data)
    assert "shard_00001.parquet" in said


def test_a_broken_shard_is_one_sentence(tmp_path, capsys):
    data = shards(tmp_path / "text", ["words"], ["words"])
    (tmp_path / "text" / "shard_00000.parquet").write_bytes(b"")
    assert "shard_00000.parquet" in sentence(capsys, "tokenizer", *TINY_SET, "--set", data)


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_sentence_from_elsewhere_cannot_drive_the_terminal(monkeypatch, capsys):
    def owned(args):
        raise UserError("the endpoint failed: \x1b]0;owned\x07.")

    monkeypatch.setattr(cli, "do_chat", owned)
    assert sentence(capsys, "chat") == "nanochat: the endpoint failed: ]0;owned.\n"


def test_no_space_left_in_a_rank_is_told_to_the_launcher(monkeypatch):
    """A UserError: the launcher does not try again what no second attempt mends."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(cli, "do_stage", no_space)
    with pytest.raises(UserError, match="cannot write to .*No space left.*free some space"):
        main(["pretrain", *TINY_SET])


@pytest.mark.parametrize("stage", ["tokenizer", "data", "base"])
def test_no_space_left_is_one_sentence_and_leaves_no_half_file(
    stage, tmp_path, capsys, monkeypatch
):
    run = copy_of(finished_run(), tmp_path / "full", *STAGES[: STAGES.index(stage)])
    for file in run.directory.glob("tokens/*/*"):
        if stage == "data":
            file.unlink()

    def names():
        files = (file.relative_to(run.directory) for file in run.directory.rglob("*"))
        return {file for file in files if not any(part[0] == "." for part in file.parts)}

    before = names() | {Path(stage)}
    command = {"base": "pretrain"}.get(stage, stage)
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "fsync", no_space)
        said = sentence(capsys, command, "--folder", run.directory)
    assert "No space left on device" in said and "free some space" in said
    assert names() <= before
    assert main([command, "--folder", str(run.directory)]) == 0  # with space again it goes on
    assert read_json(run.directory / stage / "done.json")["seconds"] > 0


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    run = copy_of(finished_run(), tmp_path / "full", "tokenizer", "data")
    monkeypatch.setattr(cli, "run_stage", no_space)
    said = sentence(capsys, "pretrain", "--folder", run.directory)
    assert "cannot write to the folder of the run: No space left on device" in said


def test_a_runs_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NANOCHAT_RUNS", str(tmp_path / "file"))
    assert "Not a directory" in sentence(capsys, "tokenizer", *TINY_SET)


def test_ctrl_c_is_no_error_message(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "do_report", interrupted)
    assert main(["report"]) == 130 and capsys.readouterr().err == ""


def test_a_stage_command_prepares_what_it_needs(tmp_path, capsys):
    assert main(["pretrain", "--profile", "smoke", *TINY_SET, "--set", "name=mine"]) == 0
    run = Run(tmp_path / "runs" / "mine")
    assert [stage for stage in STAGES if run.done(stage)] == ["tokenizer", "data", "base"]
    assert run.done("base")["loss"] == finished_run().done("base")["loss"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) < 12 and all("\r" not in line for line in said)
    assert main(["eval", "--set", "name=mine"]) == 0  # the name alone finds the run
    assert f"bits_per_byte            {run.done('base')['scores']['bits_per_byte']:.4f}" in (
        capsys.readouterr().out
    )


def test_chat_and_report_of_a_finished_run(tmp_path, capsys):
    run = copy_of(finished_run(), tmp_path / "tiny", *STAGES)
    assert main(["chat", "--folder", str(run.directory), "-p", "Who are you?"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["report", "--folder", str(run.directory)]) == 0
    assert [Path(line).is_file() for line in capsys.readouterr().out.splitlines()] == [True, True]


def test_bench_ends_with_json(capsys):
    folder = str(finished_run().directory)
    small = ["--batch", "1", "3", "--prompt", "8", "--new", "4", "--repeats", "1"]
    assert main(["bench", "--folder", folder, *small]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["batch"] for result in facts["results"]] == [1, 3]
    assert all(result["tokens_per_second"] > 0 for result in facts["results"])
    assert "context window of 128" in sentence(capsys, "bench", "--folder", folder, "--new", 100)
    assert "1 or more" in sentence(capsys, "bench", "--folder", folder, "--batch", 0)


def test_serve_offers_the_newest_stage_first(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(cli, "run_server", lambda engines, **options: served.append(engines))
    assert main(["serve", "--folder", str(finished_run().directory)]) == 0
    assert list(served[0]) == ["rl", "sft", "mid", "base"]


def test_the_doctor_says_what_to_mend(capsys, monkeypatch):
    monkeypatch.setattr(cli, "doctor", lambda: [("torch", "2.13", True, ""), ("disk", "full", False, "free some space")])  # fmt: skip  # noqa: E501
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok  torch        2.13",
        "BAD disk         full: free some space",
    ]


def test_torch_missing_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "nanochat", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "nanochat: the package 'torch' is missing; "
        "run `pip install -e .` in the folder of the book.\n"
    )


def test_an_old_python_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(program.sys, "version_info", (3, 8, 18))
    assert program.start() == 2
    assert capsys.readouterr().err == ("nanochat: Python 3.8 is too old; install 3.10 or newer.\n")


def test_what_starts_first_is_read_by_an_old_python():
    import ast

    for name in ("__init__.py", "__main__.py"):
        ast.parse((ROOT / "nanochat" / name).read_text(encoding="utf-8"), feature_version=(3, 7))


def test_an_estimate_of_a_large_model_measures_a_small_one(monkeypatch, capsys):
    tried = []

    def speed(recipe, config, device):
        tried.append(config)
        return 1000.0

    monkeypatch.setattr(cli, "training_speed", speed)
    for profile in ("laptop", "speedrun"):
        assert main(["estimate", "--profile", profile, "--set", "device=cpu"]) == 0
    assert [config.n_layer for config in tried] == [Recipe.for_profile("laptop").depth, 4]
    assert "GiB with" in capsys.readouterr().out


def test_an_estimate_needs_no_run_and_makes_none(tmp_path, capsys):
    assert main(["estimate", "--profile", "smoke", *TINY_SET]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "M parameters" in said[0] and "GiB with 2 rows at a time" in said[1]
    assert said[3] == "| before the run | this machine | 8 x H100 (assumed 40 %) |"
    assert [line.split(" | ")[0] for line in said[5:]] == [
        "| time", "| rent in dollars", "| energy in kWh", "| kg of CO2 (assumed grid)"
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()
