"""Check: every derived file is what its source says, and a readable diff when it is not."""

import difflib
import json

from book import printing
from book.contents import content_files
from book.export import package_files
from book.manuscript import Book, BookError, Chapter
from book.sheets import sheet_files

FOLDERS = ("nanochat", "chapters", "exercises")
SHOWN = 40


def check(book: Book, numbers: list[str]) -> list[str]:
    """Problems in words, each with what mends it; an empty list when the book is fresh."""
    chapters = book.select(numbers)
    sheets = {path.name for path in (book.root / "exercises").glob("*.py")}
    expected, problems = package_files(book, chapters)
    expected.update(content_files(book))
    try:
        expected.update(sheet_files(book))
    except BookError as error:
        problems.append(str(error))
    for name, text in expected.items():
        verb = "export" if name.startswith("nanochat/") else "print --no-execute"
        problems += compare(book, name, text, f"python -m book {verb}")
    for chapter in chapters:
        try:
            problems += check_printed(book, chapter)
        except BookError as error:
            problems.append(str(error))
    known = {f"chapters/{c.name}{end}" for c in book.chapters for end in (".py", ".ipynb")}
    known |= {f"nanochat/{module}.py" for c in book.chapters for module in c.modules}
    for path in sorted(p for f in FOLDERS for p in (book.root / f).rglob("*")):
        name = path.relative_to(book.root).as_posix()
        derived = path.suffix in (".py", ".ipynb") and "/." not in name
        source = path.stem + ".py" in sheets if name.startswith("exercises/") else False
        if derived and name not in {*known, *expected} and not source:
            problems.append(f"{name}: nothing in the book makes it or lists it")
    return list(dict.fromkeys(problems))


def compare(book: Book, name: str, text: str, remedy: str) -> list[str]:
    path = book.root / name
    if not path.is_file():
        return [f"{name}: missing; run `{remedy}`"]
    found = path.read_bytes().decode("utf-8", errors="replace")
    advice = f"differs from its source; edit the source, then `{remedy}`"
    return [] if found == text else [f"{name}: {advice}\n{diff(found, text)}"]


def diff(found: str, expected: str) -> str:
    """A shortened unified diff; notebooks are compared as text first, then as JSON."""
    pair = [found, expected]
    if found.startswith("{") and expected.startswith("{"):
        pair = [readable(text) for text in pair]
        pair = pair if pair[0] != pair[1] else [found, expected]
    rows = [text.splitlines() for text in pair]
    lines = list(difflib.unified_diff(*rows, "as found", "as derived", n=2, lineterm=""))
    lines = lines or ["only the line ends differ"]
    more = [f"... {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
    return "\n".join("    " + line[:160] for line in lines[:SHOWN] + more)


def readable(notebook: str) -> str:
    try:
        cells = json.loads(notebook)["cells"]
        return "\n".join(f"# %% [{c['cell_type']}]\n{''.join(c['source'])}\n" for c in cells)
    except (ValueError, KeyError, TypeError):
        return notebook


def check_printed(book: Book, chapter: Chapter) -> list[str]:
    """A printed notebook: text and code fresh, outputs unedited and computed from this code."""
    name, again = f"chapters/{chapter.name}.ipynb", f"run `python -m book print {chapter.number}`"
    if not book.path(chapter).is_file():
        return []
    if not book.path(chapter, ".ipynb").is_file():
        return [f"{name}: missing; {again}"]
    old = printing.read_printed(book.path(chapter, ".ipynb"))
    fresh = printing.refreshed(book, chapter)
    notebook = printing.notebook_of(book, book.path(chapter))
    computed = old["metadata"]["book"]["computed_from"]
    now = printing.prefixes(notebook, chapter)
    stale = [i for i, prefix in enumerate(now) if prefix not in computed]
    problems = [f"{name}: {printing.too_large(fresh)}"] if printing.too_large(fresh) else []
    if printing.outputs_digest(old) != old["metadata"]["book"]["outputs"]:
        problems.append(f"{name}: an output was edited by hand; {again}")
    elif stale:
        first = printing.code_cells(notebook)[stale[0]]["source"].split("\n")[0]
        where = f"code cell {stale[0] + 1} (`{first}`) to cell {stale[-1] + 1}"
        problems.append(f"{name}: outputs are stale from {where}; {again}")
    else:
        remedy = f"python -m book print {chapter.number} --no-execute"
        problems += compare(book, name, fresh, remedy)
    return problems
