"""CORE for any model: the bundle from a server, Hugging Face models, kept results, leaked exams."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from core_reference import WORDS, compare_with_reference, random_model, toy_task
from hub_server import Handler, HubServer
from hypothesis import given, settings, strategies as st

from nanochat import core, evaluation as ev
from nanochat.common import UserError, read_json
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ITEMS = [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(4)]


# --- files ---


def write_jsonl(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def write_bundle(folder):
    """Two tasks in the layout of the DCLM bundle."""
    write_jsonl(folder / "eval_data/qa/a.jsonl", ITEMS)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n- label: a\n  dataset_uri: qa/a.jsonl\n  num_fewshot: [10]\n"
        '  icl_task_type: multiple_choice\n  continuation_delimiter: "\\nAnswer: "\n'
        "- label: b\n  dataset_uri: qa/a.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: multiple_choice\n"
    )
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Category,Random baseline\na,x,25\nb,x,9.1\n"
    )


def test_a_folder_with_a_manifest(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", ITEMS)
    entry = {"task_type": "multiple_choice", "num_fewshot": 2, "random_baseline": 50}
    tasks = [
        {"label": "a", "file": "a.jsonl.gz", "continuation_delimiter": "\nAnswer: ", **entry},
        {"label": "gone", "file": None, **entry},
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": tasks}))
    (task,) = core.load_core(tmp_path)
    assert task == ev.Task("a", "multiple_choice", ITEMS, 2, "\nAnswer: ", 0.5)


def test_the_layout_of_the_dclm_bundle(tmp_path):
    write_bundle(tmp_path)
    a, b = core.load_core(tmp_path)
    assert (a.name, a.shots, a.delimiter, a.baseline) == ("a", 10, "\nAnswer: ", 0.25)
    assert (b.name, b.shots, b.delimiter, b.baseline) == ("b", 0, " ", 0.091)


def test_wrong_files_get_one_clear_sentence(tmp_path):
    def said():
        with pytest.raises(UserError) as caught:
            core.load_core(tmp_path)
        message = str(caught.value)
        assert "\n" not in message and message.endswith(".") and str(tmp_path) in message
        return message

    assert "manifest.json" in said()
    entry = {"label": "a", "file": "a.jsonl.gz", "task_type": "multiple_choice"}
    entry.update(num_fewshot=0, continuation_delimiter=" ", random_baseline=50)
    manifest = tmp_path / "manifest.json"
    for broken in ("{}", "[]", '{"tasks": 3}', '{"tasks": [{"file": "x"}]}', "no json"):
        manifest.write_text(broken)
        assert "manifest.json" in said()
    manifest.write_text(json.dumps({"tasks": [{**entry, "random_baseline": "half"}]}))
    assert "no list of tasks" in said()
    manifest.write_text(json.dumps({"tasks": [entry]}))
    assert "a.jsonl.gz does not exist" in said()
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    assert "a.jsonl.gz is damaged" in said()
    for items, problem in (
        ([], "has no items"),
        ([{"query": "q", "gold": 0}], "item 0 lacks choices"),
        ([ITEMS[0], {"query": "q", "choices": ["x"], "gold": 1}], "item 1 has no option number 1"),
        ([{"query": "q", "choices": ["x"], "gold": "0"}], "no option number '0'"),
        ([{"query": "q", "choices": "xy", "gold": 0}], "no list of choices"),
        ([{"query": 7, "choices": ["x"], "gold": 0}], "a field that is no text"),
        ([["q", "x"]], "is not an object"),
    ):
        write_jsonl(tmp_path / "a.jsonl.gz", items)
        with pytest.raises(UserError, match=problem):
            core.load_core(tmp_path)
    with pytest.raises(UserError, match="unknown"):
        ev.Task("t", "essay", ITEMS)
    manifest.unlink()
    (tmp_path / "core.yaml").write_text("icl_tasks: [{label: a}]")
    with pytest.raises(UserError, match="core.yaml is no list of tasks"):
        core.load_core(tmp_path)


def test_a_damaged_gzip_file_is_one_sentence_or_reads_the_same(tmp_path):
    path, rng = tmp_path / "a.jsonl.gz", random.Random(0)
    items = [{"context": rng.random().hex(), "continuation": str(i)} for i in range(3000)]
    write_jsonl(path, items)
    packed = path.read_bytes()
    for _ in range(100):  # some damage shows in a checksum, some already while unpacking
        broken = bytearray(packed)
        broken[rng.randrange(20, len(packed) - 10)] ^= 0xFF
        path.write_bytes(broken)
        try:
            assert core.read_items(path) == items
        except UserError as error:
            assert "a.jsonl.gz is damaged" in str(error)


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 10_000, '{"a": "\ufeff', "\ufeff{}"])
def test_a_line_that_json_cannot_read_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="a.jsonl is damaged"):
        core.read_items(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="a.jsonl is damaged"):
        core.read_items(path)


@pytest.mark.parametrize("bomb", [b"\n" * 20_000_000, b" " * 20_000_000 + b"{}"])
def test_a_gzip_bomb_is_stopped_while_it_unpacks(tmp_path, bomb):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(bomb))
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 2,000,000 bytes"):
        core.read_items(path, max_bytes=2_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 30_000 and peak < 10_000_000


def test_a_file_of_exactly_the_bytes_allowed_is_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ITEMS)
    size = (tmp_path / "a.jsonl").stat().st_size
    assert core.read_items(tmp_path / "a.jsonl", size) == ITEMS
    with pytest.raises(UserError, match="holds more than"):
        core.read_items(tmp_path / "a.jsonl", size - 1)


# --- archives ---


def zip_of(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def link_to(target):
    info = zipfile.ZipInfo("eval_bundle/link")
    info.external_attr = 0o120777 << 16
    return info, target


UNSAFE = [
    ("../outside", b"x"),
    ("a/../../outside", b"x"),
    ("/absolute", b"x"),
    ("C:/windows", b"x"),
    ("back\\slash", b"x"),
    link_to("/etc/passwd"),
]


@pytest.mark.parametrize("member", UNSAFE, ids=lambda m: str(getattr(m[0], "filename", m[0])))
def test_an_archive_that_leads_out_is_refused_whole(tmp_path, member):
    inside = tmp_path / "inside"
    archive = zip_of(tmp_path / "a.zip", ("good.txt", b"good"), member)
    with pytest.raises(UserError, match="no plain file"):
        core.unpack(archive, inside / "files")
    assert list(inside.iterdir()) == [] and sorted(os.listdir(tmp_path)) == ["a.zip", "inside"]


def test_a_bomb_is_stopped_while_it_unpacks(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("zeros", bytes(20_000_000)))
    assert archive.stat().st_size < 30_000
    with pytest.raises(UserError, match="unpacks to more than 5,000,000 bytes"):
        core.unpack(archive, tmp_path / "files", max_bytes=5_000_000)
    many = zip_of(tmp_path / "many.zip", *((f"{i}", b"") for i in range(core.MAX_FILES + 1)))
    with pytest.raises(UserError, match="1,001 files"):
        core.unpack(many, tmp_path / "files")
    # the sizes written in the archive lie: the central directory says 10 bytes
    lying = bytearray(archive.read_bytes())
    at = lying.rindex(b"PK\x01\x02") + 24
    lying[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "lying.zip").write_bytes(lying)
    with pytest.raises(UserError):
        core.unpack(tmp_path / "lying.zip", tmp_path / "files", max_bytes=5_000_000)
    assert not (tmp_path / "files").exists()


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_archive_is_one_sentence_or_unpacks_the_same(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("zip")
    archive = zip_of(folder / "a.zip", ("one.txt", b"one" * 50), ("two/three.txt", b"three" * 9))
    raw = bytearray(archive.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    archive.write_bytes(raw)
    try:
        core.unpack(archive, folder / "files")
    except UserError:
        assert not (folder / "files").exists()
    else:
        texts = {p.read_bytes() for p in (folder / "files").rglob("*") if p.is_file()}
        assert texts <= {b"one" * 50, b"three" * 9}
    assert {p.name for p in folder.iterdir()} <= {"a.zip", "files"}


# --- the bundle from a server ---


class ArchiveHandler(Handler):
    """Serves the files of a HubServer under their plain names."""

    def do_GET(self):
        self.send_file(self.path.lstrip("/"))

    def do_HEAD(self):
        data = self.server.files.get(self.path.lstrip("/"))
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()


@contextmanager
def archive_server(files):
    server = HubServer("archives", files)
    server.RequestHandlerClass = ArchiveHandler
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def bundle(tmp_path):
    """The bytes of a small bundle and their SHA-256."""
    import hashlib

    write_bundle(tmp_path / "source")
    paths = [p for p in (tmp_path / "source").rglob("*") if p.is_file()]
    members = [(f"eval_bundle/{p.relative_to(tmp_path / 'source')}", p.read_bytes()) for p in paths]
    members.append(("eval_bundle/noise.bin", random.Random(0).randbytes(300_000)))
    data = zip_of(tmp_path / "source.zip", *members).read_bytes()
    return data, hashlib.sha256(data).hexdigest()


def test_the_bundle_is_fetched_once_and_kept(tmp_path, bundle, monkeypatch):
    data, digest = bundle
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    with archive_server({"b.zip": data}) as server:
        server.cut = [100_000]  # the first answer breaks off; the rest is asked for
        folder = core.fetch_core(url=f"{server.url}/b.zip", digest=digest)
        assert [t.name for t in core.load_core(folder)] == ["a", "b"]
        assert folder.is_relative_to(tmp_path / "cache" / "core")
        assert [asked for _, asked in server.asked] == [None, "bytes=100000-"]
        assert core.fetch_core(url=f"{server.url}/b.zip", digest=digest) == folder
        assert len(server.asked) == 2
        (folder / "eval_data/qa/a.jsonl").write_text("shorter")  # damaged since: fetched again
        assert core.fetch_core(url=f"{server.url}/b.zip", digest=digest) == folder
        assert [t.name for t in core.load_core(folder)] == ["a", "b"] and len(server.asked) == 3
    assert core.fetch_core(url="http://127.0.0.1:9/b.zip", digest=digest) == folder  # no network
    assert not list((tmp_path / "cache").rglob("*.zip"))


def test_another_file_than_the_known_one_is_thrown_away(tmp_path, bundle):
    data, digest = bundle
    with archive_server({"b.zip": data}) as server:
        server.forge = True
        with pytest.raises(UserError, match="wrong checksum"):
            core.fetch_core(tmp_path / "core", f"{server.url}/b.zip", digest)
        assert not list((tmp_path / "core").glob("**/core.yaml"))
        server.forge = False
        assert core.load_core(core.fetch_core(tmp_path / "core", f"{server.url}/b.zip", digest))
        with pytest.raises(UserError, match="404"):
            core.fetch_core(tmp_path / "other", f"{server.url}/c.zip", digest)


def test_the_known_address_and_hash_are_plain():
    assert core.CORE_URL.startswith("https://") and len(bytes.fromhex(core.CORE_SHA256)) == 32


# --- models of Hugging Face ---


def save_tiny(folder, kind, bos=True):
    """A random model with a tokenizer of its own, as a folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers, trainers

    inner = Fast(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>"], initial_alphabet=alphabet)
    inner.train_from_iterator([" ".join(WORDS) + "? Answer: yes"] * 9, trainer)
    name = "bos_token" if bos else "eos_token"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **{name: "<s>"})
    sizes = {"vocab_size": inner.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=200, n_embd=32, n_layer=2, n_head=2, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=200,
            **sizes,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub_models(tmp_path_factory):
    kinds = ("gpt2", "llama")
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind, kind == "llama") for kind in kinds}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", list(ev.KINDS))
def test_a_hugging_face_model_is_scored_as_the_reference_says(hub_models, family, kind):
    model, tokenizer = core.load_hub_model(str(hub_models[family]))
    assert ev.context_length(model) == 200 and tokenizer.bos_id == 0
    assert tokenizer.decode(tokenizer.encode("the red fox")) == "the red fox"
    for share in (True, False):
        assert compare_with_reference(model, tokenizer, toy_task(kind), None, share=share) == 24


