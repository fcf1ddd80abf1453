"""The masters' checks, held against the masters' own solutions, blanks, and typical wrong answers."""

import importlib
import re

import masters
import pytest

WRONG = {name: importlib.import_module(f"wrong_{name}") for name in masters.NAMES}
CASES = [pytest.param(name, question, code, words, id=f"{name}-{question}-{number}")
         for name, module in WRONG.items() for question, answers in module.WRONG.items()
         for number, (code, words) in enumerate(answers)]


@pytest.mark.parametrize("seed", [0, 1, 20261])
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


@pytest.mark.parametrize(("name", "question", "code", "words"), CASES)
def test_wrong_answer_fails_with_the_words_that_explain_it(name, question, code, words):
    master = masters.read(name)
    said = master.complaints(question, master.environment(3, **{question: WRONG[name].START + code}))
    assert any(one and re.search(words, one) for one in said), said


@pytest.mark.parametrize("name", masters.NAMES)
def test_tasks_have_points_hints_and_two_wrong_answers_each_and_go_from_easy_to_research(name):
    master = masters.read(name)
    assert 6 <= len(master.questions) <= 10
    assert set(WRONG[name].WRONG) == set(master.questions)
    levels = []
    for question, one in master.questions.items():
        assert len(WRONG[name].WRONG[question]) >= 2
        assert "<summary>Hint</summary>" in one.text
        assert all(config["points"] > 0 for config, _ in one.checks)
        assert any(not config.get("hidden") for config, _ in one.checks)
        levels.append(re.search(r"^## \d+\. .*\((easy|medium|research)\)$", one.text, re.MULTILINE).group(1))
    assert levels[0] == "easy"
    assert levels[-1] == "research"
