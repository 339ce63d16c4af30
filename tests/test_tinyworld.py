"""The tiny world: deterministic, consistent, varied, and no exam question in training text."""

import re
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from nanochat import tinyworld as tw
from nanochat.tinyworld import World

WORLD = World(0)
N_DOCUMENTS = 20_000


@pytest.fixture(scope="module")
def documents():  # 20,000 are 6 MB
    return [tw.document(WORLD, i) for i in range(N_DOCUMENTS)]


@pytest.fixture(scope="module")
def conversations():
    return [tw.conversation(WORLD, i) for i in range(6_000)]


def spoken(conversation):
    """All texts of a conversation."""
    for message in conversation["messages"]:
        content = message["content"]
        yield from [content] if isinstance(content, str) else [part["text"] for part in content]


# ---------------------------------------------------------------------------- the world


def test_seeds_give_the_same_world_twice_and_different_worlds():
    again, other = World(0), World(1)
    assert again.facts == WORLD.facts
    assert again.map == WORLD.map
    assert other.facts != WORLD.facts
    assert {f.relation for f in other.facts} == {f.relation for f in WORLD.facts}


@pytest.mark.parametrize("seed", [-1, 1.5, "a", None])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        World(seed)


@pytest.mark.parametrize("seed", range(5))
def test_facts_are_functions_and_sets_are_closed(seed):
    world = World(seed)
    assert 500 <= len(world.facts) <= 600
    keys = [(fact.subject, fact.relation) for fact in world.facts]
    assert len(keys) == len(set(keys))
    for relation, objects in world.objects.items():
        assert 4 <= len(objects) <= 41, relation
        assert objects == sorted({f.object for f in world.facts if f.relation == relation})
    for fact in world.facts:
        assert world.fact(fact.subject, fact.relation) is fact


@pytest.mark.parametrize("seed", range(20))
def test_the_geography_is_consistent(seed):
    world = World(seed)
    places, roads = world.map["places"], world.map["roads"]
    assert len(set(places.values())) == len(places) == 13
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    for fact in world.facts:
        if fact.relation in back:
            assert world.fact(fact.object, back[fact.relation]).object == fact.subject
            (x, y), (u, v) = places[fact.subject], places[fact.object]
            assert (u - x, v - y) == tw.COMPASS[fact.relation]
            assert ((fact.subject, fact.object) in roads) != ((fact.object, fact.subject) in roads)
    river = world.map["river"]
    assert (river[0], river[-1]) == ("Ravenhill", "Shellbay")
    for a, b in zip(river, river[1:]):
        (x, y), (u, v) = places[a], places[b]
        assert abs(x - u) + abs(y - v) == 1
    assert all(2 <= miles <= 9 for miles in roads.values())


@pytest.mark.parametrize("seed", range(20))
def test_people_fit_together(seed):
    people = World(seed).people
    assert len(people) == 40
    for person in people.values():
        assert people[person.friend].friend == person.name != person.friend
        assert person.woman == (person.name in tw.WOMEN.split())
    for job in tw.JOBS:
        homes = [person.home for person in people.values() if person.job == job]
        assert len(homes) == len(set(homes)) == 2
    assert len({person.pet_name for person in people.values()}) == 40
    for key, most in {"home": 5, "pet": 4, "food": 3, "colour": 4, "month": 4}.items():
        counts = Counter(getattr(person, key) for person in people.values())
        assert max(counts.values()) <= most


def test_names_are_one_word_and_mean_one_thing():
    tables = [tw.WOMEN, tw.MEN, tw.PET_NAMES, tw.VILLAGES, " ".join(tw.WILDS), tw.MONTHS, tw.DAYS]
    words = [word for table in tables for word in table.split()]
    assert len(words) == len(set(words))


# ---------------------------------------------------------------------------- documents


