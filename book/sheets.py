"""Exercise sheets: from exercises/NN_name.py to learner's sheet, solution and points."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from book.manuscript import Book, BookError, Cell, read_cells
from book.printing import as_text, code_cells, notebook_of

BLOCK = re.compile(r"(?ms)^([ \t]*)# BEGIN SOLUTION\n(.*?)\n[ \t]*# END SOLUTION$")
STUB = 'raise NotImplementedError("your code here")'
NUMBERS = {"points": (1, 5), "minutes": (5, 45), "level": (1, 3)}
FIELDS = ("id", *NUMBERS, "answer")
FORM = "#| exercise " + " ".join(f"{name}=..." for name in FIELDS)
# What stands in the source and never in a learner's hands: `#| checks ID` and so on.
BEHIND = ("checks", "hints", "wrong", "right")


@dataclass(frozen=True)
class Exercise:
    """One exercise. `wrong` is (the one property that fails, source), `right` other solutions."""

    id: str
    points: int
    minutes: int
    level: int
    answer: str  # the name that the cell defines and `check` is given
    replaces: str  # "model.apply_rotary": what it can stand in for in the package, or ""
    solution: str
    checks: str = ""
    hints: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    right: list[str] = field(default_factory=list)

    @property
    def stub(self) -> str:
        return without_solutions(self.solution)


@dataclass(frozen=True)
class Sheet:
    """All exercises of a chapter, and the `#| given` cells that every one of them may use."""

    name: str
    given: str
    exercises: dict[str, Exercise]


def without_solutions(text: str) -> str:
    """The text as a learner gets it: solutions raise, an answer that is a value is None."""

    def stub(block: re.Match) -> str:
        answer = re.findall(r"answer=(\w+)", text[: block.start()])[-1:]
        if answer and re.search(rf"(?m)^{answer[0]}\b.* = ", block[2] + "\n"):
            return f"{answer[0]} = None  # your answer"
        return block[1] + STUB

    return BLOCK.sub(stub, text)


def sheet_files(book: Book) -> dict[str, str]:
    """{path below the root: text} of every sheet, every solution and the table of points."""
    files, sheets, problems = {}, [], []
    names = [c.name for c in book.chapters]
    for path in sorted((book.root / "exercises").glob("*.py")):
        try:
            if path.stem not in names:
                raise BookError(f"exercises/{path.name}: no chapter has this name")
            sheets.append(read_sheet(path))
            text = path.read_text(encoding="utf-8")
            for folder, given in (
                ("exercises", without_solutions(text)),
                ("exercises/solutions", text),  # with its markers: nbgrader asks for them
            ):
                notebook = sheet_notebook(book, path, given, sheets[-1])
                files[f"{folder}/{path.stem}.ipynb"] = as_text(notebook)
        except BookError as error:
            problems += str(error).splitlines()
        except SyntaxError as error:
            reason = f"not Python once solutions are taken out ({error.msg})"
            problems.append(f"exercises/{path.name}: a cell is {reason}")
    if problems:
        raise BookError("\n".join(problems))
    if sheets:
        sheets.sort(key=lambda sheet: names.index(sheet.name))
        files["exercises/POINTS.md"] = points_table(sheets)
    return files


def sheet_notebook(book: Book, path: Path, text: str, sheet: Sheet) -> dict:
    """The sheet without what stands behind it; each exercise's two cells carry its id."""
    notebook = notebook_of(book, path, text)
    kinds = [behind(cell) for cell in read_cells(path)]
    notebook["cells"] = [c for c, kind in zip(notebook["cells"], kinds) if not kind]
    for cell in code_cells(notebook):
        ast.parse(cell["source"])
        for exercise in sheet.exercises.values():
            if re.match(rf"#\| exercise id={re.escape(exercise.id)}(\s|$)", cell["source"]):
                cell["metadata"] = marks(exercise.id, solution=True)
            elif re.match(rf'check\("{re.escape(exercise.id)}"', cell["source"]):
                cell["metadata"] = marks(f"{exercise.id}-check", points=exercise.points)
    return notebook


def marks(grade_id: str, solution: bool = False, points: int | None = None) -> dict:
    """Cell metadata by which our grader finds an answer, and nbgrader a task and its test."""
    nbgrader = {"schema_version": 3, "grade_id": grade_id, "solution": solution, "task": False}
    nbgrader.update(grade=points is not None, locked=not solution)
    if points is not None:
        nbgrader["points"] = points
    return {"nbgrader": nbgrader}


def behind(cell: Cell) -> str:
    """Which of BEHIND the cell is, or ""."""
    return next((name for name in BEHIND if name in cell.directives), "")


