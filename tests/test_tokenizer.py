"""Chapter 1: the tokenizer, against rustbpe (training) and tiktoken (encoding)."""

import base64
import json
import random

import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    StreamDecoder,
    Tokenizer,
    count_chunks,
    learn_merges,
    count_batches,
    ranks_from_merges,
    read_ranks,
    tokens_as_html,
    write_ranks,
)

ENGLISH = [
    "The baker's dog ran to the mill. It didn't stop; it couldn't! 12 days, 365 nights, $3.50.",
    "Anna said: “I’ll go to Lund on Monday,”   and   went.\n\n\tShe sold 1234 apples\r\nfor 567.",
] * 3
CODE = ["def f(x):\n    return [y**2 for y in x if y != 0]  # squares\n\n\nclass A:\n\tpass\n"] * 2
WORLD_SCRIPTS = [
    "고양이가 방에 있다. 고양이 고양이가",
    "猫坐在垫子上。猫猫猫",
    "🐈🐈‍⬛ 👩‍👩‍👧 ok🙂🙂",
    "naïve ΑΒΓ ſ İ",
]
REPEATED = ["a" * 5000, " " * 333 + "b", "ababab" * 50 + "aaa"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(ENGLISH + CODE + WORLD_SCRIPTS, 400)


def naive_merges(texts, n_merges):
    """Recount all pairs for each merge."""
    chunks = [list(c.encode()) for t in texts for c in regex.findall(SPLIT_PATTERN, t)]
    merges = []
    for new_id in range(256, 256 + n_merges):
        counts = {}
        for ids in chunks:
            for pair in zip(ids, ids[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        merges.append(min(counts, key=lambda p: (-counts[p], p)))
        for ids in chunks:
            merge_chunk(ids, merges[-1], new_id)
    return merges


def assert_same_as_rustbpe(texts, n_ranks):
    rustbpe = pytest.importorskip("rustbpe")
    other = rustbpe.Tokenizer()
    other.train_from_iterator(iter(texts), n_ranks, pattern=SPLIT_PATTERN)
    expected = {bytes(symbol): rank for symbol, rank in other.get_mergeable_ranks()}
    assert ranks_from_merges(learn_merges(count_chunks(texts), n_ranks - 256)) == expected


@pytest.mark.parametrize(
    "texts",
    [ENGLISH, CODE, WORLD_SCRIPTS, REPEATED, [""], ["x"], [], ENGLISH + CODE + WORLD_SCRIPTS],
    ids=["english", "code", "scripts", "repeated", "empty", "one byte", "nothing", "all"],
)
def test_merges_equal_rustbpe(texts):
    assert_same_as_rustbpe(texts, 600)


def test_merges_equal_rustbpe_on_the_tiny_world():
    from nanochat.tinyworld import World, document

    world = World(0)
    assert_same_as_rustbpe([document(world, i) for i in range(500)], 2048 - 9)


def test_merges_equal_rustbpe_on_one_repeated_letter():
    assert_same_as_rustbpe(["a" * 1_000_000], 300)


def test_merges_equal_rustbpe_on_real_text(shared_data):
    parquet = pytest.importorskip("pyarrow.parquet")
    group = parquet.ParquetFile(shared_data / "corpus" / "shard_00004.parquet").read_row_group(0)
    texts, size = [], 0
    for text in group.column("text").to_pylist():
        texts.append(text)
        size += len(text)
        if size > 1_000_000:
            break
    assert_same_as_rustbpe(texts, 4096)


@given(st.lists(st.text(alphabet="abc é", max_size=30), max_size=6), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_fast_trainer_learns_what_the_naive_one_learns(texts, n_merges):
    assert learn_merges(count_chunks(texts), n_merges) == naive_merges(texts, n_merges)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_chunks_are_the_text(text):
    assert "".join(regex.findall(SPLIT_PATTERN, text)) == text


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_round_trip_and_no_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < tokenizer.bos_id for i in ids)
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode("utf-8"))


def test_encoding_equals_tiktoken_with_the_same_ranks(tokenizer):
    reference = tiktoken.Encoding(
        "reference", pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    for text in ENGLISH + CODE + WORLD_SCRIPTS:
        assert tokenizer.encode(text) == reference.encode(text)


def test_encoding_applies_merges_in_the_order_learned():
    merges = learn_merges(count_chunks(ENGLISH), 120)
    tokenizer = Tokenizer(ranks_from_merges(merges))
    for chunk in count_chunks(ENGLISH):
        ids = list(chunk.encode())
        for new_id, pair in enumerate(merges, 256):
            merge_chunk(ids, pair, new_id)
        assert tokenizer.encode(chunk) == ids


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_user_text_never_becomes_a_special_token(tokenizer, name):
    assert tokenizer.special(name) not in tokenizer.encode(f"a {name} b{name}")
    assert tokenizer.decode(tokenizer.encode(name)) == name
    assert tokenizer.special(name.strip("<|>")) == tokenizer.special(name)
    assert tokenizer.decode([tokenizer.special(name)]) == name


def test_special_ids_follow_the_merges_in_order(tokenizer):
    first = tokenizer.vocab_size - 9
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(first, first + 9))
    assert tokenizer.bos_id == first
    with pytest.raises(KeyError, match="pad"):
        tokenizer.special("pad")


def test_batch_equals_one_by_one(tokenizer):
    texts = ENGLISH + [""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    rows = tokenizer.encode_batch(texts, bos=True, num_threads=3)
    assert rows == [tokenizer.encode(t, bos=True) for t in texts]
    assert rows[-1] == [tokenizer.bos_id]


def test_token_bytes_counts_raw_bytes(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == torch.int32
    assert lengths[255] == 1  # a byte that is no character on its own
    assert lengths[tokenizer.bos_id :].eq(0).all() and lengths[: tokenizer.bos_id].gt(0).all()
    for rank in range(0, tokenizer.bos_id, 7):
        assert lengths[rank] == len(tokenizer.decode_bytes([rank]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_stream_decoder_equals_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(i) for i in ids] + [decoder.flush()]) == tokenizer.decode(ids)


@given(st.text(max_size=50))
@settings(max_examples=100, deadline=None)
def test_stream_of_valid_text_never_shows_a_broken_character(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text and decoder.flush() == ""


def test_small_corpus_learns_fewer_and_says_so():
    with pytest.warns(UserWarning, match="266 were learned"):
        tokenizer = Tokenizer.train(["ab"], 1000)
    assert tokenizer.vocab_size == 266
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def test_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(UserError, match="need 265"):
        Tokenizer.train(["ab"], 100)
    assert Tokenizer.train(["ab"], 265).vocab_size == 265


def test_training_does_not_depend_on_the_order_of_texts():
    mixed = ENGLISH + CODE + WORLD_SCRIPTS
    shuffled = random.Random(1).sample(mixed, len(mixed))
    assert Tokenizer.train(mixed, 350).fingerprint() == Tokenizer.train(shuffled, 350).fingerprint()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    again = Tokenizer.load(tmp_path / "new" / "tokenizer")
    assert again.ranks == tokenizer.ranks and again.fingerprint() == tokenizer.fingerprint()
    assert sorted(p.name for p in (tmp_path / "new" / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer.tiktoken",
    ]
    line = (tmp_path / "new" / "tokenizer" / "tokenizer.tiktoken").read_text().splitlines()[300]
    assert tokenizer.ranks[base64.b64decode(line.split()[0])] == 300


def test_saving_over_another_tokenizer_is_seen_by_the_next_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    Tokenizer.load(tmp_path)
    other = Tokenizer.train(ENGLISH, 300)
    other.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == 300


def test_fingerprint_depends_on_ranks_and_pattern(tokenizer):
    other = Tokenizer(tokenizer.ranks, SPLIT_PATTERN.replace("{1,2}", "{1,3}"))
    assert other.fingerprint() != tokenizer.fingerprint()
    swapped = dict(tokenizer.ranks)
    a, b = list(swapped)[300:302]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert Tokenizer(swapped).fingerprint() != tokenizer.fingerprint()


def test_missing_files(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").unlink()
    with pytest.raises(UserError, match="tokenizer.tiktoken does not exist"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: lines[:300] + [b"%%% 300"] + lines[301:], "line 301"),
        (lambda lines: lines[:300] + [b"nonsense"] + lines[301:], "line 301"),
        (lambda lines: lines[:300] + lines[301:], "line 301"),
        (lambda lines: lines[:300] + [lines[299]] + lines[301:], "line 301"),
        (lambda lines: lines[:200], "single bytes"),
        (lambda lines: lines[:-1], "do not belong together"),
        (lambda lines: lines[:-1] + [b"enp6eg== %d" % (len(lines) - 1)], "do not belong together"),
    ],
    ids=["base64", "fields", "gap", "twice", "short", "truncated", "changed"],
)
def test_damaged_ranks(tokenizer, tmp_path, damage, message):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"n_vocab": 3})])
def test_damaged_json(tokenizer, tmp_path, content):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_ranks_file_round_trip(tmp_path):
    ranks = ranks_from_merges([(104, 105), (256, 33)])
    write_ranks(tmp_path / "r.tiktoken", ranks)
    assert read_ranks(tmp_path / "r.tiktoken") == ranks and ranks[b"hi!"] == 257


def test_html_is_escaped_and_complete(tokenizer):
    page = tokens_as_html(tokenizer, tokenizer.encode("<b>&"))
    assert "<b>" not in page and "&lt;" in page and "&amp;" in page
    marked = tokens_as_html(tokenizer, [97, 98], colors=["red", None])
    assert marked.count("background:red") == 1 and marked.count("background:none") == 1


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 200_000, "^" * 200_000, "1" * 200_000])
def test_long_runs_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_do_not_break_training_or_encoding():
    tokenizer = Tokenizer.train(["\ud800abc abc"], 267)
    assert tokenizer.decode(tokenizer.encode("\ud800a")) == "\ufffda"


def test_pickles_for_worker_processes(tokenizer):
    import pickle

    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(ENGLISH[0]) == tokenizer.encode(ENGLISH[0])
