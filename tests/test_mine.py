"""book.mine and nanochat.recipe.use_mine: the learner's code trains the model, if it is right."""

import json
import os

import pytest
import torch
from conftest import ROOT
from tiny_run import copy_of, finished_run, one_thread, tiny_recipe  # noqa: F401

import nanochat.model
import nanochat.optim
import nanochat.train
from book import mine
from book.grading import all_sheets
from book.manuscript import load_book
from book.mine import switch
from nanochat.common import UserError, read_metrics
from nanochat.recipe import MODELS, STAGES, Run, run_stage, use_mine
from nanochat.report import write_report

SHEETS = all_sheets(load_book(ROOT))
STANDING_IN = [e for sheet in SHEETS for e in sheet.exercises.values() if e.replaces]


def hand_in(folder, *sources):
    """A work folder whose one notebook has these cells."""
    cells = [dict(cell_type="code", source=s, metadata={}) for s in sources]
    (folder / "exercises").mkdir(parents=True)
    (folder / "exercises" / "mine.ipynb").write_text(json.dumps({"cells": cells}))
    return str(folder)


@pytest.fixture(autouse=True)
def the_books_own_code_afterwards(monkeypatch):
    monkeypatch.delenv(mine.PASSED, raising=False)
    yield
    switch("")


def exercise(id):
    return next(e for e in STANDING_IN if e.id == id)


def wrong(id, property):
    """The wrong answer of a sheet to one property, as a learner would hand it in."""
    found = exercise(id)
    source = next(source for name, source in found.wrong if name == property)
    head, _, rest = source.partition("\n")
    return f"#| exercise id={id} points=1\n{rest}"


def test_all_solutions_as_the_learners_code_give_the_books_run_bit_for_bit(tmp_path, capsys):
    book = finished_run()
    folder = hand_in(tmp_path / "work", *(e.solution for e in STANDING_IN))
    run = Run.open(tiny_recipe(name="mine", mine=folder), tmp_path / "run")
    used = use_mine(run.recipe)
    assert used == [f"{e.id} ({e.replaces})" for e in STANDING_IN]
    before = {key: pair[0] for key, pair in mine.IN_PLACE.items()}
    for stage in STAGES:
        run_stage(run, stage)
    assert all(f.__code__.co_filename == "<answer>" for _, f in mine.IN_PLACE.values())
    for stage in MODELS:
        ours, theirs = (r.checkpoint(stage).model.state_dict() for r in (run, book))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), stage
        assert run.done(stage)["scores"] == book.done(stage)["scores"]
    names = ", ".join(e.id for e in STANDING_IN)
    assert f"base: with your {names}\n" in capsys.readouterr().out
    assert [e["stage"] for e in read_metrics(run.log.path, "mine")] == [*STAGES]
    report = write_report(run)[0].read_text()
    assert "## Your code" in report and f"| {STANDING_IN[0].id} |" in report
    assert "## Your code" not in write_report(copy_of(book, tmp_path / "copy"))[0].read_text()
    switch("")
    for key, function in before.items():
        module, name = key.rstrip(")").split(" (")[1].split(".")
        assert getattr(getattr(nanochat, module), name) is function


def test_the_learners_function_is_the_one_that_runs_everywhere(tmp_path):
    book = nanochat.optim.lr_multiplier
    source = exercise("04-rate").solution
    recipe = tiny_recipe(mine=hand_in(tmp_path / "work", source))
    assert use_mine(recipe) == ["04-rate (optim.lr_multiplier)"]
    yours = nanochat.optim.lr_multiplier
    assert yours is not book and yours.__code__.co_filename == "<answer>"
    assert nanochat.recipe.lr_multiplier is yours
    assert nanochat.train.fit.__kwdefaults__["schedule"] is yours
    assert use_mine(tiny_recipe()) == []  # a run without `mine` has the book's
    assert nanochat.optim.lr_multiplier is nanochat.recipe.lr_multiplier is book
    assert nanochat.train.fit.__kwdefaults__["schedule"] is book


def test_the_ranks_of_several_use_it_too(tmp_path, capfd):
    speaking = exercise("04-rate").solution.replace(
        "    # BEGIN", "    print('my schedule', end=chr(10) if step else '')\n    # BEGIN"
    )
    recipe = tiny_recipe(mine=hand_in(tmp_path / "work", speaking), processes=2)
    run = copy_of(finished_run(), tmp_path / "run", "tokenizer", "data")
    (run.directory / "recipe.json").write_text(json.dumps(vars(recipe)))
    run_stage(Run(run.directory), "base")
    said = capfd.readouterr().out
    assert "\nmy schedule" in said and "[rank 1] my schedule" in said
    assert said.count("base: with your 04-rate\n") == 1


CORE = [(e.id, e.wrong[0][0]) for e in STANDING_IN if e.replaces[:5] in ("model", "optim")]


@pytest.mark.parametrize("id, property", CORE)
def test_a_subtly_wrong_answer_is_refused_with_the_reason(tmp_path, id, property):
    recipe = tiny_recipe(mine=hand_in(tmp_path / "work", wrong(id, property)))
    with pytest.raises(UserError) as caught:
        Run.open(recipe, tmp_path / "run")
    said = str(caught.value)
    assert said.startswith(f"your answer to {id} cannot stand for nanochat.")
    assert property in said and said.endswith("or leave `mine` out.")
    assert not (tmp_path / "run").exists()


def test_what_is_not_written_yet_is_left_alone(tmp_path):
    stubs = [e.stub for e in STANDING_IN]
    assert use_mine(tiny_recipe(mine=hand_in(tmp_path / "work", *stubs))) == []


def test_the_books_function_does_not_count_as_an_answer(tmp_path):
    cell = "#| exercise id=04-rate points=1\nfrom nanochat.optim import lr_multiplier"
    with pytest.raises(UserError, match="is what you are asked to write"):
        use_mine(tiny_recipe(mine=hand_in(tmp_path / "work", cell)))


def test_a_process_that_this_one_starts_need_not_check_again(tmp_path, monkeypatch):
    folder = hand_in(tmp_path / "work", exercise("04-rate").solution)
    switch(folder)
    passed = os.environ[mine.PASSED]
    switch("")
    monkeypatch.setattr(mine.Grader, "grade", lambda *_: pytest.fail("checked again"))
    assert switch(folder) == ["04-rate (optim.lr_multiplier)"]
    assert len(passed.split()) == 1


def test_a_folder_that_is_not_there_and_a_package_without_the_book(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such folder; `make work` makes work/"):
        use_mine(tiny_recipe(mine=str(tmp_path / "none")))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bad.ipynb").write_text("no notebook")
    with pytest.raises(UserError, match="bad.ipynb cannot be read as a notebook"):
        use_mine(tiny_recipe(mine=str(tmp_path / "work")))
    monkeypatch.setitem(__import__("sys").modules, "book.mine", None)
    with pytest.raises(UserError, match="run this from a clone of the book"):
        use_mine(tiny_recipe(mine="work"))
