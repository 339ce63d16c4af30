"""Chapter 1: encoding against tiktoken, files, old pickles, streaming. Training is in test_bpe."""

import base64
import json
import os
import pickle

import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

from nanochat.bpe import SPLIT_PATTERN, learn_merges, ranks_from_merges
from nanochat.common import UserError
from nanochat.tokenizer import (
    LARGEST_FILE,
    SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    count_chunks,
    encode_long,
    pickled_fields,
    pieces_as_html,
    read_nanochat_pickle,
    read_ranks,
    token_explorer,
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


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(ENGLISH + CODE + WORLD_SCRIPTS, 400)


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
            for i in range(len(ids) - 1):
                if tuple(ids[i : i + 2]) == pair:
                    ids[i : i + 2] = [new_id]
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


@pytest.mark.parametrize(
    "content", ["{", "[]", json.dumps({"n_vocab": 3}), json.dumps({"pattern": 3})]
)
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


BLANKS = " ", "\t", "\xa0", "\u3000", " \t"


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("before, after", [("", ""), ("x", "y"), ("\n", "\x1c"), (".\r", " y")])
def test_a_million_blanks_encode(tokenizer, before, after, blank):
    text = before + (blank * 1_000_000)[:1_000_000] + after
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text], bos=True) == [[tokenizer.bos_id, *ids]]


@pytest.mark.parametrize("text", [" " * 1_100_000 + "\nx", "\n " * 600_000 + "x", "\n" * 1_100_000])
def test_a_million_blanks_with_line_ends_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


SPACED = st.text(st.sampled_from("     \t\xa0\u2028\x1c\x85\r\nab.1é\ud800"), max_size=60)


@given(SPACED, st.integers(2, 6))
@settings(max_examples=1000, deadline=None)
def test_long_runs_are_cut_where_the_pattern_cuts(tokenizer, text, long_run):
    wanted = tokenizer.encoding.encode_ordinary(text)
    assert encode_long(tokenizer.encoding, text, long_run) == wanted


def test_the_longest_runs_that_the_pattern_engine_takes_are_cut_alike(tokenizer):
    text = "a" + " " * 950_000 + "b  c"
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


def test_long_texts_with_many_short_runs_are_searched_once(tokenizer):
    text = ("a" + " " * 299_999) * 20  # a search from each blank would never end
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_do_not_break_training_or_encoding():
    tokenizer = Tokenizer.train(["\ud800abc abc"], 267)
    assert tokenizer.decode(tokenizer.encode("\ud800a")) == "\ufffda"


def test_pickles_for_worker_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(ENGLISH[0]) == tokenizer.encode(ENGLISH[0])


def test_a_pattern_that_is_no_pattern_is_one_sentence(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts | {"pattern": "("}))
    with pytest.raises(UserError, match="refuses the pattern"):
        Tokenizer.load(tmp_path)


def test_a_file_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    with open(path, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    for reader in (read_ranks, read_nanochat_pickle):
        with pytest.raises(UserError, match="check the path"):
            reader(path)


# The pickle of the original nanochat


def nanochat_encoding(**changed):
    """An encoding as the original nanochat makes it, from ranks and the nine special tokens."""
    ranks = ranks_from_merges(learn_merges(count_chunks(ENGLISH), 50))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    fields = {"pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks, "special_tokens": special}
    return tiktoken.Encoding("rustbpe", **(fields | changed))


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_an_old_tokenizer_is_converted(tmp_path, protocol):
    old = nanochat_encoding()
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(old, protocol))
    converted = read_nanochat_pickle(tmp_path / "tokenizer.pkl")
    converted.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.vocab_size == converted.vocab_size == old.n_vocab
    for text in ENGLISH + CODE + WORLD_SCRIPTS:
        assert again.encode(text) == old.encode_ordinary(text)
    for name in SPECIAL_TOKENS:
        assert again.special(name) == old.encode_single_token(name)


class Call:
    """Pickles as a call of a function; the call would leave a file behind."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["alone", "in a field", "as the class"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol, place):
    mark = tmp_path / "mark"
    attack = Call(os.mkdir, str(mark))
    content = {"alone": attack, "in a field": {"pat_str": attack}, "as the class": [attack]}
    data = pickle.dumps(content[place], protocol)
    (tmp_path / "tokenizer.pkl").write_bytes(data)
    with pytest.raises(UserError, match="nothing in it was executed"):
        read_nanochat_pickle(tmp_path / "tokenizer.pkl")
    assert not mark.exists()
    pickle.loads(data)  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x80\x04.",  # nothing on the stack
        b"\x80\x04h\x05.",  # a memo entry that does not exist
        b"\x80\x04}u.",  # items without a mark
        b"\x80\x04}}}s.",  # a dictionary as a key
        b"\x80\x04)(K\x01K\x02u.",  # items into a tuple
        b"cos\nsystem\n(S'true'\ntR.",  # the oldest attack there is
        b"\x80\x04ctiktoken.core\nEncoding\n)R.",  # calling the class
        b"\x80\x04ctiktoken.core\nEncoding\n)\x81.",  # an object without fields
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # eight exabytes of bytes
        pickle.dumps({"pat_str": "x"}),
        pickle.dumps([1, 2]),
        pickle.dumps("tiktoken"),
    ],
)
def test_broken_pickles_are_one_sentence(tmp_path, data):
    (tmp_path / "tokenizer.pkl").write_bytes(data)
    with pytest.raises(UserError, match="is not a tokenizer of the original nanochat"):
        read_nanochat_pickle(tmp_path / "tokenizer.pkl")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"special_tokens": {"<|bos|>": 306}}, "nine of nanochat"),
        ({"mergeable_ranks": {bytes([i]): i for i in range(255)}}, "single bytes"),
        ({"mergeable_ranks": {bytes([i]): i * 2 for i in range(256)}}, "not 0, 1, 2"),
        ({"mergeable_ranks": {"a": 0}}, "wrong type"),
        ({"pat_str": b"x"}, "wrong type"),
    ],
)
def test_a_pickle_of_another_tokenizer_is_refused(tmp_path, changed, message):
    ranks = {bytes([i]): i for i in range(256)}
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    fields = {"pat_str": "x", "mergeable_ranks": ranks, "special_tokens": special} | changed
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(fields))
    with pytest.raises(UserError, match=message):
        read_nanochat_pickle(tmp_path / "tokenizer.pkl")


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda tail: b"\x80\x04" + tail))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_do_anything_but_raise(data):
    try:
        value = pickled_fields(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return
    assert value is None or isinstance(value, (int, str, bytes, dict, tuple))


# Pictures


def test_pieces_are_escaped_with_their_titles():
    page = pieces_as_html(["<i>", "x"], titles=['"1"', 2])
    assert "<i>" not in page and "&lt;i&gt;" in page
    assert 'title="&quot;1&quot;"' in page and 'title="2"' in page


def test_the_explorer_follows_what_is_typed(tokenizer):
    box, count, view = token_explorer(tokenizer, "the").children
    before = view.value
    box.value = "고양이 <script>"
    assert view.value != before and "<script>" not in view.value and "&lt;" in view.value
    n_bytes = len(box.value.encode())
    n_tokens = len(tokenizer.encode(box.value))
    assert count.value.startswith(f"12 characters, {n_bytes} bytes, {n_tokens} tokens")
    box.value = ""
    assert count.value == "0 characters, 0 bytes, 0 tokens"
