"""book.grading and book.answering: cheats earn what is honest in them, breakage costs its own part.

The sample sheet of three exercises stands for the book's: every rule here is the same for all.
"""

import csv
import io
import json
import random
import re
import tarfile
import weakref
import zipfile

import pytest
import torch
from conftest import ROOT, write_sample
from hypothesis import given, strategies as st

from book import answering
from book.__main__ import main
from book.answering import Answer, Elsewhere, Nursery, error_of, pack, unpack
from book.grading import Grader, all_sheets, grade, hidden_cases, read_answers, submissions
from book.manuscript import BookError, load_book

SHEET = '''
# %% [markdown]
r"""
# Exercises on circles
"""

# %%
#| given
import math

import torch

from nanochat.model import rotate

# %%
from book.graded import check, hint, progress


# %%
#| exercise id=00-softmax points=4 minutes=10 level=2 answer=softmax
def softmax(x):
    """Softmax over the last dimension of x, (..., n) float32."""
    # BEGIN SOLUTION
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)
    # END SOLUTION


# %%
check("00-softmax", softmax)


# %%
#| checks 00-softmax
def rows():
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


@says("agrees with torch", "Exponentials, divided by their sum over the last dimension.")
def _(softmax):
    assert close(softmax(rows()), torch.softmax(rows(), -1))


@says("large numbers do not overflow", "Take the maximum away first.")
def _(softmax):
    assert not softmax(torch.tensor([[1e4, 1e4]])).isnan().any()


# %%
#| hints 00-softmax
hints = ["one", "two", "three"]


# %%
#| wrong 00-softmax: large numbers do not overflow
def softmax(x):
    return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)


# %%
#| wrong 00-softmax: agrees with torch
def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


# %%
#| right 00-softmax
def softmax(x):
    return (x - x.logsumexp(-1, keepdim=True)).exp()


# %%
#| exercise id=00-seconds points=2 minutes=5 level=1 answer=seconds
# Seconds in a week:
# BEGIN SOLUTION
seconds = 7 * 24 * 3600
# END SOLUTION

# %%
check("00-seconds", seconds)


# %%
#| checks 00-seconds
@says("a number of seconds", "Days, hours, seconds of an hour.")
def _(seconds):
    assert close(seconds, 604800)


# %%
#| hints 00-seconds
hints = ["one", "two", "three"]

# %%
#| wrong 00-seconds: a number of seconds
seconds = 7 * 24 * 60

# %%
#| wrong 00-seconds: a number of seconds
seconds = "604800"

# %%
#| right 00-seconds
seconds = 604800.0


# %%
#| exercise id=00-rotary points=4 minutes=20 level=2 answer=rotary replaces=model.rotate
def rotary(x, cos, sin):
    """Rotate the pairs of each head."""
    # BEGIN SOLUTION
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
    # END SOLUTION


# %%
check("00-rotary", rotary)


# %%
#| checks 00-rotary
def example():
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[0.3, 0.7], [0.6, 1.4]])
    return x, angles.cos(), angles.sin()


@says("keeps the length", "A rotation changes no length.")
def _(rotary):
    x, cos, sin = example()
    assert close(rotary(x, cos, sin).norm(), x.norm())


@says("is what the model does", "The first half of the channels pairs with the second.")
def _(rotary):
    assert close(rotary(*example()), rotate(*example()))


# %%
#| hints 00-rotary
hints = ["one", "two", "three"]


# %%
#| wrong 00-rotary: is what the model does
def rotary(x, cos, sin):
    return x


# %%
#| wrong 00-rotary: is what the model does
def rotary(x, cos, sin):
    return -x


# %%
#| right 00-rotary
def rotary(x, cos, sin):
    turn = torch.complex(cos, -sin).unsqueeze(-2)
    turned = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag], -1)
'''

SOFTMAX = """
#| exercise id=00-softmax points=4 minutes=10 level=2 answer=softmax
def softmax(x):
    return torch.softmax(x, -1)
"""
SECONDS = "#| exercise id=00-seconds points=2 minutes=5 level=1 answer=seconds\nseconds = 604_800"
ROTARY = """
#| exercise id=00-rotary points=4 minutes=20 level=2 answer=rotary replaces=model.rotate
def rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
"""
HEAD = "#| exercise id=00-{} points=1 minutes=5 level=1 answer={}\n"


