"""nanochat.chat: rendering, loss masks, parsing, and the template for other libraries."""

import random

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.chat import CHAT_TEMPLATE, TokenView, parse, render, render_prompt, reply_text, turns
from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = "The cat sat. Who are you? 12 + 30 = 42 #### 42 straße naïve <|bos|> 'don't'\n\n" * 3
TOKENIZER = Tokenizer.train([TEXT], vocab_size=300)
S = {name.strip("<|>"): TOKENIZER.special(name) for name in SPECIAL_TOKENS}

texts = st.text(max_size=20) | st.sampled_from(["", "<|assistant_end|>", "a\n\nb", "#### 4"])
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output"]), "text": texts}
)
assistant = st.builds(
    lambda content: {"role": "assistant", "content": content}, texts | st.lists(part, max_size=5)
)
user = st.builds(lambda content: {"role": "user", "content": content}, texts)
system = st.builds(lambda content: {"role": "system", "content": content}, texts)


@st.composite
def conversations(draw):
    messages = [draw(system)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [draw(user), draw(assistant)]
    return {"messages": messages}


def expected_rendering(conversation):
    """Walk the messages once more, by the written rules, keeping (id, trained) pairs."""
    messages = [dict(m) for m in conversation["messages"]]
    if messages[0]["role"] == "system":
        messages[1]["content"] = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = messages[1:]
    out = [(S["bos"], 0)]
    for m in messages:
        if m["role"] == "user":
            body = [(i, 0) for i in TOKENIZER.encode(m["content"])]
            out += [(S["user_start"], 0), *body, (S["user_end"], 0)]
            continue
        out.append((S["assistant_start"], 0))
        content = m["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for p in parts:
            ids = TOKENIZER.encode(p["text"])
            if p["type"] == "python":
                ids = [S["python_start"], *ids, S["python_end"]]
            if p["type"] == "python_output":
                ids = [S["output_start"], *ids, S["output_end"]]
            out += [(i, int(p["type"] != "python_output")) for i in ids]
        out.append((S["assistant_end"], 1))
    return [i for i, _ in out], [m for _, m in out]


@settings(max_examples=400, deadline=None)
@given(conversations())
def test_rendering_and_mask_follow_the_rules(conversation):
    assert render(conversation, TOKENIZER) == expected_rendering(conversation)


def test_masks_of_ten_thousand_random_conversations():
    rng = random.Random(1)
    words = ["a", "the cat", "12*3", "", "Ü", "<|user_start|>", "\n", "#### 7"]
    for _ in range(10_000):
        messages = [{"role": "system", "content": rng.choice(words)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": rng.choice(words)})
            kinds = rng.choices(["text", "python", "python_output"], k=rng.randint(0, 4))
            parts = [{"type": kind, "text": rng.choice(words)} for kind in kinds]
            messages.append({"role": "assistant", "content": parts})
        conversation = {"messages": messages}
        assert render(conversation, TOKENIZER) == expected_rendering(conversation)


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(0, 60))
def test_truncation_is_a_prefix(conversation, limit):
    ids, mask = render(conversation, TOKENIZER)
    assert render(conversation, TOKENIZER, max_tokens=limit) == (ids[:limit], mask[:limit])


@settings(max_examples=200, deadline=None)
@given(conversations())
def test_prompt_and_reply_make_up_the_rendering_and_the_reply_parses_back(conversation):
    ids, mask = render(conversation, TOKENIZER)
    prompt = render_prompt(conversation, TOKENIZER)
    assert ids[: len(prompt)] == prompt and prompt[-1] == S["assistant_start"]
    parsed = parse(ids[len(prompt) :], TOKENIZER)
    content = conversation["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    merged = []  # neighbouring texts are one text, and empty ones are nothing
    for p in parts:
        if p["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + p["text"]}
        elif p["type"] != "text" or p["text"]:
            merged.append(dict(p))
    assert parsed == [p for p in merged if p["type"] != "text" or p["text"]]


def test_prompt_without_assistant_turn_and_unfinished_call():
    question = {"messages": [{"role": "user", "content": "hi"}]}
    ids = TOKENIZER.encode("hi")
    expected = [S["bos"], S["user_start"], *ids, S["user_end"], S["assistant_start"]]
    assert render_prompt(question, TOKENIZER) == expected
    parts = parse([*ids, S["python_start"], *TOKENIZER.encode("1+1")], TOKENIZER)
    assert parts == [{"type": "text", "text": "hi"}, {"type": "python", "text": "1+1"}]
    assert reply_text(parts) == "hi" and reply_text("x") == "x"


def message(role, content="x"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        ([], "must be"),
        ({"messages": []}, "at least one"),
        ({"messages": [message("bot")]}, "'bot'"),
        ({"messages": [message("assistant")]}, "Message 0"),
        ({"messages": [message("user"), message("user")]}, "Message 1"),
        ({"messages": [message("system"), message("assistant")]}, "Message 1"),
        ({"messages": [message("user"), message("system")]}, "Message 1"),
        ({"messages": [message("system")]}, "needs a user message"),
        ({"messages": [message("user", 3)]}, "must be a string"),
        ({"messages": [message("user", [{"type": "text", "text": "x"}])]}, "must be a string"),
        ({"messages": [message("user"), message("assistant", [{"type": "code"}])]}, "A part of"),
        ({"messages": [message("user")]}, "must be the assistant's"),
    ],
)
def test_malformed_conversations_say_what_is_wrong(conversation, says):
    with pytest.raises(UserError, match=says):
        turns(conversation, training=True)


@settings(max_examples=100, deadline=None)
@given(conversations())
def test_jinja_template_gives_the_same_text(conversation):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(CHAT_TEMPLATE, {"bos_token": "<|bos|>"})
    text = template.render(messages=conversation["messages"], add_generation_prompt=False)
    assert text == TOKENIZER.decode(render(conversation, TOKENIZER)[0])
    question = {"messages": conversation["messages"][:-1]}
    text = template.render(**question, add_generation_prompt=True)
    assert text == TOKENIZER.decode(render_prompt(question, TOKENIZER))


def test_transformers_applies_the_template_with_the_same_text(tmp_path):
    """A Hugging Face tokenizer with our ids and our template: its ids are those of `render`."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    vocab = {token: i for i, token in enumerate([*"abcdefghijklmnopqrstuvwxyz0123456789+? ", "\n"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    theirs.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    theirs.chat_template = CHAT_TEMPLATE
    calls = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    conversation = {
        "messages": [
            message("system", "be brief"),
            message("user", "one and one?"),
            message("assistant", [*calls, {"type": "text", "text": "two"}]),
            message("user", "sure?"),
            message("assistant", "yes"),
        ]
    }
    text = theirs.apply_chat_template(conversation["messages"], tokenize=False)
    ids, _ = render(conversation, TOKENIZER)
    assert text == TOKENIZER.decode(ids)
    found = theirs(text)["input_ids"]
    assert theirs.convert_ids_to_tokens(found) == [
        piece for i in ids for piece in (
            [TOKENIZER.decode([i])] if i >= TOKENIZER.bos_id else TOKENIZER.decode([i]))
    ]  # fmt: skip
    asked = theirs.apply_chat_template(
        conversation["messages"][:-1], tokenize=False, add_generation_prompt=True
    )
    assert asked == TOKENIZER.decode(render_prompt(conversation, TOKENIZER))


def test_view_marks_exactly_the_trained_tokens():
    conversation = {"messages": [message("user", "<b> 1+1?"), message("assistant", "two")]}
    ids, mask = render(conversation, TOKENIZER)
    view = TokenView(ids, mask, TOKENIZER)
    assert "[<|assistant_end|>]" in str(view) and "[<|user_end|>]" not in str(view)
    page = view._repr_html_()
    assert "<b>" not in page and page.count("font-weight:600") == sum(mask)
