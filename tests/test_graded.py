"""book.graded: check, hint and progress as a learner meets them."""

import json
import math

import pytest
import torch
from conftest import write_sample

from book import graded
from book.graded import Progress, check, close, examine, find, hint, namespace_of, progress
from book.manuscript import BookError
from book.sheets import read_sheet


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The sample book as the one that check, hint and progress belong to."""
    folder = write_sample(tmp_path / "sample")
    monkeypatch.setattr(graded, "ROOT", folder)
    monkeypatch.setattr(graded, "EXERCISES", folder / "exercises")
    monkeypatch.setattr(graded, "WORK", folder / "work")
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.setattr(find, "__defaults__", (folder / "exercises",))
    return folder


def record(course):
    return json.loads((course / "work" / "progress.json").read_text())["00-square"]


def unwritten(x):
    raise NotImplementedError("your code here")


def test_check_names_properties_and_likely_mistakes(course):
    result = check("00-square", lambda x: abs(x) * 2)
    assert result.score == 1
    assert str(result).splitlines() == [
        "00-square: 1 of 2 points",
        "  FAILED  squares numbers",
        "          A square is a number times itself.",
        "  passed  is never negative",
    ]
    page = result._repr_html_()
    assert "\u2717" in page and "\u2713" in page and "A square is a number" in page
    assert str(check("00-square", unwritten)).count("not written yet") == 2
    assert str(check("00-square", None)).count("not written yet") == 2
    said = str(check("00-square", lambda x: [][0]))
    assert said.count("IndexError: list index out of range") == 2
    assert "<b>" not in check("00-square", lambda x: {}["<b>"])._repr_html_().split("table")[1]


def test_an_answer_that_exits_or_is_no_function_fails_its_properties(course):
    for answer in (None, 3, "x", lambda: None, lambda x: exit()):
        assert check("00-square", answer).score == 0


def test_the_best_score_is_kept(course):
    check("00-square", unwritten)
    assert record(course) == {"best": 0, "tries": 1, "hints": 0}
    check("00-square", lambda x: x * x)
    check("00-square", unwritten)
    assert record(course) == {"best": 2, "tries": 3, "hints": 0}


def test_three_hints_in_rising_help(course, capsys):
    for n in (1, 2, 3, 3):
        hint("00-square")
        assert len(capsys.readouterr().out.splitlines()) == n
    hint("00-square")
    assert capsys.readouterr().out.splitlines()[2] == "hint 3 of 3: `x * x`"
    assert record(course)["hints"] == 3


def test_progress_is_a_table_with_bars(course):
    assert str(progress()).splitlines() == [
        "00 Circles       0 of   2",
        "all              0 of   2",
    ]
    check("00-square", lambda x: x * x)
    assert "2 of   2" in str(progress())
    page = progress()._repr_html_()
    assert "<b>2 of 2 points</b>" in page and "width:300px" in page


def test_a_progress_file_with_more_points_than_there_are_shows_no_more(course):
    check("00-square", unwritten)
    graded.write_progress({"00-square": {"best": 99, "tries": 1, "hints": 0}})
    assert progress().rows == [("00 Circles", 2, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"00-square": 3}',
        '{"00-square": {}}',
        '{"00-square": {"best": null, "tries": 1, "hints": 0}}',
        '{"00-square": {"best": 1, "tries": "1", "hints": 0}}',
        '{"00-square": {"best": NaN, "tries": 1, "hints": 0}}',
        '{"00-cube": {"best": 1, "tries": 1, "hints": -1}}',
    ],
)
def test_an_unreadable_progress_file_is_put_aside(course, text, capsys):
    path = course / "work" / "progress.json"
    path.parent.mkdir()
    path.write_text(text)
    assert check("00-square", lambda x: x * x).score == 2
    assert "is now progress.unreadable.json" in capsys.readouterr().out
    assert (course / "work" / "progress.unreadable.json").read_text() == text
    assert record(course)["best"] == 2


def test_a_second_unreadable_progress_file_does_not_replace_the_first(course, capsys):
    (course / "work").mkdir()
    for number in ("", "2", "3"):
        (course / "work" / "progress.json").write_text(f"unreadable {number}")
        progress()
        assert f"is now progress.unreadable{number}.json" in capsys.readouterr().out
    for number in ("", "2", "3"):
        text = (course / "work" / f"progress.unreadable{number}.json").read_text()
        assert text == f"unreadable {number}"


def test_an_id_that_does_not_exist_is_one_sentence(course):
    with pytest.raises(BookError, match="there is no exercise '00-cube'; there are 00-square"):
        check("00-cube", None)
    with pytest.raises(BookError, match="there is no sheet of exercises for '77-cube'"):
        check("77-cube", None)


def test_under_nbgrader_a_check_is_a_number_and_writes_nothing(course, monkeypatch, capsys):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check("00-square", lambda x: abs(x) * 2) == 1.0
    assert "A square is a number times itself." in capsys.readouterr().out
    assert not (course / "work").exists()


def test_what_needs_a_gpu_is_not_verified_without_one_and_never_passed(course, monkeypatch):
    path = course / "exercises" / "00_circle.py"
    text = path.read_text()
    old = '"Minus times minus is plus.")'
    assert old in text
    path.write_text(text.replace(old, '"Minus times minus is plus.", gpu=True)'))
    sheet = read_sheet(path)
    exercise, names = sheet.exercises["00-square"], namespace_of(sheet)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = examine(exercise, names, lambda x: x * x)
    assert result.score == 1
    assert "unseen  is never negative\n          not verified here: it needs a GPU" in str(result)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert examine(exercise, names, lambda x: x * x).score == 2


def test_close_compares_kind_shape_dtype_and_value():
    x = torch.tensor([1.0, 2.0])
    assert close(x, x.clone()) and close(1.0 + 1e-7, 1) and close(torch.tensor(2.0), 2)
    wrong = [x.double(), x[:1], x + 1e-3, x * math.nan, [1.0, 2.0], None]
    assert not any(close(found, x) for found in wrong)
    assert not any(close(found, 1.0) for found in (True, "1", None, math.nan, x, 1.001))


def test_rows_of_progress_add_up():
    shown = str(Progress([("a", 1.5, 3), ("bb", 2, 4)])).splitlines()
    assert shown == ["a       1.5 of   3", "bb        2 of   4", "all     3.5 of   7"]
