"""Plain convolutional networks [Simonyan and Zisserman 2015] with BatchNorm, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unit import Shortcut, Unit, drop_from, initialise

LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class PlainUnit(Unit):
    """``relu(bn(conv(x)))``; switched off, x itself, with zero maps added where the width grows."""

    def __init__(self, before: int, after: int, stage: int, index: int):
        super().__init__(stage, index)
        self.conv = nn.Conv2d(before, after, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(after)
        self.shortcut = Shortcut(1, after - before)

    @property
    def writer(self) -> nn.Module:
        return self.bn

    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def join(self, x: Tensor, maps: Tensor) -> Tensor:
        return F.relu(maps)

    def bypass(self, x: Tensor) -> Tensor:
        return self.shortcut(x)


class VGG(nn.Module):
    """A first convolution, then units in five stages with 2 x 2 max pooling after each, and one linear layer."""

    def __init__(self, layers: tuple[int, ...], classes: int, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.steps = nn.Sequential()
        before, index = width, 0
        for stage, count in enumerate(layers):
            after = width << min(stage, 3)
            for _ in range(count - (stage == 0)):
                self.steps.append(PlainUnit(before, after, stage, index))
                before, index = after, index + 1
            # Images of 8 x 8 pixels are down to one pixel after three stages: rounding up keeps it.
            self.steps.append(nn.MaxPool2d(2, ceil_mode=True))
        self.fc = nn.Linear(before, classes)
        initialise(self)

    @property
    def units(self) -> list[Unit]:
        """The units that the network has, in order."""
        return [step for step in self.steps if isinstance(step, Unit)]

    def stem(self, x: Tensor) -> Tensor:
        """Images to the state before the first step."""
        return F.relu(self.bn(self.conv(x)))

    def head(self, x: Tensor) -> Tensor:
        """The state after the last step to logits."""
        return self.fc(torch.mean(x, (2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(self.stem(x)))

    def drop(self, removed: set[int]) -> None:
        """Remove the units of the given `index` for good; zero maps stay of those that widen the state."""
        self.steps = drop_from(self.steps, removed)


def vgg(depth: int = 16, classes: int = 10, channels: int = 3, width: int = 64) -> VGG:
    """VGG with `depth` 11, 13, 16 or 19 and one linear layer: VGG-16 has 14,718,912 + 513 `classes` parameters.

    Its first convolution is the stem; each of the other ones, with BatchNorm and ReLU, is a unit.

    Raises
    ------
    ValueError
        another depth
    """
    if depth not in LAYERS:
        raise ValueError(f"depth={depth}: a VGG has {', '.join(map(str, LAYERS))} layers")
    return VGG(LAYERS[depth], classes, channels, width)
