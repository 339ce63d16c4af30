"""book.manuscript and book.export: what an exported module looks like, and what is refused."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from book.__main__ import main
from book.export import export, package_files, render_imports
from book.manuscript import BookError, load_book, read_cells

CIRCLE = '''"""Circles and their areas.

Exported from chapters/00_circle.py (chapter 00, Circles); edit there, not here.
"""

import math
from collections.abc import Iterable

__all__ = ["TAU", "area", "areas"]


# Twice pi.
TAU = 2 * math.pi


def area(r: float) -> float:
    """The area of a circle of radius `r`."""
    return TAU / 2 * r**2


def areas(radii: Iterable[float]) -> list[float]:
    return [area(r) for r in radii]
'''

RING = '''"""Rings.

Exported from chapters/01_ring.py (chapter 01, Rings); edit there, not here.
"""

from nanochat.circle import area
from nanochat.cut import cut

__all__ = ["ring"]


def ring(outer: float, inner: float) -> float:
    return cut(area(outer), area(inner))


if __name__ == "__main__":
    print(ring(2, 1))
'''


def read(folder, name):
    return (folder / "nanochat" / name).read_text(encoding="utf-8")


def refusals(sample, *cells, chapter="01_ring"):
    """What the exporter says about a chapter that consists of these cells."""
    head = "# %%\n#| default_exp ring\n\n# %%\n#| export cut\nCUT = 1\n"
    text = head + "".join(f"\n# %%\n{cell}\n" for cell in cells)
    (sample / "chapters" / f"{chapter}.py").write_text(text, encoding="utf-8")
    book = load_book(sample)
    files, problems = package_files(book, book.select([chapter]))
    return problems or files["nanochat/ring.py"]


def test_modules_read_like_code_a_person_wrote(sample):
    export(load_book(sample), [])
    assert read(sample, "circle.py") == CIRCLE
    assert read(sample, "ring.py") == RING
    init = read(sample, "__init__.py")
    assert '__version__ = "0.0.1"' in init and "circle  chapters/00_circle.py" in init
    assert "import" not in init.split('"""')[2]


def test_exported_modules_pass_the_formatter_and_run(sample):
    export(load_book(sample), [])
    ruff = [sys.executable, "-m", "ruff", "--config", str(ROOT / "pyproject.toml")]
    for arguments in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [*ruff[:3], *arguments, *ruff[3:], "nanochat"],
            cwd=sample,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.ring"], cwd=sample, capture_output=True, text=True
    )
    assert done.stdout.startswith("9.42"), done.stderr


def test_export_is_idempotent_and_stable(sample, capsys):
    book = load_book(sample)
    export(book, [])
    stamps = {p: p.stat().st_mtime_ns for p in (sample / "nanochat").glob("*.py")}
    first = {p: p.read_bytes() for p in stamps}
    capsys.readouterr()
    export(book, [])
    assert capsys.readouterr().out == ""
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert {p: p.read_bytes() for p in stamps} == first


def test_one_broken_chapter_does_not_stop_another(sample):
    (sample / "chapters" / "00_circle.py").write_text("# %%\n#| export\nx = (\n")
    book = load_book(sample)
    export(book, ["01"])
    assert read(sample, "ring.py") == RING
    (sample / "nanochat" / "ring.py").unlink()
    with pytest.raises(BookError, match=r"00_circle.py:3: .*not Python"):
        export(book, [])
    assert read(sample, "ring.py") == RING


def test_a_missing_manuscript_is_a_note_or_strictly_an_error(sample, capsys):
    (sample / "chapters" / "00_circle.py").unlink()
    export(load_book(sample), [])
    assert "note: chapters/00_circle.py: the manuscript is missing" in capsys.readouterr().out
    with pytest.raises(BookError, match="missing"):
        export(load_book(sample), [], strict=True)


