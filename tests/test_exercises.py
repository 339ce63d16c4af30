"""Every exercise: its solution, its stub, its wrong answers and its other right ones."""

import pytest
from conftest import ROOT

from book.graded import define, examine, namespace_of
from book.grading import Grader
from book.manuscript import load_book
from book.sheets import read_sheet

SHEETS = {p.stem: read_sheet(p) for p in sorted((ROOT / "exercises").glob("*.py"))}
EVERY = [(name, id) for name, sheet in SHEETS.items() for id in sheet.exercises]
GIVEN: dict[str, dict] = {}


def exercise_of(name, id):
    if name not in GIVEN:
        GIVEN[name] = namespace_of(SHEETS[name])
    return SHEETS[name].exercises[id], GIVEN[name]


def failed(exercise, given, source):
    """Names of the properties that the answer in `source` does not have."""
    try:
        answer = define(source, given, exercise.answer)
    except NotImplementedError:  # a stub outside of any function
        answer = None
    return [o.name for o in examine(exercise, given, answer).outcomes if not o.passed]


@pytest.mark.parametrize("name, id", EVERY)
def test_the_solution_has_every_property(name, id):
    exercise, given = exercise_of(name, id)
    result = examine(exercise, given, define(exercise.solution, given, exercise.answer))
    assert result.score == exercise.points, str(result)


@pytest.mark.parametrize("name, id", EVERY)
def test_the_stub_has_none(name, id):
    exercise, given = exercise_of(name, id)
    assert failed(exercise, given, exercise.stub) == [
        o.name for o in examine(exercise, given, None).outcomes
    ]


@pytest.mark.parametrize("name, id", EVERY)
def test_a_wrong_answer_fails_the_property_meant_to_catch_it(name, id):
    exercise, given = exercise_of(name, id)
    assert len(exercise.wrong) >= 2
    for property, source in exercise.wrong:
        assert failed(exercise, given, source) == [property]


@pytest.mark.parametrize("name, id", EVERY)
def test_another_right_answer_has_every_property(name, id):
    exercise, given = exercise_of(name, id)
    assert exercise.right
    for source in exercise.right:
        assert failed(exercise, given, source) == []


@pytest.fixture(scope="module")
def grader():
    grader = Grader(list(SHEETS.values()))
    with grader.nursery:
        yield grader


@pytest.mark.parametrize("name, id", EVERY)
def test_the_grader_asks_answers_in_their_own_process_and_finds_the_same(name, id, grader):
    exercise, _ = exercise_of(name, id)
    result = grader.grade(SHEETS[name], exercise, exercise.solution)
    assert result.score == exercise.points, str(result)
    property, source = exercise.wrong[0]
    result = grader.grade(SHEETS[name], exercise, source)
    assert [o.name for o in result.outcomes if not o.passed] == [property], str(result)


def test_a_split_by_the_hash_of_python_is_noticed_here_and_in_the_graders_processes(grader):
    sheet, property = SHEETS["A1_tiny_world"], "the same index gives the same word, in another"
    exercise, given = exercise_of("A1_tiny_world", "A1-seeds")
    source = """
def quiz_word(words, split, index):
    mine = [w for w in words if (hash(w) % 5 == 0) == (split == "test")]
    return random.Random(index).choice(mine)
"""
    here = failed(exercise, given, source)
    there = [o.name for o in grader.grade(sheet, exercise, source).outcomes if not o.passed]
    assert [len([n for n in names if n.startswith(property)]) for names in (here, there)] == [1, 1]


def test_every_chapter_has_four_exercises_and_there_are_sixty():
    for chapter in load_book(ROOT).chapters:
        assert len(SHEETS[chapter.name].exercises) >= 4, chapter.name
    assert len(EVERY) >= 60
