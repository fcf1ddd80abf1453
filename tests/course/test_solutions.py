"""The masters' solutions, which are written by hand, beside what the library computes for the same question."""

import masters
import numpy as np
import pytest
import torch
from torch import nn

from fishlib import course, divergence, fisher, units


@pytest.fixture(scope="module")
def solved():
    return {name: masters.read(name).environment(5) for name in masters.NAMES}


def close(found, expected):
    return np.allclose(found, np.asarray(expected), rtol=1e-6, atol=1e-12)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight = nn.Parameter(torch.tensor(weight))
    return layer


def test_diagonals_by_hand_are_the_librarys(solved):
    x, W = course.layer(5)
    env = solved["fisher_information"]
    assert close(env["diagonal"](x, W), fisher.diagonal(linear(W), torch.tensor(x))["weight"])
    x, W, V = course.two_layers(5)
    net = nn.Sequential(linear(W), nn.ReLU(), linear(V))
    assert close(env["hidden_diagonal"](x, W, V), fisher.diagonal(net, torch.tensor(x))["0.weight"])


def test_step_moves_the_predictions_as_far_as_the_librarys_quadratic_form_says(solved):
    x, W = course.layer(5)
    D = course.draw(5, "direction").normal(size=W.shape)
    form = fisher.quadratic(linear(W), torch.tensor(x), {"weight": torch.tensor(D)})
    assert close(solved["fisher_information"]["step_length"](x, W, D, 0.01), (0.02 / float(form)) ** 0.5)


def test_divergences_by_hand_are_the_librarys(solved):
    features, labels = course.class_features(5)
    moments = [(part.mean(0), np.cov(part.T)) for part in (features[labels == 0], features[labels == 1])]
    tensors = [torch.tensor(part) for pair in moments for part in pair]
    assert close(solved["skip_units"]["divergence"](*moments[0], *moments[1]), divergence.fisher_divergence_gaussian(*tensors))


def test_clusters_of_equal_weight_are_the_librarys(solved):
    scores = course.draw(5, "scores").normal(size=11)
    found, expected = solved["skip_units"]["cluster"](scores, np.ones(11), 4), units.cluster(scores, 4)
    assert groups(found) == groups(expected)


def groups(labels):
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
