"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn


def mlp(shape: Sequence[int] = (1, 28, 28), classes: int = 10, hidden: Sequence[int] = (300, 100)) -> nn.Sequential:
    """Flattened images (N, C, H, W) through ReLU layers of `hidden` widths to logits (N, classes)."""
    widths = [prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def lenet300(classes: int = 10, shape: Sequence[int] = (1, 28, 28)) -> nn.Sequential:
    """LeNet-300-100 [LeCun et al. 1998]: 266,610 parameters on 28 x 28 images."""
    return mlp(shape, classes, (300, 100))
