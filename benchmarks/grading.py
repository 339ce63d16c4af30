"""How long it takes to grade a class: made-up students hand in the whole book.

    python benchmarks/grading.py [--students 30] [--workers 2]

Each student solves most exercises, gets some wrong and leaves some; five of them loop without end
or crash somewhere. Prints the time, and grades the class a second time to see whether the grades
are the same.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from book.grading import all_sheets, grade
from book.manuscript import load_book

HEAD = "#| exercise id={} points=1\n"
HANG = "while True:\n    pass\n"
CRASH = "import os\n\nos._exit(1)\n"


def notebook(sheet, rng: random.Random, trouble: str) -> str:
    """A sheet as a student hands it in; `trouble` stands before one answer."""
    cells = []
    for exercise in sheet.exercises.values():
        source = rng.choices(
            [exercise.solution, exercise.right[0], exercise.wrong[0][1], exercise.stub],
            [0.5, 0.1, 0.25, 0.15],
        )[0]
        if not source.startswith("#| exercise"):
            source = HEAD.format(exercise.id) + source.partition("\n")[2]
        cells.append({"cell_type": "code", "metadata": {}, "source": source})
    if trouble:
        cells[0]["source"] += "\n" + trouble
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    book = load_book(Path(__file__).resolve().parent)
    sheets = all_sheets(book)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "submissions"
        for number in range(options.students):
            rng, chosen = random.Random(number), number % len(sheets)
            for position, sheet in enumerate(sheets):
                trouble = {0: HANG, 6: CRASH}.get(number % 12, "") if position == chosen else ""
                path = folder / f"student{number:02d}" / f"{sheet.name}.ipynb"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(notebook(sheet, rng, trouble), encoding="utf-8")
        results = []
        for attempt in ("once", "again"):
            begin = time.perf_counter()
            results.append(grade(book, folder, Path(place) / attempt, workers=options.workers))
            print(f"{attempt}: {time.perf_counter() - begin:.0f} s", flush=True)
    count = sum(len(sheet.exercises) for sheet in sheets)
    first, second = results
    differ = [
        (name, e["id"])
        for name in first
        for c, d in zip(first[name]["chapters"], second[name]["chapters"])
        for e, f in zip(c["exercises"], d["exercises"])
        if e["score"] != f["score"]
    ]
    print(f"{options.students} students, {count} exercises each, {options.workers} workers")
    print(f"scores {min(g['score'] for g in first.values())} to", end=" ")
    print(f"{max(g['score'] for g in first.values())} of {first['student00']['points']}")
    print(f"scores that differ between the two: {len(differ)} {differ[:10]}")


if __name__ == "__main__":
    main()
