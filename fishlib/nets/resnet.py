"""Residual networks for small images [He et al. 2015, section 4.2], and the same networks without shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unit import Shortcut, Unit, drop_from, initialise


class ResidualUnit(Unit):
    """Two 3 x 3 convolutions beside a shortcut without parameters: ``relu(f(x) + A x)``, or A x when switched off.

    `A` is the identity, or, where a stage begins, every second pixel with zero maps added (option A). A plain unit
    (``skip=False``) computes ``relu(f(x))``; A x takes its place only when it is switched off.
    """

    def __init__(self, before: int, after: int, stride: int, skip: bool = True, stage: int = 0, index: int = 0):
        super().__init__(stage, index)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = Shortcut(stride, after - before)
        self.skip = skip

    @property
    def writer(self) -> nn.Module:
        return self.bn2

    def maps(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def join(self, x: Tensor, maps: Tensor) -> Tensor:
        return F.relu(maps + self.shortcut(x) if self.skip else maps)

    def bypass(self, x: Tensor) -> Tensor:
        return self.shortcut(x)  # x is an output of ReLU, so another ReLU would change nothing


class ResNet(nn.Module):
    """A stem, three stages of residual units, global average pooling and a linear layer."""

    def __init__(self, units: int, classes: int, channels: int, width: int, skip: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.steps = nn.Sequential()
        before = width
        for stage in range(3):
            for unit in range(units):
                after, stride = width << stage, 2 if stage and not unit else 1
                self.steps.append(ResidualUnit(before, after, stride, skip, stage, len(self.steps)))
                before = after
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
        """Remove the units of the given `index` for good; the shortcut stays of those that change the shape."""
        self.steps = drop_from(self.steps, removed)


def resnet(depth: int = 56, classes: int = 10, channels: int = 3, width: int = 16) -> ResNet:
    """ResNet of `depth` 6n + 2 for images of about 32 x 32; ResNet-56 has 853,018 parameters in 27 units.

    Raises
    ------
    ValueError
        a depth that is not 6n + 2
    """
    return ResNet(_units(depth), classes, channels, width)


def plain(depth: int = 20, classes: int = 10, channels: int = 3, width: int = 16) -> ResNet:
    """The twin of `resnet` without shortcuts: the same layers and the same number of parameters."""
    return ResNet(_units(depth), classes, channels, width, skip=False)


def _units(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers, such as 8, 20, 32, 56 or 110")
    return (depth - 2) // 6
