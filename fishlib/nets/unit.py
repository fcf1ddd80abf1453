"""What the units of all skip networks have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unit(nn.Module):
    """A part of a network that can be switched off: ``alpha`` in {0, 1} is a buffer, so it saves and loads.

    With alpha 1 the next state is ``join(x, T(x))``; with alpha 0 it is ``bypass(x)``, and nothing else is computed. Set it
    by ``unit.switch(False)``. A change of the buffer itself is noticed as well, though not by a network that is compiled
    already.

    Attributes
    ----------
    stage : stage of the network, from 0
    index : position among the units of the network as it was built; it stays when other units are removed
    writer : the module whose output is T, the unit's feature maps
    """

    def __init__(self, stage: int, index: int):
        super().__init__()
        self.stage, self.index = stage, index
        self.register_buffer("alpha", torch.ones((), dtype=torch.uint8))
        self._read: tuple[Tensor, int] | None = None
        self._active = True

    @property
    def active(self) -> bool:
        """alpha as a bool; a device is asked only after alpha has changed."""
        if not torch.compiler.is_compiling() and (
                self._read is None or self._read[0] is not self.alpha or self._read[1] != self.alpha._version):
            self._refresh()
        return self._active

    def switch(self, on: bool) -> None:
        """Set alpha to 1 or to 0."""
        with torch.no_grad():
            self.alpha.fill_(bool(on))
        self._refresh()

    def _refresh(self) -> None:
        self._active = bool(self.alpha)
        self._read = (self.alpha, self.alpha._version)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}  # a copy's alpha is another tensor, with versions of its own

    def maps(self, x: Tensor) -> Tensor:
        """T(x), the feature maps that the unit computes."""
        raise NotImplementedError

    def join(self, x: Tensor, maps: Tensor) -> Tensor:
        """The next state, from the present one and the unit's feature maps."""
        raise NotImplementedError

    def bypass(self, x: Tensor) -> Tensor:
        """The next state without the unit."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.maps(x)) if self.active else self.bypass(x)


class Shortcut(nn.Module):
    """A x without parameters: every `stride`-th pixel, with `added` maps of zeros around the channels (option A)."""

    def __init__(self, stride: int, added: int):
        super().__init__()
        self.stride, self.added = stride, added

    @property
    def is_identity(self) -> bool:
        return self.stride == 1 and self.added == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.is_identity:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


def drop_from(steps: nn.Sequential, removed: set[int]) -> nn.Sequential:
    """Steps without the units of the given `index`, for units whose bypass is their `shortcut`."""
    kept: list[nn.Module] = []
    for step in steps:
        if not (isinstance(step, Unit) and step.index in removed):
            kept.append(step)
        elif not step.shortcut.is_identity:
            kept.append(step.shortcut)
    return nn.Sequential(*kept)


def initialise(net: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out in all convolutions [He et al. 2015]."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
