"""Layers that look along the channel axis, so that few maps carry what many would.

Layers take and give images (N, C, H, W), as ``nn.Conv2d`` does, and can take its place. The order of channels means
nothing in a network, so neighbourhood along it has to be made: by a 1 x 1 convolution before, by sorting, or by learning
an order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelConv3d(nn.Module):
    """A 3-D convolution over (channel, row, column): weights are shared along the channel axis.

    The weights are drawn normal, with mean 0 and variance ``2 / (G d k^2)``, where ``nn.Conv2d`` draws uniform ones of variance
    ``1 / (3 C k^2)``: behind BatchNorm the size of the first weights acts like the inverse of a
    learning rate.

    The C input channels are G = `groups_in` groups of C/G neighbours; each group is an input map of depth D = C/G of a 3-D
    convolution with kernel d x k x k and `groups_out` = G' output maps, which again are groups of D channels:
    ``out[g', c] = bias[g'] + sum_g sum_e w[g', g, e] * x[g, c + e - d//2]`` with 2-D convolutions ``*``, zeros outside. So
    the layer has G' D output channels.

    Parameters: ``G' G d k^2`` and the bias G' (for C = 64, k = d = 3, G = G' = 8: 1,728 weights instead of 36,864).
    MACs: ``G' G d k^2 D H' W'`` for an output of H' x W'. Mixing adds ``C^2`` parameters and ``C^2 H W`` MACs, a learned
    order ``C^2`` parameters until `settled` fixes it.

    Parameters
    ----------
    channels : C, input channels
    groups_in, groups_out : G and G'; G divides C; G' = G by default
    kernel : k, rows and columns of the kernel
    depth : d, its extent along the channels; odd
    mix : a 1 x 1 convolution of C to C channels first
    order : fixed order in which the channels lie along the axis, as positions; "learned" for one that `ChannelOrder`
        learns, behind the mixing; by default their own
    dense : run as one 2-D convolution whose weight is the banded matrix of the 3-D kernel; by default where gradients are
        wanted, since that is faster backwards, and as a 3-D convolution elsewhere. Both forms give the same outputs
    """

    def __init__(self, channels: int, groups_in: int = 8, groups_out: int | None = None, kernel: int = 3, depth: int = 3,
                 stride: int = 1, mix: bool = False, order: Sequence[int] | str | None = None, bias: bool = False,
                 dense: bool | None = None):
        super().__init__()
        _check_divides(channels, groups_in=groups_in)
        groups_out = groups_in if groups_out is None else groups_out
        _check_at_least_one(channels=channels, groups_out=groups_out, stride=stride)
        _check_odd(kernel=kernel, depth=depth)
        learned = isinstance(order, str) and order == "learned"
        if not (order is None or learned) and sorted(order) != list(range(channels)):
            raise ValueError(f'order has to name each of the channels 0 to {channels - 1} once, or be "learned"')
        self.channels, self.groups_in, self.groups_out, self.stride = channels, groups_in, groups_out, stride
        self.depth = channels // groups_in
        self.dense = dense
        self.mix = nn.Conv2d(channels, channels, 1, bias=False) if mix else nn.Identity()
        self.conv = nn.Conv3d(groups_in, groups_out, (depth, kernel, kernel), (1, stride, stride),
                              (depth // 2, kernel // 2, kernel // 2), bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if bias:
            nn.init.zeros_(self.conv.bias)
        self.arrange = ChannelOrder(channels) if learned else nn.Identity()
        self.register_buffer("order", None if order is None or learned else torch.tensor(list(order)))

    @property
    def out_channels(self) -> int:
        """G' D."""
        return self.groups_out * self.depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.arrange(self.mix(x))
        if self.order is not None:
            x = x[:, self.order]
        if self.conv.weight.requires_grad and torch.is_grad_enabled() if self.dense is None else self.dense:
            bias = None if self.conv.bias is None else self.conv.bias.repeat_interleave(self.depth)
            return F.conv2d(x, self.banded_weight(), bias, self.stride, self.conv.padding[1:])
        return self.conv(x.unflatten(1, (self.groups_in, self.depth))).flatten(1, 2)

    def banded_weight(self) -> Tensor:
        """The weight (G' D, C, k, k) of the 2-D convolution that gives the same outputs: constant along diagonals."""
        weight, depth = self.conv.weight, self.depth
        half = weight.shape[2] // 2
        # Entry (c', c) of the band is kernel plane c - c' + half, and 0 where there is none.
        plane = torch.arange(depth, device=weight.device)[None, :] - torch.arange(depth, device=weight.device)[:, None] + half
        inside = (plane >= 0) & (plane < weight.shape[2])
        band = weight[:, :, plane.clamp(0, weight.shape[2] - 1)] * inside[:, :, None, None]
        return band.transpose(1, 2).reshape(self.out_channels, self.channels, *weight.shape[3:])

    @property
    def parameters_formula(self) -> int:
        """``G' G d k^2``, G' more with a bias, C^2 more with mixing and as much with an order that is being learned."""
        depth, kernel, _ = self.conv.kernel_size
        own = self.groups_out * self.groups_in * depth * kernel**2 + (self.groups_out if self.conv.bias is not None else 0)
        return own + self._mixing + (self.channels**2 if isinstance(self.arrange, ChannelOrder) else 0)

    def macs_formula(self, height: int, width: int) -> int:
        """``G' G d k^2 D H' W'`` of the 3-D form, for an input of `height` x `width`, ``C^2 H W`` more with mixing.

        The banded 2-D form multiplies by the zeros of the band too, so it computes ``D / d`` times as much.
        """
        depth, kernel, _ = self.conv.kernel_size
        outputs = self.depth * -(-height // self.stride) * -(-width // self.stride)
        return self.groups_out * self.groups_in * depth * kernel**2 * outputs + self._mixing * height * width

    @property
    def _mixing(self) -> int:
        return self.channels**2 if isinstance(self.mix, nn.Conv2d) else 0


class ChannelOrder(nn.Module):
    """A learned order of the C channels: a permutation forwards, its soft form backwards [after Mena et al. 2018].

    ``y = P x`` with the permutation P of the largest sum of scores, and gradients as if it were
    ``y = S x``, ``S = Sinkhorn(scores / temperature)``: rows and columns of exp(scores / temperature) are divided by their
    sums in turn, `iterations` times. The sums of the columns then are 1, and those of the rows nearly so.

    Training starts at the channels' own order, since the diagonal of the scores is the larger, and may end there: the layers
    behind are trained for the order at hand, so that an exchange of channels harms at first. Compare `positions` before and
    after; scores drawn anew start at a random order.
    """

    def __init__(self, channels: int, temperature: float = 0.1, iterations: int = 10):
        super().__init__()
        self.temperature, self.iterations = temperature, iterations
        self.scores = nn.Parameter(0.1 * torch.eye(channels) + 0.01 * torch.randn(channels, channels))

    def positions(self) -> list[int]:
        """Which channel stands at each place."""
        return linear_sum_assignment(self.scores.detach().float().cpu().numpy(), maximize=True)[1].tolist()

    def soft(self) -> Tensor:
        """The nearly doubly stochastic matrix S (C, C)."""
        logs = self.scores / self.temperature
        for _ in range(self.iterations):
            logs = logs - logs.logsumexp(1, keepdim=True)
            logs = logs - logs.logsumexp(0, keepdim=True)
        return logs.exp()

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.tensor(self.positions(), device=x.device)
        if not (self.training and torch.is_grad_enabled()):
            return x[:, positions]
        soft = self.soft()
        matrix = F.one_hot(positions, len(soft)).to(soft.dtype) + soft - soft.detach()
        return F.conv2d(x, matrix[:, :, None, None])


def settled(net: nn.Module) -> nn.Module:
    """A copy of `net` in which every learned order is a fixed one, without scores: the same outputs, fewer parameters."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, ChannelConv3d) and isinstance(layer.arrange, ChannelOrder):
            layer.order = torch.tensor(layer.arrange.positions(), device=layer.conv.weight.device)
            layer.arrange = nn.Identity()
    return net


def swapped(net: nn.Module, neighbours: int = 4, depth: int = 3, mix: bool = False) -> nn.Module:
    """A copy of `net` with a `ChannelConv3d`, of new weights, in place of each k x k convolution that it can replace.

    A convolution from C to C' channels becomes one from ``G = C / D`` to ``G' = C' / D`` groups of D = `neighbours`; it keeps
    its kernel, its stride, whether it has a bias, whether its weight is trained, and its mode. 1 x 1, grouped and dilated
    convolutions stay, those that do not pad k // 2 zeros, and those where D does not divide both C and C'. The new weights
    are drawn from the global random state, which stays as it is.

    Raises
    ------
    ValueError
        nothing could be replaced; a number of neighbours below 1, an even depth
    """
    _check_at_least_one(neighbours=neighbours)
    _check_odd(depth=depth)
    net = copy.deepcopy(net)
    found = {name: conv for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d) and _replaceable(conv, neighbours)}
    with torch.random.fork_rng(devices=[]):
        for name, conv in found.items():
            layer = ChannelConv3d(conv.in_channels, conv.in_channels // neighbours, conv.out_channels // neighbours,
                                  conv.kernel_size[0], depth, conv.stride[0], mix, bias=conv.bias is not None)
            layer = layer.train(conv.training).requires_grad_(conv.weight.requires_grad)
            net.set_submodule(name, layer.to(conv.weight.device, conv.weight.dtype))
    if not found:
        raise ValueError(f"no convolution of {type(net).__name__} can have groups of {neighbours} neighbours: their kernels "
                         "have to be larger than 1 x 1, and neighbours a divisor of their channels")
    return net


def _replaceable(conv: nn.Conv2d, neighbours: int) -> bool:
    kernel = conv.kernel_size[0]
    square = conv.kernel_size == (kernel, kernel) and len(set(conv.stride)) == 1
    padded = conv.padding_mode == "zeros" and conv.padding in ("same", (kernel // 2, kernel // 2))
    return (square and padded and kernel > 1 and kernel % 2 == 1 and conv.groups == 1 and conv.dilation == (1, 1)
            and conv.in_channels % neighbours == 0 and conv.out_channels % neighbours == 0)


class Maxout(nn.Module):
    """The maximum over every `pieces` neighbouring channels [Goodfellow et al. 2013]: (N, C, H, W) to (N, C/pieces, H, W)."""

    def __init__(self, pieces: int = 2):
        super().__init__()
        _check_at_least_one(pieces=pieces)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.pieces:
            raise ValueError(f"{x.shape[1]} channels cannot be split into groups of {self.pieces}: choose a divisor")
        return x.unflatten(1, (-1, self.pieces)).amax(2)


class TriPlanar(nn.Module):
    """The sum of three 2-D convolutions, over the planes (H, W), (C, H) and (C, W) [after Prasoon et al. 2013].

    The first one is depthwise; the two others slide a k x k kernel along the channel axis and one image axis, in G groups of
    C/G neighbouring channels as in `ChannelConv3d`. Parameters: ``C k^2 + 2 G^2 k^2``.
    """

    def __init__(self, channels: int, groups: int = 8, kernel: int = 3):
        super().__init__()
        _check_at_least_one(channels=channels)
        _check_divides(channels, groups=groups)
        _check_odd(kernel=kernel)
        half = kernel // 2
        self.groups = groups
        self.rows_columns = nn.Conv2d(channels, channels, kernel, padding=half, groups=channels, bias=False)
        self.channels_rows = nn.Conv3d(groups, groups, (kernel, kernel, 1), padding=(half, half, 0), bias=False)
        self.channels_columns = nn.Conv3d(groups, groups, (kernel, 1, kernel), padding=(half, 0, half), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        volume = x.unflatten(1, (self.groups, -1))
        return self.rows_columns(x) + (self.channels_rows(volume) + self.channels_columns(volume)).flatten(1, 2)


class ChannelAttention(nn.Module):
    """Each channel times a gate from its neighbours' means: ``x * sigmoid(conv1d(mean x))`` [ECA, Wang et al. 2020]."""

    def __init__(self, kernel: int = 3):
        super().__init__()
        _check_odd(kernel=kernel)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()
        return x * gate[:, :, None, None]


def sorted_order(relation: Tensor, distance: bool = False) -> list[int]:
    """An order of channels in which neighbours are similar: the leaves of a clustering by average linkage.

    Parameters
    ----------
    relation : matrix (C, C) of similarities such as correlations, whose absolute value counts; or of distances, such as KL,
        which is made symmetric
    """
    matrix = relation.double().cpu()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not torch.isfinite(matrix).all():
        raise ValueError(f"a relation of shape {tuple(matrix.shape)}: give a finite matrix (C, C)")
    far = (matrix + matrix.T) / 2 if distance else 1 - (matrix.abs() + matrix.abs().T) / 2
    if len(far) < 3:
        return list(range(len(far)))
    far = far.clamp_min(0).fill_diagonal_(0).numpy()
    return leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True)).tolist()


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: use at least 1")


def _check_divides(channels: int, **values: int) -> None:
    for name, value in values.items():
        if value < 1 or channels % value:
            raise ValueError(f"{name}={value} does not divide channels={channels}: choose a divisor")


def _check_odd(**values: int) -> None:
    for name, value in values.items():
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{name}={value}: use an odd size, so that its middle is one pixel or channel")
