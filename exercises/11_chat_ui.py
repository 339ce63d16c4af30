# %% [markdown]
r"""
# Exercises for chapter 11: talk to it

Between a model and a reader stands a window. Here you write the parts that decide what it shows:
how tokens become parts of an answer, which turns of a long talk the model still sees, what may
become markup, and how often the window is drawn. No widget runs in this sheet. `check` says which
properties your answer has, `hint` helps three times, `progress()` shows your points.
"""

# %%
#| given
import html
import re

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. From tokens to parts

The engine yields tokens; a reader sees parts: text, a call of the calculator, its result. The
borders are special tokens. Here tokens are texts, and five of them are special:

```text
<|python_start|> <|python_end|> <|output_start|> <|output_end|> <|assistant_end|>
```

Return the parts as pairs (kind, text), with the kinds `"text"`, `"python"` and `"output"`. Each of
the first four tags ends the part before it and begins a new one: of kind `python` or `output` after
a start, of kind `text` after an end. Tags are in no part. `<|assistant_end|>` ends the answer. A
part without text is left out. A reply that was stopped may end inside a part; keep it.
"""


# %%
#| exercise id=11-parts points=2 minutes=15 level=2 answer=parts
def parts(tokens: list) -> list:
    """Return the (kind, text) pairs of an answer.

    Args:
        tokens: texts, of which five are special.
    """
    # BEGIN SOLUTION
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, kind, new = [], "text", True
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in kinds or token in ("<|python_end|>", "<|output_end|>"):
            kind, new = kinds.get(token, "text"), True
        elif new:
            out.append((kind, token))
            new = False
        else:
            out[-1] = (kind, out[-1][1] + token)
    return out
    # END SOLUTION


# %%
check("11-parts", parts)

# %%
#| checks 11-parts
CALL, CALLED = "<|python_start|>", "<|python_end|>"
RESULT, SHOWN, END = "<|output_start|>", "<|output_end|>", "<|assistant_end|>"


def pairs(found):
    return [tuple(pair) for pair in found]


@says("neighbouring tokens of a kind are one part", "Add a token to the part that is open.")
def _(parts):
    assert pairs(parts(["It ", "is ", "so"])) == [("text", "It is so")]


@says(
    "a call and its result are parts of their own",
    "Each start tag names the kind of what follows; each end tag leads back to text.",
)
def _(parts):
    tokens = ["I add ", CALL, "12*3", CALLED, RESULT, "36", SHOWN, " so"]
    expected = [("text", "I add "), ("python", "12*3"), ("output", "36"), ("text", " so")]
    assert pairs(parts(tokens)) == expected


@says("two calls in a row stay two", "A new part begins at the tag, also if the kind is the same.")
def _(parts):
    tokens = [CALL, "1", CALLED, CALL, "2", CALLED]
    assert pairs(parts(tokens)) == [("python", "1"), ("python", "2")]


@says("the answer ends at its last tag", "What follows <|assistant_end|> is not the answer.")
def _(parts):
    assert pairs(parts(["a", END, "b"])) == [("text", "a")]


@says("a part that was cut off is kept", "A stopped reply may end before the closing tag.")
def _(parts):
    assert pairs(parts(["a", CALL, "12"])) == [("text", "a"), ("python", "12")]


@says("a part without text is left out", "Make a part when its first token comes, not at the tag.")
def _(parts):
    assert pairs(parts([CALL, CALLED, "b"])) == [("text", "b")] and pairs(parts([])) == []


# %%
#| hints 11-parts
hints = [
    "Two things must be known at each token: the kind of the open part, and whether it has begun.",
    "A tag sets the kind and says 'the next token begins a part'; any other token is text of it.",
    "If a part is to begin: append (kind, token). If not: replace the last pair by a longer one.",
]


# %%
#| wrong 11-parts: neighbouring tokens of a kind are one part
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, kind = [], "text"
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in kinds or token in ("<|python_end|>", "<|output_end|>"):
            kind = kinds.get(token, "text")
        else:
            out.append((kind, token))
    return out


# %%
#| wrong 11-parts: a call and its result are parts of their own
def parts(tokens):
    out, kind, new = [], "text", True
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token.startswith("<|"):
            kind, new = "python" if token == "<|python_start|>" else "text", True
        elif new:
            out.append((kind, token))
            new = False
        else:
            out[-1] = (kind, out[-1][1] + token)
    return out


# %%
#| wrong 11-parts: two calls in a row stay two
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, kind = [], "text"
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in kinds or token in ("<|python_end|>", "<|output_end|>"):
            kind = kinds.get(token, "text")
        elif out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + token)
        else:
            out.append((kind, token))
    return out


# %%
#| wrong 11-parts: the answer ends at its last tag
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, kind, new = [], "text", True
    for token in tokens:
        if token == "<|assistant_end|>":
            continue
        if token in kinds or token in ("<|python_end|>", "<|output_end|>"):
            kind, new = kinds.get(token, "text"), True
        elif new:
            out.append((kind, token))
            new = False
        else:
            out[-1] = (kind, out[-1][1] + token)
    return out


# %%
#| wrong 11-parts: a part that was cut off is kept
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, kind, text = [], "text", ""
    for token in [*tokens, "<|assistant_end|>"]:
        if token in kinds or token in ("<|python_end|>", "<|output_end|>"):
            out += [(kind, text)] if text else []
            kind, text = kinds.get(token, "text"), ""
        elif token == "<|assistant_end|>":
            return out + ([(kind, text)] if text and kind == "text" else [])
        else:
            text += token


# %%
#| wrong 11-parts: a part without text is left out
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|output_start|>": "output"}
    out, new = [], True
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in kinds:
            out.append((kinds[token], ""))
            new = False
        elif token in ("<|python_end|>", "<|output_end|>"):
            new = True
        elif new:
            out.append(("text", token))
            new = False
        else:
            out[-1] = (out[-1][0], out[-1][1] + token)
    return out


# %%
#| right 11-parts
def parts(tokens):
    kinds = {"<|python_start|>": "python", "<|python_end|>": "text"}
    kinds.update({"<|output_start|>": "output", "<|output_end|>": "text"})
    found = [("text", [])]
    for token in tokens:
        if token == "<|assistant_end|>":
            break
        if token in kinds:
            found.append((kinds[token], []))
        else:
            found[-1][1].append(token)
    return [(kind, "".join(texts)) for kind, texts in found if texts]


# %% [markdown]
r"""
## 2. The oldest turn goes

