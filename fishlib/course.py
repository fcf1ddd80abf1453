"""What the assignments share: samples that follow from a student's seed, and checks that say in words what is wrong.

A check has three steps: `answer` finds what the student was asked to define, `call` calls it with copies of the inputs and
for a limited time, `compare` holds the result against the expected one within a tolerance, and names the slip where the
result is that of a known one. Each failure is an AssertionError whose message is meant for the student.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SECONDS = 5.0  # a function of a student may take in a check


# Samples ---------------------------------------------------------------------------------------------------------------

def draw(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one named sample: another seed, or another name, gives independent ones."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def layer(seed: int) -> tuple[NDArray, NDArray]:
    """Inputs x (60, 5), correlated, and weights W (4, 5) of a softmax layer with logits W x."""
    rng = draw(seed, "layer")
    x = rng.normal(size=(60, 5)) @ (np.eye(5) + 0.6 * rng.normal(size=(5, 5)))
    return x, 0.7 * rng.normal(size=(4, 5))


def two_layers(seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """Inputs x (60, 5), hidden weights W (6, 5) and output weights V (4, 6) of logits V relu(W x)."""
    rng = draw(seed, "two layers")
    return rng.normal(size=(60, 5)), rng.normal(size=(6, 5)), 0.8 * rng.normal(size=(4, 6))


def weights(seed: int) -> tuple[NDArray, NDArray]:
    """60 weights with heavy tails, and the diagonal of their Fisher information."""
    rng = draw(seed, "weights")
    return rng.laplace(size=60), rng.lognormal(0, 1.5, size=60)


def block(seed: int) -> tuple[NDArray, NDArray]:
    """8 weights and their whole Fisher information (8, 8), which is far from diagonal."""
    rng = draw(seed, "block")
    root = rng.normal(size=(12, 8)) + 1.5 * rng.normal(size=(12, 1))
    return rng.normal(size=8), root.T @ root / 12


def layers(seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """Sizes, ranges and Fisher traces of the 12 layers of a network."""
    rng = draw(seed, "layers")
    sizes = 100 * np.ceil(10 ** rng.uniform(0.3, 1.8, 12)).astype(int)
    return sizes, rng.uniform(0.5, 3, 12), sizes * rng.lognormal(-3, 2, 12)


def feature_maps(seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """Activations a (300, 8) of channels that share four causes, weight W (5, 8) and bias b (5,) of the next layer W a + b."""
    rng = draw(seed, "feature maps")
    causes = rng.normal(size=(300, 4))
    mix = np.vstack([2.5 * np.eye(2, 4)[[0, 0, 1, 1]], np.eye(4)[2:], rng.normal(size=(2, 4))])  # loud copies, quiet witnesses
    a = np.maximum(causes @ mix.T + 0.15 * rng.normal(size=(300, 8)) + 1, 0)
    return a, rng.normal(size=(5, 8)), rng.normal(size=5)


def linear_units(seed: int) -> tuple[NDArray, NDArray]:
    """A state x (6,) and the matrices M (5, 6, 6) of residual units U + M U."""
    rng = draw(seed, "linear units")
    return rng.normal(size=6), 0.4 * rng.normal(size=(5, 6, 6))


def class_features(seed: int) -> tuple[NDArray, NDArray]:
    """Features (150, 4), which vary together, and their labels (150,) from 0 to 2; each class has a mean and covariance."""
    rng = draw(seed, "class features")
    labels = rng.permutation(np.repeat(np.arange(3), 50))
    mix = np.eye(4) + 0.5 * rng.normal(size=(3, 4, 4))
    return rng.normal(size=(3, 4))[labels] + np.einsum("nij,nj->ni", mix[labels], rng.normal(size=(150, 4))), labels


def unit_outputs(seed: int) -> tuple[NDArray, NDArray]:
    """What 10 units say (600, 10), one number each, of labels (600,) from 0 to 2; some say the same, in any order."""
    rng = draw(seed, "unit outputs")
    labels = rng.permutation(np.repeat(np.arange(3), 200))
    loud = 3.0 * (labels == 0) + 0.8 * rng.normal(size=600)
    told = [loud + 0.3 * rng.normal(size=600) for _ in range(4)]
    told += [1.6 * (labels == c) + 0.8 * rng.normal(size=600) for c in (1, 2, 1)] + [rng.normal(size=600) for _ in range(3)]
    return np.stack(told, 1)[:, rng.permutation(10)], labels


def softmax(logits: NDArray) -> NDArray:
    """Probabilities from logits, over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def seed_of(env: Mapping[str, Any]) -> int:
    """The notebook's SEED."""
    seed = env.get("SEED")
    whole = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
    assert whole, (
        "SEED is not there: it is the whole number in the first code cell, which has to stay and to run first")
    return seed


