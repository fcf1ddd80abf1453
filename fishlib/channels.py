"""Channels of convolutions: how they relate, which of them repeat what others say, and how to remove those.

A layer is named by its convolution. What is looked at are its feature maps behind the BatchNorm that reads what it gives,
if one does, and behind a ReLU; the maps are taken in one pass, and nothing of an image stays but sums. Removal is physical, by
the package torch-pruning, and checked against the network in which the removed channels are zero where they are read.
Divergences are in nats.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import cost, divergence
from .data import Batches, ImageData
from .training import evaluation_mode
from .units import _device, _evenly_spaced

KINDS = ("kl", "js", "correlation", "cosine", "cka")
REDUCE = ("pixels", "mean")
PORTIONS = ("l1", "kl")
SCORES = ("l1", "fpgm", "taylor", "rank", "chip", "group", "random")
CRITERIA = (*KINDS, *SCORES)
RANGE = 6.0  # of histograms, in root mean squares of the layer's first batch
CHIP_IMAGES = 100  # at most, for the criterion "chip"

# Statistics of channels, in one pass.


@dataclass
class LayerStatistics:
    """Sums over the samples of one layer's C channels; a sample is a pixel, or the mean of a map.

    Attributes
    ----------
    name : name of the convolution
    samples : number of samples
    mean : (C,), float64
    covariance : (C, C), divisor N, float64
    histogram : (C, bins) counts. Bins are in units of `scale`; the first and the last one are open, and behind a ReLU the
        first one holds the zeros
    low : where the bins begin, 0 behind a ReLU
    scale : root mean square of the first batch
    largest : (C,) largest magnitude of what the network reads: behind a ReLU only where it has one
    hsic : (C, C) inner products of centred Gram matrices, summed over batches; None unless asked for
    """

    name: str
    samples: int = 0
    low: float = 0.0
    scale: float = 1.0
    largest: Tensor | float = 0.0
    histogram: Tensor | None = None
    hsic: Tensor | None = None
    _shift: Tensor | None = field(default=None, repr=False)
    _sum: Tensor | float = field(default=0.0, repr=False)
    _cross: Tensor | float = field(default=0.0, repr=False)

    @property
    def mean(self) -> Tensor:
        return self._shift + self._sum / self.samples

    @property
    def covariance(self) -> Tensor:
        offset = self._sum / self.samples
        return self._cross / self.samples - offset[:, None] * offset[None, :]

    @property
    def constant(self) -> list[int]:
        """Channels that are constant, up to rounding, over all samples: they correlate with nothing."""
        spread = self.covariance.diagonal().clamp_min(0).sqrt()
        return (spread <= 1e-6 * max(self.scale, 1e-30)).nonzero().flatten().tolist()

    @property
    def dead(self) -> list[int]:
        """Channels that are zero, up to rounding, where the network reads them: nothing changes without them."""
        return (self.largest <= 1e-6 * max(self.scale, 1e-30)).nonzero().flatten().tolist()

    def add(self, maps: Tensor, reduce: str, bins: int, gram: Tensor | None) -> None:
        """Count in the maps (N, C, H, W) of a batch, and the Gram matrices of its channels."""
        rows = (maps.mean((2, 3), keepdim=True) if reduce == "mean" else maps).movedim(1, 0).flatten(1)
        if self._shift is None:
            self._shift = rows.mean(1).double()
            self.scale = float(rows.double().square().mean().sqrt()) or 1.0
            self.histogram = torch.zeros(len(rows), bins, dtype=torch.int64, device=rows.device)
        centred = rows - self._shift.to(rows.dtype)[:, None]
        self.samples += rows.shape[1]
        self._sum = self._sum + centred.sum(1).double()
        self._cross = self._cross + (centred @ centred.T).double()
        self.histogram += _histogram(rows, self.scale, bins, self.low)
        if gram is not None:
            hsic = (gram @ gram.T).double()
            self.hsic = hsic if self.hsic is None else self.hsic + hsic


def _histogram(rows: Tensor, scale: float, bins: int, low: float) -> Tensor:
    """Counts (C, bins) of rows (C, M): bin 0 up to ``low * scale``, the last one above ``RANGE * scale``."""
    width = scale * (RANGE - low) / (bins - 2)
    place = (rows / width).sub_(low * scale / width).ceil_().clamp_(0, bins - 1).int()
    place += bins * torch.arange(len(rows), device=rows.device, dtype=torch.int32)[:, None]
    return torch.bincount(place.flatten(), minlength=len(rows) * bins).view(len(rows), bins)


def _gram(maps: Tensor) -> Tensor:
    """Centred Gram matrix over the images for each channel, as rows (C, N * N)."""
    x = maps.movedim(1, 0).flatten(2)
    x = x - x.mean(1, keepdim=True)  # centring the images centres their Gram matrix
    return (x @ x.mT).flatten(1)


@dataclass
class Activations:
    """What `activations` found: `layers` by name, in the order in which they run, and sums over `pairs` of neighbours."""

    layers: dict[str, LayerStatistics]
    pairs: dict[tuple[str, str], PairStatistics]
    images: int
    reduce: str

    @property
    def cross(self) -> dict[tuple[str, str], Tensor]:
        """Correlations (C, C') between layers of which the second follows the first."""
        return {pair: self.between(*pair, "correlation") for pair in self.pairs}

    def dead(self) -> dict[str, list[int]]:
        """Channels that are zero throughout, by layer, layers without any left out."""
        return {name: layer.dead for name, layer in self.layers.items() if layer.dead}

    def relation(self, name: str, kind: str = "kl") -> Tensor:
        """Channel-by-channel matrix (C, C) of one layer; see `relations`."""
        _check_choice("kind", kind, KINDS)
        _check_choice("layer", name, list(self.layers))
        layer = self.layers[name]
        if kind in ("kl", "js"):
            compare = divergence.kl_histogram_pairs if kind == "kl" else divergence.js_histogram_pairs
            return compare(layer.histogram)
        if kind == "cka":
            if layer.hsic is None:
                raise ValueError("these statistics have no Gram matrices: call activations(..., grams=True)")
            return _normalised(layer.hsic, layer.constant)
        second = layer.covariance
        return _normalised(second + torch.outer(layer.mean, layer.mean) if kind == "cosine" else second,
                           layer.constant if kind == "correlation" else ())

    def between(self, first: str, second: str, kind: str = "kl") -> Tensor:
        """Matrix (C, C') between the channels of two layers; beyond "kl" and "js" only where `second` follows `first`.

        Divergences compare values in units of each layer's own root mean square. Correlations and cosines are over the
        pixels of the coarser of the two layers, to which the other one is pooled; CKA compares images, at any resolution.
        """
        _check_choice("kind", kind, KINDS)
        for name in (first, second):
            _check_choice("layer", name, list(self.layers))
        if kind in ("kl", "js"):
            if self.layers[first].low != self.layers[second].low:
                raise ValueError(f"the histograms of {first} and {second} have other bins, since the network has a ReLU behind "
                                 "one of them only: call activations(..., rectify=True)")
            compare = divergence.kl_histogram_pairs if kind == "kl" else divergence.js_histogram_pairs
            return compare(self.layers[first].histogram, self.layers[second].histogram)
        if (first, second) not in self.pairs:
            raise ValueError(f"{first} and {second} are not neighbours, in this order: there are {list(self.pairs)}")
        pair = self.pairs[first, second]
        if kind == "cosine":
            return pair.cosine
        layers = self.layers[first], self.layers[second]
        if kind == "correlation":
            # What is left of a constant channel is rounding.
            alive = [torch.ones(len(one.mean)).index_fill(0, torch.tensor(one.constant, dtype=torch.long), 0)
                     for one in layers]
            return pair.correlation * torch.outer(*alive).to(pair.correlation)
        if pair.hsic is None:
            raise ValueError("these statistics have no Gram matrices: call activations(..., grams=True)")
        inverse = [_inverse_root(one.hsic.diagonal(), one.constant) for one in layers]
        return (pair.hsic * inverse[0][:, None] * inverse[1][None, :]).clamp(-1, 1)


@dataclass
class PairStatistics:
    """Sums over the common pixels of two layers, all float64: products (C, C'), values and squares of each, their number."""

    products: Tensor
    first: Tensor
    second: Tensor
    first_squares: Tensor
    second_squares: Tensor
    samples: int
    hsic: Tensor | None = None

    @classmethod
    def of(cls, first: Tensor, second: Tensor, grams: tuple[Tensor | None, Tensor | None]) -> PairStatistics:
        """Sums of one batch of maps (N, C, H, W) and (N, C', H', W'), pooled to the coarser of both."""
        side = min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])
        # In double precision: a channel may vary by far less than its mean, and products of the raw values lose that.
        x, y = (F.adaptive_avg_pool2d(one, side).movedim(1, 0).flatten(1).double() for one in (first, second))
        sums = x @ y.T, x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1)
        return cls(*sums, x.shape[1], None if grams[0] is None else (grams[0] @ grams[1].T).double())

    def __add__(self, other: PairStatistics) -> PairStatistics:
        sums = {one.name: getattr(self, one.name) for one in fields(self)}
        return PairStatistics(**{name: None if value is None else value + getattr(other, name) for name, value in sums.items()})

    @property
    def correlation(self) -> Tensor:
        means = self.first / self.samples, self.second / self.samples
        spread = [(square / self.samples - mean.square()) for square, mean in
                  zip((self.first_squares, self.second_squares), means, strict=True)]
        floor = [1e-12 * (square / self.samples).max().clamp_min(1e-30) for square in (self.first_squares, self.second_squares)]
        inverse = [torch.where(v > f, v.clamp_min(1e-300).rsqrt(), 0) for v, f in zip(spread, floor, strict=True)]
        return (self.products / self.samples - torch.outer(*means)) * inverse[0][:, None] * inverse[1][None, :]

    @property
    def cosine(self) -> Tensor:
        inverse = _inverse_root(self.first_squares), _inverse_root(self.second_squares)
        return (self.products * inverse[0][:, None] * inverse[1][None, :]).clamp(-1, 1)


