"""The capstone notebook: executed by papermill from the first cell to the last, then again."""

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from tiny_run import TINY, one_thread  # noqa: F401

from nanochat import cli
from nanochat.common import read_metrics
from nanochat.recipe import MODELS, STAGES, Run

ROOT = Path(__file__).resolve().parent.parent


def notebook(folder: Path) -> Path:
    """The printed capstone; when it is not printed yet, the same made from the manuscript."""
    printed = ROOT / "chapters" / "12_capstone.ipynb"
    if printed.exists():
        return printed
    import jupytext

    made = folder / "12_capstone.ipynb"
    jupytext.write(jupytext.read(printed.with_suffix(".py")), made)
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Papermill's kernels find this package, a folder for runs, and figures that are kept."""
    folder = tmp_path_factory.mktemp("capstone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("NANOCHAT_RUNS", str(folder / "runs"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield folder


@pytest.fixture(scope="module")
def executed(environment):
    overrides = {**TINY, "device": "auto", "dtype": "auto"}
    papermill.execute_notebook(
        str(notebook(environment)),
        str(environment / "out.ipynb"),
        parameters=dict(profile="smoke", name="mine", seed=3, overrides=overrides),
        kernel_name="python3",
        progress_bar=False,
        cwd=str(environment),
    )
    return nbformat.read(environment / "out.ipynb", 4)


@pytest.fixture(scope="module")
def run(executed, environment):
    return Run(environment / "runs" / "mine")


def outputs(executed, kind, key):
    return [
        output[key]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == kind
    ]


def test_every_cell_runs_and_every_stage_leaves_its_mark(executed, run):
    assert outputs(executed, "error", "evalue") == []
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert [stage for stage in STAGES if run.done(stage)] == list(STAGES)
    assert (run.recipe.seed, run.recipe.depth) == (3, 1)


def test_the_notebook_shows_plots_and_a_table_with_a_column_for_each_stage(executed):
    shown = outputs(executed, "display_data", "data")
    assert sum("image/png" in data for data in shown) == 1 + len(MODELS)
    tables = [data["text/markdown"] for data in shown if "text/markdown" in data]
    (table,) = [table for table in tables if table.startswith("| metric |")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["metric", "chance", *MODELS]
    assert {len(row) for row in rows} == {6} and len(rows) > 9
    assert all(re.fullmatch(r"-?\d\.\d{3}", cell) for row in rows[2:] for cell in row[2:])


def test_progress_is_sparse_plain_lines(executed):
    streams = "".join(outputs(executed, "stream", "text"))
    assert "\r" not in streams and "%|" not in streams
    for stage, steps in zip(MODELS, (12, 4, 4, 2)):
        lines = re.findall(rf"^{stage} [\d,]+/{steps} steps.*", streams, re.M)
        assert 1 <= len(lines) <= 12 and "in all" in lines[-1]


def test_the_report_and_the_log_can_be_read(run):
    for name in ("report.md", "report.html"):
        assert "What each stage brought" in (run.directory / name).read_text(encoding="utf-8")
    lines = run.log.path.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert {e["stage"] for e in events if e["event"] == "judged"} == set(MODELS)
    assert {e["stage"] for e in events if e["event"] == "exchange"} == set(MODELS)
    assert not list(run.directory.rglob("*.tmp"))


def test_the_command_finds_everything_done_and_ends_with_an_exchange(
    run, environment, capfd, monkeypatch
):
    monkeypatch.setattr(cli, "capstone_notebook", lambda: notebook(environment))
    before = len(read_metrics(run.log.path, "step"))
    assert cli.main(["capstone", "--folder", str(run.directory)]) == 0
    said = capfd.readouterr().out
    assert all(f"{stage}: finished before, skipped" in said for stage in STAGES)
    assert len(read_metrics(run.log.path, "step")) == before
    assert (run.directory / "capstone.ipynb").exists()
    tail = said[said.index("executed notebook  ") :]
    assert "capstone.ipynb" in tail and "report.md" in tail and "report.html" in tail
    assert tail.count("\n> ") == 3 and "> Who are you?" in tail


def test_a_capstone_that_breaks_is_one_sentence(environment, capfd, monkeypatch):
    monkeypatch.setattr(cli, "capstone_notebook", lambda: notebook(environment))
    sets = [part for k, v in TINY.items() for part in ("--set", f"{k}={v}")]
    sets += ["--set", "data=folder:nowhere", "--set", "name=broken"]
    assert cli.main(["capstone", "--profile", "smoke", *sets]) == 2
    err = capfd.readouterr().err  # a dying kernel may add a line of its own
    (said,) = [line for line in err.splitlines() if line.startswith("nanochat: ")]
    assert "Traceback" not in err
    assert "UserError: data folder nowhere does not exist; check the path" in said
    assert "the same command goes on from there" in said