@given(st.integers(0, 10**9), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_random_access(index, seed):
    """A document depends on the seed and its number, not on what was asked before."""
    fresh = World(seed)
    text = tw.document(fresh, index)
    tw.document(fresh, index + 1)
    assert tw.document(fresh, index) == text == text.strip()
    assert tw.validation_document(fresh, index) != text
    assert tw.document_kind(fresh, index) in {make.__name__ for make, _ in tw.DOCUMENT_KINDS}


def test_negative_numbers_are_refused():
    with pytest.raises(IndexError, match="-1"):
        tw.document(WORLD, -1)


def test_no_document_repeats(documents):
    """20,000 in a row, 1.5 million tokens, without one repetition, nor with other cases."""
    assert len({text.lower() for text in documents}) == N_DOCUMENTS


def test_enough_different_documents_for_twenty_million_tokens():
    """Per kind: no repetition among 8,000 bounds the repetitions expected in 85 MB.

    If two documents of a kind are equal with probability p, n documents hold n * n * p / 2 equal
    pairs on average; none seen among 8,000 puts p under 1e-7 with 95 % certainty.
    """
    n_large, share_of = 270_000, {make: share for make, share in tw.DOCUMENT_KINDS}
    assert sum(share_of.values()) == pytest.approx(100)
    expected = 0.0
    for make, share in share_of.items():
        rng = tw.draw(0, 999, 1)
        seen = Counter(make(WORLD, rng) for _ in range(8_000))
        pairs = sum(count * (count - 1) / 2 for count in seen.values())
        p = (pairs + 3) / (8_000**2 / 2)  # upper bound with 95 % certainty
        expected += (n_large * share / 100) ** 2 / 2 * p
        assert pairs <= 1, make.__name__
    assert expected < 0.005 * n_large  # even by this bound 99.5 % of 20 M tokens are new


def test_validation_documents_are_disjoint_by_hash(documents):
    validation = [tw.validation_document(WORLD, i) for i in range(400)]
    for text in validation:
        assert zlib.crc32(text.encode()) % tw.VALIDATION_SHARE == 0
    for text in documents:
        assert zlib.crc32(text.encode()) % tw.VALIDATION_SHARE != 0
    assert not set(validation) & set(documents)
    assert len(set(validation)) == len(validation)


def test_vocabulary_is_small_and_closed(documents):
    words = Counter(re.findall(r"[A-Za-z]+", " ".join(documents).lower()))
    assert 900 <= len(words) <= 1_500
    assert sum(count < 5 for count in words.values()) < 30  # hardly any rare word


def test_size_of_documents(documents):
    sizes = [len(text.encode()) for text in documents]
    assert max(sizes) < 2_000 and min(sizes) > 60
    stories = [text for i, text in enumerate(documents[:2_000])
               if tw.document_kind(WORLD, i) == "story"]  # fmt: skip
    lengths = [len(text.split()) for text in stories]
    assert min(lengths) >= 50 and max(lengths) <= 250


# ---------------------------------------------------------------------------- English


def test_articles_agree(documents, conversations):
    text = "\n".join(documents) + "\n".join(t for c in conversations for t in spoken(c))
    text = re.sub(r"(?m)^[A-D]$", "", text)  # answers to multiple choice
    assert re.findall(r"\b[Aa] [aeiouAEIOU]\w*", text) == []
    assert re.findall(r"\b[Aa]n [^aeiouAEIOU\W]\w*", text) == []
    assert len(re.findall(r"\b[Aa]n [aeiou]", text)) > 500


def test_plurals_and_capitals(documents):
    text = "\n".join(documents[:6_000])
    assert not re.findall(r"\b1 (?:times|miles|coins|\w+s are)\b|\bone (?:coins|miles)\b", text)
    assert not re.findall(
        r"\w+ss\b(?<!grass)(?<!less)(?<!miss)(?<!guess)(?<!mess)(?<!across)", text
    )
    assert not re.findall(r"[.?!] [a-z]", re.sub(r'[?!,]" \w+', "", text))
    assert "  " not in text and "{" not in text and "|" not in text
    assert not re.findall(r"\.\.|,,| \.| ,|,\.|\?\.|\.\?", text)
    assert not re.findall(r"\b(\w+) \1\b", text)  # no doubled word
    for name in [*WORLD.people, *WORLD.map["places"], *tw.DAYS.split(), *tw.MONTHS.split()]:
        assert not re.search(rf"\b{name.lower()}\b", text) or name == "May", name


@pytest.mark.parametrize(
    "word, many",
    [("fox", "foxes"), ("loaf", "loaves"), ("cherry", "cherries"), ("otter", "otters"),
     ("toy", "toys"), ("bus", "buses"), ("bench", "benches")],
)  # fmt: skip
def test_plural(word, many):
    assert tw.plural(word) == many


def test_articles_and_lists():
    assert (tw.article("otter"), tw.article("fox")) == ("an otter", "a fox")
    assert tw.listing("a") == "a" and tw.listing("ab") == "a and b"
    assert tw.listing("abc") == "a, b and c"


# ---------------------------------------------------------------------------- consistency


def statements_in(text):
    """Facts that plain regular expressions can read back: (subject, relation, object)."""
    name = r"([A-Z][a-z]+)"
    rules = [
        (rf"\b{name} lives in ([A-Z]\w+)\.", "home"),
        (rf"\b{name}'s birthday is in (\w+)\.", "month"),
        (rf"\b{name}'s favourite colour is (\w+)\.", "colour"),
        (rf"\b{name}'s favourite food is (\w+)\.", "food"),
        (rf"\b{name}'s best friend is ([A-Z]\w+)\.", "friend"),
        (rf"\b{name} works as a (\w+)\.", "job"),
        (rf"\b{name} keeps a (\w+)\.", "pet"),
        (rf"\b{name}'s pet is called (\w+)\.", "pet_name"),
        (r"\b[Aa]n? (\w+) costs (\w+ coins)\b", "price"),
        (rf"The market in {name} is on (\w+)\.", "market"),
        (r"\b([A-Z]\w+) is known for its (\w+)\.", "landmark"),
    ]
    for pattern, relation in rules:
        for subject, answer in re.findall(pattern, text):
            yield subject, relation, answer


def test_documents_never_contradict_the_facts(documents):
    checked = Counter()
    for text in documents:
        for subject, relation, answer in statements_in(text):
            if (subject, relation) in WORLD._index:
                assert WORLD.fact(subject, relation).object == answer, text
                checked[relation] += 1
    assert len(checked) >= 9 and min(checked.values()) > 30


def test_people_in_stories_keep_their_job_home_and_pet(documents):
    text = " ".join(documents)
    jobs, checked = "|".join(tw.JOBS), 0
    for name, job in re.findall(rf"\b([A-Z][a-z]+) the ({jobs})\b", text):
        assert WORLD.people[name].job == job
        checked += 1
    for name, home in re.findall(r"\b([A-Z][a-z]+) of ([A-Z][a-z]+)\b", text):
        if name in WORLD.people and home in WORLD.villages:
            assert WORLD.people[name].home == home
            checked += 1
    owners = {person.pet_name: person for person in WORLD.people.values()}
    for pet, kind in re.findall(r"\b([A-Z][a-z]+) the (\w+)\b", text):
        if pet in owners and kind in tw.PETS.split():
            assert owners[pet].pet == kind
            checked += 1
    assert checked > 3_000


def test_every_statement_of_every_fact_holds_its_object():
    for world in (WORLD, World(7)):
        for fact, words in world.wordings.items():
            assert len(words.named) >= 6 and len(words.questions) >= 5
            for text in words.named + words.pronoun + words.clause:
                assert re.search(rf"(?<!\w){re.escape(fact.object)}(?!\w)", text), (fact, text)
            for text in words.questions + words.asked + words.exam_questions:
                assert text.endswith("?") and text[0].isupper()
                if fact.relation not in ("coat", "duty"):
                    assert not re.search(rf"(?<!\w){re.escape(fact.object)}(?!\w)", text)


def test_facts_are_stated_often(documents):
    """In these 20,000 documents (1.5 M tokens): every fact at least 15 times, 30 on average."""
    text = "\n".join(documents)
    counts = Counter()
    for subject in ("Mira", "Tom", "Victor"):
        for relation in tw.PERSON_RELATIONS:
            counts[subject, relation] += sum(
                text.count(s) for s in WORLD.words(subject, relation).named
            )
    assert min(counts.values()) >= 10
    assert sum(counts.values()) / len(counts) >= 30


# ---------------------------------------------------------------------------- no leak


@pytest.mark.parametrize("seed", [0, 1])
def test_no_exam_query_can_be_built_from_training_wordings(seed):
    """By construction: no wording of any fact that training uses contains an exam query."""
    world = World(seed)
    training = "\n".join(
        text
        for words in world.wordings.values()
        for text in words.named + words.pronoun + words.clause + words.questions + words.asked
    )
    queries = {item["query"] for kind in tw.EXAM_KINDS for item in tw.exam(world, kind)}
    assert len(queries) > 2_000
    assert [query for query in queries if query in training] == []


def test_no_exam_query_occurs_in_training_text(documents, conversations):
    text = "\n".join(documents[:8_000])
    text += "\n".join(t for c in conversations for t in spoken(c))
    leaked = [
        item["query"]
        for kind in ("cloze", "generative")
        for item in tw.exam(WORLD, kind)
        if item["query"] in text
    ]
    assert leaked == []


def test_sums_and_words_of_the_splits_are_disjoint():
    found = {}
    for split in ("train", "test"):
        problems = [tw.arithmetic_problem(WORLD, i, split) for i in range(4_000)]
        found[split] = {problem["parts"][0]["text"] for problem in problems}
        spelled = [tw.spelling_problem(WORLD, i, split) for i in range(2_000)]
        found[split, "words"] = {p["parts"][0]["text"].split(".")[0] for p in spelled}
    assert not found["train"] & found["test"]
    assert not found["train", "words"] & found["test", "words"]
    prefixes = {re.match(r"\d+.\d+", expression)[0] for expression in found["train"]}
    assert not prefixes & found["test"]  # a test sum is no first step of a training sum either
    assert len(found["test"]) > 500


def test_documents_hold_no_test_sum_and_spell_no_test_word(documents):
    text = "\n".join(documents)
    first_steps = set(re.findall(r"(?<![-+x] )\b(\d+) ([-+x]) (\d+)\b", text))
    assert len(first_steps) > 1_000
    for a, sign, b in first_steps:
        assert tw.in_split("train", {"+": "add", "-": "sub", "x": "mul"}[sign], int(a), int(b))
    for word in set(re.findall(r'"(\w+)" (?:is spelled|are)', text)):
        assert tw.in_split("train", "spell", word)


@given(st.text(max_size=8), st.integers(0, 100))
def test_split_is_a_partition(word, number):
    assert tw.in_split("train", word, number) != tw.in_split("test", word, number)


def test_a_misspelt_split_is_refused():
    for make in (tw.arithmetic_problem, tw.spelling_problem):
        with pytest.raises(ValueError, match="split"):
            make(WORLD, 0, "validation")


# ---------------------------------------------------------------------------- conversations


def check_schema(conversation):
    messages = conversation["messages"]
    assert len(messages) % 2 == 0 and 2 <= len(messages) <= 10
    for i, message in enumerate(messages):
        assert set(message) == {"role", "content"}
        assert message["role"] == ("assistant" if i % 2 else "user")
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        else:
            assert message["role"] == "assistant"
        for part in parts:
            assert set(part) == {"type", "text"} and part["text"].strip() == part["text"] != ""
            assert part["type"] in ("text", "python", "python_output")


@given(st.integers(0, 10**9), st.sampled_from((None, *tw.CONVERSATION_KINDS)))
@settings(max_examples=150, deadline=None)
def test_conversation_schema_for_any_number(index, kind):
    conversation = tw.conversation(WORLD, index, kind)
    check_schema(conversation)
    assert conversation == tw.conversation(WORLD, index, kind)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="poem"):
        tw.conversation(WORLD, 0, "poem")
    with pytest.raises(ValueError, match="oral"):
        tw.exam(WORLD, "oral")