def test_a_hugging_face_model_reads_a_shared_beginning_once(hub_models):
    model, _ = core.load_hub_model(str(hub_models["llama"]))
    read, plain = [], model.forward

    def forward(input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        read.append(input_ids.numel())
        return plain(
            input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    model.forward = forward
    rows = [ev.Row([*range(5, 95), 100 + i, 7], 90, 92) for i in range(4)]
    scores = ev.score_rows(model, rows)
    assert sum(read) == 89 + 4 * 2
    for row, (loss, _) in zip(rows, scores):
        labels = torch.tensor([[-100] * row.start + row.ids[row.start :]])
        model.forward = plain
        with torch.no_grad():
            expected = model(torch.tensor([row.ids]), labels=labels).loss.item()
        assert loss == pytest.approx(expected, abs=1e-4)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path, hub_models):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UserError, match="no causal model") as caught:
            core.load_hub_model(str(name))
        assert "\n" not in str(caught.value)


def test_weights_in_pickle_are_refused(tmp_path, hub_models):
    import shutil

    shutil.copytree(hub_models["gpt2"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="safetensors"):
        core.load_hub_model(str(tmp_path / "model"))


# --- kept results ---


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS)] * 20, vocab_size=300)


def three_tasks():
    tasks = [toy_task(kind, seed=i) for i, kind in enumerate(ev.KINDS)]
    return [ev.replace(task, name=f"toy: {i}") for i, task in enumerate(tasks)]


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_core as t
from nanochat import core
plain = core.evaluate_task