def read_sheet(path: Path) -> Sheet:
    """Every exercise with what stands behind it; every cell, block and field is checked."""
    cells, problems = [c for c in read_cells(path) if c.kind == "code"], []
    places, found = {}, {}
    for cell in cells:
        where = f"exercises/{path.name}:{cell.line}"
        for text in re.findall(r"(?i)#\s*(?:begin|end)\s+solution", BLOCK.sub("", cell.source)):
            problems.append(f"{where}: `{text}` has no partner or is misspelt")
        if "exercise" in cell.directives:
            fault, exercise = read_exercise(cell, path.stem.split("_")[0])
            problems += [f"{where}: {fault}"] if fault else []
            if exercise and exercise.id in found:
                problems.append(f"{where}: the id {exercise.id!r} is used twice")
            elif exercise:
                found[exercise.id], places[exercise.id] = exercise, where
    if problems:  # what stands behind an exercise that could not be read is no second problem
        raise BookError("\n".join(problems))
    for cell in (c for c in cells if behind(c)):
        fault = add(found, cell, behind(cell))
        problems += [f"exercises/{path.name}:{cell.line}: {fault}"] if fault else []
    for exercise in found.values():
        problems += [f"{places[exercise.id]}: {fault}" for fault in missing(exercise, cells)]
    if problems:
        raise BookError("\n".join(problems))
    given = "\n\n".join(c.source for c in cells if "given" in c.directives)
    return Sheet(path.stem, given, found)


def read_exercise(cell: Cell, number: str) -> tuple[str, Exercise | None]:
    """(what is wrong or "", the exercise or None)."""
    words = [word.partition("=") for word in cell.directives["exercise"].split()]
    fields = {name: value for name, _, value in words}
    if sorted({*fields} - {"replaces"}) != sorted(FIELDS) or len(fields) != len(words):
        return f"write `{FORM}`, and `replaces=module.name` where it fits", None
    if not all(fields[name].isdigit() for name in NUMBERS):
        return "points, minutes and level are whole numbers", None
    numbers = {name: int(fields[name]) for name in NUMBERS}
    for name, (least, most) in NUMBERS.items():
        if not least <= numbers[name] <= most:
            return f"{name}={numbers[name]} is not between {least} and {most}", None
    if not fields["id"].startswith(f"{number}-"):
        return f"the id {fields['id']!r} does not start with {number}-", None
    if not BLOCK.search(cell.source):
        return "an exercise needs `# BEGIN SOLUTION` and `# END SOLUTION`", None
    fields = {"replaces": "", **fields, **numbers}
    return "", Exercise(**fields, solution=cell.source)


def add(found: dict[str, Exercise], cell: Cell, kind: str) -> str:
    """Put a cell behind its exercise; what is wrong with it, or ""."""
    id, _, rest = cell.directives[kind].partition(": ")
    if id not in found:
        return f"`#| {kind} {id}`: no exercise has this id"
    exercise = found[id]
    if (kind == "hints" and exercise.hints) or (kind == "checks" and exercise.checks):
        return f"a second `#| {kind} {id}`"
    if kind == "hints":
        try:
            hints = ast.literal_eval(cell.source.partition("=")[2].strip())
        except (SyntaxError, ValueError):
            hints = None
        if not (isinstance(hints, list) and len(hints) == 3 and all(map(str, hints))):
            return "write `hints = [...]` with three texts, from a nudge to nearly the answer"
        exercise.hints.extend(hints)
    elif kind == "checks":
        object.__setattr__(exercise, "checks", cell.source)
    elif kind == "wrong":
        exercise.wrong.append((rest, cell.source))
    else:
        exercise.right.append(cell.source)
    return ""


def missing(exercise: Exercise, cells: list[Cell]) -> list[str]:
    call = f'check("{exercise.id}", {exercise.answer})'
    problems = [] if any(c.source.strip() == call for c in cells) else [f"no cell `{call}`"]
    if not exercise.checks:
        problems.append(f"no cell `#| checks {exercise.id}`")
    if not exercise.hints:
        problems.append(f"no cell `#| hints {exercise.id}`")
    if len(exercise.wrong) < 2 or not exercise.right:
        problems.append(f"{exercise.id} needs two `#| wrong` cells or more and a `#| right` one")
    return problems


def points_table(sheets: list[Sheet]) -> str:
    lines = ["# Exercises and points", "", "Derived from exercises/*.py; edit there, not here.", ""]
    lines += ["| chapter | exercise | points | minutes | level |", "|---|---|---:|---:|---:|"]
    every = [(sheet.name, e) for sheet in sheets for e in sheet.exercises.values()]
    for c, e in every:
        lines.append(f"| [{c}]({c}.ipynb) | {e.id} | {e.points} | {e.minutes} | {e.level} |")
    points, minutes = sum(e.points for _, e in every), sum(e.minutes for _, e in every)
    return "\n".join([*lines, f"| all | {len(every)} | {points} | {minutes} | |"]) + "\n"
