"""What the checks of assignments are made of: answers found, calls limited, results compared, failures told in words."""

import signal

import numpy as np
import pytest

from fishlib import course


def said(*arguments, **options):
    with pytest.raises(AssertionError) as caught:
        course.compare("it", *arguments, **options)
    return str(caught.value)


def test_equal_values_pass_within_the_tolerance_and_not_beyond():
    course.compare("it", [1.0, 2.0 + 1e-7], [1.0, 2.0])
    assert "largest deviation at (1,)" in said([1.0, 2.01], [1.0, 2.0])


def test_known_slip_is_told_before_anything_else():
    assert said(4.0, 2.0, {"the half is missing": 4.0, "other": 3.0}) == "it: the half is missing"


def test_constant_factor_is_told():
    assert said([2.0, 4.0], [1.0, 2.0]) == "it is not right: it is 2 times what it should be"


@pytest.mark.parametrize(("value", "words"), [
    ([1.0, np.nan], "NaN"), ([1.0], r"shape (1,); it has to be (2,)"), ("text", "has to be an array of numbers"),
    ([0.0, 0.0], "it is zero"), (None, "NaN")])
def test_what_is_no_array_of_the_right_kind_is_told(value, words):
    if value is None:
        value = [None, 1.0]
    assert words in said(value, [1.0, 2.0])


def test_choice_has_to_be_boolean_and_of_the_right_size():
    assert course.choice("it", [True, False], (2,), 1).tolist() == [True, False]
    for value in ([1, 0], [True], [True, True]):
        with pytest.raises(AssertionError, match="it has to"):
            course.choice("it", value, (2,), 1)


def test_function_gets_copies_so_that_it_cannot_change_the_checks_inputs():
    inputs = np.ones(3)

    def spoil(x):
        x *= 5
        return x

    assert course.call({"f": spoil}, "f", inputs).tolist() == [5, 5, 5]
    assert inputs.tolist() == [1, 1, 1]


def test_endless_function_is_told_and_the_alarm_is_taken_back():
    def endless():
        while True:
            pass

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AssertionError, match=r"`f` did not come back within 0.2 seconds"):
        course.call({"f": endless}, "f", seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("env", "words"), [
    ({}, "there is no `f`"), ({"f": ...}, "still the starter's"), ({"f": 3}, "has to be a function, it is an int"),
    ({"f": lambda: None}, "gives nothing back"), ({"f": lambda: 1 / 0}, "stopped with ZeroDivisionError"),
    ({"f": lambda: exec("raise SystemExit")}, "stopped with SystemExit")])
def test_missing_and_failing_answers_are_told(env, words):
    with pytest.raises(AssertionError, match=words):
        course.call(env, "f")


@pytest.mark.parametrize("seed", [None, "7", True, -1, 1.0])
def test_lost_seed_is_told(seed):
    with pytest.raises(AssertionError, match="SEED is not there"):
        course.seed_of({} if seed is None else {"SEED": seed})


def test_samples_follow_from_seed_and_name():
    first, again = course.layer(4), course.layer(4)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not np.allclose(first[0], course.layer(5)[0])
    assert course.draw(4, "a").random() != course.draw(4, "b").random()