def evaluate_task(model, tokenizer, task, *args, **options):
    if task.name == "toy: 2":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(model, tokenizer, task, *args, **options)

core.evaluate_task = evaluate_task
tokenizer = t.Tokenizer.load({folder!r} + "/tokenizer")
model = t.random_model(tokenizer.vocab_size)
core.run_core(model, tokenizer, t.three_tasks(), {folder!r} + "/core")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, tokenizer, monkeypatch, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    program = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "core"
    kept = {path.name: path.read_bytes() for path in (folder / "tasks").iterdir()}
    assert sorted(kept) == ["toy_0.json", "toy_1.json"] and not (folder / "core.json").exists()

    asked, plain = [], core.evaluate_task
    monkeypatch.setattr(
        core,
        "evaluate_task",
        lambda m, t, task, *a, **o: asked.append(task.name) or plain(m, t, task, *a, **o),
    )
    model = random_model(tokenizer.vocab_size)
    result = core.run_core(model, tokenizer, three_tasks(), folder)
    assert asked == ["toy: 2"]
    assert all((folder / "tasks" / name).read_bytes() == data for name, data in kept.items())
    whole = ev.evaluate_core(model, tokenizer, three_tasks())
    assert {k: result[k] for k in whole} == whole
    assert read_json(folder / "core.json") == json.loads(json.dumps(result))
    assert "| toy: 1 |" in (folder / "core.md").read_text()
    assert (folder / "core.png").read_bytes().startswith(b"\x89PNG")
    assert "72/72 items" in capsys.readouterr().out  # the bar counts what was there already
    assert core.run_core(model, tokenizer, three_tasks(), folder) == result and asked == ["toy: 2"]