def soft(body, before=""):
    """A cell that answers 00-softmax with a function of this body."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return HEAD.format("softmax", "softmax") + f"{before}\ndef softmax(x):\n{lines}\n"


def notebook(*cells, **more):
    code = [dict(cell_type="code", metadata={}, source=c, outputs=[]) for c in cells]
    code = [dict(c, **c["source"]) if isinstance(c["source"], dict) else c for c in code]
    return json.dumps({"cells": code, "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **more})


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = write_sample(tmp_path_factory.mktemp("book") / "sample")
    (folder / "exercises" / "00_circle.py").write_text(SHEET.lstrip("\n"))
    return load_book(folder)


@pytest.fixture(scope="module")
def grader(book):
    grader = Grader(all_sheets(book))
    with grader.nursery:
        yield grader


@pytest.fixture
def score(grader, tmp_path, monkeypatch):
    """score(notebook text) is what it gets of 10 points; a hanging call costs two seconds here."""
    monkeypatch.setattr(answering, "CALL_SECONDS", 2.0)

    def score(content, name="student.ipynb"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return grader.student([path])["score"]

    return score


def test_the_answers_of_the_sample_are_right_and_the_stubs_are_nothing(score, grader):
    assert score(notebook(SOFTMAX, SECONDS, ROTARY)) == 10
    exercises = grader.sheets[0].exercises.values()
    assert score(notebook(*(e.stub for e in exercises))) == 0
    assert score(notebook(*(e.solution for e in exercises))) == 10


NAN = "return x * float('nan')"
SOURCE = str(ROOT / "exercises" / "03_model.py")
CHEATS = {  # what is tried, and what its honest part deserves: seconds are always right, 2 points
    "writes checks of its own": (
        [soft(NAN), "#| checks 00-softmax\n@says('fine', '')\ndef _(f): pass"], 2),
    "patches torch": (
        [soft(NAN, "torch.allclose = lambda *a, **k: True\n"
              "torch.Tensor.isnan = lambda x: torch.zeros(1)\n"
              "torch.softmax = lambda x, d: x")], 2),
    "patches the checker": (
        [soft(NAN, "import book.graded\nbook.graded.close = lambda *a, **k: True")], 2),
    "patches the checker that is loaded": (
        [soft(NAN, "import sys\nfor m in list(sys.modules.values()):\n"
              "    m.__dict__.update(close=lambda *a, **k: True, examine=None)")], 2),
    "prints a result": ([soft(f"print('00-softmax: 4 of 4 points')\n{NAN}")], 2),
    "keeps outputs of a passed check": (
        [soft(NAN), dict(source='check("00-softmax", softmax)',
         outputs=[{"output_type": "stream", "text": "00-softmax: 4 of 4 points"}])], 2),
    "reads the solutions": (
        [soft(f"text = open({SOURCE!r}).read()\nreturn x.softmax(-1)")], 2),
    "finds the solutions through a link": (
        [soft(f"import os\nos.symlink({str(ROOT / 'exercises')!r}, 's')\n"
              "open('s/03_model.py')\nreturn x.softmax(-1)")], 2),
    "writes the progress file": (
        [soft(f"import json\nopen({str(ROOT / 'work/progress.json')!r}, 'w').write("
              "'{\"00-softmax\": {\"best\": 4}}')\nreturn x.softmax(-1)")], 2),
    "calls the book's own function": (
        [HEAD.format("rotary", "rotary") + "from nanochat.model import rotate as rotary"], 2),
    "calls the book's function by way of the given cell": (
        [HEAD.format("rotary", "rotary") + "def rotary(*a): return rotate(*a)"], 2),
    "returns an object that equals everything": (
        [soft("class Yes(torch.Tensor):\n    def __eq__(self, other): return True\n"
              "    def isnan(self): return torch.zeros(1)\n"
              "return (x * float('nan')).as_subclass(Yes)"),
         HEAD.format("seconds", "seconds") + "class Yes(float):\n"
         "    def __sub__(self, other): return 0.0\n    __rsub__ = __sub__\nseconds = Yes(1)"], 2),
    "speaks to the grader itself": (
        [soft("import os, struct\nfor h in range(64):\n    try: os.write(h, "
              "struct.pack('>II', 13, 0) + b'{\"tuple\":[1]}')\n    except OSError: pass\n"
              "return x.softmax(-1)")], 2),
    "looks for the expected values in memory": (
        [soft("import gc, sys\nframe = sys._getframe()\nwhile frame:\n"
              "    for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
              "        if isinstance(v, torch.Tensor) and v is not x: return v\n"
              "    frame = frame.f_back\n"
              "kinds = {type(o).__name__ for o in gc.get_objects()}\n"
              "found = kinds & {'Result', 'Outcome', 'Exercise', 'Sheet', 'Property'}\n"
              "return x.softmax(-1) if found else x * float('nan')")], 2),
    "reads the grader's memory": (
        [soft("import os\nopen(f'/proc/{os.getppid()}/maps').read()\nreturn x.softmax(-1)")], 2),
    "asks another program": (
        [soft("import subprocess, sys\nsubprocess.run([sys.executable, '-c', '1'])\n"
              "return x.softmax(-1)")], 2),
    "asks the network": (
        [soft("import urllib.request as u\nu.urlopen('http://127.0.0.1')\nreturn x.softmax(-1)")],
        2),
    "kills the grader": ([soft("import os\nos.kill(os.getppid(), 9)\nreturn x.softmax(-1)")], 2),
    "hands in the same answer many times": ([SECONDS, SECONDS + " ", SECONDS + "\n# again"], 2),
    "gives itself points": (
        [dict(source=soft(NAN), metadata={"nbgrader": {
            "grade_id": "00-softmax", "solution": True, "grade": True, "points": 100}})], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_scores_what_its_honest_part_deserves(name, score):
    cells, expected = CHEATS[name]
    assert score(notebook(*cells, SECONDS)) == expected


def test_what_one_student_leaves_behind_helps_nobody(score):
    leave = "open('answer.txt', 'w').write('1')\ntorch.left = torch.softmax\n" + NAN
    assert score(notebook(soft(leave))) == 0
    take = "open('answer.txt').read()\nreturn torch.left(x, -1)"
    assert score(notebook(soft(take))) == 0


FINE = (SECONDS, ROTARY)  # 6 points
BROKEN = {
    "syntax": (notebook(soft("return ("), *FINE), 6),
    "magic and shell lines": (notebook("%%time\n" + SOFTMAX.strip(), *FINE), 6),
    "magic after the mark": (notebook(soft("return x.softmax(-1)", "%time"), *FINE), 10),
    "fails when defined": (notebook(soft(NAN, "1 / 0"), *FINE), 6),
    "endless when defined": (notebook(soft(NAN, "while True: pass"), *FINE), 6),
    "endless when called": (notebook(soft("while True: pass"), *FINE), 6),
    "endless for one case": (
        notebook(soft("while x.max() > 100: pass\nreturn x.softmax(-1)"), *FINE), 8),
    "sleeps": (notebook(soft("import time\ntime.sleep(1000)"), *FINE), 6),
    "sys.exit": (notebook(soft(NAN, "import sys; sys.exit()"), *FINE), 6),
    "os._exit": (notebook(soft("import os; os._exit(0)"), *FINE), 6),
    "dies for one case": (
        notebook(soft("import os\nif x.max() > 100: os._exit(1)\nreturn x.softmax(-1)"), *FINE), 8),
    "segmentation fault": (notebook(soft("import ctypes; ctypes.string_at(0)"), *FINE), 6),
    "prints without end": (notebook(soft("while True: print('x' * 10**6)"), *FINE), 6),
    "prints a lot": (notebook(soft("print('x' * 10**8)\nreturn x.softmax(-1)"), *FINE), 10),
    "returns too much": (notebook(soft("return torch.ones(2**25)"), *FINE), 6),
    "takes all memory": (notebook(soft("return torch.ones(2**36)"), *FINE), 6),
    "fills the disk": (
        notebook(soft("f = open('x', 'wb')\nwhile True: f.write(b'x' * 2**20)"), *FINE), 6),
    "starts processes": (notebook(soft("import os\nwhile True: os.fork()"), *FINE), 6),
    "recurses": (notebook(soft("return softmax(x)"), *FINE), 6),
    "waits for input": (notebook(soft("return float(input())"), *FINE), 6),
    "closes everything": (notebook(soft("import os; os.closerange(0, 99)"), *FINE), 6),
    "an error without words": (
        notebook(soft("class E(Exception):\n    def __str__(self): 1 / 0\nraise E"), *FINE), 6),
    "returns a module": (notebook(soft("return torch"), *FINE), 6),
    "another name": (notebook(SOFTMAX.replace("def softmax", "def my_softmax"), *FINE), 6),
    "another mark": (notebook(SOFTMAX.replace("00-softmax", "00-softmaxx"), *FINE), 6),
    "the mark is deleted": (notebook(SOFTMAX.replace("#| exercise", "# exercise"), *FINE), 6),
    "a missing cell": (notebook(*FINE), 6),
    "a markdown cell": (notebook(dict(cell_type="markdown", source=SOFTMAX), *FINE), 6),
    "source as lines": (notebook(dict(source=SOFTMAX.splitlines(True)), *FINE), 10),
    "helpers in another cell": (
        notebook("def helper(x): return x", soft("return helper(x).softmax(-1)"), *FINE), 6),
    "lone surrogates": (notebook(soft("raise ValueError('\\ud800')"), *FINE), 6),
    "no JSON": ("this is not a notebook", 0),
    "empty": ("", 0),
    "cut off": (notebook(SOFTMAX, *FINE)[:-40], 0),
    "another JSON": ('{"worksheets": []}', 0),
    "cells of another kind": ('{"cells": [1, null, "x"]}', 0),
    "too deep": ("[" * 100_000 + "]" * 100_000, 0),
    "binary": (bytes(range(256)), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_submission_loses_its_own_points(name, score):
    content, expected = BROKEN[name]
    if name == "magic and shell lines":  # the mark must be first, unless metadata holds it
        assert score(content) == expected
        marked = dict(source="%%time\n" + SOFTMAX, metadata={"nbgrader": {
            "grade_id": "00-softmax", "solution": True}})  # fmt: skip
        content, expected = notebook(marked, *FINE), 10
    assert score(content) == expected


def test_words_say_what_went_wrong(grader, tmp_path):
    def words(cell):
        (tmp_path / "s.ipynb").write_text(notebook(cell))
        exercises = grader.student([tmp_path / "s.ipynb"])["chapters"][0]["exercises"]
        return exercises[0]["outcomes"][0]["words"]

    assert "Exponentials, divided by" in words(soft("return x"))
    assert "define in it what it needs" in words(soft("return helper(x)"))
    assert "the cell does not define 'softmax'" in words(SOFTMAX.replace("def s", "def my_s"))
    assert "no cell with the mark" in words(SECONDS)
    assert "SystemExit" in words(soft(NAN, "raise SystemExit"))
    assert words(soft("raise NotImplementedError('your code here')")) == "not written yet"
    rotary = HEAD.format("rotary", "rotary") + "rotary = rotate"
    (tmp_path / "s.ipynb").write_text(notebook(rotary))
    found = grader.student([tmp_path / "s.ipynb"])["chapters"][0]["exercises"][2]["outcomes"]
    assert "nanochat.model.rotate is what you are asked to write" in found[0]["words"]


def test_the_best_of_several_answers_counts(score, grader):
    stub = grader.sheets[0].exercises["00-softmax"].stub
    assert score(notebook(soft(NAN), SOFTMAX, stub)) == 4


def archive(path, files):
    """A .zip or .tar.gz of {name: content}; a content of None is a link to /etc/passwd."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            for name, content in files.items():
                out.writestr(name, content or "")
        return path
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content or "")
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            out.addfile(entry, io.BytesIO((content or "").encode()))
    return path


