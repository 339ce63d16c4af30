"""book.printing and book.running: notebooks that are the same every time, and what a run costs."""

import base64
import json
import zlib

import nbformat
import pytest
from conftest import ROOT, write_sample

from book.contents import content_files
from book.manuscript import BookError, load_book, read_cells
from book.printing import (
    collapse,
    normalise,
    notebook_of,
    plain_png,
    print_book,
    print_chapter,
    scrub,
)
from book.running import execute, run

CIRCLE = "chapters/00_circle.ipynb"


def outputs(path):
    return [c["outputs"] for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def test_text_and_code_survive_the_way_to_a_notebook(sample):
    book = load_book(sample)
    for path in sorted((sample / "chapters").glob("*.py")):
        notebook = notebook_of(book, path)
        expected = [(c.kind, c.source, list(c.tags)) for c in read_cells(path)]
        cells = notebook.cells
        assert [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in cells] == expected
        nbformat.validate(notebook)


def test_printing_twice_gives_identical_bytes(printed_once, tmp_path):
    second = write_sample(tmp_path / "elsewhere")
    print_book(load_book(second), [])
    names = sorted(p.relative_to(second) for p in second.rglob("*.*") if p.is_file())
    for name in names:
        if name.suffix != ".pyc":
            assert (printed_once / name).read_bytes() == (second / name).read_bytes(), name


def test_a_printed_notebook_holds_clean_outputs_of_the_quick_profile(printed_once):
    text = (printed_once / CIRCLE).read_text()
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    shown = outputs(printed_once / CIRCLE)
    assert shown[-2][0]["text"] == "done 12.566\n. TMP\n"  # radius = 2 by book.toml
    assert shown[-1][0]["data"]["text/plain"] == "<object at 0x...>"
    assert "papermill" not in text and "injected" not in text and str(printed_once) not in text
    assert [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"] == [
        *range(1, len(shown) + 1)
    ]
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert len({c["id"] for c in notebook["cells"]}) == len(notebook["cells"])


def test_no_execute_keeps_outputs_whose_code_is_unchanged(printed):
    book = load_book(printed)
    path = printed / "chapters" / "00_circle.py"
    path.write_text(path.read_text().replace("# Circles", "# Round things"))
    before = outputs(printed / CIRCLE)
    print_chapter(book, book.chapters[0], run=False)
    assert "# Round things" in (printed / CIRCLE).read_text()
    assert outputs(printed / CIRCLE) == before
    path.write_text(path.read_text().replace("round(area(radius), 3)", "round(area(radius), 1)"))
    print_chapter(book, book.chapters[0], run=False)
    assert outputs(printed / CIRCLE) == [*before[:-2], [], []]


def test_a_failing_cell_fails_the_print_and_leaves_the_old_notebook(printed):
    path = printed / "chapters" / "00_circle.py"
    path.write_text(path.read_text() + "\n\n# %%\nprint('here')\n1 / 0\n")
    before = (printed / CIRCLE).read_bytes()
    with pytest.raises(BookError, match=r"(?s)cell \[\d+\] failed.*1 / 0.*ZeroDivisionError"):
        print_book(load_book(printed), ["00"])
    assert (printed / CIRCLE).read_bytes() == before


def test_a_notebook_that_is_too_large_names_its_largest_cell(printed):
    path = printed / "chapters" / "00_circle.py"
    path.write_text(path.read_text() + "\n\n# %%\nprint('large ' * 100_000)\n")
    with pytest.raises(BookError, match=r"over the limit of 400 KB.*cell \[11\], `print\('large"):
        print_book(load_book(printed), ["00"])


def test_run_measures_time_and_memory_and_records_them(printed, capsys):
    book = load_book(printed)
    (printed / "README.md").write_text("before\n<!-- times -->\nold\n<!-- /times -->\nafter\n")
    run(book, ["01"], record=True)
    for name in ("runs/chapters.json", "chapters/TIMES.json"):
        cost = json.loads((printed / name).read_text())["chapters"]["01_ring"]
        assert 0 < cost["seconds"] < 60 and 10 < cost["memory_mb"] < 2000
    assert "01_ring" in capsys.readouterr().out
    files = content_files(book)
    assert "| 01 | [Rings](01_ring.ipynb) | `ring`, `cut` |" in files["chapters/README.md"]
    assert files["README.md"].startswith("before\n<!-- times -->\n| # | chapter")
    assert (
        files["README.md"].endswith("<!-- /times -->\nafter\n") and "old" not in files["README.md"]
    )
    assert "(chapters/01_ring.ipynb)" in files["README.md"] and "CPU cores" in files["README.md"]


def test_run_fails_on_a_failing_cell_and_strictly_on_the_budget(printed, capsys):
    toml = printed / "book.toml"
    toml.write_text(toml.read_text().replace("memory_mb = 2000", "memory_mb = 1"))
    run(load_book(printed), ["01"])
    assert "over budget" in capsys.readouterr().out
    path = printed / "chapters" / "00_circle.py"
    path.write_text(path.read_text() + "\n\n# %%\nraise KeyError('lost')\n")
    with pytest.raises(BookError, match="(?s)01_ring.py: over budget.*MB"):
        run(load_book(printed), ["01"], strict=True)
    with pytest.raises(BookError, match="(?s)00_circle.py: cell .*KeyError: 'lost'"):
        run(load_book(printed), ["00"])


def test_streams_are_merged_and_overwritten_lines_collapse():
    def stream(text, name="stdout"):
        return {"output_type": "stream", "name": name, "text": text}

    found = normalise([stream("1%\r2"), stream("%\r100%\n"), stream("x\n", "stderr")], {})
    assert [(o["name"], o["text"]) for o in found] == [("stdout", "100%\n"), ("stderr", "x\n")]
    assert collapse("a\r\nb\rc\r") == "a\nc"


def test_widgets_and_display_ids_leave_no_residue():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "Box()"}
    output = {"output_type": "display_data", "data": widget, "metadata": {}, "transient": {"a": 1}}
    (found,) = normalise([output], {})
    assert found["data"] == {"text/plain": "(a widget: run this cell to use it)"}
    assert "transient" not in found


