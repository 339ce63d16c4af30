"""Run a notebook in a fresh kernel through papermill's engine, and measure time and memory."""

import contextlib
import copy
import datetime
import json
import logging
import os
import platform
import re
import tempfile
import threading
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from book.contents import content_files, read_times
from book.export import write_files
from book.manuscript import Book, BookError, Chapter


class Cost(NamedTuple):
    """What a run took, why it failed ("" when it did not), and the folder where it ran."""

    seconds: float
    memory_mb: float
    failure: str
    folder: str


@contextlib.contextmanager
def peak_memory():
    """Sample the resident memory of this process's children; yields a list with the peak in MB."""
    import psutil

    peak, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            total = 0
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process().children(recursive=True):
                    total += child.memory_info().rss
            peak[0] = max(peak[0], total / 2**20)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


ALT_TEXT = """
def alt_text(figure, include=None, exclude=None):
    return {}, {"image/png": {"alt": figure.get_label()}}

pictures = get_ipython().display_formatter.mimebundle_formatter
pictures.for_type_by_name("matplotlib.figure", "Figure", alt_text)
del alt_text, pictures
"""


@contextlib.contextmanager
def kernel_environment(book: Book, folder: str):
    """Offline, this book's package first, inline figures, and no personal IPython settings.

    A figure's label goes beside its picture as alt text.
    """
    old = dict(os.environ)
    startup = Path(folder, ".ipython", "profile_default", "startup")
    startup.mkdir(parents=True)
    (startup / "alt_text.py").write_text(ALT_TEXT, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(book.root), old.get("PYTHONPATH")]))
    os.environ.update(PYTHONPATH=path, HF_HUB_OFFLINE="1", IPYTHONDIR=f"{folder}/.ipython")
    os.environ.update(MPLBACKEND="module://matplotlib_inline.backend_inline")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


def execute(book: Book, chapter: Chapter, notebook: dict) -> tuple[dict, Cost]:
    """Run a notebook in a fresh kernel and a fresh, empty folder; a failing cell is reported."""
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # A socket file instead of a TCP port: quiet, and out of reach of other users.
    config = Config({"KernelManager": {"transport": "ipc"}} if os.name == "posix" else {})
    options = {"kernel_name": "python3", "config": config, "progress_bar": False}
    options.update(request_save_on_cell_execute=False, execution_timeout=int(10 * chapter.seconds))
    failure, result, start = "", copy.deepcopy(notebook), time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="book-"))
        stack.enter_context(kernel_environment(book, folder))
        peak = stack.enter_context(peak_memory())
        target = os.path.join(folder, ".printed.ipynb")
        options.update(cwd=folder, parameters=chapter.parameters)
        try:
            result = papermill.execute_notebook(result, target, **options)
        except papermill.PapermillExecutionError as error:
            trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).splitlines()
            head = "\n".join(error.source.splitlines()[:12])
            tail = "\n".join(trace[-15:])
            failure = f"cell [{error.exec_count}] failed:\n{head}\n...\n{tail}"
        except Exception as error:  # a dead kernel, a timeout
            failure = f"{type(error).__name__}: {str(error)[-1000:]}"
        seconds = time.perf_counter() - start
    return result, Cost(seconds, peak[0], failure, folder)


def run(book: Book, numbers: list[str], strict: bool = False, record: bool = False) -> None:
    """Run chapters, print and keep their costs; raise BookError when one fails."""
    from book.printing import notebook_of

    kept = [book.root / "runs" / "chapters.json"]
    kept += [book.root / "chapters" / "TIMES.json"] if record else []
    for path in kept:
        read_times(path)  # a damaged one is named now, and not after all that work
    results, problems = {}, []
    print(f"{'chapter':<22}{'seconds':>9}{'MB':>8}")
    for chapter in book.select(numbers):
        try:
            _, done = execute(book, chapter, notebook_of(book, book.path(chapter)))
        except BookError as error:
            problems.append(str(error))
            continue
        over = f"over budget ({chapter.seconds:.0f} s, {chapter.memory_mb:.0f} MB)"
        within = done.seconds <= chapter.seconds and done.memory_mb <= chapter.memory_mb
        note = "failed" if done.failure else "" if within else over
        print(f"{chapter.name:<22}{done.seconds:>9.1f}{done.memory_mb:>8.0f}  {note}", flush=True)
        if done.failure or (strict and not within):
            problems.append(f"chapters/{chapter.name}.py: {done.failure or over}")
        else:
            cost = {"seconds": round(done.seconds, 1), "memory_mb": round(done.memory_mb)}
            results[chapter.name] = cost
    for path in kept:
        keep(path, results)
    if record:
        write_files(book, content_files(book))
    if problems:
        raise BookError("\n".join(problems))


def keep(path: Path, results: dict) -> None:
    """Merge measurements into a JSON file that also names the machine."""
    from nanochat.common import atomic_write

    old = read_times(path)["chapters"]
    machine = {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": next((d.version.split("+")[0] for d in distributions(name="torch")), "none"),
        "date": datetime.date.today().isoformat(),
    }
    table = {"machine": machine, "chapters": dict(sorted({**old, **results}.items()))}
    atomic_write(path, json.dumps(table, indent=1) + "\n")
