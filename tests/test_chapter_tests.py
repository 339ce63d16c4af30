"""Every `#| test` cell of every chapter, run against the exported modules.

A test cell may use the exported names of its own chapter and what the cells above it import;
anything else it needs, it makes itself. (A cell that asserts something about the values of its
chapter is an ordinary cell without a directive: it runs whenever the chapter runs.)
"""

import ast
import importlib

import pytest
from conftest import ROOT

from book.manuscript import BookError, load_book, parse, read_cells

BOOK = load_book(ROOT)


def collect():
    """(chapter, cell) of every test cell, with the place of the cell as its name."""
    found = []
    for chapter in BOOK.chapters:
        path = BOOK.path(chapter)
        try:
            cells = read_cells(path) if path.is_file() else []
        except BookError:
            continue  # the check of the book reports it
        tests = [cell for cell in cells if "test" in cell.directives]
        found += [pytest.param(chapter, cell, id=f"{path.name}:{cell.line}") for cell in tests]
    return found


def namespace(chapter, line):
    """What the cells above `line` import, and the names of the chapter's exported modules."""
    names = {"__name__": "__test__"}
    for cell in read_cells(BOOK.path(chapter)):
        if cell.kind == "code" and cell.line < line:
            tree = parse(cell, chapter.name)
            tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            exec(compile(tree, chapter.name, "exec"), names)
    for name in chapter.modules:
        if name != "__main__":
            module = importlib.import_module(f"nanochat.{name}")
            names.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
    return names


@pytest.mark.parametrize("chapter, cell", collect())
def test_chapter(chapter, cell):
    path = BOOK.path(chapter)
    source = "\n" * (cell.line - 1) + cell.source  # so that a failure shows the chapter's line
    try:
        exec(compile(source, str(path), "exec"), namespace(chapter, cell.line))
    except NameError as error:
        reason = f"a test cell uses only exported names and imports ({error})"
        pytest.fail(f"chapters/{path.name}:{cell.line}: {reason}; or drop `#| test`", pytrace=False)


@pytest.mark.parametrize("chapter", BOOK.chapters, ids=lambda c: c.name)
def test_exported_modules_import_and_keep_their_promises(chapter):
    if not BOOK.path(chapter).is_file():
        pytest.skip("the manuscript is not there yet")
    for name in chapter.modules:
        if name == "__main__":
            continue
        module = importlib.import_module(f"nanochat.{name}")
        assert f"Exported from chapters/{chapter.name}.py" in module.__doc__
        assert [n for n in module.__all__ if not hasattr(module, n)] == []
