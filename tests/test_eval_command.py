"""`python -m nanochat eval --core`: the tasks of CORE with a run's model, or any other, by hand."""

import json

import pytest
from core_reference import toy_task
from test_core import ITEMS, save_tiny, write_bundle, write_jsonl
from tiny_run import copy_of, finished_run, one_thread  # noqa: F401

from nanochat import cli
from nanochat.cli import main
from nanochat.common import read_json
from nanochat.distributed import launch
from nanochat.recipe import STAGES


@pytest.fixture(autouse=True)
def runs_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def run(tmp_path):
    return copy_of(finished_run(), tmp_path / "tiny", *STAGES)


def sentence(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanochat: ") and said.endswith(".\n") and said.count("\n") == 1
    return said


def test_a_runs_model_and_a_folder_of_tasks(run, tmp_path, capsys):
    write_bundle(tmp_path / "bundle")
    command = ["eval", "--folder", run.directory, "--stage", "base", "--core", tmp_path / "bundle"]
    with pytest.warns(UserWarning, match="4 items are too few for 10 shots"):
        assert main([str(word) for word in command]) == 0
    said = capsys.readouterr().out
    result = read_json(run.directory / "core" / "base" / "core.json")
    assert f"**{result['core']:+.3f}**" in said and str(run.directory / "core" / "base") in said
    assert result["tasks"]["a"]["shots"] == 3 and result["n_tasks"] == 2


def test_a_hugging_face_model_needs_no_run(tmp_path, capsys):
    save_tiny(tmp_path / "gpt2", "gpt2")
    write_jsonl(tmp_path / "tasks" / "a.jsonl", ITEMS)
    entry = {"label": "a", "file": "a.jsonl", "task_type": "multiple_choice", "num_fewshot": 1}
    manifest = {"tasks": [{**entry, "random_baseline": 50}]}
    (tmp_path / "tasks" / "manifest.json").write_text(json.dumps(manifest))
    command = ["eval", "--core", tmp_path / "tasks", "--hf", tmp_path / "gpt2"]
    assert main([str(w) for w in command] + ["--results", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "core.json")["tasks"]["a"]["n"] == 4
    capsys.readouterr()
    assert "no causal model" in sentence(capsys, *command[:-1], tmp_path / "none")
    assert not (tmp_path / "runs").exists()


def test_without_a_folder_the_bundle_is_fetched(run, tmp_path, monkeypatch, capsys):
    write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(cli, "fetch_core", lambda: tmp_path / "bundle")
    with pytest.warns(UserWarning):
        assert main(["eval", "--folder", str(run.directory), "--core", "--limit", "4"]) == 0
    assert (run.directory / "core" / "rl" / "core.png").exists()


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    where = ("--folder", run.directory)
    assert "neither manifest.json nor core.yaml" in sentence(
        capsys, "eval", *where, "--core", tmp_path
    )
    assert "go with --core" in sentence(capsys, "eval", *where, "--limit", 3)
    write_bundle(tmp_path / "bundle")
    said = sentence(capsys, "eval", *where, "--core", tmp_path / "bundle", "--limit", "-2")
    assert "limit -2 leaves no items" in said


def test_two_processes_find_what_one_does(run, tmp_path):
    tasks = {kind: toy_task(kind, n=11).items for kind in ("multiple_choice", "language_modeling")}
    entries = []
    for kind, items in tasks.items():
        write_jsonl(tmp_path / "tasks" / f"{kind}.jsonl", items)
        facts = {"num_fewshot": 2, "continuation_delimiter": " ", "random_baseline": 0}
        entries.append({"label": kind, "file": f"{kind}.jsonl", "task_type": kind, **facts})
    (tmp_path / "tasks" / "manifest.json").write_text(json.dumps({"tasks": entries}))
    command = ["eval", "--folder", str(run.directory), "--stage", "base"]
    command += ["--core", str(tmp_path / "tasks"), "--results"]
    assert main([*command, str(tmp_path / "one")]) == 0
    lines = []
    launch("nanochat", [*command, str(tmp_path / "two")], 2, lines.append)
    assert read_json(tmp_path / "two" / "core.json") == read_json(tmp_path / "one" / "core.json")
    assert sum("results" in line for line in lines) == 1  # the first process alone speaks