@pytest.mark.parametrize("end", [".zip", ".tar.gz", ".tgz"])
def test_archives_are_read_and_never_unpacked(tmp_path, end):
    files = {
        "work/exercises/00_circle.ipynb": notebook(SOFTMAX),
        "work/exercises/.ipynb_checkpoints/00_circle.ipynb": notebook(soft(NAN)),
        "../../outside.ipynb": notebook(SECONDS),
        "/absolute.ipynb": notebook(ROTARY),
        "work/notes.txt": "no notebook",
    }
    files |= {} if end == ".zip" else {"link.ipynb": None}
    path = archive(tmp_path / f"ada{end}", files)
    answers, notes = read_answers([path])
    assert sorted(answers) == ["00-rotary", "00-seconds", "00-softmax"] and notes == []
    assert answers["00-softmax"] == [SOFTMAX]
    assert [p.name for p in tmp_path.rglob("*")] == [path.name]


def test_a_broken_archive_and_one_too_large(tmp_path, monkeypatch):
    (tmp_path / "bad.zip").write_bytes(b"PK no archive")
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    for name in ("bad.zip", "bad.tar.gz"):
        answers, (note,) = read_answers([tmp_path / name])
        assert answers == {} and note.startswith(f"{name} cannot be read to its end")
    monkeypatch.setattr("book.grading.FILE_MB", 1)
    path = archive(tmp_path / "large.zip", {"a.ipynb": notebook(SOFTMAX + "#" * 2**20)})
    answers, (note,) = read_answers([path])
    assert answers == {} and "larger than 1 MB" in note


