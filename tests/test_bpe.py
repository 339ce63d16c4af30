"""Chapter 1, training: chunks counted in several ways, merges against rustbpe and a naive loop."""

import io
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import regex
from hypothesis import given, settings, strategies as st

from nanochat import bpe, tokenizer
from nanochat.bpe import (
    SPLIT_PATTERN,
    chunk_positions,
    compiled_loop,
    count_batches,
    learn_merges,
    merge_loop,
    ranks_from_merges,
    serve_counts,
    text_batches,
)
from nanochat.common import UserError
from nanochat.tokenizer import count_chunks, count_in_worker

ENGLISH = [
    "The baker's dog ran to the mill. It didn't stop; it couldn't! 12 days, 365 nights, $3.50.",
    "Anna said: “I’ll go to Lund on Monday,”   and   went.\n\n\tShe sold 1234 apples\r\nfor 567.",
] * 3
CODE = ["def f(x):\n    return [y**2 for y in x if y != 0]  # squares\n\n\nclass A:\n\tpass\n"] * 2
SCRIPTS = [
    "고양이가 방에 있다. 고양이 고양이가",
    "猫坐在垫子上。猫猫猫",
    "🐈🐈‍⬛ 👩‍👩‍👧 ok🙂🙂",
    "naïve ΑΒΓ ſ İ",
]
REPEATED = ["a" * 5000, " " * 333 + "b", "ababab" * 50 + "aaa"]
CORPORA = {
    "english": ENGLISH,
    "code": CODE,
    "scripts": SCRIPTS,
    "repeated": REPEATED,
    "empty": [""],
    "one byte": ["x"],
    "nothing": [],
    "all": ENGLISH + CODE + SCRIPTS + REPEATED,
}
LOOPS = ["python", "numba"]