def test_results_of_something_else_are_not_mixed_in(tmp_path, tokenizer):
    model, tasks = random_model(tokenizer.vocab_size), three_tasks()
    core.run_core(model, tokenizer, tasks, tmp_path, limit=6)
    other = random_model(tokenizer.vocab_size, seed=1)
    with pytest.raises(UserError, match="another model;"):
        core.run_core(other, tokenizer, tasks, tmp_path, limit=6)
    with pytest.raises(UserError, match="another limit;"):
        core.run_core(model, tokenizer, tasks, tmp_path, limit=7)
    with pytest.raises(UserError, match="another task;"):
        core.run_core(model, tokenizer, [ev.replace(t, shots=1) for t in tasks], tmp_path, limit=6)
    wider = Tokenizer.train([" ".join(WORDS)] * 20, vocab_size=290)
    with pytest.raises(UserError, match="another tokenizer;"):
        core.run_core(model, wider, tasks, tmp_path, limit=6)


@pytest.mark.parametrize("names", [("a b", "a b"), ("a b", "a_b"), ("a: b", "A_b")])
def test_tasks_that_would_share_a_file_are_refused_before_anything_runs(tmp_path, tokenizer, names):
    model, (one, other, _) = random_model(tokenizer.vocab_size), three_tasks()
    tasks = [ev.replace(task, name=name) for task, name in zip((one, other), names)]
    said = f"called '{names[0]}' and '{names[1]}'.*rename one of them"
    with pytest.raises(UserError, match=said):
        core.run_core(model, tokenizer, tasks, tmp_path / "out")
    with pytest.raises(UserError, match=said):
        ev.evaluate_core(model, tokenizer, tasks)
    assert not (tmp_path / "out").exists()


