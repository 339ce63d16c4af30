"""Chapter 2: sources, token shards and batches."""

import itertools
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import data
from nanochat.common import UserError
from nanochat.data import (
    RowOrder,
    TokenBatches,
    TokenShards,
    open_source,
    prepare_tokens,
    read_shard,
    split_shards,
    write_shard,
)
from nanochat.tokenizer import Tokenizer

TEXTS = [f"document {n} has " + "several words " * (n % 7) + "é" * (n % 3) for n in range(300)]


class ListSource:
    """A finite source from a list; counts what is read from it."""

    def __init__(self, texts, name="list"):
        self.texts, self.name, self.read = texts, name, 0

    def describe(self, split):
        return f"{self.name} {split}"

    def documents(self, split, start=0):
        for text in self.texts[start:]:
            self.read += 1
            yield text


class Numbers:
    """Token shards without files: token i is the number i."""

    def __init__(self, length):
        self.length, self.folder = length, "numbers"

    def __len__(self):
        return self.length

    rows = TokenShards.rows

    def read(self, start, stop):
        assert 0 <= start < stop <= self.length
        return np.arange(start, stop, dtype=np.uint32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write_shard(
            tmp_path / "data" / f"shard_{number}.parquet", TEXTS[number * 100 :][: 100 - number]
        )
    return tmp_path / "data"


# Sources


def test_tiny_world_source_is_endless_and_starts_anywhere():
    source = open_source("tinyworld", seed=3)
    first = list(itertools.islice(source.documents("train"), 20))
    assert list(itertools.islice(source.documents("train", 7), 13)) == first[7:]
    assert list(itertools.islice(open_source("tinyworld", seed=3).documents("train"), 20)) == first
    assert list(itertools.islice(open_source("tinyworld", seed=4).documents("train"), 20)) != first
    assert not set(first) & set(itertools.islice(source.documents("val"), 20))
    assert "seed 3" in source.describe("val")


def test_folder_source(folder):
    (folder / "notes.txt").write_text("not a shard")
    source = open_source(f"folder:{folder}")
    train = list(source.documents("train"))
    assert train == TEXTS[:100] + TEXTS[100:199]
    assert list(source.documents("val")) == TEXTS[200:298]
    assert "1 shards, shard_2.parquet" in source.describe("val")
    assert "shard_0.parquet to shard_1.parquet" in source.describe("train")


@given(start=st.integers(0, 2600), groups=st.sampled_from([1, 7, 1000, 1024, 5000]))
@settings(max_examples=25, deadline=None)
def test_reading_a_shard_from_any_row(tmp_path_factory, start, groups):
    path = tmp_path_factory.mktemp("shard") / "a.parquet"
    texts = [str(n) for n in range(2500)]
    pq.write_table(pa.table({"text": texts, "other": texts}), path, row_group_size=groups)
    assert list(read_shard(path, start)) == texts[start:]


def test_null_rows_keep_their_number_and_large_strings_are_read(tmp_path):
    table = pa.table({"text": pa.array(["a", None, "c"], pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_shard(tmp_path / "a.parquet")) == ["a", "", "c"]


def test_split_names():
    assert split_shards(["b", "a", "c"]) == {"train": ["a", "b"], "val": ["c"]}
    hub = ["d/test-00000-of-00001.parquet", "d/train-00000.parquet", "d/train-00001.parquet"]
    assert split_shards(hub) == {"train": hub[1:2], "val": hub[2:]}
    assert split_shards([*hub, "d/validation-0.parquet"]) == {
        "train": hub[1:],
        "val": ["d/validation-0.parquet"],
    }
    assert split_shards(["trainer.parquet", "values.parquet"])["val"] == ["values.parquet"]
    assert split_shards([]) == {"train": [], "val": []}


def broken(kind, path):
    good = path.read_bytes()
    if kind == "missing column":
        pq.write_table(pa.table({"body": ["x"]}), path)
    elif kind == "wrong type":
        pq.write_table(pa.table({"text": [1, 2]}), path)
    elif kind == "no rows":
        write_shard(path, [])
    else:
        size = {"no bytes": 0, "truncated": len(good) - 20, "stub": 3}[kind]
        path.write_bytes(good[:size])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing column", r"no column `text` \(found body\)"),
        ("wrong type", "holds int64, expected string"),
        ("no rows", r"is empty \(0 rows\)"),
        ("no bytes", r"\(0 bytes\) is not a readable parquet"),
        ("truncated", "truncated or damaged"),
        ("stub", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("name", ["shard_1.parquet", "shard_2.parquet"])
def test_broken_shards_are_named_when_the_folder_is_opened(folder, name, kind, message):
    broken(kind, folder / name)
    with pytest.raises(UserError, match=f"{name}.*{message}") as caught:
        open_source(f"folder:{folder}")
    assert "\n" not in str(caught.value)


def test_damage_inside_a_shard_is_named_when_it_is_read(folder):
    path = folder / "shard_0.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(bytes(content))
    source = open_source(f"folder:{folder}")
    with pytest.raises(UserError, match=r"shard_0\.parquet is damaged inside"):
        list(source.documents("train"))


def test_shard_that_disappears(folder):
    source = open_source(f"folder:{folder}")
    (folder / "shard_1.parquet").unlink()
    with pytest.raises(UserError, match=r"shard_1\.parquet is missing"):
        list(source.documents("train"))


def test_missing_empty_and_too_small_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="has 0 .parquet files, at least 2"):
        open_source(f"folder:{tmp_path}")
    write_shard(tmp_path / "one.parquet", ["a"])
    with pytest.raises(UserError, match="has 1 .parquet files, at least 2"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "tiny", "folder:", "hub:", "s3:bucket", "tinyworld:3"])
def test_unknown_sources(spec):
    with pytest.raises(UserError, match="is unknown; use tinyworld"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["tinyworld", "folder"])
def test_unknown_split(folder, spec):
    source = open_source(f"folder:{folder}" if spec == "folder" else spec)
    with pytest.raises(UserError, match="split 'test' is unknown"):
        next(source.documents("test"))


# Tokens on disk


def expected_tokens(tokenizer, texts=TEXTS):
    return [i for text in texts if text for i in tokenizer.encode(text, bos=True)]


@pytest.mark.parametrize("shard_tokens", [1, 500, 10**6])
def test_tokens_are_those_of_the_documents(tokenizer, tmp_path, shard_tokens, monkeypatch):
    monkeypatch.setattr(data.encode_stream, "__defaults__", (16,))
    everything = expected_tokens(tokenizer)
    shards = prepare_tokens(
        ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6, shard_tokens=shard_tokens
    )
    assert len(shards) == len(everything) and shards.read(0, len(shards)).tolist() == everything
    assert shards.index["dtype"] == "uint16"
    assert len(shards.maps) == {1: 19, 500: 7, 10**6: 1}[shard_tokens]
    again = TokenShards.load(tmp_path, "train")
    assert again.fingerprint() == shards.fingerprint()
    assert shards.read(5, 6).tolist() == everything[5:6]
    middle = shards.ends[0]
    assert (
        shards.read(middle - 1, middle + 1 if middle < len(shards) else middle).tolist()
        == (everything[middle - 1 : middle + 1])
    )


@given(st.data(), st.integers(0, 3000), st.sampled_from([1, 90, 1000]), st.integers(20, 300))
@settings(max_examples=25, deadline=None)
def test_any_division_into_shards_reads_the_same(tokenizer, tmp_path_factory, d, n, size, batch):
    everything = expected_tokens(tokenizer)
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.encode_stream, "__defaults__", (batch,))
        shards = prepare_tokens(ListSource(TEXTS), tokenizer, folder, "train", n, shard_tokens=size)
    assert len(shards) == min(n, len(everything))
    if len(shards):
        start = d.draw(st.integers(0, len(shards) - 1))
        stop = d.draw(st.integers(start + 1, len(shards)))
        assert shards.read(start, stop).tolist() == everything[start:stop]


def test_large_vocabulary_uses_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    shards = prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    assert shards.index["dtype"] == "uint32"
    assert shards.read(0, 1000).tolist() == expected_tokens(tokenizer)[:1000]


def test_second_call_reads_nothing_and_more_tokens_are_added(tokenizer, tmp_path):
    source = ListSource(TEXTS * 10)
    first = prepare_tokens(source, tokenizer, tmp_path, "train", 2000)
    read = source.read
    again = prepare_tokens(source, tokenizer, tmp_path, "train", 2000)
    assert source.read == read and again.fingerprint() == first.fingerprint()
    more = prepare_tokens(source, tokenizer, tmp_path, "train", 30_000)
    assert len(more) == 30_000
    assert more.read(0, 30_000).tolist() == expected_tokens(tokenizer, source.texts)[:30_000]
    fewer = prepare_tokens(source, tokenizer, tmp_path, "train", 2000)
    assert fewer.fingerprint() == first.fingerprint()
    assert len(TokenShards.load(tmp_path, "train")) == 2000  # the last request counts


def test_source_that_ends_early(tokenizer, tmp_path):
    source = ListSource(TEXTS)
    shards = prepare_tokens(source, tokenizer, tmp_path, "train", 10**9 // 1000)
    assert len(shards) == len(expected_tokens(tokenizer))
    read = source.read
    prepare_tokens(source, tokenizer, tmp_path, "train", 10**9 // 1000)
    assert source.read == read  # it is known to have ended


def test_empty_documents_are_skipped_but_counted(tokenizer, tmp_path):
    texts = ["", *TEXTS[:5], "", "", *TEXTS[5:9]]
    shards = prepare_tokens(ListSource(texts), tokenizer, tmp_path, "train", 10**6)
    assert shards.read(0, len(shards)).tolist() == expected_tokens(tokenizer, texts)
    assert shards.index["next_document"] == len(texts)


class Stop(Exception):
    """Stands for a killed process."""


def test_interrupted_work_goes_on_at_the_last_whole_shard(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.encode_stream, "__defaults__", (16,))
    calls = itertools.count()
    real = data.write_token_shard

    def stop_at_third(*args, **kwargs):
        if next(calls) == 2:
            raise Stop
        real(*args, **kwargs)

    monkeypatch.setattr(data, "write_token_shard", stop_at_third)
    with pytest.raises(Stop):
        prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6, shard_tokens=600)
    with pytest.raises(UserError, match="are unfinished"):
        TokenShards.load(tmp_path, "train")
    monkeypatch.setattr(data, "write_token_shard", real)
    source = ListSource(TEXTS)
    shards = prepare_tokens(source, tokenizer, tmp_path, "train", 10**6, shard_tokens=600)
    assert shards.read(0, len(shards)).tolist() == expected_tokens(tokenizer)
    assert 0 < source.read < len(TEXTS)  # the first two shards were not made again


def test_progress_object_receives_every_token(tokenizer, tmp_path):
    seen = []
    bar = type("Bar", (), {"update": lambda self, n: seen.append(n)})()
    shards = prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6, progress=bar)
    assert sum(seen) == len(shards)


def test_another_tokenizer_or_source_is_refused(tokenizer, tmp_path):
    prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    other = Tokenizer.train(TEXTS, 290)
    with pytest.raises(UserError, match="another tokenizer"):
        prepare_tokens(ListSource(TEXTS), other, tmp_path, "train", 1000)
    with pytest.raises(UserError, match="another source"):
        prepare_tokens(ListSource(TEXTS, "other"), tokenizer, tmp_path, "train", 1000)


def names(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_no_space_is_found_before_the_work(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    source = ListSource(TEXTS)
    with pytest.raises(UserError, match="tokenising 5,000 tokens needs .* are free"):
        prepare_tokens(source, tokenizer, tmp_path, "train", 5000)
    assert source.read == 0 and names(tmp_path) == []


def test_disk_that_fills_up_leaves_only_whole_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.encode_stream, "__defaults__", (16,))
    calls, real = itertools.count(), os.fsync

    def full(descriptor):
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6, shard_tokens=600)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["00000.bin", "00001.bin", "index.json"]
    shards = prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6)
    assert shards.read(0, len(shards)).tolist() == expected_tokens(tokenizer)