@pytest.fixture(params=LOOPS)
def loop(request, monkeypatch):
    """Make `learn_merges` use one of its two ways, whatever the size."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(bpe, "COMPILE_FROM", 0 if request.param == "numba" else 10**12)
    return request.param


def naive_merges(texts, n_merges):
    """Recount all pairs of all chunks for each merge."""
    chunks = [list(c.encode()) for t in texts for c in regex.findall(SPLIT_PATTERN, t)]
    merges = []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pair for ids in chunks for pair in zip(ids, ids[1:]))
        if not counts:
            break
        merges.append(min(counts, key=lambda p: (-counts[p], p)))
        for ids in chunks:
            for i in range(len(ids) - 1):
                if tuple(ids[i : i + 2]) == merges[-1]:
                    ids[i : i + 2] = [new_id]
    return merges


def plain_counts(texts, pattern=SPLIT_PATTERN):
    return Counter(chunk for text in texts for chunk in regex.findall(pattern, text))


def rustbpe_ranks(texts, n_ranks):
    rustbpe = pytest.importorskip("rustbpe")
    other = rustbpe.Tokenizer()
    other.train_from_iterator(iter(texts), n_ranks, pattern=SPLIT_PATTERN)
    return {bytes(symbol): rank for symbol, rank in other.get_mergeable_ranks()}


def assert_same_as_rustbpe(texts, n_ranks):
    ours = ranks_from_merges(learn_merges(count_chunks(texts), n_ranks - 256))
    assert ours == rustbpe_ranks(texts, n_ranks)


def real_text(shared_data, shard, megabytes):
    """The first documents of a shard, in the length that nanochat cuts them to."""
    parquet = pytest.importorskip("pyarrow.parquet")
    file, texts, size = parquet.ParquetFile(shared_data / "corpus" / shard), [], 0
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group).column("text").to_pylist():
            texts.append(text[:10_000])
            size += len(texts[-1].encode())
            if size > megabytes * 1e6:
                return texts
    return texts


# Counting


words = st.text(alphabet="ab é. '1\n\t\u3000\x1c가😀", max_size=12)
spaced = st.lists(words, max_size=8).map(" ".join)


@given(st.lists(st.text(max_size=60) | spaced, max_size=6))
@settings(max_examples=300)
def test_words_first_counts_what_the_pattern_counts(texts):
    assert count_batches(text_batches(texts, size=50)) == plain_counts(texts)


@given(spaced)
@settings(max_examples=300)
def test_chunks_are_the_text(text):
    assert "".join(regex.findall(SPLIT_PATTERN, text)) == text


@pytest.mark.parametrize("name", CORPORA)
def test_counts_on_examples(name):
    assert count_chunks(CORPORA[name]) == plain_counts(CORPORA[name])


def test_another_pattern_is_obeyed():
    texts, pattern = ENGLISH + CODE, SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    assert count_chunks(texts, pattern) == plain_counts(texts, pattern)
    assert count_chunks(texts, r"\S+ \S+|\s|\S+") == plain_counts(texts, r"\S+ \S+|\s|\S+")


def test_lone_surrogates_count_as_a_question_mark():
    assert count_chunks(["\ud800 abc", "abc"]) == {"?": 1, " abc": 1, "abc": 1}


def test_batches_hold_all_texts_in_order():
    texts = [f"{i} " * (i % 7) for i in range(500)]
    batches = list(text_batches(texts, size=100))
    assert [t.as_py() for batch in batches for t in batch] == texts
    assert max(sum(map(len, batch.to_pylist())) for batch in batches) < 100 + 7 * 4


@pytest.fixture
def small_batches(monkeypatch):
    """Batches so small that even a short text needs workers."""
    monkeypatch.setattr(tokenizer, "text_batches", lambda texts: text_batches(texts, size=200))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_count_the_same(small_batches, workers):
    texts = ENGLISH + CODE + SCRIPTS + ["\ud800 lone"]
    expected = plain_counts([t.encode("utf-8", "replace").decode() for t in texts])
    assert count_chunks(iter(texts), workers=workers) == expected


def test_an_error_in_the_texts_arrives_and_ends_the_workers(small_batches):
    def texts():
        yield from ENGLISH * 10
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        count_chunks(texts(), workers=2)


def test_a_worker_that_dies_is_one_sentence(small_batches, monkeypatch):
    monkeypatch.setattr(sys, "executable", "python-that-does-not-exist")
    with pytest.raises((UserError, OSError)):
        count_chunks(ENGLISH * 10, workers=2)


def test_a_worker_with_a_bad_pattern_says_so():
    with pytest.raises(UserError, match="worker process that counts chunks has died .*error"):
        count_in_worker(iter(text_batches(ENGLISH)), "(")


def test_training_in_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from nanochat.tokenizer import count_chunks\n"
        "text = 'the cat sat on the mat ' * 1000\n"
        "print(count_chunks([text] * 600, workers=2)[' cat'])\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | path
    )
    assert out.stdout.split() == ["once", "600000"], out.stderr


def test_the_worker_speaks_arrow(monkeypatch):
    sent, received = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_stream(sent, pa.schema({"text": pa.string()})) as stream:
        stream.write_batch(pa.record_batch([pa.array(["a b", "b"])], ["text"]))
    sent.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(sent))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(received))
    serve_counts(SPLIT_PATTERN)
    table = pa.ipc.open_stream(received.getvalue()).read_all().to_pylist()
    assert sorted(row["chunk"] for row in table) == [" b", "a", "b"]


# Merging


@pytest.mark.parametrize("name", CORPORA)
def test_merges_equal_rustbpe(loop, name):
    assert_same_as_rustbpe(CORPORA[name], 600)


def test_merges_equal_rustbpe_on_the_tiny_world(loop):
    from nanochat.tinyworld import World, document

    world = World(0)
    assert_same_as_rustbpe([document(world, i) for i in range(500)], 2048 - 9)


def test_merges_equal_rustbpe_on_one_repeated_letter(loop):
    assert_same_as_rustbpe(["a" * 1_000_000], 300)


def test_merges_equal_rustbpe_on_real_text(loop, shared_data):
    assert_same_as_rustbpe(real_text(shared_data, "shard_00004.parquet", 1), 8192)


def test_merges_equal_rustbpe_on_more_real_text(shared_data):
    """With worker processes and the compiled loop; benchmarks/tokenizer.py does it on all of it."""
    pytest.importorskip("numba")
    assert_same_as_rustbpe(real_text(shared_data, "shard_00000.parquet", 10), 32768 - 9)


@given(st.lists(st.text(alphabet="abc é", max_size=30), max_size=6), st.integers(0, 20))
@settings(max_examples=60)
def test_fast_trainer_learns_what_the_naive_one_learns(texts, n_merges):
    assert learn_merges(count_chunks(texts), n_merges) == naive_merges(texts, n_merges)


@given(st.dictionaries(st.text(alphabet="ab", min_size=1, max_size=9), st.integers(1, 9)))
@settings(max_examples=60)
def test_the_compiled_loop_learns_what_the_plain_one_learns(counts):
    pytest.importorskip("numba")
    plain = merge_loop(*(array.tolist() for array in chunk_positions(counts)), 40)
    assert list(compiled_loop()(*chunk_positions(counts), 40)) == plain


def test_without_numba_the_loop_runs_in_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(bpe, "COMPILE_FROM", 0)
    compiled_loop.cache_clear()
    try:
        assert compiled_loop() is None
        assert learn_merges({"low": 3, "lower": 2}, 2) == [(108, 111), (256, 119)]
    finally:
        compiled_loop.cache_clear()


def test_weights_larger_than_32_bits(loop):
    assert learn_merges({"ab": 2**40, "cd": 2**40 + 1, "ef": 3}, 2) == [(99, 100), (97, 98)]


def test_merges_are_plain_integers(loop):
    merges = learn_merges({"abc": 2}, 2)
    assert merges == [(97, 98), (256, 99)] and type(merges[0][0]) is int


def test_positions():
    symbol, weight, left, right = chunk_positions({"ab": 3, "": 9, "é": 1})
    assert symbol.tolist() == [97, 98, 0xC3, 0xA9] and weight.tolist() == [3, 3, 1, 1]
    assert left.tolist() == [-1, 0, -1, 2] and right.tolist() == [1, -1, 3, -1]
    assert symbol.dtype == left.dtype == right.dtype == np.int32 and weight.dtype == np.int64


def test_training_does_not_depend_on_the_order_of_texts(loop):
    mixed = ENGLISH + CODE + SCRIPTS
    shuffled = random.Random(1).sample(mixed, len(mixed))
    assert learn_merges(count_chunks(mixed), 90) == learn_merges(count_chunks(shuffled), 90)


def test_a_worker_needs_no_torch():
    code = "import sys; import nanochat.bpe; print('torch' in sys.modules)"
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | path
    )
    assert out.stdout.strip() == "False", out.stderr