A model with a window of 2,048 tokens cannot read a talk of 3,000. Cutting in the middle of a
message leaves half a sentence in front of the model; a talk that begins with an answer is a form
that it has never seen. So whole turns go, the oldest first and as few as possible, what is left
begins with a question, and the system message stays always: it says how to behave. And the answer
needs room, too: `reserve` tokens stay free.

`messages` are pairs (role, tokens), in order: perhaps one `"system"`, then `"user"` and
`"assistant"` in turn, the last one `"user"`. Return the positions of the messages that are kept, or
None if not even the last question fits. An error that says so is better than a silent cut.
"""


# %%
#| exercise id=11-window points=2 minutes=15 level=2 answer=kept
def kept(messages: list, window: int, reserve: int) -> list | None:
    """Return the positions of the messages that go into the prompt, rising.

    Args:
        messages: (role, number of tokens) pairs.
        window: tokens that prompt and answer may have together.
        reserve: tokens kept free for the answer.
    """
    # BEGIN SOLUTION
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return None
    # END SOLUTION


# %%
check("11-window", kept)


# %%
#| checks 11-window
def talk(*sizes, system=None):
    roles = ["user", "assistant"] * len(sizes)
    first = [("system", system)] if system else []
    return [*first, *zip(roles, sizes)]


@says("a talk that fits stays whole", "Up to and including the last token of the window.")
def _(kept):
    assert list(kept(talk(10, 10, 10), 30, 0)) == [0, 1, 2]
    assert list(kept(talk(10, 10, 10, system=5), 35, 0)) == [0, 1, 2, 3]


@says("as few old turns go as possible", "Drop from the front, and stop as soon as the rest fits.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10), 30, 0)) == [2, 3, 4]
    assert list(kept(talk(50, 10, 10, 10, 10), 35, 0)) == [2, 3, 4]


@says("what is left begins with a question", "A question goes together with its answer.")
def _(kept):
    assert list(kept(talk(10, 10, 10), 25, 0)) == [2]
    assert list(kept(talk(30, 5, 5, 5, 5), 24, 0)) == [2, 3, 4]


@says("the system message stays", "It is always kept, and its tokens count.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10, system=10), 40, 0)) == [0, 3, 4, 5]


@says("the answer has its room", "Prompt and reserve together must fit into the window.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10), 50, 20)) == [2, 3, 4]


@says("a question that cannot fit is None", "Say so with None; do not send an empty prompt.")
def _(kept):
    assert kept(talk(10, 10, 40), 30, 0) is None and kept(talk(10, system=25), 30, 0) is None


# %%
#| hints 11-window
hints = [
    "Where may the kept part begin? List the places, oldest first, and take the first that fits.",
    "The places are the positions of user messages; the system message is added to each.",
    "For each start with role user: system + range(start, n); sum of tokens + reserve <= window.",
]


# %%
#| wrong 11-window: what is left begins with a question
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start in range(len(system), len(messages)):
        chosen = system + [*range(start, len(messages))]
        if sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return None


# %%
#| wrong 11-window: the answer has its room
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) <= window:
            return chosen
    return None


# %%
#| wrong 11-window: a question that cannot fit is None
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return system


# %%
#| right 11-window
def kept(messages, window, reserve):
    room, best, system = window - reserve, None, []
    if messages[0][0] == "system":
        room, system = room - messages[0][1], [0]
    for start in range(len(messages) - 1, len(system) - 1, -1):
        room -= messages[start][1]
        if room < 0:
            break
        if messages[start][0] == "user":
            best = system + list(range(start, len(messages)))
    return best


# %% [markdown]
r"""
## 3. Links, and nothing but links

