"""Print: from a manuscript to a notebook whose outputs are the same on every machine and day."""

import base64
import hashlib
import json
import re
import struct
import sys
import tempfile
from pathlib import Path

from book.contents import content_files
from book.export import export, write_files
from book.manuscript import Book, BookError, Chapter, parse, read_cells
from book.running import execute, keep

LIMIT_KB = 400
# Lines of nanochat.common.Progress: the ones on the way go, the last one loses its time.
PROGRESS = re.compile(r"^.* [\d,]+/[\d,]+ \w+ \| (?:.* \| )?[\dhms ]+ left\n?", re.MULTILINE)
PROGRESS_END = re.compile(r"^(.* [\d,]+/[\d,]+ \w+.*) \| [\dhms ]+ in all$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def digest(text: str, length: int = 16) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:length]


def notebook_of(book: Book, path: Path, text: str | None = None) -> dict:
    """The manuscript (or another `text` of it) as a notebook without outputs, by jupytext."""
    import jupytext

    if not path.is_file():
        raise BookError(f"{path.relative_to(book.root).as_posix()}: the manuscript is missing")
    cells = read_cells(path)
    for cell in (c for c in cells if c.kind == "code"):
        parse(cell, path.name)
    source = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(source if text is None else text, fmt="py:percent")
    if len(notebook.cells) != len(cells):
        raise BookError(f"{path.name}: {len(cells)} cells, but jupytext sees {len(notebook.cells)}")
    origin = {"manuscript": path.relative_to(book.root).as_posix()}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}, "book": origin}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for position, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        cell.id = f"{position:03d}-{digest(cell.cell_type + cell.source, 8)}"
    return notebook


def as_text(notebook: dict) -> str:
    import nbformat

    notebook = nbformat.from_dict(notebook)
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prefixes(notebook: dict, chapter: Chapter) -> list[str]:
    """For each code cell, a hash of it and of all that ran before it, parameters included."""
    running, found = json.dumps(chapter.parameters, sort_keys=True), []
    for cell in code_cells(notebook):
        running = digest(f"{running}\0{cell['source']}")
        found.append(running)
    return found


def outputs_digest(notebook: dict) -> str:
    return digest(json.dumps([c["outputs"] for c in code_cells(notebook)], sort_keys=True))


def with_outputs(notebook: dict, chapter: Chapter, outputs: dict[str, list]) -> str:
    """The notebook's text with the outputs kept by prefix hash; other cells are left empty."""
    now = prefixes(notebook, chapter)
    for number, (cell, prefix) in enumerate(zip(code_cells(notebook), now), 1):
        cell["execution_count"] = number if prefix in outputs else None
        cell["outputs"] = outputs.get(prefix, [])
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    notebook["metadata"]["book"].update(
        computed_from=[prefix if prefix in outputs else "" for prefix in now],
        outputs=outputs_digest(notebook),
        parameters=chapter.parameters,
    )
    return as_text(notebook)


