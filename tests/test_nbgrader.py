"""The printed sheets under nbgrader, for instructors who have it (the extra `nbgrader`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from book.manuscript import load_book
from book.sheets import read_sheet, sheet_notebook

nbgrader = pytest.importorskip("nbgrader", reason="the extra `nbgrader` is not installed")
NAME = "00_start_here"


def run(folder, *arguments):
    """`nbgrader ...` in a course folder; its log when it fails."""
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for alembic
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PATH": here, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def answered(release, sources):
    """A copy of the released sheet with the cells of these exercises filled in."""
    notebook = json.loads(release)
    for cell in notebook["cells"]:
        id = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if id in sources:
            cell["source"] = sources[id]
    return json.dumps(notebook)


def test_generate_assignment_and_autograde(tmp_path):
    from nbgrader.api import Gradebook

    path = ROOT / "exercises" / f"{NAME}.py"
    sheet = read_sheet(path)
    text = path.read_text(encoding="utf-8")
    source = tmp_path / "source" / "one" / f"{NAME}.ipynb"
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps(sheet_notebook(load_book(ROOT), path, text, sheet)))
    (tmp_path / "nbgrader_config.py").write_text(
        "c = get_config()\nc.CourseDirectory.course_id='c'"
    )
    run(tmp_path, "generate_assignment", "one", "--create")
    release = (tmp_path / "release" / "one" / f"{NAME}.ipynb").read_text()
    assert "SOLUTION" not in release and release.count("raise NotImplementedError()") == len(
        sheet.exercises
    )
    right = {e.id: e.solution for e in sheet.exercises.values()}
    partial = next(e for e in sheet.exercises.values() if e.checks.count("@says") > 1)
    for student, sources in {
        "ada": right,
        "ben": {partial.id: partial.wrong[0][1]},
        "eve": {},
    }.items():
        target = tmp_path / "submitted" / student / "one" / f"{NAME}.ipynb"
        target.parent.mkdir(parents=True)
        target.write_text(answered(release, sources))
    progress = ROOT / "work" / "progress.json"
    before = progress.read_bytes() if progress.is_file() else None
    run(tmp_path, "autograde", "one", "--create")
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        scores = {s: book.find_submission("one", s).score for s in ("ada", "ben", "eve")}
        total = book.find_assignment("one").max_score
    assert total == sum(e.points for e in sheet.exercises.values())
    assert scores["ada"] == total and scores["eve"] == 0
    n = partial.checks.count("@says")
    assert scores["ben"] == pytest.approx(partial.points * (n - 1) / n, abs=0.01)
    assert before == (progress.read_bytes() if progress.is_file() else None)