def test_the_digest_of_a_model_is_of_its_weights():
    a, b = random_model(50), random_model(50)
    assert (
        core.model_digest(a) == core.model_digest(b) != core.model_digest(random_model(50, seed=1))
    )
    with torch.no_grad():
        b.head.weight[0, 0] += 1e-3
    assert core.model_digest(a) != core.model_digest(b)
    assert core.model_digest(a) != core.model_digest(random_model(50).bfloat16())
    b = random_model(50)
    b.compute_dtype = torch.bfloat16
    assert core.model_digest(a) != core.model_digest(b)


class Part:
    """One of two processes that see different folders; `other` is what the second adds."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, rank, others=()):
        self.rank, self.is_main, self.others, self.seen = rank, rank == 0, list(others), []

    def sum(self, value):
        self.seen.append(value.clone())
        return value + self.others.pop(0) if self.others else value


def test_processes_agree_on_what_is_done(tmp_path, tokenizer):
    """A task counts as done only when both processes have its file."""
    model, tasks = random_model(tokenizer.vocab_size), three_tasks()
    whole = core.run_core(model, tokenizer, tasks, tmp_path / "one")
    second = Part(1)
    core.run_core(model, tokenizer, tasks, tmp_path / "empty", world=second)
    assert not (tmp_path / "empty").exists()  # only the first process writes
    first = Part(0, second.seen)
    assert core.run_core(model, tokenizer, tasks, tmp_path / "one", world=first) == whole
    assert len(first.seen) == 4  # what is done, and all three tasks once more


# --- leaks ---


def reference_share(text, documents, n):
    """Shares by plain strings."""
    words = core.WORD.findall(text.lower())
    n = min(n, len(words))
    if n < core.SHORTEST:
        return float("nan")
    runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    held = [f" {' '.join(core.WORD.findall(d.lower()))} " for d in documents]
    return sum(any(f" {run} " in d for d in held) for run in runs) / len(runs)


WORDLIST = st.lists(st.sampled_from(["a", "b", "c", "dog", "Cat"]), max_size=14).map(" ".join)


@given(
    st.lists(WORDLIST, min_size=1, max_size=5),
    st.lists(WORDLIST, max_size=5),
    st.integers(5, 8),
    st.sampled_from([1, 7, 10**6]),
)
def test_contamination_is_the_plain_search(texts, documents, n, block):
    got = core.contamination(texts, iter(documents), n, block)
    expected = [reference_share(text, documents, n) for text in texts]
    np.testing.assert_allclose(got, expected)


def test_a_planted_leak_is_found_and_nothing_else():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    exam = [" ".join(rng.choices(words, k=25)) + "?" for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=300)) for _ in range(200)]
    for number in (3, 17, 40):
        documents[number] += f"\n{exam[number].upper()}, " + "w1 " * 5
    shares = core.contamination(exam, documents)
    assert (
        np.flatnonzero(shares).tolist() == [3, 17, 40] and shares[[3, 17, 40]].tolist() == [1] * 3
    )
