"""Chapter 2: sources, token shards and batches."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import data
from nanochat.common import UserError
from nanochat.data import (
    Prefetch,
    RowPlan,
    TokenBatches,
    TokenShards,
    TokenStream,
    ValidationBatches,
    document_bounds,
    document_ids,
    document_mask,
    fill_rows,
    open_source,
    pack_rows,
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


BOS = 10**9


class Numbers(TokenShards):
    """Token shards without files: token i is the number i, and documents have the given lengths."""

    bos_id = BOS

    def __init__(self, lengths):
        self.stops = np.cumsum(lengths, dtype=np.int64)
        self.starts, self.length = self.stops - lengths, int(sum(lengths))
        self.shuffled = (None, None)

    def read(self, start, stop):
        assert 0 <= start < stop <= self.length + 1
        return np.arange(start, min(stop, self.length))


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
    nameless = ["part-0", "part-1", "part-2"]  # what says val or test is not trained on
    assert split_shards([*nameless, "test-0"]) == {"train": nameless[:2], "val": nameless[2:]}
    assert split_shards([*nameless, "val-0", "test"]) == {"train": nameless, "val": ["val-0"]}
    assert split_shards([]) == {"train": [], "val": []}


def test_split_names_of_folders():
    """As the hub writes them: default/train/0000.parquet. The innermost name counts."""
    names = [f"d/{split}/000{i}" for split in ("test", "train", "validation") for i in (0, 1)]
    assert split_shards(names) == {"train": names[2:4], "val": names[4:]}
    assert split_shards(names[:4]) == {"train": names[2:3], "val": names[3:4]}
    mixed = ["train/test-0", "test/train-0", "test/train/0", "train/val/part-0", "train/values"]
    assert split_shards(mixed) == {
        "train": ["test/train-0", "test/train/0", "train/values"],
        "val": ["train/val/part-0"],
    }
    assert split_shards(["trainer/a", "testament/b", "values/c"])["val"] == ["values/c"]


@pytest.mark.parametrize(
    "train, test, val",
    [("Train-0", "Test-0", "VAL-0"), ("training", "testing", "valid"), ("TRAIN", "test", "Valid")],
)
def test_split_names_in_other_spellings(train, test, val):
    assert split_shards([train, test, val]) == {"train": [train], "val": [val]}


def test_folders_above_the_opened_one_say_nothing(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / "test" / "tales" / f"{name}.parquet", [name])
    source = open_source(f"folder:{tmp_path / 'test' / 'tales'}")
    assert source.splits == {"train": ["a.parquet"], "val": ["b.parquet"]}


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
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 16)
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
    begins = [i for i, token in enumerate(everything) if token == tokenizer.bos_id]
    assert shards.starts.tolist() == begins and shards.bos_id == tokenizer.bos_id
    assert shards.stops.tolist() == [*begins[1:], len(everything)]
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
        patch.setattr(data, "BATCH_DOCUMENTS", batch)
        shards = prepare_tokens(ListSource(TEXTS), tokenizer, folder, "train", n, shard_tokens=size)
    assert len(shards) == min(n, len(everything))
    assert (shards.starts < len(shards)).all() and shards.stops[-1:].sum() == len(shards)
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
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 16)
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


def test_a_folder_that_was_written_anew_is_another_source(folder, tokenizer, tmp_path):
    prepare = dict(tokenizer=tokenizer, directory=tmp_path / "tokens", split="train")
    source, path = open_source(f"folder:{folder}"), folder / "shard_1.parquet"
    first = prepare_tokens(source, n_tokens=800, **prepare)
    content = path.read_bytes()
    path.write_bytes(content)  # the same bytes at another time
    os.utime(path, (1, 1))
    more = prepare_tokens(open_source(f"folder:{folder}"), n_tokens=1600, **prepare)
    assert more.read(0, 800).tolist() == first.read(0, 800).tolist()
    write_shard(folder / "shard_2.parquet", ["validation is another split"])
    prepare_tokens(open_source(f"folder:{folder}"), n_tokens=1600, **prepare)
    texts = list(read_shard(path))
    texts[50] = texts[50].replace("document", "document"[::-1])  # as many rows and characters
    for rewritten in (["NEW"] * 99, texts):
        write_shard(path, rewritten)
        for asked in (1600, 10**6):
            with pytest.raises(UserError, match="were made with another source .*content") as no:
                prepare_tokens(source, n_tokens=asked, **prepare)
            assert "\n" not in str(no.value)
    path.write_bytes(content)
    assert len(prepare_tokens(source, n_tokens=10**6, **prepare)) > 1600


def test_a_change_at_the_beginning_of_a_large_shard_is_seen_at_its_end(tmp_path):
    texts = [hashlib.shake_128(b"%d" % n).hexdigest(500) for n in range(3000)]
    for name in "ab":
        write_shard(tmp_path / f"{name}.parquet", texts)
    source, path = open_source(f"folder:{tmp_path}"), tmp_path / "a.parquet"
    before, size = source.describe("train"), path.stat().st_size
    assert source.describe("train") == before
    assert size > 800_000  # a change in the first row group is far from the last bytes ...
    write_shard(path, [texts[0][::-1] + "x", *texts[1:]])
    after = source.describe("train")
    assert after != before and after.split(", content")[0] == before.split(", content")[0]
    path.unlink()  # ... but the footer knows its size
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        source.describe("train")


def names(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_no_space_is_found_before_the_work(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    source = ListSource(TEXTS)
    with pytest.raises(UserError, match="tokenising 5,000 tokens needs .* are free"):
        prepare_tokens(source, tokenizer, tmp_path, "train", 5000)
    assert source.read == 0 and names(tmp_path) == []


def test_disk_that_fills_up_leaves_only_whole_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 16)
    calls, real = itertools.count(), os.fsync

    def full(descriptor):
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 10**6, shard_tokens=600)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["00000.bin", "00000.lengths", "00001.bin", "index.json"]
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
    with pytest.raises(UserError, match=r"00000\.bin has [\d,]+ bytes, expected .* again"):
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


@pytest.mark.parametrize("fault", ["missing", "short", "no lengths", "wrong lengths"])
def test_a_broken_token_shard_is_made_again_and_the_others_stay(
    tokenizer, tmp_path, fault, request
):
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 16)
    prepare = dict(directory=tmp_path, split="train", n_tokens=10**6, shard_tokens=600)
    whole = prepare_tokens(ListSource(TEXTS), tokenizer, **prepare).fingerprint()
    before = {p.name: p.read_bytes() for p in (tmp_path / "train").iterdir()}
    path, beside = (tmp_path / "train" / f"00002.{kind}" for kind in ("bin", "lengths"))
    if fault in ("missing", "no lengths"):
        (path if fault == "missing" else beside).unlink()
    elif fault == "short":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        beside.write_bytes(b"\1" + beside.read_bytes()[1:])
    with pytest.raises(UserError, match=r"00002\..*this shard alone is made") as caught:
        TokenShards.load(tmp_path, "train")
    assert "\n" not in str(caught.value)
    source = ListSource(TEXTS)
    assert prepare_tokens(source, tokenizer, **prepare).fingerprint() == whole
    assert source.read < len(TEXTS) / 3
    assert {p.name: p.read_bytes() for p in (tmp_path / "train").iterdir()} == before


def test_a_broken_token_shard_of_a_changed_source(tokenizer, tmp_path):
    prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    (tmp_path / "train" / "00000.bin").unlink()
    with pytest.raises(UserError, match="the source has changed"):
        prepare_tokens(ListSource(TEXTS[::-1]), tokenizer, tmp_path, "train", 1000)
    with pytest.raises(UserError, match="the source has changed"):
        prepare_tokens(ListSource([]), tokenizer, tmp_path, "train", 1000)


def test_verify_names_a_token_shard_with_other_bytes(tokenizer, tmp_path):
    shards = prepare_tokens(ListSource(TEXTS), tokenizer, tmp_path, "train", 1000)
    shards.verify()
    path = tmp_path / "train" / "00000.bin"
    content = bytearray(path.read_bytes())
    content[11] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"00000\.bin is not what was written"):
        TokenShards.load(tmp_path, "train").verify()


# Worker processes


SCRIPT = """
import sys
from pathlib import Path
from nanochat.data import FolderSource, prepare_tokens
from nanochat.tokenizer import Tokenizer
folder = Path(sys.argv[1])
tokenizer = Tokenizer.load(folder / "tokenizer")
source = FolderSource(folder / "data")
prepare_tokens(source, tokenizer, folder / "two", "train", 10**6, shard_tokens=2000, workers=2)
print("started")
"""


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_workers_write_the_same_files_also_from_a_script_without_a_guard(tmp_path):
    texts = [f"{n} of many " + "some words " * (n % 9) for n in range(3000)]
    for number in range(2):
        write_shard(tmp_path / "data" / f"{number}.parquet", texts)
    tokenizer = Tokenizer.train(texts, 300)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parent.parent)}
    ran = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "started\n"  # once: the workers did not run the script
    source = open_source(f"folder:{tmp_path / 'data'}")
    prepare_tokens(source, tokenizer, tmp_path / "none", "train", 10**6, shard_tokens=2000)
    alone = digests(tmp_path / "none" / "train")
    assert len(alone) > 10 and digests(tmp_path / "two" / "train") == alone


def test_a_worker_that_dies_is_one_sentence_and_finished_shards_stay(tokenizer, tmp_path):
    class Killer(ListSource):
        def documents(self, split, start=0):
            for number, text in enumerate(super().documents(split, start)):
                if number == 20_000:
                    for child in multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGKILL)
                yield text

    source = Killer(TEXTS * 100)
    work = dict(directory=tmp_path, split="train", n_tokens=10**7, shard_tokens=10_000)
    with pytest.raises(UserError, match="a tokenising process died") as caught:
        prepare_tokens(source, tokenizer, **work, workers=1)
    assert "\n" not in str(caught.value) and multiprocessing.active_children() == []
    done = [name for name in names(tmp_path) if name.endswith(".bin")]
    assert len(done) > 3 and not [name for name in names(tmp_path) if name.endswith(".tmp")]
    source = ListSource(source.texts)
    shards = prepare_tokens(source, tokenizer, **work)
    assert source.read < len(source.texts)  # it went on
    assert shards.read(0, len(shards)).tolist() == expected_tokens(tokenizer, source.texts)


def test_small_work_and_few_cores_need_no_workers(monkeypatch):
    monkeypatch.setattr(data, "usable_cores", lambda: 8)
    assert data.pick_workers(10**6) == 0 and data.pick_workers(10**9) == 8
    monkeypatch.setattr(data, "usable_cores", lambda: 2)
    assert data.pick_workers(10**9) == 0
    monkeypatch.setattr(data, "usable_cores", lambda: 64)
    assert data.pick_workers(10**9) == 16


# Packing

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(LENGTHS, st.integers(2, 50))
def test_packing_loses_nothing_repeats_nothing_and_begins_with_bos(lengths, seq_len):
    shards = Numbers(lengths)
    starts, stops = shards.starts.tolist(), shards.stops.tolist()
    rows = pack_rows(starts, stops, seq_len)
    slots = [sum(stop - start + resumed for start, stop, resumed in row) for row in rows]
    assert all(n == seq_len for n in slots[:-1]) and 0 < slots[-1] <= seq_len
    pieces = [piece for row in rows for piece in row]
    placed = [token for start, stop, _ in pieces for token in range(start, stop)]
    assert sorted(placed) == list(range(shards.length))
    for start, _, resumed in pieces:
        assert resumed == (start not in starts)
    where = {start: row for row, found in enumerate(rows) for start, *_ in found}
    for start, stop in zip(starts, stops):  # the rest of a document comes in a later row
        order = [where[s] for s, *_ in sorted(pieces) if start <= s < stop]
        assert order == sorted(order)


@given(LENGTHS, st.integers(2, 50))
def test_every_token_is_a_target_exactly_once(lengths, seq_len):
    shards = Numbers(lengths)
    rows = pack_rows(shards.starts.tolist(), shards.stops.tolist(), seq_len)
    inputs, targets = fill_rows([(shards.read, row) for row in rows], BOS, seq_len)
    assert inputs.shape == targets.shape == (len(rows), seq_len)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    asked = targets >= 0
    assert sorted(targets[asked].tolist()) == list(range(1, shards.length))
    assert torch.equal(inputs[asked] + 1, targets[asked])  # token i is the number i
    assert sorted(inputs[inputs != BOS].tolist()) == list(range(shards.length))
    begins = set(shards.starts.tolist()) | {BOS}
    assert set(inputs[:, 0].tolist()) <= begins


def test_long_documents_fill_the_gaps_and_short_ones_stay_whole():
    shards = Numbers([1000] + [7] * 40)
    rows = pack_rows(shards.starts.tolist(), shards.stops.tolist(), 32)
    resumed = [start for row in rows for start, _, again in row if again]
    assert resumed and max(resumed) < 1000
    slots = len(rows) * 32
    assert (slots - 1280) / slots < 0.06  # own slots and the end of the last row


def test_documents_of_a_batch():
    inputs = torch.tensor([[BOS, 1, 2, BOS, 3], [BOS, 4, 5, 6, 7], [8, 9, BOS, BOS, 1]])
    ids = document_ids(inputs, BOS)
    assert ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [0, 0, 1, 2, 2]]
    bounds = document_bounds(inputs, BOS)
    assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 3, 5, 10, 12, 13, 15]
    mask = document_mask(inputs, BOS)
    assert mask.shape == (3, 1, 5, 5) and mask.dtype == torch.bool
    for b, i, j in itertools.product(range(3), range(5), range(5)):
        assert mask[b, 0, i, j] == (j <= i and ids[b, i] == ids[b, j])


def test_masked_attention_equals_attention_of_each_document_alone():
    shards, T = Numbers([5, 9, 3, 20, 6]), 12
    rows = pack_rows(shards.starts.tolist(), shards.stops.tolist(), T)
    inputs, _ = fill_rows([(shards.read, row) for row in rows], BOS, T)
    inputs[np.isin(inputs, shards.starts)] = BOS  # real tokens begin documents with bos
    q, k, v = torch.randn(3, len(rows), 2, T, 4, generator=torch.Generator().manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    together = attend(q, k, v, attn_mask=document_mask(inputs, BOS))
    flat = [x.transpose(1, 2).reshape(-1, 2, 4) for x in (q, k, v, together)]
    bounds = document_bounds(inputs, BOS).tolist()
    assert len(bounds) > 6
    for first, last in zip(bounds, bounds[1:]):
        q1, k1, v1, expected = (x[first:last].transpose(0, 1)[None] for x in flat)
        torch.testing.assert_close(attend(q1, k1, v1, is_causal=True), expected)


# Batches


def rows_of(n_steps, loaders):
    """Rows of n_steps, all ranks in order, as tuples of inputs and targets."""
    batches = [loader.next() for _ in range(n_steps) for loader in loaders]
    return [(tuple(x.tolist()), tuple(y.tolist())) for b in batches for x, y in zip(*b)]


def loaders(shards, seq_len, rows_per_step, world_size, seed):
    size = rows_per_step // world_size
    return [
        TokenBatches(shards, size, seq_len, rank=r, world_size=world_size, seed=seed)
        for r in range(world_size)
    ]


@given(
    LENGTHS,
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_each_document_once_an_epoch(lengths, seq_len, batch_size, world_size, window, seed):
    shards = Numbers(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOW", window)
        ranks = loaders(shards, seq_len, batch_size * world_size, world_size, seed)
        epochs, seen = 0, set()
        while epochs < 2:
            for inputs, _ in rows_of(1, ranks):
                new = {token for token in inputs if token != BOS}
                assert len(new) == sum(token != BOS for token in inputs) and not new & seen
                seen |= new
                if len(seen) == shards.length:  # only now may anything come again
                    epochs, seen = epochs + 1, set()
        assert {rank.epoch for rank in ranks} == {ranks[0].epoch} and ranks[0].epoch >= 1


@given(LENGTHS, st.integers(2, 30), st.sampled_from([1, 2, 3, 4]), st.integers(0, 8), st.data())
def test_ranks_together_equal_one_process(lengths, seq_len, world_size, steps, d):
    shards, seed = Numbers(lengths), d.draw(st.integers(0, 3))
    ranks = loaders(shards, seq_len, 12, world_size, seed)
    alone = loaders(shards, seq_len, 12, 1, seed)
    assert rows_of(steps, ranks) == rows_of(steps, alone)
    assert {json.dumps(r.state_dict()) for r in ranks} == {json.dumps(alone[0].state_dict())}


@given(
    LENGTHS,
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(0, 25),
    st.integers(1, 12),
    st.booleans(),
)
def test_resume_equals_uninterrupted_also_on_other_ranks(
    lengths, before, after, steps, window, ahead
):
    shards = Numbers(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOW", window)
        expected = rows_of(steps + 4, loaders(shards, 11, 6, 1, 3))
        first = loaders(shards, 11, 6, before, 3)
        seen = rows_of(steps, first)
        state = json.loads(json.dumps(first[-1].state_dict()))
        assert all(type(value) is int for value in state.values()) and len(state) == 6
        second = loaders(shards, 11, 6, after, 3)
        second = [Prefetch(loader) for loader in second] if ahead else second
        for loader in second:
            loader.load_state_dict(state)
        assert seen + rows_of(4, second) == expected
        for loader in second if ahead else []:
            loader.close()


@given(st.sampled_from([1, 90, 1000, 10**6]), st.sampled_from([1, 2, 4]), st.integers(0, 9))
@settings(max_examples=12)
def test_batches_do_not_depend_on_the_size_of_token_shards(
    tokenizer, tmp_path_factory, shard_tokens, world_size, steps
):
    found = []
    for size in (10**6, shard_tokens):
        folder = tmp_path_factory.mktemp("tokens")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "BATCH_DOCUMENTS", 20)
            source = ListSource(TEXTS)
            shards = prepare_tokens(source, tokenizer, folder, "train", 2500, shard_tokens=size)
        found.append(rows_of(steps, loaders(shards, 32, 4, world_size, 0)))
    assert found[0] == found[1]


def test_seeds_and_epochs_give_different_orders():
    shards = Numbers([1] * 500)
    assert sorted(shards.order(0, 0)) == list(range(500))
    orders = [shards.order(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_fixed_for_ever():
    """A change here changes every run: the order is part of what a seed means."""
    shards, generator = Numbers([3] * 10), np.random.default_rng
    assert shards.order(3, 1).tolist() == generator([3, 1]).permutation(10).tolist()
    plan = RowPlan(shards, 6, seed=3)
    rows = pack_rows(*(x[shards.order(3, 0)].tolist() for x in (shards.starts, shards.stops)), 6)
    expected = [rows[i] for i in generator([3, 0, 1]).permutation(5)]
    assert [row for _, row in plan.take(5)] == expected


def test_state_of_other_data_is_refused():
    state = TokenBatches(Numbers([50, 50]), 2, 5).state_dict()
    for other in (
        TokenBatches(Numbers([50, 50]), 2, 6),
        TokenBatches(Numbers([50, 40]), 2, 5),
        TokenBatches(Numbers([50, 50]), 2, 5, seed=1),
    ):
        with pytest.raises(UserError, match="cannot resume"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="has seed None"):
        TokenBatches(Numbers([50, 50]), 2, 5).load_state_dict({"position": 3})


def test_no_tokens_and_no_room(tokenizer, tmp_path):
    shards = prepare_tokens(ListSource([]), tokenizer, tmp_path, "train", 100)
    assert len(shards) == 0
    with pytest.raises(UserError, match="holds no tokens; prepare more"):
        TokenBatches(shards, 1, 8)
    with pytest.raises(UserError, match="needs at least 2 slots"):
        TokenBatches(Numbers([5]), 1, 1)


# Prefetch


class Failing:
    """Batches that end with an error."""

    batch_size = 1

    def __init__(self, n):
        self.n, self.at = n, 0

    def next(self):
        if self.at == self.n:
            raise UserError("the shard is gone.")
        self.at += 1
        return self.at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_prefetch_gives_the_same_batches_and_the_state_of_the_consumer():
    shards = Numbers([5, 30, 8, 11])
    plain, ahead = (TokenBatches(shards, 3, 9, seed=1) for _ in range(2))
    with Prefetch(ahead, depth=3) as fetched:
        assert fetched.batch_size == 3
        for _ in range(20):
            for x, y in zip(plain.next(), fetched.next()):
                assert torch.equal(x, y)
            assert fetched.state_dict() == plain.state_dict()
    assert fetched.waited > 0
    assert torch.equal(fetched.next()[0], plain.next()[0])  # after a close it goes on
    fetched.close()


def test_prefetch_goes_to_a_saved_place_and_drops_what_was_made_ahead():
    with Prefetch(Failing(100)) as fetched:
        assert [fetched.next() for _ in range(5)] == [1, 2, 3, 4, 5]
        fetched.load_state_dict({"at": 50})
        assert fetched.state_dict() == {"at": 50}
        assert [fetched.next(), fetched.next()] == [51, 52]


def test_prefetch_raises_the_error_of_its_thread_in_its_place_each_time():
    before = set(threading.enumerate())
    fetched = Prefetch(Failing(2))
    assert [fetched.next(), fetched.next()] == [1, 2]
    for _ in range(2):
        with pytest.raises(UserError, match="the shard is gone"):
            fetched.next()
        assert fetched.state_dict() == {"at": 2}
    assert set(threading.enumerate()) <= before


def test_prefetch_ends_its_thread_when_full_when_unused_and_when_the_loop_fails():
    before = set(threading.enumerate())
    Prefetch(Failing(9)).close()
    with pytest.raises(ZeroDivisionError), Prefetch(Failing(1000)) as fetched:
        fetched.next()
        while not fetched.ready.full():
            time.sleep(0.001)
        assert len(set(threading.enumerate()) - before) == 1
        raise ZeroDivisionError
    fetched.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_reach_the_gpu():
    shards = Numbers([700] * 9)
    plain = TokenBatches(shards, 8, 64)
    with Prefetch(TokenBatches(shards, 8, 64, pin=True)) as fetched:
        for _ in range(40):
            x, expected = fetched.next()[0], plain.next()[0]
            assert x.is_pinned()
            assert torch.equal(x.to("cuda", non_blocking=True).cpu(), expected)


# Validation


@given(LENGTHS, st.integers(2, 40), st.integers(1, 7), st.integers(1, 4))
def test_validation_set_is_the_same_for_any_batch_and_world_size(
    lengths, seq_len, batch_size, world_size
):
    shards = Numbers(lengths)
    ranks = [
        ValidationBatches(shards, batch_size, seq_len, r, world_size) for r in range(world_size)
    ]
    assert {len(list(rank)) for rank in ranks} == {len(ranks[0])}
    batches = [batch for rank in ranks for batch in rank]
    assert {x.shape for batch in batches for x in batch} == {(batch_size, seq_len)}
    targets = torch.cat([y.flatten() for _, y in batches])
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, shards.length))
    single = ValidationBatches(shards, 1, seq_len)
    assert {rank.fingerprint() for rank in ranks} == {single.fingerprint()}
    rows = {tuple(x.tolist()) for batch, _ in batches for x in batch} - {(BOS,) * seq_len}
    assert rows == {tuple(x[0].tolist()) for x, _ in single}
    shorter = ValidationBatches(shards, 1, seq_len + 1)
    assert shorter.fingerprint() != single.fingerprint()


# Streams


def test_stream_gives_every_document_once_resumes_and_begins_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 40)
    texts = [text for text in TEXTS[:190] if text] + [""]
    loader = TokenBatches(TokenStream(ListSource(texts), tokenizer), 3, 64, seed=1)
    wanted = [i for text in texts if text for i in [*tokenizer.encode(text), tokenizer.bos_id]]
    states, rows = [], []
    while loader.epoch == 0:
        states.append(loader.state_dict())
        rows += [(x, y) for x, y in zip(*loader.next())]
    targets = torch.cat([y for _, y in rows]).tolist()
    epoch = [t for t in targets if t >= 0][: len(wanted)]
    assert sorted(epoch) == sorted(wanted)
    resumed = TokenBatches(TokenStream(ListSource(texts), tokenizer), 3, 64, seed=1)
    for k in (7, 2, len(states) - 1):
        resumed.load_state_dict(states[k])
        assert torch.equal(resumed.next()[0], torch.stack([x for x, _ in rows[3 * k : 3 * k + 3]]))


def test_stream_reads_on_without_opening_the_source_again(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 50)
    source = ListSource(TEXTS)
    loader = TokenBatches(TokenStream(source, tokenizer), 4, 32)
    for _ in range(8):
        loader.next()
    assert source.read == 50 * (loader.plan.window + (loader.plan.rows is not None))


def test_stream_of_nothing(tokenizer):
    loader = TokenBatches(TokenStream(ListSource([]), tokenizer), 4, 32)
    with pytest.raises(UserError, match="holds no documents"):
        loader.next()
    with pytest.raises(UserError, match="split 'test'"):
        TokenStream(ListSource([]), tokenizer, "test")


def test_stream_of_empty_documents_ends_with_a_sentence(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 3)
    windows, window = itertools.count(), TokenStream.window

    def counted(self, *place):
        assert next(windows) < 100, "it would go on for ever"
        return window(self, *place)

    monkeypatch.setattr(TokenStream, "window", counted)
    loader = TokenBatches(TokenStream(ListSource([""] * 8), tokenizer), 1, 8)
    for _ in range(2):
        with pytest.raises(UserError, match="holds empty documents only"):
            loader.next()
    one = TokenBatches(TokenStream(ListSource([""] * 8 + ["a"] + [""] * 8), tokenizer), 4, 8)
    for start in (one.state_dict(), {**one.state_dict(), "window": 4}):
        one.load_state_dict(start)  # also from a place behind the only row
        inputs, _ = one.next()
        assert inputs[:, 1].tolist() == tokenizer.encode("a") * 4


def test_real_text_from_files_to_batches(shared_data, tmp_path):
    source = open_source(f"folder:{shared_data / 'corpus'}")
    assert source.splits["val"] == ["shard_00004.parquet"]
    texts = list(itertools.islice(source.documents("val", 990), 11))
    assert len(texts) == 11
    tokenizer = Tokenizer.train(texts, 600)
    shards = prepare_tokens(source, tokenizer, tmp_path, "val", 100_000)
    first = next(source.documents("val"))
    begin = shards.read(1, int(shards.stops[0])).tolist()
    assert first == tokenizer.decode(begin)
    inputs, targets = TokenBatches(shards, 4, 256).next()
    assert (inputs[:, 0] == tokenizer.bos_id).all() and (targets >= 0).float().mean() > 0.98
    rows = [row for _, row in RowPlan(shards, 256).take(300)]
    assert sum(stop - start for row in rows for start, stop, _ in row) > 0.98 * 300 * 256