def test_paths_and_addresses_are_scrubbed():
    places = {"/home/ann/book": ".", "/home/ann": "~"}
    assert scrub("/home/ann/book/x /home/ann/y /home/anna", places) == "./x ~/y /home/anna"
    assert scrub("<A object at 0x7f12ab34cd56>", {}) == "<A object at 0x...>"
    assert scrub("/tmp/ipykernel_12/345.py:3: Warning", {}) == "cell.py:3: Warning"
    assert scrub("saved to /tmp/tmpabcd_123/x", {}) == "saved to TMP/x"


def test_png_metadata_is_dropped_and_pixels_stay():
    import struct

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head, tail = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"1234"), chunk(b"IEND", b"")
    image = head + chunk(b"tEXt", b"Software\0plot") + chunk(b"tIME", b"now") + tail
    assert plain_png(image) == head + tail
    data = {"image/png": base64.b64encode(image).decode() + "\n"}
    (found,) = normalise([{"output_type": "display_data", "data": data, "metadata": {}}], {})
    assert base64.b64decode(found["data"]["image/png"]) == head + tail


def test_the_label_of_a_figure_is_printed_as_alt_text(sample):
    book = load_book(sample)
    code = """
import matplotlib.pyplot as plt
plt.figure(figsize=(1, 1)).set_label("an empty square")
plt.show()
plt.figure(figsize=(1, 1))
plt.show()"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python"}
    executed, done = execute(book, book.chapters[0], notebook)
    assert not done.failure
    shown = normalise(executed.cells[-1].outputs, {})
    assert [o["metadata"] for o in shown] == [{"image/png": {"alt": "an empty square"}}, {}]


@pytest.mark.parametrize("path", sorted((ROOT / "chapters").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_picture_of_the_book_has_alt_text(path):
    shown = [o for cell in outputs(path) for o in cell if "image/png" in o.get("data", {})]
    assert shown and all(o["metadata"]["image/png"]["alt"] for o in shown)