def test_dialogues_have_two_to_four_turns():
    for i in range(500):
        assert 4 <= len(tw.conversation(WORLD, i, "dialogue")["messages"]) <= 10


def test_identity_says_its_name():
    texts = [t for i in range(200) for t in spoken(tw.conversation(WORLD, i, "identity"))]
    assert sum(tw.IDENTITY["name"] in text for text in texts) > 50
    assert any(text == "Who are you?" for text in texts)


def test_facts_in_conversations_are_true():
    stated = {}
    for fact, words in WORLD.wordings.items():
        for question in words.questions:
            stated.setdefault(question, set()).add(fact.object)
    for i in range(2_000):
        messages = tw.conversation(WORLD, i, "fact")["messages"]
        question, answer = messages[0]["content"], messages[1]["content"]
        found = [q for q in stated if question.lower().endswith(q.lower())]
        assert found, question
        assert any(o in answer for q in found for o in stated[q]), (question, answer)


def test_letters_name_the_true_choice():
    for i in range(500):
        question, answer = (
            m["content"] for m in tw.conversation(WORLD, i, "multiple_choice")["messages"]
        )
        choices = re.findall(r"^- (.+)=([A-D])$", question, re.M)
        assert [letter for _, letter in choices] == list("ABCD")
        chosen = {letter: choice for choice, letter in choices}[answer]
        asked = question.split("\n")[0]
        assert (
            any(
                fact.object == chosen and asked in words.questions
                for fact, words in WORLD.wordings.items()
            )
            or chosen in asked
        )