def test_a_class_is_graded_with_hidden_cases_twice_the_same(book, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "submissions"
    (folder / "grace" / "deep").mkdir(parents=True)
    (folder / "ada.ipynb").write_text(notebook(SOFTMAX, SECONDS, ROTARY))
    (folder / "grace" / "a.ipynb").write_text(notebook(SECONDS))
    (folder / "grace" / "deep" / "b.ipynb").write_text(notebook(ROTARY))
    archive(folder / "=1+1.zip", {"x.ipynb": notebook(soft("raise ValueError('<b>&')"))})
    (folder / "readme.txt").write_text("no submission")
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "# %%\n#| checks 00-softmax\n"
        "@says('sums to one', 'Divide by the sum.')\n"
        "def _(softmax):\n    assert close(softmax(torch.ones(3)).sum(), 1.0)\n"
        "@says('a hidden impossibility', '')\ndef _(softmax):\n    assert False\n"
    )
    assert sorted(submissions(folder)) == ["=1+1", "ada", "grace"]
    monkeypatch.chdir(book.root)
    out = ["--hidden", str(hidden), "--out", str(tmp_path / "one")]
    assert main(["grade", str(folder), *out]) == 0
    assert "   9.00 of 10  ada" in capsys.readouterr().out
    grades = json.loads((tmp_path / "one" / "grades.json").read_text())
    assert {n: g["score"] for n, g in grades.items()} == {"ada": 9, "grace": 6, "=1+1": 0}
    rows = list(csv.reader(io.StringIO((tmp_path / "one" / "grades.csv").read_text())))
    assert rows[0][:4] == ["student", "score", "points", "00_circle"]
    assert rows[1] == ["'=1+1", "0", "10", "0", "0", "0", "0"]
    page = (tmp_path / "one" / "feedback" / "=1+1.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page and "sums to one" in page
    sheets = all_sheets(book)
    again = Grader(sheets, hidden_cases(hidden, sheets))
    with again.nursery:
        assert {n: again.student(paths) for n, paths in submissions(folder).items()} == grades


def test_a_submission_that_ends_the_graders_own_process_costs_no_other(book, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "bad.ipynb").write_text(notebook(soft("return x * 0 + 7"), SECONDS))
    (folder / "good.ipynb").write_text(notebook(SOFTMAX, SECONDS))
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "# %%\n#| checks 00-softmax\nimport os\n"
        "@says('is no seven', '')\n"
        "def _(softmax):\n    os._exit(1) if softmax(torch.ones(1)).item() == 7 else None\n"
    )
    grades = grade(book, folder, tmp_path / "out", hidden, workers=1)
    assert {name: one["score"] for name, one in grades.items()} == {"bad": 0, "good": 6}
    assert "grade it by hand" in (tmp_path / "out" / "feedback" / "bad.html").read_text()
    assert grades["good"]["notes"] == []


