"""book.check, book.sheets and book.learning: what is stale is found and shown."""

import json
import re

import pytest

from book import learning
from book.__main__ import main
from book.check import check
from book.learning import copy, work
from book.manuscript import BookError, load_book
from book.printing import print_book
from book.sheets import sheet_files, without_solutions


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def problems(folder):
    return check(load_book(folder), [])


def test_a_printed_book_is_fresh(printed, monkeypatch, capsys):
    assert problems(printed) == []
    monkeypatch.chdir(printed)
    assert main(["check"]) == 0
    edit(printed / "nanochat" / "circle.py", "TAU / 2", "TAU / 3")
    assert main(["check"]) == 1
    assert "1 problems" in capsys.readouterr().err


def test_an_edited_package_file(printed):
    edit(printed / "nanochat" / "circle.py", "TAU / 2", "TAU / 3")
    (found,) = problems(printed)
    assert found.startswith("nanochat/circle.py: differs from its source; edit the source, then")
    assert "-    return TAU / 3 * r**2" in found and "+    return TAU / 2 * r**2" in found


def test_a_package_file_that_no_chapter_exports(printed):
    (printed / "nanochat" / "extra.py").write_text("x = 1\n")
    (found,) = problems(printed)
    assert found == "nanochat/extra.py: nothing in the book makes it or lists it"


def test_a_missing_package_file(printed):
    (printed / "nanochat" / "cut.py").unlink()
    assert problems(printed) == ["nanochat/cut.py: missing; run `python -m book export`"]


@pytest.mark.parametrize(
    "old, new, shown",
    [
        ('print(\\"done\\"', 'print(\\"fine\\"', '+print("done"'),
        ("The area is", "The surface is", "+The area is"),
    ],
)
def test_an_edited_cell_of_a_printed_notebook(printed, old, new, shown):
    edit(printed / "chapters" / "00_circle.ipynb", old, new)
    (found,) = problems(printed)
    assert found.startswith("chapters/00_circle.ipynb: differs from its source")
    assert shown in found


def test_an_edited_output_of_a_printed_notebook(printed):
    edit(printed / "chapters" / "00_circle.ipynb", "done 12.566", "done 12.567")
    (found,) = problems(printed)
    assert "an output was edited by hand; run `python -m book print 00`" in found


def test_edited_metadata_of_a_printed_notebook(printed):
    edit(printed / "chapters" / "00_circle.ipynb", '"name": "python3"', '"name": "other"')
    (found,) = problems(printed)
    assert '+   "name": "python3"' in found


def test_a_printed_notebook_saved_by_something_else(printed):
    path = printed / "chapters" / "00_circle.ipynb"
    path.write_text('{"cells": []}')
    assert any("00_circle.ipynb is not a printed notebook" in p for p in problems(printed))


def test_a_missing_and_a_stray_notebook(printed):
    (printed / "chapters" / "00_circle.ipynb").rename(printed / "chapters" / "07_other.ipynb")
    found = problems(printed)
    assert "chapters/00_circle.ipynb: missing; run `python -m book print 00`" in found
    assert any(p.startswith("chapters/07_other.ipynb: nothing in the book") for p in found)


def test_a_stale_output_of_a_changed_cell(printed):
    edit(printed / "chapters" / "00_circle.py", "return 3 * r * r", "return 4 * r * r")
    print_book(load_book(printed), [], run=False)  # text and code are refreshed, outputs are not
    (found,) = problems(printed)
    assert "outputs are stale from code cell 5 (`def area(r):`) to cell 10" in found


def test_a_stale_output_because_a_parameter_changed(printed):
    edit(printed / "book.toml", "radius = 2", "radius = 3")
    assert any("outputs are stale from code cell 1" in p for p in problems(printed))


def test_a_changed_text_is_mended_without_execution(printed):
    edit(printed / "chapters" / "00_circle.py", "The area is", "Its area is")
    (found,) = problems(printed)
    assert "`python -m book print 00 --no-execute`" in found
    print_book(load_book(printed), [], run=False)
    assert problems(printed) == []


def test_a_directive_typo(printed):
    edit(printed / "chapters" / "00_circle.py", "#| test", "#| tset")
    found = problems(printed)
    assert any(re.search(r"00_circle.py:\d+: misspelt directive `#\| tset`", p) for p in found)


def test_an_undefined_exported_name(printed):
    edit(printed / "chapters" / "00_circle.py", "return TAU / 2", "return TAUS / 2")
    assert any("the name 'TAUS' is neither defined" in p for p in problems(printed))