# ---------------------------------------------------------------------------- sums and letters


def evaluate(expression):
    """Independent evaluation: multiply, then add from left to right."""
    tokens = re.findall(r"\d+|[-+*]", expression)
    assert "".join(tokens) == expression
    while "*" in tokens:
        i = tokens.index("*")
        tokens[i - 1 : i + 2] = [str(int(tokens[i - 1]) * int(tokens[i + 1]))]
    total = int(tokens[0])
    for sign, number in zip(tokens[1::2], tokens[2::2]):
        total += int(number) if sign == "+" else -int(number)
    return total


@given(st.integers(0, 10**9), st.sampled_from(("train", "test")))
@settings(max_examples=200, deadline=None)
def test_arithmetic_is_right(index, split):
    problem = tw.arithmetic_problem(WORLD, index, split)
    call, output, text = problem["parts"]
    assert (call["type"], output["type"], text["type"]) == ("python", "python_output", "text")
    result = evaluate(call["text"])
    assert problem["answer"] == output["text"] == str(result)
    assert 2 <= result <= 160
    assert text["text"].endswith(f"\n#### {result}")
    asked = sorted(map(int, re.findall(r"\d+", problem["question"])))
    assert asked == sorted(map(int, re.findall(r"\d+", call["text"])))
    assert problem == tw.arithmetic_problem(WORLD, index, split)


