"""The masters' checks, held against the masters' own solutions, other right answers, blanks, and typical wrong answers."""

import re
from collections import Counter
from pathlib import Path

import masters
import pytest

HERE = Path(__file__).resolve().parent
IN_PART = {"each image's own gradient",  # is unbiased, though not from one gradient
           "the search stopped too early"}  # only where the errors do not fall with k
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:Mean of empty slice")


def answers(kind, name):
    """(question, words above it, code) for each answer in `kind/name.py`; of a wrong one the check has to say these words."""
    imports, *parts = re.split(r"^# (q\d+): (.*)\n", (HERE / kind / f"{name}.py").read_text(), flags=re.MULTILINE)
    return [(question, words, imports + code) for question, words, code in zip(*[iter(parts)] * 3, strict=True)]


def cases(kind):
    return [pytest.param(name, *case, id=f"{name}-{number}-{case[0]}")
            for name in masters.NAMES for number, case in enumerate(answers(kind, name))]


@pytest.mark.parametrize("seed", [0, 1, 124, 277, 20261])
@pytest.mark.parametrize("name", masters.NAMES)
def test_solutions_pass_every_check_for_every_students_sample(name, seed):
    master = masters.read(name)
    env = master.environment(seed)
    assert {question: master.complaints(question, env) for question in master.questions} == {
        question: [None] * len(one.checks) for question, one in master.questions.items()}


@pytest.mark.parametrize("name", masters.NAMES)
def test_blank_answers_fail_every_check_and_are_told_so(name):
    master = masters.read(name)
    env = master.environment(**{question: "\n".join(map(masters.blank, one.solution))
                                for question, one in master.questions.items()})
    for question in master.questions:
        assert all(words and "put your solution in" in words for words in master.complaints(question, env)), question


@pytest.mark.parametrize("name", masters.NAMES)
def test_renamed_answers_fail_and_the_name_is_told(name):
    master = masters.read(name)
    env = master.environment(**dict.fromkeys(master.questions, ""))
    for question in master.questions:
        assert all(words and "keep the name" in words for words in master.complaints(question, env)), question


@pytest.mark.parametrize(("name", "question", "words", "code"), cases("right_answers"))
def test_other_right_answer_passes_every_check(name, question, words, code):
    master = masters.read(name)
    said = master.complaints(question, master.environment(3, **{question: code}))
    assert not any(said), (words, said)


@pytest.mark.parametrize(("name", "question", "words", "code"), cases("wrong_answers"))
def test_wrong_answer_fails_with_the_words_that_explain_it_and_gets_no_points(name, question, words, code):
    master = masters.read(name)
    said = master.complaints(question, master.environment(3, **{question: code}))
    assert any(one and re.search(words, one) for one in said), said
    in_part = question == list(master.questions)[-1] or words in IN_PART
    assert in_part or all(said), said


@pytest.mark.parametrize("name", masters.NAMES)
def test_tasks_have_points_hints_and_two_wrong_answers_each_and_go_from_easy_to_research(name):
    master = masters.read(name)
    assert 6 <= len(master.questions) <= 10
    levels, wrong = [], Counter(question for question, *_ in answers("wrong_answers", name))
    assert set(wrong) == set(master.questions) == {question for question, *_ in answers("right_answers", name)}
    for question, one in master.questions.items():
        assert wrong[question] >= 2
        assert "<summary>Hint</summary>" in one.text
        assert all(config["points"] > 0 for config, _ in one.checks)
        assert any(not config.get("hidden") for config, _ in one.checks)
        levels.append(re.search(r"^## \d+\. .*\((easy|medium|research)\)$", one.text, re.MULTILINE).group(1))
    assert levels[0] == "easy"
    assert levels[-1] == "research"