def _inverse_root(values: Tensor, zero: Iterable[int] = ()) -> Tensor:
    """``1 / sqrt(values)``, and 0 where a value is not positive or its position is named."""
    values = values.index_fill(0, torch.tensor(list(zero), dtype=torch.long, device=values.device), 0)
    return torch.where(values > 0, values.clamp_min(1e-300).rsqrt(), 0)


def _normalised(products: Tensor, constant: Iterable[int] = ()) -> Tensor:
    """Products (C, C) over the roots of their diagonal; 0 where a channel has none, and 1 on the diagonal."""
    inverse = _inverse_root(products.diagonal(), constant)
    matrix = products * inverse[:, None] * inverse[None, :]
    return matrix.clamp(-1, 1).fill_diagonal_(1)


def activations(net: nn.Module, data: ImageData, layers: Sequence[str] | None = None, reduce: str = "pixels",
                rectify: bool | None = True, bins: int = 64, images: int = 5000, grams: bool = False,
                cross: bool = True, batch_size: int = 100) -> Activations:
    """Means, covariances and histograms of all channels of the named layers, in one pass over training images.

    Beyond a copy of the chosen images, one byte a pixel and colour, memory does not depend on their number. Sums are kept in
    float64, those within a batch in the network's type, but for products of two layers.

    Parameters
    ----------
    layers : names of convolutions; by default all that run
    reduce : what a sample is: "pixels", every pixel of a map, or "mean", the mean of each map
    rectify : look at the maps behind a ReLU, whether or not the network has one there, so that layers compare; None: only
        behind those that it has
    bins : of the histograms, between 0 (or -6) and 6 root mean squares of the layer, with an open one at either end
    images : number of images, evenly spaced in the training split; all of them if there are fewer
    grams : keep what "cka" needs, too: C products of (batch, batch) matrices, averaged over batches, which biases CKA
        upwards where a batch is small
    cross : keep what `Activations.between` needs of neighbouring layers, too

    Raises
    ------
    ValueError
        a layer that does not exist or does not run, activations that are not finite, fewer than two images
    """
    _check_choice("reduce", reduce, REDUCE)
    if bins < 4:
        raise ValueError(f"bins={bins}: a histogram needs at least 4")
    if grams and batch_size < 2:
        raise ValueError(f"batch_size={batch_size}: Gram matrices compare images of a batch, so give it two or more")
    sample, statistics, pairs = _sample(data, images, batch_size), {}, {}
    places = _places(net, sample, layers)
    last: list[tuple] = []

    def take(name: str, maps: Tensor) -> None:
        _check_finite(name, "activations", maps)  # before the ReLU, behind which -inf is 0
        positive, has_relu = F.relu(maps), places[name].relu
        read = positive if has_relu else maps
        rectified = has_relu if rectify is None else rectify
        maps = positive if rectified else maps
        gram = _gram(maps) if grams else None
        layer = statistics.setdefault(name, LayerStatistics(name, low=0.0 if rectified else -RANGE))
        layer.add(maps, reduce, bins, gram)
        largest = torch.maximum(read.amax((0, 2, 3)), -read.amin((0, 2, 3)))
        layer.largest = largest.double().clamp_min(layer.largest)
        if cross and last:
            before, earlier, earlier_gram = last.pop()
            sums = PairStatistics.of(earlier, maps, (earlier_gram, gram))
            pairs[before, name] = pairs[before, name] + sums if (before, name) in pairs else sums
        last[:] = [(name, maps, gram)]

    with torch.no_grad(), evaluation_mode(net), _watching(places, take):
        for batch, _ in sample:
            last.clear()
            net(batch.to(_device(net)))
    _check_ran(layers, statistics)
    return Activations(statistics, pairs, len(sample.labels), reduce)