REFUSED = {
    "undefined name": (["#| export\ndef f():\n    return missing"], "'missing' is neither"),
    "undefined in a class": (["#| export\nclass A:\n    x = missing"], "'missing' is neither"),
    "undefined in a decorator": (["#| export\n@missing\ndef f(): ..."], "'missing' is neither"),
    "undefined in a default": (["#| export\ndef f(x=missing): ..."], "'missing' is neither"),
    "undefined in an annotation": (["#| export\ndef f(x: missing): ..."], "'missing' is neither"),
    "undefined in quotes": (["#| export\ndef f(x: 'list[missing]'): ..."], "'missing' is neither"),
    "undefined global": (["#| export\ndef f():\n    global g\n    return g"], "'g' is neither"),
    "chapter-only name": (["help_me = 1", "#| export\nX = help_me"], "'help_me' is neither"),
    "chapter-only import": (["import math", "#| export\nX = math.pi"], "line 9 imports it without"),
    "notebook name": (["#| export\ndef f():\n    display(1)"], "'display' is neither"),
    "exported twice": (["#| export\nX = 1", "#| export\nX = 2"], r"'X' is exported twice"),
    "twice in one cell": (["#| export\nX = 1\nX = 2"], r"'X' is exported twice"),
    "in two modules": (["#| export\nCUT = 2"], r"'CUT' is exported twice \(also to"),
    "import and definition": (["#| export\nimport math\nmath = 1"], "already means something"),
    "two imports": (
        ["#| export\nfrom math import pi\nX = pi", "#| export\nfrom cmath import pi"],
        "'pi' already means something else",
    ),
    "later module": (["#| export\nfrom nanochat.last import x\nY = x"], "later chapter 02"),
    "later, inside": (["#| export\ndef f():\n    import nanochat.last"], "later chapter 02"),
    "later, not exported": (["from nanochat import last"], "later chapter 02"),
    "unknown module": (
        ["#| export\nimport nanochat.nowhere"],
        "no chapter exports nanochat.nowhere",
    ),
    "itself": (["#| export\nfrom nanochat.ring import f"], "would import itself"),
    "relative": (["#| export\nfrom .circle import area"], "relative import"),
    "star": (["#| export\nfrom math import *"], r"`import \*` hides names"),
    "percent magic": (["#| export\n%matplotlib inline"], "magic or shell line"),
    "commented magic": (["#| export\n# %timeit x\nX = 1"], "magic or shell line"),
    "shell": (["#| export\n!ls"], "magic or shell line"),
    "call": (["#| export\nprint(1)"], r"the call `print\(...\)` is work at import time"),
    "loop": (["#| export\nfor i in range(3):\n    X = i"], "a `for` statement is work"),
    "with": (["#| export\nwith open('x') as f:\n    pass"], "a `with` statement is work"),
    "reading": (["#| export\nX = open('x')"], r"`open\(...\)` is work at import time"),
    "deep reading": (["#| export\nX = [open('x').read()]"], r"`open\(...\)` is work"),
    "work in a class": (["#| export\nclass A:\n    print(1)"], r"`print\(...\)` is work"),
    "condition": (["#| export\nif 1 < 2:\n    X = 1"], "an `if` that runs at import time"),
    "item assignment": (["#| export\nimport os\nos.environ['A'] = '1'"], "not the definition"),
    "assertion": (["#| export\nassert True"], "a `assert` statement is work"),
    "spaced directive": (["# | export\nX = 1"], r"did you mean `#\| export`"),
    "tight directive": (["#|export\nX = 1"], r"did you mean `#\| export`"),
    "misspelt directive": (["#| exprot\nX = 1"], r"did you mean `#\| export`"),
    "bare directive": (["# export\nX = 1"], r"did you mean `#\| export`"),
    "unknown directive": (["#| hide\nX = 1"], "misspelt directive"),
    "late directive": (["X = 1\n#| export"], "must stand on the first lines"),
    "late spaced directive": (["X = 1\n# | test"], r"did you mean `#\| test`"),
    "directive twice": (["#| export\n#| export\nX = 1"], "wrong arguments or comes twice"),
    "exported test": (["#| export\n#| test\nX = 1"], "either exported or a test"),
    "exercise in a chapter": (["#| exercise id=1\nX = 1"], "belongs in exercises/"),
    "other chapter's module": (
        ["#| export circle\nX = 1"],
        "no module 'circle'; book.toml gives this chapter ring, cut",
    ),
    "two defaults": (["#| default_exp ring"], "a second default_exp"),
    "syntax": (["x = (", "y = 1"], "01_ring.py:9: .*this is not Python"),
    "nothing exported": (["x = 1"], "nothing is exported to nanochat.ring"),
    "circular": (
        ["#| export\ndef f():\n    return g()", "#| export cut\ndef g():\n    return f()"],
        "nanochat.cut and nanochat.ring import each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence_with_file_and_line(sample, case):
    cells, expected = REFUSED[case]
    toml = sample / "book.toml"
    last = '\n[[chapter]]\nname = "02_last"\ntitle = ""\nbuilds = ""\nmodules = { last = "" }\n'
    toml.write_text(toml.read_text() + last)
    problems = refusals(sample, *cells)
    assert isinstance(problems, list), problems
    assert any(re.search(expected, p) for p in problems), problems
    assert all(re.match(r"(chapters/)?01_ring\.py:\d+: \S", p) for p in problems), problems
    assert len(problems) <= 2, problems


ACCEPTED = {
    "comprehension": "X = [a * b for a in range(3) for b in range(a)]",
    "walrus": "def f(xs):\n    return [y for x in xs if (y := x)]",
    "except as": "def f():\n    try:\n        f()\n    except OSError as e:\n        print(e)",
    "class scope": "class A:\n    n: int = 2\n    m = n * 2\n\n    def f(self):\n        pass",
    "nested function": "def f():\n    def g():\n        return h()\n\n    h = g\n    return g",
    "recursion and later use": "def f():\n    return g()\n\n\ndef g():\n    return f()",
    "regex": "import re\n\nWORD = re.compile('a')",
    "dtype": "import numpy as np\n\nSMALL = np.float16",
    "path": "from pathlib import Path\n\nHERE = Path('x')",
    "sets": "NAMES = frozenset({'a'})\nA, B = 1, 2",
    "union": "from typing import Union\n\nNumber = Union[int, float]",
    "named tuple": "from typing import NamedTuple\n\n\nclass P(NamedTuple):\n    x: int",
    "dataclass": (
        "from dataclasses import dataclass, field\n\n\n@dataclass\nclass D:\n"
        "    x: list = field(default_factory=list)\n    y: 'D | None' = None"
    ),
    "optional import": "try:\n    import wandb\nexcept ImportError:\n    wandb = None\n\nX = wandb",
    "method from outside": "class A:\n    pass\n\n\ndef f(self):\n    return 1\n\n\nA.f = f",
    "lambda": "LOAD = lambda p: open(p)",
    "dunder": "def f():\n    return __file__, __name__",
    "literal": "from typing import Literal\n\n\ndef f(x: Literal['some words']):\n    return x",
    "global": "_cache = None\n\n\ndef f():\n    global _cache\n    _cache = 1",
    "lambda in loop": "def f(names):\n    return {n: (lambda n=n: n) for n in names}",
    "percent in a string": 'TEXT = """\n%d of %d\n!important\n#| not a directive\n"""',
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_good_code_is_accepted_and_runs(sample, case, tmp_path):
    text = refusals(sample, "#| export\n" + ACCEPTED[case])
    assert isinstance(text, str), text
    path = tmp_path / "exported.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("exported", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported"] = module
    spec.loader.exec_module(module)
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_chapter_only_cell_may_redefine_an_exported_name(sample):
    text = refusals(
        sample, "def f():\n    return 'naive'", "#| export\ndef f():\n    return 1", "f = 3"
    )
    assert "naive" not in text and "return 1" in text


def test_imports_are_merged_sorted_and_used(sample):
    text = refusals(
        sample,
        "#| export\nfrom nanochat.circle import area\nimport torch\nimport os, sys\nimport re",
        "#| export\nimport torch.nn.functional as F\nimport json  # noqa: F401\nimport os",
        "#| export\nfrom __future__ import annotations\nfrom typing import Any, Optional as Maybe\n"
        "from numpy import zeros, ndarray, ALLOW_THREADS\n\n\ndef f(x: Any, m: Maybe) -> ndarray:\n"
        "    return os, sys, torch, F, area, zeros, ALLOW_THREADS",
    )
    imports = text.split('"""')[2].split("__all__")[0].strip()
    assert imports == (
        "from __future__ import annotations\n\n"
        "import json\nimport os\nimport sys\nfrom typing import Any, Optional as Maybe\n\n"
        "import torch\nimport torch.nn.functional as F\n"
        "from numpy import ALLOW_THREADS, ndarray, zeros\n\n"
        "from nanochat.circle import area"
    )


def test_render_imports_wraps_long_lines():
    from book.export import Import

    names = [f"a_rather_long_name_{i}" for i in range(6)]
    block = render_imports([Import("nanochat.x", n, "", True, "") for n in names])[0]
    assert block.startswith("from nanochat.x import (\n    a_rather") and block.endswith(",\n)")


def test_a_preview_chapter_may_look_ahead_in_its_own_cells_only(sample):
    toml = sample / "book.toml"
    toml.write_text(
        toml.read_text().replace('builds = "the area of a circle"', 'builds = ""\npreview = true')
    )
    path = sample / "chapters" / "00_circle.py"
    path.write_text(path.read_text() + "\n\n# %%\nfrom nanochat.ring import ring\n")
    book = load_book(sample)
    assert package_files(book, book.select(["00"]))[1] == []
    path.write_text(path.read_text() + "\n\n# %%\n#| export\nfrom nanochat.cut import cut\n")
    assert "later chapter 01" in package_files(book, book.select(["00"]))[1][0]


def test_cells_are_read_with_their_lines_tags_and_kinds(sample):
    cells = read_cells(sample / "chapters" / "00_circle.py")
    assert [c.kind for c in cells[:3]] == ["markdown", "code", "code"]
    assert cells[2].tags == ("parameters",)
    lines = (sample / "chapters" / "00_circle.py").read_text().splitlines()
    for cell in cells[1:]:
        assert lines[cell.line - 1] == cell.source.split("\n")[0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("#%%\nx = 1\n", "write a cell marker as"),
        ("# %%time\nx = 1\n", "magic|outside of any cell"),
        ('# %% tags=["parametres"]\nx = 1\n', "unknown tag 'parametres'"),
        ("# %% title\nx = 1\n", "only tags="),
        ("x = 1\n\n# %%\ny = 1\n", "outside of any cell"),
    ],
)
def test_a_bad_marker_is_refused(tmp_path, text, expected):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(BookError, match=expected):
        read_cells(path)


def test_the_command_line_says_what_is_wrong_and_exits_1(sample, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(sample / "chapters")
    assert main(["export", "7"]) == 1
    assert "there is no chapter '7'; there are 00, 01" in capsys.readouterr().err
    assert main(["export", "1"]) == 0
    assert read(sample, "ring.py") == RING
    monkeypatch.chdir(tmp_path)
    assert main(["export"]) == 1
    assert "no book.toml" in capsys.readouterr().err


def test_a_module_belongs_to_one_chapter(sample):
    toml = sample / "book.toml"
    toml.write_text(toml.read_text().replace('cut = "Cutting"', 'circle = "Again"'))
    with pytest.raises(BookError, match="'circle' is declared by two chapters"):
        load_book(sample)