def test_a_folder_or_a_hidden_file_that_is_of_no_use(book, tmp_path):
    with pytest.raises(BookError, match="there is no folder"):
        grade(book, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BookError, match="holds no notebook"):
        grade(book, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.ipynb").write_text("")
    hidden = tmp_path / "hidden.py"
    hidden.write_text("# %%\n#| checks 00-cube\npass\n")
    with pytest.raises(BookError, match="no exercise is '00-cube'"):
        grade(book, tmp_path / "class", tmp_path / "out", hidden)
    hidden.write_text("# %%\nx = 1\n")
    with pytest.raises(BookError, match="no cell that begins"):
        grade(book, tmp_path / "class", tmp_path / "out", hidden)


HIDDEN = "# %%\n#| checks 00-softmax\n@says('one', '')\ndef _(softmax):\n    assert True\n"
MORE = "\n# %%\n#| checks 00-softmax\n"


def test_two_hidden_cells_of_one_exercise_both_count(book, tmp_path):
    hidden = tmp_path / "hidden.py"
    hidden.write_text(HIDDEN + MORE + "@says('two', '')\ndef _(softmax):\n    assert True\n")
    sheets = all_sheets(book)
    grader = Grader(sheets, hidden_cases(hidden, sheets))
    outcomes = grader.student([])["chapters"][0]["exercises"][0]["outcomes"]
    assert [o["name"] for o in outcomes][2:] == ["one", "two"]


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, r"hidden.py cannot be read \(.*No such file.*\); name a py:percent file"),
        (b"# %%\n\xff", "hidden.py cannot be read .*decode"),
        (HIDDEN + MORE + "x = (", r"hidden.py:9: `x = \(`: this is not Python"),
        (HIDDEN + MORE + "x = 1\nreturn x", r"hidden.py:10: this line fails \(SyntaxError"),
        (HIDDEN + MORE + "x = 1\n\nx = y", r"hidden.py:11: this line fails \(NameError: .*'y'"),
        (HIDDEN + MORE + "@says('two')\ndef _(f): 1", r"hidden.py:9: this line fails \(TypeErr"),
        (HIDDEN + MORE + "exit()", r"hidden.py:9: this line fails \(SystemExit"),
    ],
)
def test_a_hidden_file_that_fails_is_one_sentence_before_grading(
    book, tmp_path, text, expected, monkeypatch, capsys
):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.ipynb").write_text(notebook(SECONDS))
    if text is not None:
        (tmp_path / "hidden.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr("book.grading.in_workers", None)
    monkeypatch.chdir(book.root)
    out = tmp_path / "out"
    options = ["--hidden", str(tmp_path / "hidden.py"), "--out", str(out)]
    assert main(["grade", str(tmp_path / "class"), *options]) == 1
    said = capsys.readouterr().err
    assert re.match(f"{re.escape(str(tmp_path))}/{expected}", said) and said.count("\n") == 1, said
    assert not out.exists()


def test_a_wrong_out_or_number_of_workers_is_one_sentence_before_grading(
    book, tmp_path, monkeypatch, capsys
):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.ipynb").write_text(notebook(SECONDS))
    (tmp_path / "file").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "feedback").write_text("")
    monkeypatch.setattr("book.grading.in_workers", None)
    monkeypatch.chdir(book.root)
    for options, expected in (
        (["--workers", "0"], "--workers is 0; name how many to grade at a time, 1 or more\n"),
        (["--out", str(tmp_path / "file")], f"cannot write to {tmp_path / 'file'} (Not a dir"),
        (["--out", str(tmp_path / "half")], f"cannot write to {tmp_path / 'half'} (File exists"),
    ):
        assert main(["grade", str(tmp_path / "class"), *options]) == 1
        said = capsys.readouterr().err
        assert said.startswith(expected) and said.count("\n") == 1, said


numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    numbers | st.binary(),
    lambda x: (
        st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(st.text() | st.integers(), x)
        | st.sets(numbers)
    ),
    max_leaves=20,
)  # fmt: skip


@given(plain)
def test_data_comes_back_as_it_went(value):
    data = pack((value,))
    (back,) = unpack(data)
    assert back == value and type(back) is type(value)


def test_a_text_as_another_process_has_it_keeps_its_other_hash_on_the_way_to_an_answer_only():
    data = pack((Elsewhere("otter"),))
    (there,), (back,) = unpack(data, function=len), unpack(data)
    assert there == back == "otter" and type(back) is str
    assert hash(there) == hash(Elsewhere("otter")) != hash("otter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "uint8", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_come_back_bit_for_bit(dtype, shape):
    kind = getattr(torch, dtype)
    x = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0)).to(kind)[..., 0]
    data = pack((x, kind, {"k": [x.mT if x.dim() > 1 else x]}))
    back, same, tree = unpack(data)
    assert back.dtype == kind == same and back.shape == x.shape and torch.equal(back, x)
    assert torch.equal(tree["k"][0], x.mT if x.dim() > 1 else x)


def test_errors_keep_their_kind_and_are_harmless():
    assert type(error_of("IndexError", "x")) is IndexError
    assert type(error_of("NotImplementedError", "x")) is NotImplementedError
    for kind in ("SystemExit", "KeyboardInterrupt", "print", "UnicodeDecodeError", "Nothing"):
        assert type(error_of(kind, "x")) is RuntimeError


