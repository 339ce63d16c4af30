"""Learners' copies in work/, and JupyterLab for learners and for authors."""

import json
import os
import subprocess
import sys
from pathlib import Path

from book.manuscript import Book, BookError
from book.printing import digest


def work(book: Book, numbers: list[str]) -> None:
    """Copy printed notebooks and sheets into work/; a file that a learner changed is kept."""
    from nanochat.common import write_json

    folder = book.root / "work"
    record = folder / ".copies.json"
    names = [f"{c.name}.ipynb" for c in book.select(numbers)]
    copies = read_copies(record)
    sources = {name: book.root / "chapters" / name for name in names}
    sources.update({f"exercises/{n}": book.root / "exercises" / n for n in names})
    sources = {name: path for name, path in sources.items() if path.is_file()}
    if not sources:
        raise BookError("there is no printed notebook to copy; run `python -m book print` first")
    for name, path in sources.items():
        copy(folder, name, path.read_text(encoding="utf-8"), copies)
        write_json(record, copies)


def read_copies(record: Path) -> dict[str, str]:
    """{name: digest} of the copies that were made; unreadable, it knows of none."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def copy(folder: Path, name: str, text: str, copies: dict[str, str]) -> None:
    """Write `name`, or the first of NAME.new.ipynb, NAME.new2.ipynb that nobody has changed."""
    from nanochat.common import atomic_write

    number, target = 0, name
    while (folder / target).is_file():
        here = (folder / target).read_text(encoding="utf-8")
        if here == text:
            copies[target] = digest(text)
            return
        if digest(here) == copies.get(target):
            break
        number += 1
        target = name.replace(".ipynb", f".new{number if number > 1 else ''}.ipynb")
    atomic_write(folder / target, text)
    copies[target] = digest(text)
    kept = f" (work/{name} has your changes and is kept)" if target != name else ""
    print(f"wrote work/{target}{kept}")


def lab(book: Book, learner: bool, arguments: list[str]) -> int:
    """Start JupyterLab: for learners in work/, for authors on the manuscripts as notebooks."""
    environment = dict(os.environ)
    if learner:
        work(book, [])
    else:
        paths = [str(book.root / "jupyter"), environment.get("JUPYTER_CONFIG_PATH")]
        environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *arguments]
    folder = book.root / "work" if learner else book.root
    try:
        return subprocess.run(command, cwd=folder, env=environment).returncode
    except KeyboardInterrupt:
        return 0
