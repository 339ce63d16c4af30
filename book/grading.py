"""Grading: `python -m book grade DIR` marks a folder of notebooks and of archives of work/.

Every answer runs in a process of its own (book.answering), on our copy of the given cells and of
the checks. Only cells that carry an exercise's mark are read; nothing else in a submission counts.
"""

import contextlib
import csv
import dataclasses
import html
import io
import json
import multiprocessing
import re
import signal
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil

from book.answering import Answer, Nursery
from book.graded import Outcome, Result, examine, namespace_of, properties
from book.manuscript import Book, BookError, parse, read_cells
from book.sheets import Exercise, Sheet, read_sheet

MARK = re.compile(r"\s*#\| exercise id=(\S+)")
FILE_MB, ALL_MB, ARCHIVE_FILES, CANDIDATES = 20, 200, 2000, 3
CHECK_SECONDS, WORKER_MB = 60, 8192
ARCHIVES = (".zip", ".tar.gz", ".tgz")


def all_sheets(book: Book) -> list[Sheet]:
    """The sheets of the book in the order of its chapters."""
    paths = [book.root / "exercises" / f"{c.name}.py" for c in book.chapters]
    return [read_sheet(path) for path in paths if path.is_file()]


def submissions(folder: Path) -> dict[str, list[Path]]:
    """{student: what was handed in}: NAME.ipynb, NAME.zip, NAME.tar.gz and the folder NAME."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        ends = [end for end in (".ipynb", *ARCHIVES) if path.name.endswith(end)]
        if path.is_dir() or ends:
            name = path.name.removesuffix(ends[0]) if ends and path.is_file() else path.name
            if not name.startswith((".", "_")):
                found.setdefault(name, []).append(path)
    return found


def notebooks(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each notebook below a path or in an archive, which is never unpacked."""
    if path.is_dir():
        for inner in sorted(path.rglob("*.ipynb")):
            if wanted(inner.as_posix()) and not inner.is_symlink() and inner.is_file():
                with open(inner, "rb") as file:
                    yield inner.name, file.read(FILE_MB * 2**20 + 1)
    elif path.suffix == ".ipynb":
        with open(path, "rb") as file:
            yield path.name, file.read(FILE_MB * 2**20 + 1)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist()[:ARCHIVE_FILES]:
                if wanted(entry.filename):
                    with archive.open(entry) as file:
                        yield entry.filename, file.read(FILE_MB * 2**20 + 1)
    else:
        with tarfile.open(path) as archive:
            for number, entry in enumerate(archive):
                if number >= ARCHIVE_FILES or archive.offset > ALL_MB * 2**20:
                    break
                if entry.isfile() and wanted(entry.name):
                    yield entry.name, archive.extractfile(entry).read(FILE_MB * 2**20 + 1)


def wanted(name: str) -> bool:
    parts = name.split("/")
    return name.endswith(".ipynb") and not {".ipynb_checkpoints", "__MACOSX"} & {*parts}


def marked_cells(content: bytes) -> Iterator[tuple[str, str]]:
    """(exercise id, source) of the cells of a notebook that carry a mark."""
    if len(content) > FILE_MB * 2**20:
        raise ValueError(f"larger than {FILE_MB} MB")
    for cell in json.loads(content)["cells"]:
        source = cell.get("source", "")
        source = source if isinstance(source, str) else "".join(source)
        mark = cell.get("metadata", {}).get("nbgrader", {})
        first = MARK.match(source)
        if cell["cell_type"] == "code" and (mark.get("solution") or first):
            plain = re.sub(r"(?m)^\s*[%!].*$", "", source)  # %%time and the like do no harm
            yield str(mark.get("grade_id") or first[1]), plain