def test_asking_for_more_than_a_folder_holds_needs_no_more_space(folder, tokenizer, tmp_path):
    source = open_source(f"folder:{folder}")
    shards = prepare_tokens(source, tokenizer, tmp_path / "tokens", "train", 10**15)
    n_bytes = sum(len(text.encode()) for text in source.documents("train"))
    assert n_bytes / 4 < source.likely_tokens("train") < n_bytes
    assert len(shards) == len(expected_tokens(tokenizer, list(source.documents("train"))))


def test_missing_and_damaged_token_shards(tokenizer, tmp_path):
    with pytest.raises(UserError, match="there are no tokens"):
        TokenShards.load(tmp_path, "train")
    prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    path = tmp_path / "train" / "00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"00000\.bin has [\d,]+ bytes, expected"):
        TokenShards.load(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.bin is missing"):
        TokenShards.load(tmp_path, "train")
    (tmp_path / "train" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json"):
        TokenShards.load(tmp_path, "train")


def test_index_holds_no_surprises(tokenizer, tmp_path):
    prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    index = json.loads((tmp_path / "train" / "index.json").read_text())
    assert index["tokenizer"] == tokenizer.fingerprint() and index["n_tokens"] == 1000
    assert sum(s["documents"] for s in index["shards"]) == index["next_document"]


# Batches


def collect(n_steps, loaders):
    """Rows (their first token) of n_steps, all ranks in order, as one list."""
    return [int(row[0]) for _ in range(n_steps) for loader in loaders for row in loader.next()[0]]


@given(st.integers(2, 400), st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_every_row_once_an_epoch(length, seq_len, batch_size, seed):
    shards = Numbers(length)
    n_rows = shards.rows(seq_len)
    if n_rows == 0:
        with pytest.raises(UserError, match="one row of"):
            TokenBatches(shards, batch_size, seq_len)
        return
    loader = TokenBatches(shards, batch_size, seq_len, seed=seed)
    seen = collect(2 * n_rows // batch_size + 1, [loader])
    for epoch in range(2):
        rows = seen[epoch * n_rows : (epoch + 1) * n_rows]
        assert sorted(rows) == [row * seq_len for row in range(n_rows)]
    assert loader.epoch == loader.position // n_rows >= 2


def test_inputs_and_targets():
    inputs, targets = TokenBatches(Numbers(1001), 4, 10, seed=1).next()
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert (inputs[:, 0] % 10 == 0).all()


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(30, 300),
    st.integers(0, 30),
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_ranks_together_equal_one_process(world_size, batch_size, length, steps, seed):
    shards = Numbers(length)
    ranks = [
        TokenBatches(shards, batch_size, 7, rank=r, world_size=world_size, seed=seed)
        for r in range(world_size)
    ]
    alone = TokenBatches(shards, batch_size * world_size, 7, seed=seed)
    assert collect(steps, ranks) == collect(steps, [alone])
    assert {r.position for r in ranks} == {alone.position} and ranks[0].epoch == alone.epoch


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 25), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_resume_equals_uninterrupted_also_on_other_ranks(before, after, steps, seed):
    shards, rows_per_step = Numbers(200), 6

    def loaders(world_size):
        size = rows_per_step // world_size
        return [
            TokenBatches(shards, size, 5, rank=r, world_size=world_size, seed=seed)
            for r in range(world_size)
        ]

    expected = collect(steps + 4, loaders(1))
    first = loaders(before)
    seen = collect(steps, first)
    state = json.loads(json.dumps(first[-1].state_dict()))
    second = loaders(after)
    for loader in second:
        loader.load_state_dict(state)
    assert seen + collect(4, second) == expected


def test_seeds_and_epochs_give_different_orders():
    a, b = RowOrder(500, seed=0), RowOrder(500, seed=1)
    assert a.take(0, 500).tolist() != b.take(0, 500).tolist()
    assert a.take(0, 500).tolist() != a.take(500, 500).tolist()
    assert a.take(490, 20).tolist() == a.take(0, 500).tolist()[490:] + a.take(500, 10).tolist()


def test_order_is_fixed_for_ever():
    """A change here changes every run: the order is part of what a seed means."""
    assert RowOrder(10, seed=0).take(0, 10).tolist() == RowOrder(10, seed=0).take(0, 10).tolist()
    reference = np.random.default_rng([3, 1]).permutation(10)
    assert RowOrder(10, seed=3).take(10, 10).tolist() == reference.tolist()


def test_unshuffled_rows_come_in_order_for_any_batch_size():
    shards = Numbers(701)
    for batch_size, steps in ((7, 10), (10, 7), (35, 2)):
        loader = TokenBatches(shards, batch_size, 10, shuffle=False)
        assert collect(steps, [loader]) == list(range(0, 700, 10))


def test_state_of_other_data_is_refused():
    state = TokenBatches(Numbers(100), 2, 5).state_dict()
    for other in (
        TokenBatches(Numbers(100), 2, 6),
        TokenBatches(Numbers(90), 2, 5),
        TokenBatches(Numbers(100), 2, 5, seed=1),
    ):
        with pytest.raises(UserError, match="cannot resume"):
            other.load_state_dict(state)


def test_real_text_from_files_to_batches(shared_data, tmp_path):
    source = open_source(f"folder:{shared_data / 'corpus'}")
    assert source.splits["val"] == ["shard_00004.parquet"]
    texts = list(itertools.islice(source.documents("val", 990), 11))
    assert len(texts) == 11
    tokenizer = Tokenizer.train(texts, 600)
    shards = prepare_tokens(source, tokenizer, tmp_path, "val", 100_000)
    inputs, _ = TokenBatches(shards, 4, 256, shuffle=False).next()
    first = next(source.documents("val"))
    assert first.startswith(tokenizer.decode(inputs[0, 1:].tolist())[:500])