def test_a_missing_manuscript(printed):
    (printed / "chapters" / "01_ring.py").unlink()
    assert any("01_ring.py: the manuscript is missing" in p for p in problems(printed))


def test_a_manuscript_that_book_toml_does_not_list(printed):
    (printed / "chapters" / "05_extra.py").write_text("# %%\nx = 1\n")
    (found,) = problems(printed)
    assert found.startswith("chapters/05_extra.py: nothing in the book")


def test_a_stale_table_of_contents(printed):
    edit(printed / "book.toml", 'title = "Rings"', 'title = "Annuli"')
    assert any(p.startswith("chapters/README.md: differs") for p in problems(printed))


@pytest.mark.parametrize("name", ["00_circle.ipynb", "solutions/00_circle.ipynb", "POINTS.md"])
def test_an_edited_sheet(printed, name):
    edit(printed / "exercises" / name, "square", "cube")
    (found,) = problems(printed)
    assert found.startswith(f"exercises/{name}: differs from its source")


def test_a_stray_sheet(printed):
    (printed / "exercises" / "01_ring.ipynb").write_text("{}")
    (found,) = problems(printed)
    assert "nothing in the book makes it" in found


def code(text):
    return ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]


def test_sheets_take_the_solution_out_and_solutions_keep_it(sample):
    files = sheet_files(load_book(sample))
    learner = code(files["exercises/00_circle.ipynb"])[2]
    solution = code(files["exercises/solutions/00_circle.ipynb"])[2]
    assert learner.endswith('    raise NotImplementedError("your code here")')
    assert "return x * x" not in learner and "SOLUTION" not in learner
    assert solution.endswith("    # BEGIN SOLUTION\n    return x * x\n    # END SOLUTION")
    points = files["exercises/POINTS.md"]
    assert "| 00-square | 2 | 5 | 1 |" in points and "| all | 1 | 2 | 5 | |" in points


def test_a_value_is_none_in_the_stub_and_a_helper_still_raises():
    head = "#| exercise id=00-x points=1 minutes=5 level=1 answer=guess\n"
    value = head + "# BEGIN SOLUTION\nn = 3\nguess = n * 2\n# END SOLUTION"
    assert without_solutions(value) == head + "guess = None  # your answer"
    helper = head + "# BEGIN SOLUTION\nguesses = 3\n# END SOLUTION"
    assert without_solutions(helper) == head + 'raise NotImplementedError("your code here")'


def test_two_solution_blocks_at_different_depths(sample):
    path = sample / "exercises" / "00_circle.py"
    block = "# BEGIN SOLUTION\nX = 1\n# END SOLUTION\n\n\n"
    edit(path, "def square", block + "def square")
    files = sheet_files(load_book(sample))
    learner, solution = (
        code(files[f"exercises/{p}00_circle.ipynb"])[2] for p in ("", "solutions/")
    )
    assert learner.count("raise NotImplementedError") == 2 and "X = 1" not in learner
    assert "\nX = 1\n" in solution and "return x * x" in solution


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("# END SOLUTION", "# END", "`# BEGIN SOLUTION` has no partner"),
        ("# BEGIN SOLUTION", "# Begin solution", "no partner or is misspelt"),
        (" minutes=5", "", "write `#| exercise id=... points=... minutes=... level="),
        ("points=2", "points=two", "points, minutes and level are whole numbers"),
        ("# BEGIN SOLUTION\n    return x * x\n    # END SOLUTION", "return 1", "an exercise needs"),
        ("#| exercise", "#| excercise", "misspelt directive"),
        (" answer=square", "", "answer=...`, and `replaces=module.name` where it fits"),
        ("id=00-square", "id=01-square", "the id '01-square' does not start with 00-"),
        ("points=2", "points=9", "points=9 is not between 1 and 5"),
        ("#| checks 00-square", "#| checks 00-cube", "no exercise has this id"),
        ("#| right 00-square", "#| wrong 00-square: squares", "needs two `#| wrong` cells or more"),
        ("#| right 00-square", "#| checks 00-square", "a second `#| checks 00-square`"),
        ('"Multiply.", ', "", "write `hints = [...]` with three texts"),
        ('check("00-square", square)', 'check("00-square")', "no cell `check("),
        ("    return x * x", "    return (x", "this is not Python"),
        ("    # BEGIN SOLUTION", "    if x:\n    # BEGIN SOLUTION", "not Python"),
    ],
)
def test_a_bad_sheet_is_refused(printed, old, new, expected):
    edit(printed / "exercises" / "00_circle.py", old, new)
    assert any(expected in p for p in problems(printed)), problems(printed)