def read_answers(paths: list[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """({exercise id: sources of different answers}, what could not be read)."""
    answers, notes, place, size = {}, [], "", 0
    for path in paths:
        try:
            for place, content in notebooks(path):
                size += len(content)
                if size > ALL_MB * 2**20:
                    raise ValueError(f"larger than {ALL_MB} MB")
                try:
                    for id, source in marked_cells(content):
                        found = answers.setdefault(id, [])
                        if source not in found:
                            found.append(source)
                except Exception as error:  # whatever a broken notebook makes the reader raise
                    notes.append(f"{place} cannot be read as a notebook ({name_of(error)})")
        except Exception as error:
            notes.append(f"{path.name} cannot be read to its end ({name_of(error)})")
    return answers, notes


def name_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a check that an answer has led astray, and again in the next."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError("the check took too long on what the answer returned")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Grader:
    """Sheets, hidden cases and a nursery: grades answers one after the other."""

    def __init__(self, sheets: list[Sheet], hidden: dict[str, str] | None = None):
        self.sheets, self.hidden = sheets, hidden or {}
        self.given = {sheet.name: namespace_of(sheet) for sheet in sheets}
        modules = {m for s in sheets for m in re.findall(r"nanochat\.(\w+)", s.given)}
        self.nursery = Nursery(tuple(sorted(modules)))

    def grade(self, sheet: Sheet, exercise: Exercise, source: str) -> Result:
        """Examine one answer in a process of its own."""
        import torch

        torch.manual_seed(0)
        given, hidden = self.given[sheet.name], self.hidden.get(exercise.id, "")
        names = sheet.given, source, exercise.answer, exercise.replaces
        with time_limit(CHECK_SECONDS), Answer(self.nursery, *names) as answer:
            try:
                value = answer.value()
            except Exception as error:
                unwritten = isinstance(error, NotImplementedError)
                words = "not written yet" if unwritten else f"{type(error).__name__}: {error}"
                return self.nothing(sheet, exercise, words)
            return examine(exercise, given, value, hidden)

    def nothing(self, sheet: Sheet, exercise: Exercise, words: str) -> Result:
        every = properties(exercise, self.given[sheet.name], self.hidden.get(exercise.id, ""))
        return Result(exercise.id, exercise.points, [Outcome(p.name, False, words) for p in every])

    def best(self, sheet: Sheet, exercise: Exercise, sources: list[str]) -> Result:
        """The best of what was handed in for an exercise; an unchanged stub is not run."""
        if not sources:
            return self.nothing(sheet, exercise, "no cell with the mark of this exercise was found")
        written = [s for s in sources if s.strip() != exercise.stub.strip()]
        best = self.nothing(sheet, exercise, "not written yet")
        tries = 3 if "perf_counter" in exercise.checks else 1  # a busy machine is no slow answer
        for source in written[-CANDIDATES:] * tries:
            result = self.grade(sheet, exercise, source)
            best = max(result, best, key=lambda result: result.score)
            if best.score == best.points:
                break
        return best

    def student(self, paths: list[Path]) -> dict:
        """All exercises of one student, as data for grades.json."""
        answers, notes = read_answers(paths)
        known = {id for sheet in self.sheets for id in sheet.exercises}
        strange = [id for id in answers if id not in known]
        notes += [f"a cell is marked {id[:60]!r}; no exercise has this id" for id in strange[:20]]
        chapters = []
        for sheet in self.sheets:
            results = [self.best(sheet, e, answers.get(e.id, [])) for e in sheet.exercises.values()]
            every = [dict(dataclasses.asdict(r), score=r.score) for r in results]
            chapters.append({"sheet": sheet.name, **total(every), "exercises": every})
        return {**total(chapters), "notes": notes, "chapters": chapters}


def total(parts: list[dict]) -> dict:
    points = sum(part["points"] for part in parts)
    return {"score": round(sum(part["score"] for part in parts), 2), "points": points}


def hidden_cases(path: Path | None, sheets: list[Sheet]) -> dict[str, str]:
    """{exercise id: source} of the `#| checks ID` cells of an instructor's file.

    All cells of an exercise are one source, in which each stands on the lines of the file.
    """
    if path is None:
        return {}
    try:
        cells = [c for c in read_cells(path) if "checks" in c.directives]
    except (OSError, UnicodeDecodeError) as error:
        raise BookError(f"{path} cannot be read ({error}); name a py:percent file") from None
    if not cells:
        raise BookError(f"{path}: there is no cell that begins with `#| checks ID`")
    known, cases = {id for sheet in sheets for id in sheet.exercises}, {}
    for cell in cells:
        id = cell.directives["checks"]
        if id not in known:
            raise BookError(f"{path}:{cell.line}: no exercise is {id!r}")
        parse(cell, str(path))
        before = cases.get(id, "")
        cases[id] = before + "\n" * (cell.line - 1 - before.count("\n")) + cell.source
    for sheet in sheets:
        given = namespace_of(sheet) if cases.keys() & sheet.exercises.keys() else {}
        for id in [id for id in sheet.exercises if id in cases]:
            try:
                properties(sheet.exercises[id], given, cases[id])
            except (Exception, SystemExit) as error:
                frames = traceback.extract_tb(error.__traceback__)
                lines = [f.lineno for f in frames if f.filename == f"checks of {id}"]
                where = f"{path}:{(lines or [getattr(error, 'lineno', 1)])[-1]}"
                raise BookError(f"{where}: this line fails ({name_of(error)}); mend it") from None
    return cases


def begin_worker(sheets: list[Sheet], hidden: dict[str, str]) -> None:
    import torch

    global GRADER
    torch.set_num_threads(1)
    if sys.platform == "linux":  # an answer must not make a check take all memory
        import resource

        limit = psutil.Process().memory_info().vms + WORKER_MB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    GRADER = Grader(sheets, hidden)


def grade_student(paths: list[Path]) -> dict:
    return GRADER.student(paths)


def grade(
    book: Book, folder: Path, out: Path, hidden: Path | None = None, workers: int = 2
) -> dict[str, dict]:
    """Grade every submission in `folder`; write grades.csv, grades.json and feedback/ to `out`."""
    from nanochat.common import Progress

    if not folder.is_dir():
        raise BookError(f"there is no folder {folder}; name the one with the submissions")
    students, sheets = submissions(folder), all_sheets(book)
    if not students:
        raise BookError(f"{folder} holds no notebook, no folder and no archive of a student")
    if workers < 1:
        raise BookError(f"--workers is {workers}; name how many to grade at a time, 1 or more")
    cases, grades = hidden_cases(hidden, sheets), {}
    try:
        (out / "feedback").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        why = f"cannot write to {out} ({error.strerror})"
        raise BookError(f"{why}; choose another folder with --out") from None
    with Progress(len(students), "grading", "submission") as bar:
        for name, found in in_workers(students, sheets, cases, workers):
            if found:
                grades[name] = found
                bar.update()
        for alone in students.keys() - grades.keys():  # one of these ended its worker: which?
            ((_, found),) = in_workers({alone: students[alone]}, sheets, cases, 1)
            died = "the grader's process ended in the middle of this submission; grade it by hand"
            grades[alone] = found or {**Grader(sheets, cases).student([]), "notes": [died]}
            bar.update()
    grades = {name: grades[name] for name in sorted(grades)}
    write_grades(grades, out)
    return grades


def in_workers(
    students: dict[str, list[Path]], sheets: list[Sheet], cases: dict[str, str], workers: int
) -> Iterator[tuple[str, dict | None]]:
    """(name, grades) of each student, in the order of being done; None if the worker died."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, begin_worker, (sheets, cases)) as pool:
        jobs = {pool.submit(grade_student, paths): name for name, paths in students.items()}
        for job in as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except BrokenProcessPool:
                yield jobs[job], None


def write_grades(grades: dict[str, dict], out: Path) -> None:
    from nanochat.common import atomic_write, write_json

    write_json(out / "grades.json", grades)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    first = next(iter(grades.values()))["chapters"]
    ids = [e["id"] for chapter in first for e in chapter["exercises"]]
    table.writerow(["student", "score", "points", *(c["sheet"] for c in first), *ids])
    for name, grade in grades.items():
        safe = f"'{name}" if name[0] in "=+-@" else name  # no formula in a spreadsheet
        scores = [c["score"] for c in grade["chapters"]]
        scores += [e["score"] for c in grade["chapters"] for e in c["exercises"]]
        row = [f"{score:g}" for score in (grade["score"], grade["points"], *scores)]
        table.writerow([safe, *row])
        atomic_write(out / "feedback" / f"{name}.html", feedback(name, grade))
    atomic_write(out / "grades.csv", text.getvalue())


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .6rem;
vertical-align:top;border-bottom:1px solid #ddd}td.n,th.n{text-align:right}.mark{width:6rem}
.passed{color:#0072b2}.failed{color:#b34700}h3{margin-bottom:.2rem}small{color:#555;white-space:pre-line}"""


def feedback(name: str, grade: dict) -> str:
    """One page for a student: points by chapter, and each property with words where it failed."""
    say = html.escape
    rows = [
        f"<tr><td>{say(c['sheet'])}<td class=n>{c['score']:g}<td class=n>{c['points']}"
        for c in grade["chapters"]
    ]
    page = [f"<h1>{say(name)}: {grade['score']:g} of {grade['points']} points</h1>"]
    page += [f"<p>{say(note)}</p>" for note in grade["notes"]]
    page += ["<table><tr><th>chapter<th class=n>points<th class=n>of", *rows, "</table>"]
    for chapter in grade["chapters"]:
        page.append(f"<h2>{say(chapter['sheet'])}</h2>")
        for e in chapter["exercises"]:
            page.append(f"<h3>{say(e['id'])}: {e['score']:g} of {e['points']}</h3><table>")
            for o in e["outcomes"]:
                word = "passed" if o["passed"] else "failed" if o["verified"] else "not verified"
                words = f"<br><small>{say(o['words'])}</small>" if o["words"] else ""
                page.append(f'<tr><td class="mark {word}">{word}<td>{say(o["name"])}{words}')
            page.append("</table>")
    head = f'<meta charset="utf-8"><title>{say(name)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(page)}</body></html>\n"
