"""The table of contents in chapters/README.md and the table of times in README.md."""

import json
import re
from pathlib import Path

from book.manuscript import Book, BookError

BLOCK = re.compile(r"<!-- times -->.*?<!-- /times -->", re.DOTALL)


def content_files(book: Book) -> dict[str, str]:
    """{path below the root: text} of the files that show the table of contents."""
    times = read_times(book.root / "chapters" / "TIMES.json")
    head = f"# {book.title}: contents\n\nDerived from book.toml; edit there, not here.\n\n"
    files = {"chapters/README.md": head + table(book, times, links="") + "\n"}
    readme = book.root / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        block = f"<!-- times -->\n{table(book, times, links='chapters/')}\n<!-- /times -->"
        files["README.md"] = BLOCK.sub(lambda _: block, text)
    return files


def read_times(path: Path) -> dict:
    """Measurements that book.running keeps in a JSON file; a damaged one is named."""
    if not path.is_file():
        return {"chapters": {}}
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        [f"{cost['seconds']:.0f}" for cost in times["chapters"].values()]
        "{cores} {system} {python} {torch} {date}".format(**times["machine"])
        return times
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BookError(
            f"{path.parent.name}/{path.name} is damaged ({type(error).__name__}: {error}); "
            "restore it or delete it, then measure again with `python -m book run --record`"
        ) from None


def table(book: Book, times: dict, links: str) -> str:
    """Number, title, modules, measured seconds and MB, and what the reader builds."""
    lines = [
        "| # | chapter | module | seconds | MB | what you build |",
        "|---|---|---|---:|---:|---|",
    ]
    for chapter in book.chapters:
        cost = times["chapters"].get(chapter.name, {})
        seconds = f"{cost['seconds']:.0f}" if cost else "-"
        memory = str(cost.get("memory_mb", "-"))
        modules = ", ".join(f"`{name}`" for name in chapter.modules) or "-"
        link = f"[{chapter.title}]({links}{chapter.name}.ipynb)"
        row = [chapter.number, link, modules, seconds, memory, chapter.builds]
        lines.append("| " + " | ".join(row) + " |")
    machine = times.get("machine")
    if machine:
        lines += [
            "",
            f"Measured in the quick profile, offline, on {machine['cores']} CPU cores: "
            f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}, "
            f"{machine['date']}. MB is the peak of the kernel and its children.",
        ]
    return "\n".join(lines)
