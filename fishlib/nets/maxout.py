"""A convolutional network with Maxout in place of ReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..relations import Maxout


def maxout_net(classes: int = 10, shape: Sequence[int] = (1, 8, 8), width: int = 32, pieces: int = 2,
               layers: int = 3) -> nn.Sequential:
    """The twin of `relation_net` with "conv2d" whose maps meet in groups of `pieces`: ``width / pieces`` maps go on.

    The next layer so reads fewer maps: an inner layer has ``9 width^2 / pieces`` weights. No ReLU [Goodfellow et al. 2013].
    """
    if pieces < 1 or width % pieces:
        raise ValueError(f"pieces={pieces} does not divide width={width}: choose a divisor")
    before, net = shape[0], nn.Sequential()
    for i in range(layers + 1):
        pool = nn.MaxPool2d(2, ceil_mode=True) if i in (1, 2) else nn.Identity()
        net.extend([nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), Maxout(pieces), pool])
        before = width // pieces
    return net.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, classes)])
