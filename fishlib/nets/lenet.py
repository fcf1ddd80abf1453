"""Small convolutional networks for digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def lenet5(classes: int = 10, shape: Sequence[int] = (1, 28, 28)) -> nn.Sequential:
    """The LeNet-5 of Caffe, the one that compression papers use: 431,080 parameters on 28 x 28 images.

    Two 5 x 5 convolutions of 20 and 50 maps, each with 2 x 2 max pooling, then 500 hidden units. Images below 16 x 16
    are too small for it.
    """
    channels, height, width = shape
    rows, columns = _after_two_stages(height), _after_two_stages(width)
    if min(rows, columns) < 1:
        raise ValueError(f"lenet5 needs images of at least 16 x 16 pixels, got {height} x {width}: use small_cnn")
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(50 * rows * columns, 500), nn.ReLU(), nn.Linear(500, classes))


def classic_lenet5(classes: int = 10, shape: Sequence[int] = (1, 28, 28)) -> nn.Sequential:
    """The LeNet-5 of 1998 in today's dress: 6 and 16 maps, ReLU, max pooling, 120 and 84 hidden units; 61,706 parameters."""
    channels, height, width = shape
    rows, columns = (height // 2 - 4) // 2, (width // 2 - 4) // 2
    if min(rows, columns) < 1:
        raise ValueError(f"classic_lenet5 needs images of at least 12 x 12 pixels, got {height} x {width}: use small_cnn")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * rows * columns, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, classes))


def small_cnn(classes: int = 10, shape: Sequence[int] = (1, 8, 8), width: int = 16) -> nn.Sequential:
    """3 x 3 convolutions with BatchNorm, of `width` and twice `width` maps; from 16 x 16 pixels on a third, of four times."""
    widths = [shape[0], width, 2 * width] + ([4 * width] if min(shape[1:]) >= 16 else [])
    blocks = [nn.Sequential(*_block(*pair)) for pair in pairwise(widths)]
    layers = [layer for block in blocks for layer in (*block, nn.MaxPool2d(2))][:-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], classes))


def _block(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()


def _after_two_stages(side: int) -> int:
    return ((side - 4) // 2 - 4) // 2