def test_an_exercise_id_is_unique_and_a_sheet_has_a_chapter(sample):
    path = sample / "exercises" / "00_circle.py"
    text = path.read_text()
    (sample / "exercises" / "09_none.py").write_text(text)
    (sample / "exercises" / "01_ring.py").write_text(text)
    task = text[text.index("#| exercise") : text.index('# %%\ncheck("')]
    path.write_text(text + f"# %%\n{task}")
    with pytest.raises(BookError) as caught:
        sheet_files(load_book(sample))
    first, second, third = str(caught.value).splitlines()
    assert first == "exercises/00_circle.py:65: the id '00-square' is used twice"
    assert second == "exercises/01_ring.py:15: the id '00-square' does not start with 01-"
    assert third == "exercises/09_none.py: no chapter has this name"


def test_a_learners_copy_is_never_overwritten(printed, capsys):
    book = load_book(printed)
    copy = printed / "work" / "00_circle.ipynb"
    work(book, [])
    assert copy.read_bytes() == (printed / "chapters" / "00_circle.ipynb").read_bytes()
    assert (printed / "work" / "exercises" / "00_circle.ipynb").is_file()
    capsys.readouterr()
    work(book, [])
    assert capsys.readouterr().out == ""

    edit(printed / "chapters" / "00_circle.ipynb", "The area is", "Its area is")
    work(book, ["00"])  # nobody changed the copy: it is replaced
    assert "Its area is" in copy.read_text()

    edit(copy, "Its area is", "I think its area is")
    edit(printed / "chapters" / "00_circle.ipynb", "Its area is", "An area is")
    work(book, ["00"])
    assert "I think its area is" in copy.read_text()
    new = printed / "work" / "00_circle.new.ipynb"
    assert "An area is" in new.read_text()
    assert "wrote work/00_circle.new.ipynb (work/00_circle.ipynb has your changes and is kept)" in (
        capsys.readouterr().out
    )
    edit(new, "An area is", "My area is")
    edit(printed / "chapters" / "00_circle.ipynb", "An area is", "The area is")
    work(book, ["00"])
    assert "My area is" in new.read_text()
    assert (printed / "work" / "00_circle.new2.ipynb").is_file()


@pytest.mark.parametrize("text", ["{", "[1]", "\0", None])
def test_without_a_readable_record_a_copy_that_is_what_was_printed_is_nobodys(printed, text):
    book, record = load_book(printed), printed / "work" / ".copies.json"
    work(book, ["00"])
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    work(book, ["00"])  # sees whose they are
    edit(printed / "chapters" / "00_circle.ipynb", "The area is", "Its area is")
    work(book, ["00"])
    assert "Its area is" in (printed / "work" / "00_circle.ipynb").read_text()
    assert not (printed / "work" / "00_circle.new.ipynb").exists()


def test_what_was_copied_before_an_interruption_is_on_record(printed, monkeypatch):
    def interrupted(folder, name, *rest):
        if name.startswith("exercises/"):
            raise KeyboardInterrupt
        copy(folder, name, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(learning, "copy", interrupted)
        work(load_book(printed), ["00"])
    edit(printed / "chapters" / "00_circle.ipynb", "The area is", "Its area is")
    work(load_book(printed), ["00"])
    assert "Its area is" in (printed / "work" / "00_circle.ipynb").read_text()
    assert not (printed / "work" / "00_circle.new.ipynb").exists()


def test_a_copy_that_cannot_be_written_is_one_sentence(printed, monkeypatch, capsys):
    (printed / "work").write_text("a file where a folder should be")
    monkeypatch.chdir(printed)
    assert main(["work"]) == 1
    assert capsys.readouterr().err.startswith("cannot write ")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"chapters": {"00_circle": {"seconds": null}}}',
        '{"chapters": {}, "machine": {}}',
    ],
)
def test_damaged_times_are_named(printed, text, monkeypatch, capsys):
    monkeypatch.chdir(printed)
    for name, verbs in (("chapters/TIMES.json", ["export"]), ("runs/chapters.json", ["run"])):
        (printed / name).parent.mkdir(exist_ok=True)
        (printed / name).write_text(text)
        assert main(verbs) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"{name} is damaged") and said.count("\n") == 1
        (printed / name).unlink()


def test_a_copy_needs_something_printed(sample):
    with pytest.raises(BookError, match="no printed notebook to copy"):
        work(load_book(sample), [])
