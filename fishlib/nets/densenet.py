"""Densely connected networks with bottlenecks and compression, DenseNet-BC [Huang et al. 2017]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unit import Unit, initialise


class DenseUnit(Unit):
    """``concat(x, T(x))`` with T of 1 x 1 and 3 x 3 convolutions, each after BatchNorm and ReLU; zeros when switched off."""

    def __init__(self, before: int, growth: int, stage: int, index: int):
        super().__init__(stage, index)
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    @property
    def writer(self) -> nn.Module:
        return self.conv2

    def maps(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def join(self, x: Tensor, maps: Tensor) -> Tensor:
        return torch.cat([x, maps], 1)

    def bypass(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.conv2.out_channels))


class Transition(nn.Module):
    """Between stages: BatchNorm, ReLU, a 1 x 1 convolution to fewer maps, 2 x 2 average pooling."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(before)
        self.conv = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A stem, three stages of dense units with transitions between them, BatchNorm, pooling and a linear layer."""

    def __init__(self, units: int, growth: int, classes: int, channels: int):
        super().__init__()
        width = 2 * growth
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.steps = nn.Sequential()
        for stage in range(3):
            for unit in range(units):
                self.steps.append(DenseUnit(width, growth, stage, stage * units + unit))
                width += growth
            if stage < 2:
                self.steps.append(Transition(width, width // 2))
                width //= 2
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        initialise(self)

    @property
    def units(self) -> list[Unit]:
        """The units that the network has, in order."""
        return [step for step in self.steps if isinstance(step, Unit)]

    def stem(self, x: Tensor) -> Tensor:
        """Images to the state before the first step."""
        return self.conv(x)

    def head(self, x: Tensor) -> Tensor:
        """The state after the last step to logits."""
        return self.fc(torch.mean(F.relu(self.bn(x)), (2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(self.stem(x)))

    @torch.no_grad()
    def drop(self, removed: set[int]) -> None:
        """Remove the units of the given `index` for good, and all weights that read the zeros in their place.

        BatchNorm turns such a zero into a constant, which a 1 x 1 convolution adds to its outputs. The BatchNorm that
        reads those outputs subtracts a mean: the constant is taken off that mean, so no bias is needed. The last
        constants go into the bias of the linear layer.
        """
        # Of each channel of the state: whether it stays, and what was added to it before.
        stays = torch.ones(self.conv.out_channels, dtype=torch.bool, device=self.conv.weight.device)
        shift = torch.zeros(len(stays), dtype=self.conv.weight.dtype, device=stays.device)
        steps = nn.Sequential()
        for step in self.steps:
            if isinstance(step, Transition):
                constant = _narrow(step.bn, step.conv, stays, shift)
                stays, shift = torch.ones_like(constant, dtype=torch.bool), constant
                steps.append(step)
                continue
            if keeps := step.index not in removed:
                step.bn2.running_mean -= _narrow(step.bn1, step.conv1, stays, shift)
                steps.append(step)
            growth = step.conv2.out_channels
            stays = torch.cat([stays, stays.new_full((growth,), keeps)])
            shift = torch.cat([shift, shift.new_zeros(growth)])
        self.steps = steps
        self.fc.bias += _narrow(self.bn, self.fc, stays, shift)


def _narrow(norm: nn.BatchNorm2d, reader: nn.Conv2d | nn.Linear, stays: Tensor, shift: Tensor) -> Tensor:
    """Leave `norm` and its `reader` with the inputs that stay; the constant that the other ones added to the outputs."""
    gone = ~stays
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    zeros = F.relu(norm.bias - norm.running_mean * scale)
    constant = reader.weight.flatten(1)[:, gone] @ zeros[gone]
    norm.running_mean = (norm.running_mean - shift)[stays]
    norm.running_var = norm.running_var[stays]
    for module, name, kept in ((norm, "weight", norm.weight[stays]), (norm, "bias", norm.bias[stays]),
                               (reader, "weight", reader.weight[:, stays])):
        setattr(module, name, nn.Parameter(kept, getattr(module, name).requires_grad))
    norm.num_features = int(stays.sum())
    setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", norm.num_features)
    return constant


def densenet(depth: int = 100, growth: int = 12, classes: int = 10, channels: int = 3) -> DenseNet:
    """DenseNet-BC of `depth` 6n + 4: that of depth 100 and growth 12 has 769,162 parameters in 48 units.

    Raises
    ------
    ValueError
        a depth that is not 6n + 4
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}: a DenseNet-BC has 6n + 4 layers, such as 10, 22, 40 or 100")
    return DenseNet((depth - 4) // 6, growth, classes, channels)