def relations(net: nn.Module, data: ImageData, kind: str = "kl", layers: Sequence[str] | None = None,
              adjacent: bool = False, **options) -> dict[str | tuple[str, str], Tensor]:
    """Channel-by-channel matrices (C, C), float64, of each layer; `options` go to `activations`.

    Parameters
    ----------
    kind : "kl", entry (i, j) is KL(p_i || p_j) between histograms, in nats, not symmetric; "js" the Jensen-Shannon
        divergence; "correlation"; "cosine", which does not subtract means; "cka", linear centred kernel alignment of
        the maps, averaged over batches. A constant channel has correlation and CKA 0 with every other one
    adjacent : add the matrices (C, C') between each layer and the one that runs next, under the pair of their names

    Notes
    -----
    KL and JS compare how often values occur, not where: two channels with equal histograms may be independent.
    """
    _check_choice("kind", kind, KINDS)
    found = activations(net, data, layers, grams=kind == "cka", cross=adjacent, **options)
    return ({name: found.relation(name, kind) for name in found.layers}
            | {pair: found.between(*pair, kind) for pair in found.pairs})


# What layers, and portions of layers, contribute.


@torch.no_grad()
def contribution(net: nn.Module, data: ImageData, layers: Sequence[str] | None = None, portions: int = 4,
                 split: str = "validation", images: int = 1000, by: str = "l1") -> pd.DataFrame:
    """Layers and portions of layers by what the predictions lose without them.

    ``mean KL(p(y|x) || p_without(y|x))`` in nats, the maps of the portion set to zero behind BatchNorm; and, for whole
    layers, KL between the histograms of all the layer's outputs and of the layer before, each in its own units.

    Parameters
    ----------
    portions : into how many equal parts a layer is cut, after sorting its channels; 0 for whole layers only
    by : the order of a layer's channels: "l1", by the L1 norm of their filters, so that part 0 has the smallest; "kl", in
        which `redundant` removes them by KL between training images' histograms, so that part 0 has dead channels and those
        that repeat others

    Returns
    -------
    DataFrame
        layer, portion (-1 for the whole layer), channels (how many), kl (predictions), kl_input (activations; NaN for the
        first layer and for portions); the least contributing first
    """
    if portions < 0:
        raise ValueError(f"portions={portions}: use 0 for whole layers only, or how many parts a layer is cut into")
    _check_choice("by", by, PORTIONS)
    found = _convolutions(net, layers)
    sample = _sample(data, images, 500, split)
    places = _places(net, sample, layers)
    statistics = activations(net, data, layers, images=images, cross=False)
    logits = _logits(net, sample)
    rows, before = [], None
    for name, layer in statistics.layers.items():
        order = (found[name].weight.abs().flatten(1).sum(1).argsort() if by == "l1" else
                 torch.tensor(_removal_order(statistics.relation(name, "kl"), layer.dead, portions), device=_device(net)))
        parts = {-1: order} | dict(enumerate(order.tensor_split(portions) if portions else []))
        pooled = layer.histogram.sum(0, keepdim=True)
        for portion, chosen in parts.items():
            if len(chosen):
                with _muted(places[name].module, chosen):
                    without = _logits(net, sample)
                kl_input = None if before is None or portion >= 0 else float(divergence.kl_histogram_pairs(pooled, before))
                rows.append({"layer": name, "portion": portion, "channels": len(chosen),
                             "kl": _prediction_kl(logits, without), "kl_input": kl_input})
        before = pooled
    return pd.DataFrame(rows).astype({"kl_input": float}).sort_values("kl", ignore_index=True)