def test_an_answer_may_be_given_functions():
    with Nursery() as nursery:
        source = "def apply(f, n, *, start): return [f(i + start) for i in range(n)]"
        with Answer(nursery, "", source, "apply") as answer:
            apply = answer.value()
            assert apply(lambda i: i * i, 3, start=1) == [1, 4, 9]
            with pytest.raises(ZeroDivisionError):
                apply(lambda i: 1 / i, 3, start=0)
            assert apply(str, 2, start=0) == ["0", "1"]


def test_an_answer_changes_copies_and_not_what_the_check_compares_with():
    source = "def change(x, items): x.zero_(); items.clear(); return x"
    with Nursery() as nursery, Answer(nursery, "", source, "change") as answer:
        x, items = torch.ones(2), [1]
        assert answer.value()(x, items).tolist() == [0, 0]
    assert x.tolist() == [1, 1] and items == [1]


def test_results_of_functions_live_as_long_as_the_answer_holds_them():
    source = """
def first(f):
    return [f(i).sum().item() for i in range(3)]

def second(f):
    return sum(x.sum().item() for x in [f(i) for i in range(3)])

both = lambda f, keep: second(f) if keep else first(f)
"""
    with Nursery() as nursery, Answer(nursery, "", source, "both") as answer:
        both = answer.value()
        for keep, most in ((False, 1), (True, 2)):
            given, alive = [], []

            def f(i, given=given, alive=alive):
                alive.append(sum(ref() is not None for ref in given))
                x = torch.ones(i + 1)
                given.append(weakref.ref(x))
                return x

            assert both(f, keep) in (6.0, [1.0, 2.0, 3.0])
            assert max(alive) <= 1 if not keep else max(alive) == most


@pytest.mark.skipif(not answering.FORKS, reason="Linux")
def test_a_nursery_that_the_system_kills_is_replaced():
    with Nursery() as nursery:
        for _ in range(2):
            with Answer(nursery, "", "def f(): return 3", "f") as answer:
                assert answer.value()() == 3
                nursery.mother.kill()
                nursery.mother.wait()


def test_where_there_is_no_fork_each_answer_gets_an_interpreter(monkeypatch):
    monkeypatch.setattr(answering, "FORKS", False)
    with Nursery() as nursery, Answer(nursery, "k = 3", "def f(x): return k * x", "f") as answer:
        assert answer.value()(random.Random(0).randrange(9)) % 3 == 0
        assert nursery.lone
    assert not nursery.lone
