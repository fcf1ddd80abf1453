"""Small networks that differ only in how their inner convolutions look at channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..relations import ChannelAttention, ChannelConv3d, TriPlanar

RELATIONS = ("conv2d", "channel3d", "mixed3d", "learned3d", "triplanar", "separable", "attention")


def relation_net(relation: str = "channel3d", classes: int = 10, shape: Sequence[int] = (1, 8, 8), width: int = 32,
                 groups: int = 8, layers: int = 3, orders: Sequence[Sequence[int]] | None = None) -> nn.Sequential:
    """A stem of `width` maps, `layers` inner layers that keep the width, pooling in between, and one linear layer.

    The layer at position ``3 + 4 i`` (counting in the Sequential) is the i-th inner layer, so twins differ only there.

    Parameters
    ----------
    relation : the inner layers: "conv2d" (3 x 3), "channel3d" (`ChannelConv3d`), "mixed3d" (a 1 x 1 convolution first),
        "learned3d" (a learned order first), "triplanar", "separable" (depthwise, then 1 x 1), "attention" (depthwise, then
        a gate from neighbouring channels)
    groups : of the 3-D and tri-planar layers
    orders : an order of channels for each inner layer, for "channel3d" and "mixed3d"
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}: use one of {', '.join(RELATIONS)}")
    if orders is not None and (len(orders) != layers or relation not in ("channel3d", "mixed3d")):
        raise ValueError(f"orders are for channel3d and mixed3d, one for each of the {layers} layers")
    net = nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    for i in range(layers):
        pool = nn.MaxPool2d(2, ceil_mode=True) if i < 2 else nn.Identity()
        inner = _inner(relation, width, groups, None if orders is None else orders[i])
        net.extend([inner, nn.BatchNorm2d(width), nn.ReLU(), pool])
    return net.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes)])


def _inner(relation: str, width: int, groups: int, order: Sequence[int] | None) -> nn.Module:
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    if relation == "conv2d":
        return nn.Conv2d(width, width, 3, padding=1, bias=False)
    if relation in ("channel3d", "mixed3d", "learned3d"):
        return ChannelConv3d(width, groups, mix=relation == "mixed3d", order="learned" if relation == "learned3d" else order)
    if relation == "triplanar":
        return TriPlanar(width, groups)
    return nn.Sequential(depthwise, nn.Conv2d(width, width, 1, bias=False) if relation == "separable" else ChannelAttention())
