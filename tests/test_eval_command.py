"""`python -m nanochat eval` with --core and --chat: the public tasks with a run's model."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from core_reference import toy_task
from test_core import ITEMS, save_tiny, write_bundle, write_jsonl
from tiny_run import copy_of, finished_run, one_thread  # noqa: F401

from nanochat import cli
from nanochat.cli import main
from nanochat.common import UserError, read_json
from nanochat.core import CHAT_CORE, chat_core
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
    assert "--samples goes with --chat" in sentence(capsys, "eval", *where, "--samples", 3)
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


# --- ChatCORE ---


def write_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def exams(tmp_path):
    """Three questions of each public task, in the form of their files."""
    folder = tmp_path / "exams"
    choices = [{"text": ["a", "b", "c", "d"], "label": list("ABCD")}] * 3
    for subset in ("ARC-Easy", "ARC-Challenge"):
        path = folder / "arc" / subset / "test.parquet"
        write_table(path, question=["x?", "y?", "z?"], choices=choices, answerKey=list("ABC"))
    mmlu = {"choices": [["a", "b", "c", "d"]] * 3, "answer": [0, 1, 2]}
    write_table(folder / "mmlu/test.parquet", question=["x?", "y?", "z?"], **mmlu)
    write_table(folder / "gsm8k/test.parquet", question=["1+1?"] * 3, answer=["2\n#### 2"] * 3)
    write_table(
        folder / "humaneval/test.parquet",
        prompt=["def double(x):\n"] * 3,
        canonical_solution=["    return 2 * x\n"] * 3,
        test=["def check(f):\n    assert f(3) == 6\n"] * 3,
        entry_point=["double"] * 3,
    )
    return folder


def test_chat_core_of_a_run(run, exams, capsys):
    command = ["eval", "--folder", str(run.directory), "--chat", str(exams), "--limit", "3"]
    assert main([*command, "--samples", "2"]) == 0
    said = capsys.readouterr().out
    kept = read_json(run.directory / "chat_core" / "rl" / "chat_core.json")
    assert list(kept["tasks"]) == list(CHAT_CORE) and f"ChatCORE       {kept['core']:.4f}" in said
    assert set(kept["tasks"]["humaneval"]["pass_at"]) == {"1", "2"} and "pass@2" in said
    assert "pass_at" not in kept["tasks"]["mmlu"]
    with pytest.MonkeyPatch.context() as patch:  # a second time everything is there
        patch.setattr(cli, "evaluate_chat", None)
        patch.setattr(cli, "evaluate_samples", None)
        assert main([*command, "--samples", "2"]) == 0
    assert capsys.readouterr().out == said
    assert "belongs to another samples" in sentence(capsys, *command)
    other = dict(question=["1+1?"] * 3, answer=["2\n#### 2"] * 2 + ["3\n#### 3"])
    write_table(exams / "gsm8k/test.parquet", **other)  # one answer is another
    assert "belongs to another task" in sentence(capsys, *command, "--samples", "2")
    assert "leave --core and --hf out" in sentence(capsys, *command, "--core")
    (exams / "mmlu" / "test.parquet").unlink()
    assert "no test.parquet" in sentence(capsys, *command)


def test_chat_core_is_the_mean_of_all_six_or_nothing():
    part = {"accuracy": 0.5, "chance": 0.25, "centered": 1 / 3, "n": 300, "low": 0, "high": 1}
    results = dict.fromkeys(CHAT_CORE[:3], part)
    with pytest.raises(UserError, match="gsm8k, humaneval, spelling did not run"):
        chat_core(results)
    results |= dict.fromkeys(CHAT_CORE[3:], {**part, "chance": 0.0, "centered": 0.5})
    found = chat_core(results)
    assert found["core"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert found["low"] < found["core"] < found["high"]


def test_the_six_tasks_on_real_files(shared_data):
    tasks = cli.chat_exams(str(shared_data / "chat_eval"))
    assert [len(tasks[name]) for name in CHAT_CORE] == [2376, 1172, 14042, 1319, 164, 256]
    item = tasks["humaneval"].conversation(0)
    assert tasks["humaneval"].evaluate(item["messages"][-1]["content"], item)
    assert not tasks["humaneval"].evaluate(item["prompt"] + "    return None\n", item)
