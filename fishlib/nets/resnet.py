"""Residual networks for small images [He et al. 2015, section 4.2]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters: ``relu(f(x) + A x)``.

    `A` is the identity, or, where a stage begins, every second pixel with zero maps added (option A).
    """

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def residual(self, x: Tensor) -> Tensor:
        """f(x), the unit's feature maps before the addition."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def shortcut(self, x: Tensor) -> Tensor:
        """A x."""
        if self.stride == 1 and not self.added:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of residual units, global average pooling and a linear layer."""

    def __init__(self, units: int, classes: int, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            _stage(width, width, 1, units), _stage(width, 2 * width, 2, units), _stage(2 * width, 4 * width, 2, units))
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(torch.mean(self.stages(x), (2, 3)))


def _stage(before: int, after: int, stride: int, units: int) -> nn.Sequential:
    return nn.Sequential(ResidualUnit(before, after, stride), *(ResidualUnit(after, after, 1) for _ in range(units - 1)))


def resnet(depth: int = 56, classes: int = 10, channels: int = 3, width: int = 16) -> ResNet:
    """ResNet of `depth` 6n + 2 for images of about 32 x 32; ResNet-56 has 853,018 parameters.

    Raises
    ------
    ValueError
        a depth that is not 6n + 2
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers, such as 8, 20, 32, 56 or 110")
    return ResNet((depth - 2) // 6, classes, channels, width)