The chat window of the chapter shows no links. Suppose readers want them. Text comes from a model,
and a model writes what it has read: `<script>`, links that run code (`javascript:...`), images that
tell another machine that you are reading.

Write `link_html`. `[label](address)` becomes

```html
<a href="ADDRESS" rel="noreferrer">LABEL</a>
```

but only if the address begins with `http://` or `https://` and holds no space and no parenthesis.
Everything else stays text and is escaped, above all images, `![label](address)`: a picture from
another host is fetched just by being shown. As in the chapter: split the raw text, escape every
leaf, put tags of our own around.
"""


# %%
#| exercise id=11-links points=3 minutes=25 level=3 answer=link_html
def link_html(text: str) -> str:
    """Turn Markdown links to the web into anchors, and all other text into escaped text."""
    # BEGIN SOLUTION
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])
    # END SOLUTION


# %%
check("11-links", link_html)

# %%
#| checks 11-links
from html.parser import HTMLParser


def as_a_browser_sees(page):
    """(opening tags with their attributes, the text)"""
    tags, texts = [], []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.handle_data = texts.append
    reader.feed(page)
    reader.close()
    return tags, "".join(texts)


@says(
    "text without links is only escaped",
    "Also what stands before, between and after links must pass html.escape, once.",
)
def _(link_html):
    for text in ('<img src=x onerror="alert(1)">', "1 < 2 & 2 > 1", "a [list] (of) things", "&lt;"):
        assert as_a_browser_sees(link_html(text)) == ([], text)


@says(
    "a web link becomes an anchor",
    "The tag is a, with href and rel; the label is its text, and the text around it stays.",
)
def _(link_html):
    tags, text = as_a_browser_sees(link_html("See [the book](https://a.example/x?b=1&c=2) now."))
    assert tags == [("a", {"href": "https://a.example/x?b=1&c=2", "rel": "noreferrer"})]
    assert text == "See the book now."


@says("a label is text", "What stands in the brackets came from the model, too: escape it.")
def _(link_html):
    tags, text = as_a_browser_sees(link_html("[<b>x</b>](https://a.example)"))
    assert [tag for tag, _ in tags] == ["a"] and text == "<b>x</b>"


@says(
    "an address cannot leave its attribute",
    "A quote in the address ends href and begins an attribute of the model's own: escape it.",
)
def _(link_html):
    tags, _ = as_a_browser_sees(link_html('[x](https://a.example/"onmouseover="steal)'))
    assert all(set(attributes) <= {"href", "rel"} for _, attributes in tags), tags


@says(
    "only http and https are links",
    "List what is allowed. A list of what is forbidden forgets data:, or JavaScript: in capitals.",
)
def _(link_html):
    for address in ("javascript:steal", "JavaScript:steal", "data:text/html,x", "//b.example", "x"):
        text = f"[x]({address})"
        assert as_a_browser_sees(link_html(text)) == ([], text), text


@says(
    "an image stays text",
    "With ! before it the bracket is an image: neither show it nor make a link of it.",
)
def _(link_html):
    text = "![a dot](https://b.example/seen.png)"
    assert as_a_browser_sees(link_html(text)) == ([], text)


# %%
#| hints 11-links
hints = [
    "Find the links with one regular expression; what lies between two matches is a leaf.",
    "`(?<!!)` before the bracket says: no exclamation mark here. `https?://` says which addresses.",
    "Loop over `re.finditer`; append html.escape(text[at:start]), then an anchor of escaped parts.",
]


# %%
#| wrong 11-links: text without links is only escaped
def link_html(text):
    def anchor(match):
        label, address = html.escape(match[1]), html.escape(match[2])
        return f'<a href="{address}" rel="noreferrer">{label}</a>'

    return re.sub(r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", anchor, text)


# %%
#| wrong 11-links: an address cannot leave its attribute
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        out.append(f'<a href="{match[2]}" rel="noreferrer">{html.escape(match[1])}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: only http and https are links
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"(?<!!)\[([^\[\]\n]+)\]\(((?!javascript:)[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: an image stays text
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: a web link becomes an anchor
def link_html(text: str) -> str:
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: a label is text
def link_html(text: str) -> str:
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = match[1], html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| right 11-links
def link_html(text):
    safe = html.escape(text)
    link = r"(!?)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    anchor = r'<a href="\3" rel="noreferrer">\2</a>'
    return re.sub(link, lambda m: m[0] if m[1] else m.expand(anchor), safe)


# %% [markdown]
r"""
## 4. Not at every token

