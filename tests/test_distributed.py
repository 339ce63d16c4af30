import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import distributed
from nanochat.common import UserError
from nanochat.distributed import (
    BUS_FACTORS,
    LaunchError,
    Layout,
    ShardedMuonAdamW,
    available_processes,
    buckets,
    find_failure,
    launch,
    launch_environment,
    reduction_layouts,
    setup,
    share_out,
    share_rows,
)
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer, param_groups

WORKERS = str(Path(__file__).with_name("distributed_workers.py"))
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and sessions of POSIX")
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@given(shapes, st.integers(1, 7), st.sampled_from(["adamw", "muon"]))
@settings(max_examples=60, deadline=None)
def test_pieces_cover_every_element_once_and_are_balanced(shapes, n_ranks, kind):
    params = [torch.zeros(shape) for shape in shapes]
    (share,) = share_out([dict(kind=kind, params=params)], n_ranks)
    seen = {id(p): torch.zeros(p.numel()) for p in params}
    for pieces in share:
        for piece in pieces:
            assert 0 <= piece.start < piece.stop <= piece.param.numel()
            assert kind == "adamw" or piece.stop - piece.start == piece.param.numel()
            seen[id(piece.param)][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in seen.values())
    loads = [sum(p.stop - p.start for p in pieces) for pieces in share]
    slack = max(p.numel() for p in params) if kind == "muon" else len(params) * n_ranks
    assert max(loads) - min(loads) <= slack


@given(shapes, st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_rows_and_matrices_are_shared_out_as_chunk_cuts_them(shapes, n_ranks):
    tables, matrices = [torch.rand(shape) for shape in shapes], [torch.rand(3, 2) for _ in shapes]
    groups = [dict(kind="adamw", params=tables), dict(kind="muon", params=matrices)]
    by_rows, whole = share_rows(groups, n_ranks)
    for rank in range(n_ranks):
        cuts = [table.chunk(n_ranks) for table in tables]
        expected = [cut[rank].flatten() for cut in cuts if rank < len(cut)]
        stacks = torch.stack(matrices).chunk(n_ranks)
        expected += [matrix.flatten() for matrix in (stacks[rank] if rank < len(stacks) else [])]
        found = [piece.of(piece.param) for piece in by_rows[rank] + whole[rank]]
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@given(shapes, st.integers(1, 5), st.sampled_from(["adamw", "muon"]))
@settings(max_examples=40, deadline=None)
def test_layout_carries_every_element_to_its_place(shapes, n_ranks, kind):
    params = [torch.rand(shape) for shape in shapes]
    (share,) = share_out([dict(kind=kind, params=params)], n_ranks)
    layout = Layout(share)
    flat = layout.empty()
    for rank in range(n_ranks):
        for piece, place in layout.slots(layout.part(flat, rank), rank):
            place.copy_(piece.of(piece.param))
    copies = {id(p): torch.zeros_like(p) for p in params}
    for rank in range(n_ranks):
        for piece, place in layout.slots(layout.part(flat, rank), rank):
            piece.of(copies[id(piece.param)]).copy_(place)
    assert all(torch.equal(copies[id(p)], p) for p in params)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(4, 100))
def test_buckets_keep_order_and_limit(lengths, limit):
    tensors = [torch.zeros(n) for n in lengths]
    cut = list(buckets(tensors, limit))
    assert [t.numel() for bucket in cut for t in bucket] == lengths
    assert all(len(b) == 1 or sum(t.nbytes for t in b) <= limit for b in cut)


