"""Exercises in a notebook: `check("03-rope", rotate)`, `hint("03-rope")`, `progress()`."""

import html
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from book.manuscript import BookError, load_book
from book.sheets import Exercise, Sheet, read_sheet

__all__ = ["check", "hint", "progress", "close"]

ROOT = Path(__file__).parents[1]
EXERCISES, WORK = ROOT / "exercises", ROOT / "work"
STUB_SAYS = "your code here"
MARKS = {"passed": ("\u2713", "#0072b2"), "FAILED": ("\u2717", "#d55e00"), "unseen": ("?", "#666")}
SEEN: dict[Path, tuple[float, Sheet, dict]] = {}  # sheets as last read, with their namespaces


@dataclass(frozen=True)
class Property:
    """One thing that is true of every right answer, and what is likely wrong where it is not."""

    name: str
    mistake: str
    test: Callable[[Any], None]
    gpu: bool = False  # cannot be verified without one


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    words: str = ""  # what was seen and what is likely wrong; empty when it passed
    verified: bool = True  # False: this machine cannot tell, and nothing is given for it

    @property
    def mark(self) -> str:
        return "passed" if self.passed else "FAILED" if self.verified else "unseen"


@dataclass(frozen=True)
class Result:
    """What a check found. `score` gives every property of an exercise the same weight."""

    id: str
    points: int
    outcomes: list[Outcome]

    @property
    def score(self) -> float:
        return round(self.points * sum(o.passed for o in self.outcomes) / len(self.outcomes), 2)

    def __str__(self) -> str:
        lines = [f"{self.id}: {self.score:g} of {self.points} points"]
        for outcome in self.outcomes:
            lines.append(f"  {outcome.mark}  {outcome.name}")
            lines += [f"          {line}" for line in outcome.words.splitlines()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = []
        for outcome in self.outcomes:
            mark, colour = MARKS[outcome.mark]
            words = html.escape(outcome.words).replace("\n", "<br>")
            rows.append(
                f'<tr><td style="color:{colour};font-weight:bold">{mark}</td>'
                f'<td style="text-align:left">{html.escape(outcome.name)}</td>'
                f'<td style="text-align:left">{words}</td></tr>'
            )
        title = f"<b>{html.escape(self.id)}</b>: {self.score:g} of {self.points} points"
        return f"{title}<table>{''.join(rows)}</table>"


def close(found: Any, expected: Any, atol: float = 1e-5) -> bool:
    """Is `found` a number or a tensor of the shape and (for tensors) dtype of `expected`, and near?

    Never raises: an answer of the wrong kind is simply not close. NaN is close to nothing.
    """
    import torch

    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
            return False
        same = found.dtype == expected.dtype
        return same and torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=atol)
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return False
    return abs(found - expected) <= atol + 1e-5 * abs(expected)


def find(id: str, folder: Path | None = None) -> tuple[Exercise, Sheet, dict]:
    """The exercise, its sheet, and the namespace of the sheet's `#| given` cells."""
    number = id.split("-")[0]
    paths = sorted((folder or EXERCISES).glob(f"{number}_*.py"))
    if not paths:
        raise BookError(f"there is no sheet of exercises for {id!r}; ids look like 03-rope")
    path = paths[0]
    stamp = path.stat().st_mtime
    if SEEN.get(path, (None,))[0] != stamp:
        sheet = read_sheet(path)
        SEEN[path] = stamp, sheet, namespace_of(sheet)
    _, sheet, given = SEEN[path]
    if id not in sheet.exercises:
        raise BookError(f"there is no exercise {id!r}; there are {', '.join(sheet.exercises)}")
    return sheet.exercises[id], sheet, given


def namespace_of(sheet: Sheet) -> dict:
    """The names that the given cells of a sheet define."""
    names: dict = {"__name__": "exercises"}
    exec(compile(sheet.given, f"exercises/{sheet.name}.py", "exec"), names)
    return names


def define(source: str, given: dict, name: str) -> Any:
    """What `source` calls `name` when it runs after the given cells."""
    names = dict(given)
    exec(compile(source, "<answer>", "exec"), names)
    return names[name]


def properties(exercise: Exercise, given: dict, hidden: str = "") -> list[Property]:
    """The properties that the `#| checks` cell declares with `@says(name, mistake)`.

    One with `gpu=True` is not verified on a machine without a GPU. `hidden` is the source of more.
    """
    found: list[Property] = []

    def says(name: str, mistake: str, gpu: bool = False) -> Callable:
        return lambda test: found.append(Property(name, mistake, test, gpu))

    for source in (exercise.checks, hidden):
        names = {**given, "says": says, "close": close}
        exec(compile(source, f"checks of {exercise.id}", "exec"), names)
    return found