def read_printed(path: Path) -> dict:
    """A printed notebook; BookError when it was not printed by us."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        wanted = {"computed_from", "outputs"} <= set(notebook["metadata"]["book"])
    except Exception:  # whatever a foreign file makes nbformat raise
        wanted = False
    if not wanted:
        raise BookError(f"{path.name} is not a printed notebook; delete it and print it again")
    return notebook


def refreshed(book: Book, chapter: Chapter) -> str:
    """The printed notebook as it should be now, with the outputs that still hold."""
    outputs, path = {}, book.path(chapter, ".ipynb")
    if path.is_file():
        old = read_printed(path)
        computed = old["metadata"]["book"]["computed_from"]
        outputs = {p: cell["outputs"] for p, cell in zip(computed, code_cells(old)) if p}
    return with_outputs(notebook_of(book, book.path(chapter)), chapter, outputs)


def print_book(book: Book, numbers: list[str], run: bool = True, record: bool = False) -> None:
    """Print chapters, sheets and tables; a chapter that fails does not stop the others."""
    from book.sheets import sheet_files

    problems = []
    chapters = [lambda c=c: print_chapter(book, c, run, record) for c in book.select(numbers)]
    for action in [
        *chapters,
        lambda: write_files(book, sheet_files(book)),
        lambda: write_files(book, content_files(book)),
    ]:
        try:
            action()
        except BookError as error:
            problems.append(str(error))
    if problems:
        raise BookError("\n".join(problems))


def print_chapter(book: Book, chapter: Chapter, run: bool, record: bool = False) -> None:
    """Write chapters/NN_name.ipynb, executed or with only its text and code refreshed."""
    cost = ""
    if run:
        export(book, [chapter.name])
        notebook = notebook_of(book, book.path(chapter))
        executed, done = execute(book, chapter, notebook)
        if done.failure:
            raise BookError(f"chapters/{chapter.name}.py: {done.failure}")
        cells = code_cells(executed)
        cells = [c for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
        places = {done.folder: ".", str(book.root): ".", sys.prefix: "ENV", str(Path.home()): "~"}
        outputs = [normalise(cell["outputs"], places) for cell in cells]
        text = with_outputs(notebook, chapter, dict(zip(prefixes(notebook, chapter), outputs)))
        cost = f", {done.seconds:.1f} s, {done.memory_mb:.0f} MB"
        if record:
            measured = {"seconds": round(done.seconds, 1), "memory_mb": round(done.memory_mb)}
            keep(book.root / "chapters" / "TIMES.json", {chapter.name: measured})
    else:
        text = refreshed(book, chapter)
    if too_large(text):
        raise BookError(f"chapters/{chapter.name}.ipynb: {too_large(text)}")
    book.path(chapter, ".ipynb").write_bytes(text.encode("utf-8"))
    print(f"printed chapters/{chapter.name}.ipynb ({len(text) / 1024:.0f} KB{cost})", flush=True)


def too_large(text: str) -> str:
    """A sentence that names the largest cell, or "" when the notebook is small enough."""
    size = len(text.encode("utf-8")) / 1024
    cells = code_cells(json.loads(text))
    if size <= LIMIT_KB:
        return ""
    largest = max(cells, key=lambda cell: len(json.dumps(cell["outputs"])))
    where = f"the largest output is of cell [{largest['execution_count']}]"
    return f"{size:.0f} KB is over the limit of {LIMIT_KB} KB; {where}, `{largest['source'][0]}`"


def normalise(outputs: list[dict], places: dict[str, str]) -> list[dict]:
    """Outputs without paths, addresses, progress residue, widget state or image dates."""
    clean: list[dict] = []
    for output in json.loads(json.dumps(outputs)):
        output.pop("transient", None)
        if output["output_type"] == "stream":
            if clean and clean[-1].get("name") == output["name"]:
                clean[-1]["text"] += output["text"]
            else:
                clean.append(output)
            continue
        alt = output["metadata"].get("image/png", {}).get("alt")
        output["metadata"] = {"image/png": {"alt": alt}} if alt else {}
        data = output.get("data", {})
        if data.pop(WIDGET, None) is not None and set(data) <= {"text/plain"}:
            data["text/plain"] = "(a widget: run this cell to use it)"
        for kind, value in data.items():
            if kind == "image/png":
                data[kind] = base64.b64encode(plain_png(base64.b64decode(value))).decode("ascii")
            elif kind.startswith("text/"):
                data[kind] = scrub(value, places)
        clean.append(output)
    for output in clean:
        if output["output_type"] == "stream":
            text = PROGRESS_END.sub(r"\1", PROGRESS.sub("", collapse(output["text"])))
            output["text"] = scrub(text, places)
    return [output for output in clean if output.get("text") or output.get("data")]


def collapse(text: str) -> str:
    """What a terminal shows in the end of lines that were overwritten with carriage returns."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(next(filter(None, reversed(line.split("\r"))), "") for line in lines)


def scrub(text: str, places: dict[str, str]) -> str:
    """Replace what differs between machines and runs: folders, temporary names, addresses."""
    for place in sorted(places, key=len, reverse=True):
        for form in {place, str(Path(place).resolve())} - {"/"}:
            text = re.sub(re.escape(form) + r"(?![\w-])", places[place], text)
    temporary = f"(?:{re.escape(tempfile.gettempdir())}|/tmp)"
    text = re.sub(rf"{temporary}/ipykernel_\d+/\d+\.py", "cell.py", text)
    text = re.sub(rf"{temporary}/\w*tmp\w{{8}}", "TMP", text)
    return re.sub(r"\bat 0x[0-9a-fA-F]{6,16}", "at 0x...", text)


def plain_png(data: bytes) -> bytes:
    """A PNG without its text and time chunks (software, creation date)."""
    kept, place = data[:8], 8
    while place + 8 <= len(data):
        end = place + 12 + struct.unpack(">I", data[place : place + 4])[0]
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf"):
            kept += data[place:end]
        place = end
    return kept
