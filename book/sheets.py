"""Exercise sheets: from exercises/NN_name.py to learner's sheet, solution and points."""

import ast
import re
from pathlib import Path

from book.manuscript import Book, BookError, read_cells
from book.printing import as_text, code_cells, notebook_of

BLOCK = re.compile(r"(?ms)^([ \t]*)# BEGIN SOLUTION\n(.*?)\n[ \t]*# END SOLUTION$")
STUB = r'\1raise NotImplementedError("your code here")'
FIELDS = ("id", "points", "minutes", "level")
FORM = "#| exercise " + " ".join(f"{name}=..." for name in FIELDS)


def sheet_files(book: Book) -> dict[str, str]:
    """{path below the root: text} of every sheet, every solution and the table of points."""
    files, rows, problems = {}, [], []
    names = [c.name for c in book.chapters]
    for path in sorted((book.root / "exercises").glob("*.py")):
        try:
            if path.stem not in names:
                raise BookError(f"exercises/{path.name}: no chapter has this name")
            rows += [(path.stem, exercise) for exercise in exercises(path)]
            text = path.read_text(encoding="utf-8")
            for folder, instead in (("exercises", STUB), ("exercises/solutions", r"\2")):
                notebook = notebook_of(book, path, BLOCK.sub(instead, text))
                for cell in code_cells(notebook):
                    ast.parse(cell["source"])
                files[f"{folder}/{path.stem}.ipynb"] = as_text(notebook)
        except BookError as error:
            problems += str(error).splitlines()
        except SyntaxError as error:
            reason = f"not Python once solutions are taken out or unwrapped ({error.msg})"
            problems.append(f"exercises/{path.name}: a cell is {reason}")
    used = [row["id"] for _, row in rows]
    problems += [f"exercises: id {i!r} is used twice" for i in set(used) if used.count(i) > 1]
    if problems:
        raise BookError("\n".join(problems))
    if rows:
        rows.sort(key=lambda row: names.index(row[0]))
        files["exercises/POINTS.md"] = points_table(rows)
    return files


def exercises(path: Path) -> list[dict[str, str]]:
    """The `#| exercise` directives of a sheet; every block and every field is checked."""
    found, problems = [], []
    for cell in (c for c in read_cells(path) if c.kind == "code"):
        where = f"exercises/{path.name}:{cell.line}"
        for text in re.findall(r"(?i)#\s*(?:begin|end)\s+solution", BLOCK.sub("", cell.source)):
            problems.append(f"{where}: `{text}` has no partner or is misspelt")
        if "exercise" not in cell.directives:
            continue
        words = [word.partition("=") for word in cell.directives["exercise"].split()]
        exercise = {name: value for name, _, value in words}
        if sorted(name for name, _, _ in words) != sorted(FIELDS):
            problems.append(f"{where}: write `{FORM}`")
        elif not all(exercise[name].isdigit() for name in FIELDS[1:]):
            problems.append(f"{where}: points, minutes and level are whole numbers")
        elif not BLOCK.search(cell.source):
            problems.append(f"{where}: an exercise needs `# BEGIN SOLUTION` and `# END SOLUTION`")
        found.append(exercise)
    if problems:
        raise BookError("\n".join(problems))
    return found


def points_table(rows: list[tuple[str, dict]]) -> str:
    lines = ["# Exercises and points", "", "Derived from exercises/*.py; edit there, not here.", ""]
    lines += ["| chapter | exercise | points | minutes | level |", "|---|---|---:|---:|---:|"]
    lines += [f"| [{c}]({c}.ipynb) | " + " | ".join(e[f] for f in FIELDS) + " |" for c, e in rows]
    points, minutes = (sum(int(e[f]) for _, e in rows) for f in ("points", "minutes"))
    return "\n".join([*lines, f"| all | {len(rows)} | {points} | {minutes} | |"]) + "\n"