def test_sums_in_documents_are_right(documents):
    count = 0
    for text in documents:
        for left, right in re.findall(r"((?:\d+ [-+x] )+\d+) = (\d+)\.", text):
            assert evaluate(left.replace("x", "*").replace(" ", "")) == int(right)
            count += 1
    assert count > 1_000


@given(st.integers(0, 10**9), st.sampled_from(("train", "test")))
@settings(max_examples=200, deadline=None)
def test_letter_counting_is_right(index, split):
    problem = tw.spelling_problem(WORLD, index, split)
    call, output, text = problem["parts"]
    word, letter = re.fullmatch(r'"([a-z]+)"\.count\("([a-z])"\)', call["text"]).groups()
    count = sum(character == letter for character in word)
    assert problem["answer"] == output["text"] == str(count)
    assert text["text"].endswith(f"\n#### {count}")
    assert f'"{word}"' in problem["question"] and f'"{letter}"' in problem["question"]
    assert tw.in_split(split, "spell", word)


def test_spelling_lines_are_right(documents):
    lines = re.findall(r'"(\w+)" (?:is spelled|are) ([a-z, ]+)\.', "\n".join(documents))
    assert len(lines) > 500
    for word, letters in lines:
        assert letters.split(", ") == list(word)


# ---------------------------------------------------------------------------- exams


@pytest.mark.parametrize("kind", tw.EXAM_KINDS)
@pytest.mark.parametrize("seed", [0, 3])
def test_exam_items(kind, seed):
    world = World(seed)
    items = tw.exam(world, kind)
    assert len(items) == 2 * len(world.facts)
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        _, relation, subject, _ = item["id"].split("/")
        truth = world.fact(subject, relation).object
        assert set(item) == {"id", "kind", "query", "choices", "gold", "answer", "chance"}
        assert item["answer"] == truth and item["kind"] == kind
        if kind == "generative":
            assert item["choices"] is None and item["gold"] is None
            assert item["chance"] == 1 / len(world.objects[relation]) < 0.25
        else:
            assert len(set(item["choices"])) == 4 and item["choices"][item["gold"]] == truth
            assert set(item["choices"]) <= set(world.objects[relation])
            assert item["chance"] == 0.25
        assert item["query"].endswith("?") == (kind != "cloze")
        assert (
            not re.search(rf"(?<!\w){re.escape(truth)}(?!\w)", item["query"]) or relation == "coat"
        )


@pytest.mark.parametrize("kind", tw.EXAM_KINDS)
def test_an_exam_is_stable_under_n_and_seed(kind):
    full = tw.exam(WORLD, kind)
    assert tw.exam(WORLD, kind, 50) == full[:50]
    other = tw.exam(World(0), kind, seed=5)
    assert other != full
    by_id = {item["id"]: item for item in full}
    assert all(by_id[item["id"]] == item for item in other)


def test_guessing_gets_what_chance_says():
    """Always the first choice, or always the most common object: about chance."""
    items = tw.exam(WORLD, "multiple_choice")
    for letter in range(4):
        assert abs(sum(item["gold"] == letter for item in items) / len(items) - 0.25) < 0.05
    for relation in WORLD.objects:
        asked = [f.object for f in WORLD.facts if f.relation == relation]
        most = Counter(asked).most_common(1)[0][1] / len(asked)
        assert most <= 3.2 / len(WORLD.objects[relation]) + 0.05, relation