def examine(exercise: Exercise, given: dict, answer: Any, hidden: str = "") -> Result:
    """Try every property on the answer. What an answer raises costs it that property only."""
    import torch

    outcomes = []
    for one in properties(exercise, given, hidden):
        if one.gpu and not torch.cuda.is_available():
            outcomes.append(Outcome(one.name, False, "not verified here: it needs a GPU", False))
            continue
        if answer is None:  # the stub of an answer that is a value
            outcomes.append(Outcome(one.name, False, "not written yet"))
            continue
        try:
            one.test(answer)
            outcomes.append(Outcome(one.name, True))
        except NotImplementedError as error:
            words = str(error) if str(error) != STUB_SAYS else ""
            outcomes.append(Outcome(one.name, False, words or "not written yet"))
        except AssertionError as error:
            outcomes.append(Outcome(one.name, False, f"{error}\n{one.mistake}".strip()))
        except (Exception, SystemExit) as error:
            words = f"{type(error).__name__}: {error}"[:300]
            outcomes.append(Outcome(one.name, False, f"{words}\n{one.mistake}"))
    return Result(exercise.id, exercise.points, outcomes)


def check(id: str, answer: Any) -> Result | float:
    """Check an answer, keep the best score in work/progress.json and say what is still wrong.

    When nbgrader runs the notebook, what comes back is the score as the number that it asks for.
    """
    exercise, _, given = find(id)
    result = examine(exercise, given, answer)
    if os.environ.get("NBGRADER_EXECUTION"):
        print(result)
        return result.score
    record = read_progress()
    entry = record.setdefault(id, {"best": 0.0, "tries": 0, "hints": 0})
    entry["best"], entry["tries"] = max(entry["best"], result.score), entry["tries"] + 1
    write_progress(record)
    return result


def hint(id: str) -> None:
    """Print the next of the exercise's three hints; after the third, all of them again."""
    exercise, _, _ = find(id)
    record = read_progress()
    entry = record.setdefault(id, {"best": 0.0, "tries": 0, "hints": 0})
    entry["hints"] = min(entry["hints"] + 1, len(exercise.hints))
    write_progress(record)
    for number, text in enumerate(exercise.hints[: entry["hints"]], 1):
        print(f"hint {number} of {len(exercise.hints)}: {text}")


def read_progress() -> dict:
    """work/progress.json; an unreadable file is put aside, and nothing is ever overwritten."""
    path = WORK / "progress.json"
    if not path.is_file():
        return {}
    kinds = {"best": (int, float), "tries": int, "hints": int}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        every = [(entry[name], kind) for entry in record.values() for name, kind in kinds.items()]
        if all(isinstance(value, kind) and value >= 0 for value, kind in every):
            return record
    except (ValueError, AttributeError, TypeError, LookupError):
        pass
    number, aside = 1, path.with_suffix(".unreadable.json")
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".unreadable{number}.json")
    path.replace(aside)
    print(f"work/progress.json could not be read; it is now {aside.name}")
    return {}


def write_progress(record: dict) -> None:
    from nanochat.common import write_json

    WORK.mkdir(exist_ok=True)
    write_json(WORK / "progress.json", record)


@dataclass(frozen=True)
class Progress:
    """Points by chapter: (title, points, points to be had). A table, with bars in a notebook."""

    rows: list[tuple[str, float, int]]

    def __str__(self) -> str:
        width = max(3, *(len(title) for title, _, _ in self.rows))
        lines = [f"{title:<{width}}  {points:6.4g} of {all:3d}" for title, points, all in self.rows]
        points, total = sum(r[1] for r in self.rows), sum(r[2] for r in self.rows)
        return "\n".join([*lines, f"{'all':<{width}}  {points:6.4g} of {total:3d}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table with a bar a chapter: grey what is to be had, blue what is yours."""
        points, total = sum(r[1] for r in self.rows), sum(r[2] for r in self.rows)
        scale = 300 / max(row[2] for row in self.rows)
        lines = []
        for title, got, all in self.rows:
            inner = f"background:#0072b2;width:{got * scale:.0f}px;height:0.9em"
            outer = f"background:#8885;width:{all * scale:.0f}px;height:0.9em"
            lines.append(
                f'<tr><td style="text-align:left">{html.escape(title)}</td><td>{got:g} of {all}'
                f'</td><td><div style="{outer}"><div style="{inner}"></div></div></td></tr>'
            )
        return f"<b>{points:g} of {total} points</b><table>{''.join(lines)}</table>"


def progress() -> Progress:
    """Points by chapter, from work/progress.json."""
    record, rows = read_progress(), []
    for chapter in load_book(ROOT).chapters:
        path = EXERCISES / f"{chapter.name}.py"
        if path.is_file():
            every = read_sheet(path).exercises.values()
            points = sum(min(record.get(e.id, {"best": 0})["best"], e.points) for e in every)
            title = f"{chapter.number} {chapter.title}"
            rows.append((title, points, sum(e.points for e in every)))
    return Progress(rows)