def test_sharding_over_one_process_is_the_plain_optimizer():
    config = GPTConfig(vocab_size=31, seq_len=8, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    models = []
    for build in (build_optimizer, lambda m: ShardedMuonAdamW(param_groups(m), setup("cpu"))):
        model = GPT(config)
        optimizer = build(model)
        for _ in range(3):
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


@given(shapes, st.integers(1, 5), st.integers(4, 4000), st.sampled_from(["bfloat16", "float32"]))
@settings(max_examples=40)
def test_every_gradient_is_reduced_once_in_a_bucket_that_is_balanced(shapes, n_ranks, limit, dtype):
    matrices = [torch.zeros(shape) for shape in sorted(shapes)]
    by_shape = {m.shape: [n for n in matrices if n.shape == m.shape] for m in matrices}
    vectors = [torch.zeros(n) for shape in shapes for n in shape]
    groups = [dict(kind="muon", params=params) for params in by_shape.values()]
    groups.append(dict(kind="adamw", params=vectors))
    world = SimpleNamespace(
        world_size=n_ranks, bucket_bytes=limit, reduce_dtype=getattr(torch, dtype)
    )
    layouts = reduction_layouts(groups, share_out(groups, n_ranks), world)
    reduced = [id(param) for layout in layouts for param in layout.params]
    assert sorted(reduced) == sorted(id(param) for param in matrices + vectors)
    for layout in layouts:
        assert layout.dtype == world.reduce_dtype
        size = sum(param.nbytes for param in layout.params)
        assert size <= max(limit, n_ranks * max(p.nbytes for p in layout.params))


@pytest.mark.parametrize(
    ("nproc", "what"),
    [
        (2, "verbs+early+training+modern+any_shapes+checkpoints"),
        (4, "training+modern+any_shapes+checkpoints"),
    ],
)
def test_ranks_agree_with_one_process(tmp_path, nproc, what):
    """Each part is a function of distributed_workers.py; one launch for all of them."""
    lines = []
    launch(WORKERS, [what, str(tmp_path)], nproc, lines.append, env={"OMP_NUM_THREADS": "1"})
    done = sorted(line.split()[-2:] for line in lines if "done" in line)
    assert done == sorted([part, str(r)] for part in what.split("+") for r in range(nproc))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_agree_with_one_process(tmp_path):
    lines, env = [], {"WORKERS_DEVICE": "cuda"}
    what = "verbs+early+training+modern+checkpoints"
    launch(WORKERS, [what, str(tmp_path)], 2, lines.append, env=env)
    assert sum("done checkpoints" in line for line in lines) == 2


def test_a_failing_rank_reaches_the_caller_with_its_own_traceback(tmp_path):
    with pytest.raises(LaunchError) as caught:
        launch(WORKERS, ["raises", str(tmp_path)], 2, lambda line: None)
    error = caught.value
    assert error.rank == 1
    assert "rank 1 failed: ValueError: the row of rank 1 is too short" in str(error)
    assert "distributed_workers.py" in error.traceback and "in raises" in error.traceback


@posix_only
def test_a_killed_rank_is_named_before_its_echoes(tmp_path):
    with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL") as caught:
        launch(WORKERS, ["killed", str(tmp_path)], 2, lambda line: None)
    assert caught.value.rank == 1


def test_a_module_that_ends_early_shows_what_it_wrote(tmp_path):
    with pytest.raises(LaunchError, match="profile 'huge' is unknown"):
        launch(WORKERS, ["no_setup", str(tmp_path)], 1, lambda line: None)


def test_a_line_written_in_pieces_arrives_whole(tmp_path):
    lines = []
    launch(WORKERS, ["writes_in_pieces", str(tmp_path)], 2, lines.append)
    first, second = "one whole line of 0", "[rank 1] one whole line of 1"
    assert sorted(line for line in lines if "line of" in line) == [second] * 2 + [first] * 2


@posix_only
def test_a_rank_killed_while_it_reports_leaves_no_half_of_a_report(tmp_path):
    """torchrun ends a rank at any moment; here just before its report gets its name."""
    code = (
        "import os, signal\n"
        "from nanochat.distributed import report_errors\n"
        "report_errors()\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "raise ValueError('x' * 100_000)\n"
    )
    env = {**launch_environment(1), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run([sys.executable, "-c", code], env=env)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "error.json").exists()


@posix_only
def test_an_interrupt_ends_every_rank_soon(tmp_path):
    """Within five seconds on a free machine; torchrun alone would wait thirty."""
    pids, began = [], []
    # A job in the background has SIGINT ignored; launch is for people in the foreground.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_line(line):
        pids.append(int(line.split()[-1]))
        if len(pids) == 2:
            began.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            launch(WORKERS, ["sleeps", str(tmp_path)], 2, on_line)
    finally:
        signal.signal(signal.SIGINT, before)
    assert wait_until_gone(pids, 25 - (time.monotonic() - began[0]))


@posix_only
def test_no_rank_outlives_a_notebook_that_is_killed(tmp_path):
    code = (
        "import sys; from nanochat.distributed import launch; launch(sys.argv[1], sys.argv[2:], 2)"
    )
    root = str(Path(distributed.__file__).parents[1])
    notebook = subprocess.Popen(
        [sys.executable, "-c", code, WORKERS, "sleeps", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    guard = threading.Timer(300, notebook.kill)
    guard.start()
    pids = [int(notebook.stdout.readline().split()[-1]) for _ in range(2)]
    guard.cancel()
    notebook.kill()
    notebook.wait()
    notebook.stdout.close()
    assert wait_until_gone(pids, 60)


def test_environment_shares_the_cores_out(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    env = launch_environment(2)
    assert int(env["OMP_NUM_THREADS"]) == max(1, available_processes("cpu") // 2)
    assert "MPLBACKEND" not in env and env["PYTHONPATH"]


def test_failure_without_any_report_shows_the_launcher(tmp_path):
    error = find_failure(tmp_path, "line 1\nno module named nowhere\n", 1)
    assert error.rank is None and "no module named nowhere" in str(error)


SUMMARY = """
W1129 api.py:889] Unable to shutdown process 70 via Signals.SIGTERM, forcefully exiting via SIGKILL
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : {first} (pid: 70)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {second} (pid: 71)
"""


def test_a_rank_that_torchrun_killed_is_not_the_first_to_fail(tmp_path):
    report = tmp_path / "job" / "attempt_0" / "1" / "error.json"
    report.parent.mkdir(parents=True)
    details = {"py_callstack": "Traceback ...", "timestamp": "1"}
    message = {"message": "ValueError: the mistake", "extraInfo": details}
    report.write_text(json.dumps({"message": message}))
    error = find_failure(tmp_path, SUMMARY.format(first=-9, second=1), 1)
    assert error.rank == 1 and "the mistake" in str(error)
    error = find_failure(tmp_path, SUMMARY.format(first=-15, second=-9), 1)
    assert error.rank == 1 and "killed by SIGKILL" in str(error)


def test_without_a_report_the_rank_that_failed_speaks(tmp_path):
    for rank, text in enumerate(("a harmless warning", "no file tokens/train")):
        file = tmp_path / "job" / "attempt_0" / str(rank) / "stderr.log"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    error = find_failure(tmp_path, SUMMARY.format(first=-15, second=1), 1)
    assert error.rank == 1 and "no file tokens/train" in str(error)


@posix_only
@pytest.mark.parametrize("failure", ["no folder", "odd name"])
def test_an_error_that_cannot_be_reported_is_printed(tmp_path, failure):
    folder = "/proc/none" if failure == "no folder" else tmp_path
    code = (
        "from nanochat.distributed import report_errors, print_whole_lines\n"
        "print_whole_lines(), report_errors()\n"
        "print('loading ... ', end='')\n"
        "raise ValueError('the cause: \\udcff')\n"
    )
    env = {**launch_environment(1), "TORCHELASTIC_ERROR_FILE": f"{folder}/error.json"}
    command = [sys.executable, "-u", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "the cause" in done.stderr and done.stdout == "loading ... "
    if failure == "odd name":
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert told["message"] == "ValueError: the cause: \udcff"


def test_setup_refuses_a_device_that_is_not_there():
    with pytest.raises(UserError, match="available"):
        setup("tpu")


def test_check_of_one_process_prints_json(capsys):
    distributed.main(["--check", "--device", "cpu", "--sizes", "1000", "100000"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == ["rank", "copy", "copy"]
    assert all(line["gb_per_s"] > 0 for line in lines[1:])


def test_bus_factors_are_those_of_nccl_tests():
    for n in (2, 4, 8):
        assert BUS_FACTORS["all_reduce"](n) == 2 * (n - 1) / n
        parts = BUS_FACTORS["reduce_scatter"](n) + BUS_FACTORS["all_gather"](n)
        assert parts == BUS_FACTORS["all_reduce"](n)