def _removal_order(relation: Tensor, dead: Sequence[int], portions: int) -> list[int]:
    """Channels in the order in which `redundant` first removes them by KL, where it removes a portion more each time."""
    order: list[int] = []
    for part in range(1, portions):
        # As many as the first parts of `tensor_split` have.
        count = sum(len(one) for one in torch.arange(len(relation)).tensor_split(portions)[:part])
        order += [one for one in redundant(relation, "kl", min(count, len(relation) - 1), dead) if one not in order]
    return order + [one for one in range(len(relation)) if one not in order]


def _logits(net: nn.Module, sample: Batches) -> Tensor:
    with evaluation_mode(net):
        logits = torch.cat([net(images.to(_device(net))) for images, _ in sample])
    if not torch.isfinite(logits).all():
        raise ValueError("the outputs of the network are not finite; look for NaN or infinite weights or images")
    return logits


def _prediction_kl(logits: Tensor, changed: Tensor) -> float:
    return float(F.kl_div(changed.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean"))


@contextlib.contextmanager
def _muted(module: nn.Module, channels: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, i, output: output.index_fill(1, channels, 0))
    try:
        yield
    finally:
        handle.remove()


# Which channels to remove.


def redundant(relation: Tensor, kind: str, count: int, dead: Iterable[int] = ()) -> list[int]:
    """`count` channels to remove, by clustering: dead ones first, then all but one of each cluster.

    The channels that are left form ``C - count`` clusters by average linkage of the distance (the symmetrised KL, JS,
    ``1 - |correlation|``, ``1 - cosine`` or ``1 - CKA``); the one that is nearest to the others of its cluster stays.

    Parameters
    ----------
    relation : matrix (C, C) of `relations`
    dead : channels whose removal changes nothing, as in `LayerStatistics`
    """
    _check_choice("kind", kind, KINDS)
    total = len(relation)
    if not 0 <= count < total:
        raise ValueError(f"count={count}: of {total} channels 0 to {total - 1} can be removed")
    gone = sorted(dead)[:count]
    rest = [channel for channel in range(total) if channel not in gone]
    distance = _distance(relation, kind)[rest][:, rest].cpu().numpy()
    if count == len(gone):
        return gone
    groups = total - count
    if groups == 1:
        label = [0] * len(rest)
    else:
        label = AgglomerativeClustering(groups, metric="precomputed", linkage="average").fit_predict(distance)
    label = pd.Series(label)
    for _, members in label.groupby(label):
        members = list(members.index)
        head = members[distance[members][:, members].sum(1).argmin()]
        gone += [rest[one] for one in members if one != head]
    return sorted(gone)


def _distance(relation: Tensor, kind: str) -> Tensor:
    if kind in ("kl", "js"):
        distance = (relation + relation.T) / 2
    else:
        distance = 1 - (relation.abs() if kind == "correlation" else relation)
    return distance.clamp_min(0).fill_diagonal_(0)


def choose(net: nn.Module, data: ImageData, criterion: str = "kl", share: float | Mapping[str, float] = 0.5,
           layers: Sequence[str] | None = None, images: int = 1000, seed: int = 0) -> dict[str, list[int]]:
    """Channels to remove, the same share of every layer or as `allocate` says, by a criterion; each keeps at least one.

    Parameters
    ----------
    criterion : a kind of `relations`, whose clusters `redundant` thins out; or a score, the lowest of which go: "l1" of
        filters [Li et al. 2017]; "fpgm", summed distance to the other filters [He et al. 2019]; "taylor", mean squared
        change of the loss to first order [Molchanov et al. 2019]; "rank", mean rank of maps [Lin et al. 2020]; "chip", by
        how much the nuclear norm of a layer's maps, as a matrix (channels, pixels), falls without the channel, averaged
        over images [Sui et al. 2021], see `independence`; "group", sum of squares of all weights that go together, over
        its mean, by torch-pruning [Fang et al. 2023]; "random"
    share : of each layer's channels, in [0, 1), rounded down; or a share by the layer's name
    layers : by default those that `removable` names, or that have a share of their own
    images : of the training split, for criteria that look at images; "chip" looks at 100 of them at most

    Returns
    -------
    dict : for `remove`

    Raises
    ------
    ValueError
        an unknown name, a share that is none, a network in which no layer is removable, values that are not finite
    """
    _check_choice("criterion", criterion, CRITERIA)
    layers = list(share) if layers is None and isinstance(share, Mapping) else layers
    names = removable(net, data.shape) if layers is None else layers
    shares = dict(share) if isinstance(share, Mapping) else dict.fromkeys(names, share)
    if wrong := [one for one in (share.values() if isinstance(share, Mapping) else [share]) if not 0 <= one < 1]:
        raise ValueError(f"share={wrong[0]}: use a share from 0 to below 1")
    if layers is None and not names:
        raise ValueError(f"no convolution of {type(net).__name__} can lose channels: others share them, or what reads them "
                         "needs as many as there are")
    found = _convolutions(net, names)
    if missing := [name for name in found if name not in shares]:
        raise ValueError(f"no share for layer {', '.join(missing)}: give one for each layer, or one for all")
    counts = {name: _count(shares[name], conv.out_channels) for name, conv in found.items()}
    if criterion in KINDS:
        statistics = activations(net, data, names, rectify=None, images=images, grams=criterion == "cka", cross=False)
        return {name: redundant(statistics.relation(name, criterion), criterion, counts[name], layer.dead)
                for name, layer in statistics.layers.items()}
    values = scores(net, data, criterion, list(found), images, seed)
    return {name: sorted(values[name].argsort(stable=True)[:count].tolist()) for name, count in counts.items()}


def _count(share: float, total: int) -> int:
    return int(share * total + 1e-9)  # 0.29 * 100 is below 29


def allocate(net: nn.Module, shape: Sequence[int], contribution: Mapping[str, float], share: float = 0.5,
             tilt: float = 0.5) -> dict[str, float]:
    """A share for each removable layer, larger where the layer contributes less, at the MACs of the same share everywhere.

    ``share_l = clip(a (1 + tilt (n + 1 - 2 r_l) / (n - 1)), 0, b)`` for the n layers, with r_l = 1 for the one that
    contributes least and n for the one that contributes most. Bisection finds the a at which as many MACs are left as by
    `share`; b is 0.9, or `share` where that is more. Shares are rounded to whole channels. Where that takes the MACs off by
    more than 1 %, layers lose a channel more or less, never more than 1.5 off the formula; networks with a few narrow
    layers may stay off by more. Each layer keeps at least one channel.

    Parameters
    ----------
    shape : of an image, (C, H, W)
    contribution : by layer, such as the KL of whole layers by `contribution`; only the order counts, equal ones share a rank
    share : what `choose` would remove of every layer, in [0, 1)
    tilt : above -1 and below 1; 0 is the same share everywhere, a negative one takes more from layers that contribute more

    Returns
    -------
    dict : for `choose`, each share a whole number of channels

    Raises
    ------
    ValueError
        a share or tilt that is none, no removable layer, one without a contribution, contributions that are not finite
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: use a share from 0 to below 1")
    if not -1 < tilt < 1:
        raise ValueError(f"tilt={tilt}: use a number above -1 and below 1")
    names = removable(net, shape)
    if not names:
        raise ValueError(f"no convolution of {type(net).__name__} can lose channels")
    if missing := [name for name in names if name not in contribution]:
        raise ValueError(f"no contribution of layer {', '.join(missing)}: give one for each layer that removable() names")
    values = pd.Series({name: float(contribution[name]) for name in names})
    if not np.isfinite(values).all():
        raise ValueError("contributions are not finite; look for NaN or infinite weights")
    total = np.array([net.get_submodule(name).out_channels for name in names])
    weight = (1 + tilt * (len(names) + 1 - 2 * values.rank()) / max(len(names) - 1, 1)).to_numpy()
    macs, most = _macs_left(net, shape, names), max(0.9, share)
    target = macs(np.array([_count(share, one) for one in total]))
    counts = _whole(lambda a: (a * weight).clip(0, most) * total, macs, target, total - 1)
    return {name: count / one for name, count, one in zip(names, counts.tolist(), total.tolist(), strict=True)}


def _whole(removed: Callable[[float], np.ndarray], macs: Callable[[np.ndarray], float], target: float,
           most: np.ndarray) -> np.ndarray:
    """Whole numbers near those of `removed`, which grow with its argument, that leave MACs within 1 % if any such do."""
    low, high = 0.0, 1.0
    while macs(removed(high)) > target and high < 1e6:
        high *= 2
    for _ in range(60):
        centre = (low + high) / 2
        low, high = (centre, high) if macs(removed(centre)) > target else (low, centre)
    exact = removed(high)
    counts = np.round(exact).clip(0, most).astype(int)
    steps = [sign * row for row in np.eye(len(counts), dtype=int) for sign in (-1, 1)]
    steps += [one + other for one, other in combinations(steps, 2)]

    def error(one: np.ndarray) -> float:
        return abs(macs(one) - target)

    while error(counts) > 0.01 * target:
        others = [counts + step for step in steps]
        best = min((one for one in others if (abs(one - exact) <= 1.5).all() and (0 <= one).all() and (one <= most).all()),
                   key=error, default=counts)
        if error(best) >= error(counts):
            break
        counts = best
    return counts


def _macs_left(net: nn.Module, shape: Sequence[int], names: Sequence[str]) -> Callable[[np.ndarray], float]:
    """MACs of `net` without so many channels of each named layer: a layer's go with its inputs and with its outputs."""
    net = copy.deepcopy(net).cpu()
    table, graph = cost.count(net, shape).layers.set_index("layer").macs, _graph(net, shape)
    named = dict(net.named_modules())
    modules = [named.get(name) for name in table.index]  # operations without a module have the network's row
    read = np.zeros((len(table), len(names)))  # inputs of a layer that a channel of another one feeds
    for column, name in enumerate(names):
        for reader, inputs in _readers(graph, net, name, [0]).items():
            read[table.index.get_loc(reader), column] = len(inputs)
    inputs, outputs = (np.array([getattr(module, f"{side}_channels", None) or getattr(module, f"{side}_features", None) or 1
                                 for module in modules]) for side in ("in", "out"))
    own = np.array([[float(one == name) for name in names] for one in table.index])

    def macs(removed: np.ndarray) -> float:
        return float((table.to_numpy() * (1 - read @ removed / inputs) * (1 - own @ removed / outputs)).sum())

    return macs


def scores(net: nn.Module, data: ImageData, criterion: str = "l1", layers: Sequence[str] | None = None,
           images: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """A score for each channel of each layer, larger for what should stay; the criteria are explained in `choose`."""
    _check_choice("criterion", criterion, SCORES)
    by_maps = {"taylor": (_taylor, 250), "rank": (_rank, 250), "chip": (_chip, 50)}
    if criterion in by_maps:
        score, batch_size = by_maps[criterion]
        sample = _sample(data, min(images, CHIP_IMAGES) if criterion == "chip" else images, batch_size)
        values = score(net, _places(net, sample, layers), sample)
        _check_ran(layers, values)
    elif criterion == "group":
        values = _group_norm(net, data.shape, layers)
    else:
        generator = torch.Generator().manual_seed(seed)
        by_weight: dict[str, Callable[[Tensor], Tensor]] = {
            "l1": lambda filters: filters.abs().sum(1),
            "fpgm": lambda filters: torch.cdist(filters, filters).sum(1),
            "random": lambda filters: torch.rand(len(filters), generator=generator)}
        values = {name: by_weight[criterion](conv.weight.detach().flatten(1))
                  for name, conv in _convolutions(net, layers).items()}
    for name, value in values.items():
        _check_finite(name, f"scores by {criterion}", value)  # a sort would take NaN for the most important
    return values


def _taylor(net: nn.Module, places: Mapping[str, Place], sample: Batches) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    with torch.enable_grad(), evaluation_mode(net):
        for images, labels in sample:
            maps: dict[str, Tensor] = {}
            with _watching(places, maps.__setitem__):
                logits = net(images.to(_device(net)).requires_grad_())
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            # What does not reach the outputs has gradient and score 0.
            gradients = torch.autograd.grad(loss, list(maps.values()), materialize_grads=True) if maps else ()
            for name, gradient in zip(maps, gradients, strict=True):
                change = (maps[name].detach() * gradient).sum((2, 3))
                total[name] = total.get(name, 0) + change.double().square().sum(0)
    return {name: value / len(sample.labels) for name, value in total.items()}


def _rank(net: nn.Module, places: Mapping[str, Place], sample: Batches) -> dict[str, Tensor]:
    return _mean_over_images(net, places, sample, lambda maps: torch.linalg.matrix_rank(maps).double())


def _chip(net: nn.Module, places: Mapping[str, Place], sample: Batches) -> dict[str, Tensor]:
    return _mean_over_images(net, places, sample, lambda maps: independence(maps.flatten(2)))


@torch.no_grad()
def _mean_over_images(net: nn.Module, places: Mapping[str, Place], sample: Batches,
                      measure: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Mean over images, by layer, of what `measure` says (N, C) of maps (N, C, H, W) behind a ReLU."""
    total: dict[str, Tensor] = {}

    def take(name: str, maps: Tensor) -> None:
        _check_finite(name, "activations", maps)
        total[name] = total.get(name, 0) + measure(F.relu(maps)).sum(0)

    with evaluation_mode(net), _watching(places, take):
        for images, _ in sample:
            net(images.to(_device(net)))
    return {name: value / len(sample.labels) for name, value in total.items()}


def independence(maps: Tensor) -> Tensor:
    """Channel independence: by how much the nuclear norm of an image's maps falls when one channel is set to zero.

    ``||A||_* - ||M_i o A||_*`` for the maps A (channels, pixels), where M_i sets row i to zero and ``||.||_*`` is the sum
    of the singular values [Sui et al. 2021]; in units of the maps, never negative, 0 for a channel of zeros. The error is
    about 1e-8 of the largest singular value.

    Parameters
    ----------
    maps : (N, C, P), N images with C channels of P pixels

    Returns
    -------
    Tensor
        (N, C), float64

    Notes
    -----
    One eigendecomposition an image serves all channels. Without row a_i the Gram matrix falls by a matrix of rank one, and
    ``q_i(t) = det(A_i^T A_i + t) / det(A^T A + t) = 1 - a_i^T (A^T A + t)^-1 a_i`` holds all that its eigenvalues change.
    With ``sqrt(x) = (1 / pi) int_0^inf log(1 + x / s^2) ds`` the difference of the two sums of roots is
    ``-(1 / pi) int_0^inf log q_i(s^2) ds``. In ``x = log s`` the integrand is analytic and falls exponentially on either
    side, so that the trapezoidal rule with a step h errs by about ``exp(-pi^2 / h)``.
    """
    maps = maps.double()
    if maps.shape[1] <= maps.shape[2]:
        eigenvalues, vectors = torch.linalg.eigh(maps @ maps.mT)
        eigenvalues = eigenvalues.clamp_min(0)
        weights = vectors.square() * eigenvalues[:, None]
    else:
        eigenvalues, vectors = torch.linalg.eigh(maps.mT @ maps)
        eigenvalues = eigenvalues.clamp_min(0)
        weights = (maps @ vectors).square()
    step = 0.25
    grid = step * torch.arange(-92, 93, dtype=torch.float64, device=maps.device)
    largest = eigenvalues[:, -1:].sqrt().clamp_min(1e-30)  # an image without any activation has independence 0
    s = largest * grid.exp()
    inverse = 1 / (eigenvalues[:, :, None] + s.square()[:, None, :])
    q = (1 - weights @ inverse).clamp(1e-16, 1)
    return -step / torch.pi * (q.log() * s[:, None, :]).sum(2)


def _group_norm(net: nn.Module, shape: Sequence[int], layers: Sequence[str] | None) -> dict[str, Tensor]:
    import torch_pruning

    net = copy.deepcopy(net).cpu()
    graph = _graph(net, shape)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    return {name: importance(_group(graph, net, name, range(conv.out_channels))).detach()
            for name, conv in _convolutions(net, layers).items() if layers is not None or conv in graph.module2node}


# Removal.


def removable(net: nn.Module, shape: Sequence[int]) -> list[str]:
    """Names of the convolutions whose channels no other layer shares and `remove` can take, for images of `shape` (C, H, W).

    In a ResNet these are the first convolutions of its units: what is added to the state must fit it. Convolutions that do
    not run, such as those of a unit that is switched off, are not among them, nor those whose channels are read in groups.
    """
    net = copy.deepcopy(net).cpu()
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.nan_to_num_(0, 0, 0)  # what can be removed is not a matter of values
    graph, names = _graph(net, shape), []
    for name, conv in _convolutions(net).items():
        if conv.groups == 1 and conv.out_channels > 1 and conv in graph.module2node:
            writers = [dep for dep, _ in _group(graph, net, name, [0])
                       if isinstance(dep.target.module, (nn.Conv2d, nn.Linear)) and _writes(graph, dep)]
            if len(writers) == 1 and _readers(graph, net, name, [0]):
                names.append(name)
    return _tried(net, shape, names)


def _tried(net: nn.Module, shape: Sequence[int], names: list[str]) -> list[str]:
    """Those of the layers that can lose a channel: all of them at once, or else those of either half."""
    try:
        remove(net, shape, {name: [0] for name in names})
    except ValueError:
        half = len(names) // 2
        return _tried(net, shape, names[:half]) + _tried(net, shape, names[half:]) if half else []
    return names


def remove(net: nn.Module, shape: Sequence[int], channels: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of `net` without the given channels of the given layers: fewer weights, fewer operations, plain modules.

    BatchNorm and the layers that read the channels shrink with them. The result is compared, in float64, with `net` whose
    removed channels are zero where they are read; it differs by 1e-5 of the largest output at most.

    Parameters
    ----------
    shape : of an image, (C, H, W)
    channels : positions of the channels to remove, by name of the convolution

    Raises
    ------
    ValueError
        an unknown layer or position; all channels of a layer; a network that torch-pruning cannot trace, or whose outputs are
        not finite; layers whose removal breaks the network, takes other channels along, or changes what is left, such as
        those of a residual stream with padded shortcuts

    Examples
    --------
    >>> from fishlib import nets
    >>> remove(nets.small_cnn(10, (1, 8, 8)), (1, 8, 8), {"0": [0, 3]})[0].out_channels
    14
    """
    chosen = _checked(net, channels)
    smaller = copy.deepcopy(net)
    device = _device(smaller)
    flags = [parameter.requires_grad for parameter in smaller.parameters()]
    smaller.cpu().requires_grad_()
    masks = reader_masks(net, shape, chosen)
    graph = _graph(smaller, shape)
    try:
        for name, positions in chosen.items():
            if positions:
                _group(graph, smaller, name, positions).prune()
    except (RuntimeError, IndexError) as problem:
        raise _refused(f"torch-pruning fails ({problem})") from problem
    _check_sizes(net, smaller, chosen)
    for parameter, flag in zip(smaller.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None
    _compare(net, smaller, shape, masks)
    return smaller.to(device)


def plan(net: nn.Module, shape: Sequence[int], channels: Mapping[str, Iterable[int]]) -> pd.DataFrame:
    """What `remove` cuts, or refuses: layer, channels before and after, and the layers that read them."""
    chosen = _checked(net, channels)
    smaller, copied = remove(net, shape, chosen), copy.deepcopy(net).cpu()
    graph = _graph(copied, shape)
    return pd.DataFrame([
        {"layer": name, "before": net.get_submodule(name).out_channels, "after": smaller.get_submodule(name).out_channels,
         "read by": ", ".join(_readers(graph, copied, name, positions or [0]))}
        for name, positions in chosen.items()])


def masked_logits(net: nn.Module, images: Tensor, masks: Mapping[str, Iterable[int]]) -> Tensor:
    """Outputs of `net` with the given input channels of the given layers set to zero."""
    modules, handles = dict(net.named_modules()), []
    try:
        for name, positions in masks.items():
            index = torch.tensor(sorted(positions), dtype=torch.long, device=images.device)
            handles.append(modules[name].register_forward_pre_hook(
                lambda module, inputs, index=index: (inputs[0].index_fill(1, index, 0),)))
        with torch.no_grad(), evaluation_mode(net):
            return net(images)
    finally:
        for handle in handles:
            handle.remove()


def _checked(net: nn.Module, channels: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    found = _convolutions(net, list(channels))
    chosen = {name: sorted({int(one) for one in channels[name]}) for name in found}
    for name, positions in chosen.items():
        total = found[name].out_channels
        if positions and not 0 <= positions[0] <= positions[-1] < total:
            raise ValueError(f"channels {positions} of {name}: it has channels 0 to {total - 1}")
        if len(positions) == total:
            raise ValueError(f"all {total} channels of {name} would go: leave at least one")
    return chosen


def reader_masks(net: nn.Module, shape: Sequence[int], chosen: Mapping[str, list[int]]) -> dict[str, set[int]]:
    """For every layer that reads a removed channel, the positions among its inputs."""
    net = copy.deepcopy(net).cpu()
    graph = _graph(net, shape)
    masks: dict[str, set[int]] = {}
    for name, positions in chosen.items():
        if positions:
            for reader, inputs in _readers(graph, net, name, positions).items():
                masks.setdefault(reader, set()).update(inputs)
    return masks


def _compare(net: nn.Module, smaller: nn.Module, shape: Sequence[int], masks: Mapping[str, set[int]]) -> None:
    images = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = masked_logits(copy.deepcopy(net).cpu().double(), images, masks)
    if not torch.isfinite(expected).all():
        raise ValueError("the outputs of the network are not finite; look for NaN or infinite weights")
    try:
        found = masked_logits(copy.deepcopy(smaller).double(), images, {})
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    except (RuntimeError, ValueError, IndexError) as problem:
        raise _refused(f"the network does not run ({problem})") from problem
    if not error <= 1e-5:
        raise _refused(f"the outputs differ by {error:.1e} from those of the network in which they are zero")


def _check_sizes(net: nn.Module, smaller: nn.Module, chosen: Mapping[str, list[int]]) -> None:
    """Every layer has lost what was asked for, and says of itself what its weights are."""
    for name, positions in chosen.items():
        lost = net.get_submodule(name).out_channels - smaller.get_submodule(name).out_channels
        if lost != len(positions):
            raise _refused(f"{name} would lose {lost} channels in place of {len(positions)}: what reads it binds them together")
    for name, module in smaller.named_modules():
        if isinstance(module, nn.Conv2d):
            said = module.out_channels, module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            said = module.out_features, module.in_features
        else:
            continue
        if said != tuple(module.weight.shape[:2]):
            raise _refused(f"{name} would have weights {tuple(module.weight.shape)} for {said[1]} inputs and {said[0]} outputs")


def _refused(why: str) -> ValueError:
    return ValueError(f"without these channels {why}: remove only channels of layers that removable() names")


def _graph(net: nn.Module, shape: Sequence[int]):
    """torch-pruning's graph of dependencies; its tracer needs gradients, so `net` is a copy."""
    import torch_pruning

    net.requires_grad_()
    example = torch.zeros(1, *shape, dtype=next(net.parameters()).dtype)
    try:
        with torch.enable_grad(), evaluation_mode(net):
            return torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example, verbose=False)
    except Exception as error:  # a tracer fails in as many ways as networks can be written
        raise ValueError(f"torch-pruning cannot trace {type(net).__name__} for images of shape {tuple(shape)} "
                         f"({error})") from error


def _group(graph, net: nn.Module, name: str, positions: Iterable[int]):
    import torch_pruning

    conv = net.get_submodule(name)
    if conv not in graph.module2node:
        raise ValueError(f"torch-pruning did not find layer {name} in its trace: what it gives has to reach the outputs")
    return graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=list(positions))


def _writes(graph, dep) -> bool:
    return graph.is_out_channel_pruning_fn(dep.handler)


def _readers(graph, net: nn.Module, name: str, positions: Iterable[int]) -> dict[str, list[int]]:
    names = {module: one for one, module in net.named_modules()}
    readers: dict[str, list[int]] = {}
    for dep, inputs in _group(graph, net, name, positions):
        module = dep.target.module
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not _writes(graph, dep):
            readers.setdefault(names[module], []).extend(int(one) for one in inputs)
    return readers


# What the functions above share.


def _convolutions(net: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Conv2d]:
    found = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    if not found:
        raise ValueError(f"{type(net).__name__} has no nn.Conv2d: channels are those of convolutions")
    if layers is None:
        return found
    if unknown := [name for name in layers if name not in found]:
        raise ValueError(f"the network has no convolution named {', '.join(unknown)}: it has {', '.join(found)}")
    return {name: found[name] for name in layers}


@dataclass(frozen=True)
class Place:
    """Where the maps of a convolution are taken: behind `module`, the BatchNorm that alone reads what it gives, or itself.

    `relu`: whether a ReLU is all that reads the maps there.
    """

    module: nn.Module
    relu: bool


@torch.no_grad()
def _places(net: nn.Module, sample: Batches, layers: Sequence[str] | None = None) -> dict[str, Place]:
    """By convolution, as two images of the sample find them: the order of definition says nothing of what follows what."""
    convolutions = _convolutions(net, layers)
    calls: list[tuple[nn.Module, tuple, Tensor]] = []
    hooks = [module.register_forward_hook(lambda *call: calls.append(call))
             for module in net.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    images = next(iter(sample))[0][:2].to(_device(net))
    try:
        with evaluation_mode(net), _Reads() as reads:
            net(images)
    finally:
        for hook in hooks:
            hook.remove()

    def given(module: nn.Module) -> list[Tensor]:
        return [output for one, _, output in calls if one is module]

    def place(conv: nn.Conv2d) -> Place:
        outputs = given(conv)
        norms = [one for one, inputs, _ in calls if isinstance(one, nn.BatchNorm2d)
                 and any(x is y for x in inputs for y in outputs)]
        # A BatchNorm that serves other layers too, or is not all that reads this one, does not stand for it.
        own = (len(set(norms)) == 1 and len(norms) == len(outputs) == len(given(norms[0]))
               and all("batch_norm" in str(one) for y in outputs for one in reads.of(y)))
        module = norms[0] if own else conv
        return Place(module, all(reads.only_relu(y) for y in given(module)))

    return {name: place(conv) for name, conv in convolutions.items()}


class _Reads(TorchDispatchMode):
    """Which operations read each tensor, in order; it keeps the tensors, so that none takes the place of another."""

    RELUS = (torch.ops.aten.relu, torch.ops.aten.relu_)

    def __init__(self):
        super().__init__()
        self.reads: list[tuple[Tensor, object]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.reads += [(one, operation.overloadpacket) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        return operation(*args, **kwargs)

    def of(self, tensor: Tensor) -> list[object]:
        return [operation for one, operation in self.reads if one is tensor]

    def only_relu(self, tensor: Tensor) -> bool:
        readers = self.of(tensor)
        # In place, what comes later reads what the ReLU has left.
        return bool(readers) and (readers[0] is self.RELUS[1] or all(one in self.RELUS for one in readers))


@contextlib.contextmanager
def _watching(places: Mapping[str, Place], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [place.module.register_forward_hook(lambda m, i, output, name=name: take(name, output))
               for name, place in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(data: ImageData, images: int, batch_size: int, split: str = "train") -> Batches:
    every = data.batches(split, batch_size, shuffle=False)
    count = len(every.labels)
    if min(images, count) < 2:
        raise ValueError(f"{min(images, count)} images of the split {split!r}: statistics need two or more")
    return _evenly_spaced(every, images)


def _check_ran(layers: Sequence[str] | None, ran: Iterable[str]) -> None:
    """Layers that were asked for have to run; where none are named, those that do not are left out."""
    if missing := [name for name in layers or () if name not in ran]:
        raise ValueError(f"layer {', '.join(missing)} does not run in a forward pass: leave it out")


def _check_finite(layer: str, what: str, values: Tensor) -> None:
    if not torch.isfinite(values.detach().sum()):
        raise ValueError(f"layer {layer}: {what} are not finite; look for NaN or infinite weights or images")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
