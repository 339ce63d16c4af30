"""Your code in the machine: answers that pass stand in for the functions of the package."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from book.answering import put_in_place
from book.graded import ROOT, define, namespace_of
from book.grading import Grader, all_sheets, read_answers
from book.manuscript import BookError, load_book
from book.sheets import Exercise, Sheet
from nanochat.common import UserError

PASSED = "NANOCHAT_MINE"  # digests of answers that passed, for the processes that this one starts
IN_PLACE: dict[str, tuple[Callable, Callable]] = {}  # "03-rope (model.rotate)": (book's, yours)
STATE: dict[str, object] = {"wanted": []}


def switch(folder: str) -> list[str]:
    """Put the answers in `folder` in place of the book's functions; "" puts the book's back.

    Returns "03-rope (model.rotate)" for each that is used. Raises UserError for one that does not
    pass its checks; one that nobody has written yet is left out.
    """
    wanted = [] if not folder else find_answers(folder)
    if wanted == STATE["wanted"]:
        return list(IN_PLACE)
    for book, mine in IN_PLACE.values():
        put_in_place(mine, book)
    IN_PLACE.clear()
    STATE["wanted"] = []
    chosen = choose(wanted, folder)
    for sheet, exercise, source in chosen:
        module, name = exercise.replaces.split(".")
        book = getattr(__import__(f"nanochat.{module}", fromlist=[name]), name)
        mine = define(source, namespace_of(sheet), exercise.answer)
        IN_PLACE[f"{exercise.id} ({exercise.replaces})"] = book, mine
    for book, mine in IN_PLACE.values():
        put_in_place(book, mine)
    STATE["wanted"] = wanted
    return list(IN_PLACE)


def find_answers(folder: str) -> list[tuple[Sheet, Exercise, list[str]]]:
    """The written answers in a folder to exercises that stand for a function of the package."""
    places = [Path(folder), ROOT / folder]
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        raise UserError(f"mine is {folder!r} and there is no such folder; `make work` makes work/.")
    try:
        sheets = all_sheets(load_book(ROOT))
    except BookError as error:
        raise UserError(f"the exercises cannot be read: {str(error).splitlines()[0]}.") from None
    answers, notes = read_answers([place])
    if notes:
        raise UserError(f"mine={folder!r}: {notes[0]}; mend or delete that file.")
    found = []
    for sheet in sheets:
        for exercise in (e for e in sheet.exercises.values() if e.replaces):
            sources = answers.get(exercise.id, [])
            sources = [s for s in sources if s.strip() != exercise.stub.strip()]
            found += [(sheet, exercise, sources)] if sources else []
    return found


def choose(found: list[tuple[Sheet, Exercise, list[str]]], folder: str) -> list[tuple]:
    """(sheet, exercise, source) of the answers that pass; UserError for one of which none does."""
    passed = set(os.environ.get(PASSED, "").split())
    grader, chosen = Grader(list({s.name: s for s, _, _ in found}.values())), []
    with grader.nursery:
        for sheet, exercise, sources in found:
            for source in sources:
                digest = hashlib.sha256(f"{exercise}\0{source}".encode()).hexdigest()[:32]
                result = None if digest in passed else grader.grade(sheet, exercise, source)
                if not result or all(o.passed for o in result.outcomes):
                    passed.add(digest)
                    chosen.append((sheet, exercise, source))
                    break
            else:
                fault = next(o for o in result.outcomes if not o.passed)
                words = " ".join(fault.words.split()).rstrip(".")
                raise UserError(
                    f"your answer to {exercise.id} cannot stand for nanochat.{exercise.replaces}: "
                    f"it fails {fault.name!r} ({words}); mend it in {folder} or leave `mine` out."
                )
    os.environ[PASSED] = " ".join(sorted(passed))
    return chosen
