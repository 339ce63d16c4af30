"""Chapter 2: `hub:` sources against a loopback server that plays faults (see hub_server.py)."""

import hashlib
import io
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import COMMIT, hub_server  # noqa: E402

from nanochat import data  # noqa: E402
from nanochat.common import UserError  # noqa: E402
from nanochat.data import FolderSource, open_source, parse_hub, write_shard  # noqa: E402

pytest.importorskip("huggingface_hub")
NAME = "owner/tales"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four shards of 60 incompressible documents, and a file that is no shard."""
    folder, found = tmp_path_factory.mktemp("hub"), {"README.md": b"# tales"}
    for number in range(4):
        texts = [
            "".join(hashlib.sha256(f"{number} {row} {i}".encode()).hexdigest() for i in range(20))
            for row in range(60)
        ]
        write_shard(folder / "shard.parquet", texts)
        found[f"data/shard_{number}.parquet"] = (folder / "shard.parquet").read_bytes()
    return found


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A running hub, an empty cache, and retries that do not wait."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with hub_server(NAME, dict(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def cached(tmp_path):
    """Names of the files in the cache, notes and lists left out."""
    found = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    return sorted(p.name for p in found if p.suffix not in (".json", ".sha256", ".git"))


def test_documents_come_shard_by_shard_and_equal_a_folder(hub, files, tmp_path):
    source = open_source(f"hub:{NAME}")
    assert hub.asked == []  # opening fetches the list alone
    assert "data/shard_3.parquet" in source.describe("val")
    first = next(source.documents("train"))
    assert [name for name, _ in hub.asked] == ["data/shard_0.parquet"]
    everything = list(source.documents("train"))
    assert everything[0] == first and len(everything) == 180
    assert len(list(source.documents("val"))) == 60
    assert sorted(name for name, _ in hub.asked) == [f"data/shard_{i}.parquet" for i in range(4)]
    assert set(hub.tokens) == {"Bearer hf_secret"}

    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    folder = FolderSource(tmp_path / "copy")
    assert list(folder.documents("train")) == everything and folder.splits == source.splits
    again = FolderSource(source.folder)  # the cache itself is a folder of shards too
    assert list(again.documents("train")) == everything


def test_number_of_shards_does_not_move_validation(hub):
    source = open_source(f"hub:{NAME}@main:2")
    assert source.splits == {
        "train": ["data/shard_0.parquet", "data/shard_1.parquet"],
        "val": ["data/shard_3.parquet"],
    }


def test_second_run_fetches_nothing(hub):
    list(open_source(f"hub:{NAME}").documents("train"))
    hub.asked.clear()
    assert len(list(open_source(f"hub:{NAME}").documents("train"))) == 180
    assert hub.asked == []


def test_shards_are_fetched_side_by_side_with_one_progress_line(hub, files, capsys, monkeypatch):
    source = open_source(f"hub:{NAME}")
    hub.meet = threading.Barrier(3)  # nobody is served before three have asked
    source.fetch(source.splits["train"], workers=3)
    hub.meet = None
    said = capsys.readouterr().out
    total = sum(len(files[name]) for name in source.splits["train"])
    assert said.startswith(f"download of 3 shards {total:,}/{total:,} bytes")
    assert said.count("\n") == 1
    source.fetch(source.splits["train"])  # nothing to do, nothing said
    assert capsys.readouterr().out == "" and len(hub.asked) == 3


def test_first_failure_stops_the_others_and_keeps_what_has_come(hub, tmp_path):
    source = open_source(f"hub:{NAME}")
    lost = hub.files.pop("data/shard_1.parquet")
    with pytest.raises(UserError, match=r"shard_1\.parquet: not found.*HTTP 404"):
        source.fetch(source.splits["train"], workers=1)
    assert cached(tmp_path) == ["shard_0.parquet"]
    assert [name for name, _ in hub.asked] == ["data/shard_0.parquet", "data/shard_1.parquet"]
    hub.files["data/shard_1.parquet"] = lost
    assert len(list(source.documents("train"))) == 180


def test_progress_counts_what_an_earlier_run_has_brought(hub, capsys):
    hub.cut = [1_000] * 6
    source = open_source(f"hub:{NAME}")
    with pytest.raises(UserError, match="keeps breaking off"):
        source.fetch(source.splits["val"])
    hub.cut = []
    capsys.readouterr()
    source.fetch(source.splits["val"])
    total = source.files["data/shard_3.parquet"]["size"]
    assert f"{total:,}/{total:,} bytes" in capsys.readouterr().out


def test_files_without_lfs_are_checked_by_their_git_hash(hub, tmp_path):
    hub.plain = set(hub.files)
    assert len(list(open_source(f"hub:{NAME}").documents("val"))) == 60
    hub.forge = True
    with pytest.raises(UserError, match="wrong checksum"):
        next(open_source(f"hub:{NAME}").documents("train"))


def test_busy_server_is_asked_again(hub):
    hub.busy, hub.list_busy = 3, 1
    assert len(list(open_source(f"hub:{NAME}").documents("val"))) == 60
    assert len(hub.asked) == 4


def test_server_that_stays_busy(hub, tmp_path):
    source = open_source(f"hub:{NAME}")
    hub.busy = 100
    with pytest.raises(UserError, match=r"shard_3\.parquet: the server answers HTTP 503"):
        next(source.documents("val"))
    assert len(hub.asked) == 6 and cached(tmp_path) == []


def test_cut_connection_goes_on_where_it_stopped(hub, files):
    size = len(files["data/shard_3.parquet"])
    hub.cut = [10_000, 5_000]
    source = open_source(f"hub:{NAME}")
    assert len(list(source.documents("val"))) == 60
    assert [asked for _, asked in hub.asked] == [None, "bytes=10000-", "bytes=15000-"]
    assert size > 15_000
    assert (source.folder / "data/shard_3.parquet").read_bytes() == files["data/shard_3.parquet"]


def test_killed_program_goes_on_in_the_next_run(hub, files, tmp_path, monkeypatch):
    hub.cut = [1_000] * 6
    with pytest.raises(UserError, match="keeps breaking off .*run again to go on"):
        next(open_source(f"hub:{NAME}").documents("val"))
    (part,) = cached(tmp_path)
    assert part.endswith(".part")  # nothing under the final name
    hub.asked.clear()
    hub.cut = []
    assert len(list(open_source(f"hub:{NAME}").documents("val"))) == 60
    assert hub.asked[0][1] == "bytes=6000-" and cached(tmp_path) == ["shard_3.parquet"]


def test_server_without_ranges_sends_all_again(hub, files):
    hub.cut, hub.no_ranges = [10_000], True
    source = open_source(f"hub:{NAME}")
    assert len(list(source.documents("val"))) == 60
    assert (source.folder / "data/shard_3.parquet").read_bytes() == files["data/shard_3.parquet"]


def test_wrong_checksum_is_refused_and_leaves_nothing(hub, tmp_path):
    hub.forge = True
    with pytest.raises(UserError, match=r"shard_3\.parquet has the wrong checksum .*run again"):
        next(open_source(f"hub:{NAME}").documents("val"))
    assert cached(tmp_path) == []
    hub.forge = False
    assert len(list(open_source(f"hub:{NAME}").documents("val"))) == 60


@pytest.mark.parametrize("have", [0, 5_000])
def test_server_that_sends_more_than_announced_is_left_at_once(hub, files, tmp_path, have):
    source = open_source(f"hub:{NAME}")
    if have:  # a part of an earlier run
        hub.cut = [have] + [0] * 5
        with pytest.raises(UserError, match="keeps breaking off"):
            next(source.documents("val"))
        hub.cut = []
    hub.endless = True
    size = len(files["data/shard_3.parquet"])
    with pytest.raises(UserError, match=rf"shard_3.* sends more than the {size:,} bytes") as caught:
        next(source.documents("val"))
    assert "\n" not in str(caught.value) and hub.asked[-1][1] == ("bytes=5000-" if have else None)
    assert cached(tmp_path) == [] and hub.sent < 20_000_000
    hub.endless = False
    assert len(list(source.documents("val"))) == 60


@pytest.mark.parametrize(
    "name",
    ["../../evil/a.parquet", "/tmp/evil.parquet", "C:evil.parquet", "a\\b.parquet", "\0.parquet"],
)
def test_listed_path_that_leads_out_of_the_cache_is_refused(hub, tmp_path, name):
    hub.files = {name: b"x", **hub.files}
    with pytest.raises(
        UserError, match="which is no plain file inside of it; do not use it"
    ) as caught:
        open_source(f"hub:{NAME}")
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    assert hub.asked == [] and cached(tmp_path) == []


def test_kept_list_is_checked_too(hub, monkeypatch):
    folder = open_source(f"hub:{NAME}").folder
    kept = folder / "listing-main.json"
    kept.write_text(kept.read_text().replace("data/shard_3", "../shard_3"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"holds '\.\./shard_3"):
        open_source(f"hub:{NAME}")


def test_hash_that_is_none_is_refused(hub, monkeypatch):
    real = type(hub).entry
    forged = {"oid": "../../../../evil", "size": 3, "pointerSize": 130}
    monkeypatch.setattr(type(hub), "entry", lambda self, path: {**real(self, path), "lfs": forged})
    with pytest.raises(UserError, match="gives .* the hash '../../../../evil', which is none"):
        open_source(f"hub:{NAME}")


def test_damaged_cache_is_fetched_again(hub):
    source = open_source(f"hub:{NAME}")
    path = source.path("data/shard_3.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    assert len(list(open_source(f"hub:{NAME}").documents("val"))) == 60


def test_changed_shard_is_fetched_again(hub, files):
    source = open_source(f"hub:{NAME}")
    before = list(source.documents("val"))
    hub.files["data/shard_3.parquet"] = files["data/shard_0.parquet"]
    hub.commit = COMMIT[::-1]
    assert list(open_source(f"hub:{NAME}").documents("val")) != before


def test_full_disk(hub, tmp_path, monkeypatch):
    source = open_source(f"hub:{NAME}")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="MB are free"):
        next(source.documents("val"))
    monkeypatch.undo()
    assert cached(tmp_path) == []


def test_disk_that_fills_up_during_the_download(hub, tmp_path, monkeypatch):
    source = open_source(f"hub:{NAME}")

    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "open", lambda path, mode: Full(), raising=False)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        next(source.documents("val"))
    assert len(hub.asked) == 1 and "shard_3.parquet" not in cached(tmp_path)


def test_unknown_data_set_is_one_sentence_and_no_retry(hub):
    with pytest.raises(UserError, match=r"owner/other@main.*HTTP 40[14]"):
        open_source("hub:owner/other")
    with pytest.raises(UserError, match="@v9"):
        open_source(f"hub:{NAME}@v9")


def test_data_set_without_enough_shards(hub):
    hub.files = {"README.md": b"nothing", "data/one.parquet": b"x"}
    with pytest.raises(UserError, match="has 1 parquet files, at least 2"):
        open_source(f"hub:{NAME}")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An endpoint where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


def test_no_network_is_told(nobody):
    with pytest.raises(UserError, match=r"no connection .*use `tinyworld`"):
        open_source(f"hub:{NAME}")


def test_no_network_with_a_cache_goes_on(hub, monkeypatch):
    expected = list(open_source(f"hub:{NAME}").documents("val"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.warns(UserWarning, match="list fetched earlier"):
        source = open_source(f"hub:{NAME}")
    assert list(source.documents("val")) == expected


def test_hub_spec():
    assert parse_hub("a/b") == ("a/b", "main", None)
    assert parse_hub("a/b-c.d@v1.0:12") == ("a/b-c.d", "v1.0", 12)
    assert parse_hub("squad:3") == ("squad", "main", 3)
    for wrong in ("", "a/b:0", "a/b:x", "a/b/c", "a b", "a/b@"):
        with pytest.raises(UserError, match="not understood"):
            parse_hub(wrong)