# Checks ----------------------------------------------------------------------------------------------------------------

def answer(env: Mapping[str, Any], name: str) -> Any:
    """What the notebook defines under `name`."""
    assert name in env, f"there is no `{name}`: keep the name that the starter cell gives, and run that cell"
    assert env[name] is not ..., f"`{name}` is still the starter's `...`: put your solution in its place"
    return env[name]


def call(env: Mapping[str, Any], name: str, *arguments: Any, seconds: float = SECONDS) -> Any:
    """The value of the student's function `name` for copies of `arguments`; its errors and endless loops are told in words."""
    function = answer(env, name)
    assert callable(function), f"`{name}` has to be a function, it is {_article(function)}"
    try:
        with _limited(seconds):
            value = function(*copy.deepcopy(arguments))
    except _Late:
        raise AssertionError(f"`{name}` did not come back within {seconds:g} seconds: does a loop in it never end?") from None
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise AssertionError(f"`{name}` stopped with {told}") from None
    given = value is not None and value is not ...
    assert given, (
        f"`{name}` gives nothing back: put your solution in place of `...`, and end it with `return`")
    return value


def numbers(what: str, value: Any, shape: tuple[int, ...] | None = None) -> NDArray:
    """`value` as an array of finite numbers, of this shape if one is given."""
    try:
        found = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise AssertionError(f"{what} has to be {'a number' if shape == () else 'an array of numbers'}, it is "
                             f"{_article(value)}") from None
    assert shape is None or found.shape == shape, f"{what} has the shape {found.shape}; it has to be {shape}"
    assert np.isfinite(found).all(), f"{what} holds NaN or infinite values: is something divided by zero?"
    return found


def choice(what: str, value: Any, shape: tuple[int, ...], count: int) -> NDArray:
    """`value` as a boolean array of this shape with `count` entries True."""
    found = np.asarray(value)
    fits = found.dtype == bool and found.shape == shape
    assert fits, f"{what} has to be a boolean array of shape {shape}, it is one of {found.dtype} and shape {found.shape}"
    assert found.sum() == count, f"{what} has to hold exactly {count} times True, it holds {found.sum()}"
    return found


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """The two things that a student's function gives back."""
    fits = isinstance(value, (tuple, list)) and len(value) == 2
    assert fits, f"`{name}` has to give two things, as in `return first, second`; it gives {_article(value)}"
    return value[0], value[1]


def compare(what: str, value: Any, expected: ArrayLike, slips: Mapping[str, ArrayLike] | None = None,
            rtol: float = 1e-6, atol: float = 1e-10) -> None:
    """Hold `value` against `expected` within a tolerance.

    Parameters
    ----------
    what : the name of the quantity in messages
    slips : what a known slip would give, by the words that explain it
    rtol, atol : as for `numpy.allclose`

    Raises
    ------
    AssertionError
        with the words of the slip that gives `value`; else with a constant factor if there is one; else with the place and
        size of the largest deviation

    Examples
    --------
    >>> compare("the trace", 3.0, 6.0, {"the sum was asked for, this is the mean of the two": 3.0})
    Traceback (most recent call last):
    AssertionError: the trace: the sum was asked for, this is the mean of the two
    """
    expected = np.asarray(expected, dtype=float)
    found = numbers(what, value, expected.shape)
    if np.allclose(found, expected, rtol, atol):
        return
    for words, wrong in (slips or {}).items():
        if np.shape(wrong) == found.shape and np.allclose(found, wrong, rtol, atol):
            raise AssertionError(f"{what}: {words}")
    raise AssertionError(f"{what} is not right: {_deviation(found, expected)}")


def _deviation(found: NDArray, expected: NDArray) -> str:
    some = np.abs(expected) > 1e-12 * np.abs(expected).max(initial=0)
    if some.any() and np.ptp(ratio := found[some] / expected[some]) < 1e-6 * np.abs(ratio).max() and ratio.flat[0] != 0:
        return f"it is {ratio.flat[0]:.4g} times what it should be"
    if not found.any():
        return "it is zero"
    size = np.abs(expected).max(initial=0)
    worst = np.unravel_index(np.abs(found - expected).argmax(), found.shape)
    place = f" at {tuple(int(i) for i in worst)}" if worst else ""
    return f"the largest deviation{place} is {np.abs(found - expected)[worst] / size if size else np.inf:.2g} of its size"


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


class _Late(BaseException):
    """Raised in the student's code when its time is over; no Exception, so that `except Exception` does not hold it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield  # without signals the grader's own limit has to do
        return

    def late(*_: Any) -> None:
        raise _Late

    former: Callable | int | None = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