Each drawing sends the whole answer to the browser. Drawn at every token, an answer of n tokens
sends about n²/2. So the window is drawn at the first piece, then again only when at least `gap`
seconds have passed since the **last drawing**, and in any case at the last piece: otherwise the end
of the answer is missing until the reader asks again.

`times` are the moments, in seconds, at which the pieces of one answer came, rising. Return the
positions of the pieces at which the window is drawn.
"""


# %%
#| exercise id=11-draws points=1 minutes=10 level=1 answer=drawn
def drawn(times: list, gap: float) -> list:
    """Return the positions in `times` at which the window is drawn, rising.

    Args:
        times: when each piece came, in seconds.
        gap: seconds between two drawings, at least; the last drawing may come sooner.
    """
    # BEGIN SOLUTION
    out = []
    for i, now in enumerate(times):
        if not out or now - times[out[-1]] >= gap or i == len(times) - 1:
            out.append(i)
    return out
    # END SOLUTION


# %%
check("11-draws", drawn)


# %%
#| checks 11-draws
@says("the first piece shows at once", "Nothing has been drawn before it, however early it comes.")
def _(drawn):
    assert list(drawn([0.01, 0.02, 1.0], 0.05)) == [0, 2]


@says(
    "time counts from the last drawing",
    "A fast stream never pauses; measured from the last piece it would wait for its end.",
)
def _(drawn):
    assert list(drawn([1.0, 1.02, 1.04, 1.06, 1.08, 2.0], 0.05)) == [0, 3, 5]


@says("the last piece is drawn", "It is the whole answer; it may not wait for a piece after it.")
def _(drawn):
    assert list(drawn([1.0, 1.02, 1.04], 0.05)) == [0, 2]


@says("an answer of one piece is drawn once", "Its first piece is also its last.")
def _(drawn):
    assert list(drawn([1.0], 0.05)) == [0]


@says("no piece, no drawing", "An answer may be stopped before its first piece.")
def _(drawn):
    assert list(drawn([], 0.05)) == []


# %%
#| hints 11-draws
hints = [
    "Three reasons for a drawing: it is the first, enough time has passed, it is the last.",
    "The time of the last drawing is `times[out[-1]]` if `out` holds the positions so far.",
    "`if not out or now - times[out[-1]] >= gap or i == len(times) - 1: out.append(i)`",
]


# %%
#| wrong 11-draws: the first piece shows at once
def drawn(times, gap):
    out, last = [], 0.0
    for i, now in enumerate(times):
        if now - last >= gap or i == len(times) - 1:
            out.append(i)
            last = now
    return out


# %%
#| wrong 11-draws: time counts from the last drawing
def drawn(times, gap):
    end = len(times) - 1
    return [i for i, t in enumerate(times) if i in (0, end) or t - times[i - 1] >= gap]


# %%
#| wrong 11-draws: the last piece is drawn
def drawn(times, gap):
    out = []
    for i, now in enumerate(times):
        if not out or now - times[out[-1]] >= gap:
            out.append(i)
    return out


# %%
#| wrong 11-draws: an answer of one piece is drawn once
def drawn(times, gap):
    out = [0] if times else []
    for i in range(1, len(times) - 1):
        if times[i] - times[out[-1]] >= gap:
            out.append(i)
    return [*out, len(times) - 1] if times else out


# %%
#| wrong 11-draws: no piece, no drawing
def drawn(times, gap):
    out = [0]
    for i in range(1, len(times)):
        if times[i] - times[out[-1]] >= gap or i == len(times) - 1:
            out.append(i)
    return out


# %%
#| right 11-draws
def drawn(times, gap):
    out, i = [], 0
    while i < len(times):
        out.append(i)
        later = [j for j in range(i + 1, len(times)) if times[j] - times[i] >= gap]
        i = min([*later, len(times) - 1 if i < len(times) - 1 else len(times)])
    return out


# %% [markdown]
r"""
## Open question

Your widget has a Stop button, and the engine yields a token every two seconds, because the model is
large. Stop now takes up to two seconds. Where else could the event be looked at? What would it cost
to kill the thread instead, and what could be left behind half done? (No marks.)
"""

# %%
progress()
