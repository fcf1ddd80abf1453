"""Skip-units: removing them, asking how much each one matters, and the pruning algorithm that follows from the answer.

A network here has ``net.units`` in order (`nets.resnet`, `nets.densenet`, `nets.plain`, `nets.vgg`). Units are named by
their position in that list.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import cost, divergence
from .data import Batches, ImageData
from .training import digest, evaluate, evaluation_mode, fit

DENSITIES = ("diagonal", "full", "score-matching")
PAIRS = ("all", "reference")
FEATURES = ("flat", "pooled")
STANDARDISE = ("feature", "sample")
FORMULAS = ("fisher", "published")
HEADS = ("centroid", "lowest")
ORDERS = ("single", "random", "forward")
# The choices of the code published with the method, for `fisher_score`.
PUBLISHED = {"formula": "published", "pairs": "reference", "standardise": "sample"}
MEMORY = 1 << 30  # bytes of features that are kept at once

# Removing units.


@contextlib.contextmanager
def removed(net: nn.Module, units: Iterable[int]) -> Iterator[nn.Module]:
    """The network with the units at these positions switched off; alpha is as before at the end."""
    every = units_of(net)
    before = [unit.active for unit in every]
    try:
        for position in _positions(every, units):
            every[position].switch(False)
        yield net
    finally:
        for unit, on in zip(every, before, strict=True):
            unit.switch(on)


def keep(net: nn.Module, units: Iterable[int]) -> nn.Module:
    """A copy of `net` that has only the units at these positions; the other ones are physically gone.

    Its outputs are those of `net` with alpha 0 for the other units, up to rounding. A ResNet keeps the shortcut of a
    removed unit that changes the shape; a DenseNet loses the weights that read the removed maps.

    Examples
    --------
    >>> from fishlib import nets
    >>> len(keep(nets.resnet(20), [0, 1, 5]).units)
    3
    """
    every = units_of(net)
    chosen = set(_positions(every, units))
    smaller = copy.deepcopy(net)
    smaller.drop({unit.index for position, unit in enumerate(every) if position not in chosen})
    return smaller


def units_of(net: nn.Module) -> list[nn.Module]:
    """``net.units``; ValueError for a network that has none."""
    units = list(getattr(net, "units", ()))
    if not units:
        raise ValueError(f"{type(net).__name__} has no skip-units: use nets.resnet, nets.densenet, nets.plain or nets.vgg "
                         "with at least one unit left")
    return units


def _positions(units: Sequence[nn.Module], chosen: Iterable[int]) -> list[int]:
    chosen = sorted({int(position) for position in chosen})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < len(units):
        raise ValueError(f"units {chosen}: the network has units 0 to {len(units) - 1}")
    return chosen


@torch.no_grad()
def lesion(net: nn.Module, data: ImageData, order: str = "single", repeats: int = 5, split: str = "validation",
           seed: int = 0, batch_size: int = 256) -> pd.DataFrame:
    """Accuracy of `net` after removing units, without any training.

    Everything up to the first removed unit is computed once for all lesions that agree there.

    Parameters
    ----------
    order : "single": each unit alone; "random": growing sets in `repeats` random orders; "forward": growing sets from
        the input on
    split : where accuracy is measured

    Returns
    -------
    DataFrame
        one row per lesion: repeat, removed (number of units), unit and stage (of a single one), units (tuple of
        positions), accuracy, loss_points (percentage points below the intact network). The first row is that network.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: use one of {', '.join(ORDERS)}")
    if repeats < 1 or batch_size < 1:
        raise ValueError(f"repeats={repeats}, batch_size={batch_size}: use at least 1 of each")
    units = units_of(net)
    rows = _lesions(len(units), order, repeats, seed)
    correct = torch.zeros(len(rows), dtype=torch.int64)
    samples = 0
    with evaluation_mode(net):
        device = next(net.parameters()).device
        for images, labels in data.batches(split, batch_size, shuffle=False):
            labels = labels.to(device)
            sets = {row: chosen for row, (_, chosen) in enumerate(rows)}
            for logits, members in _branches(net, list(net.steps), units, net.stem(images.to(device)), sets):
                correct[members] += int((logits.argmax(1) == labels).sum())
            samples += len(labels)
    accuracy = (correct.double() / samples).tolist()
    return pd.DataFrame([
        {"repeat": repeat, "removed": len(chosen), "unit": unit, "stage": None if unit is None else units[unit].stage,
         "units": tuple(sorted(chosen)), "accuracy": value, "loss_points": 100 * (accuracy[0] - value)}
        for (repeat, chosen), value in zip(rows, accuracy, strict=True)
        for unit in [next(iter(chosen)) if len(chosen) == 1 else None]])


def _lesions(count: int, order: str, repeats: int, seed: int) -> list[tuple[int, frozenset[int]]]:
    intact = [(0, frozenset[int]())]
    if order == "single":
        return intact + [(0, frozenset([unit])) for unit in range(count)]
    rng = np.random.default_rng(seed)
    orders = [range(count)] if order == "forward" else [rng.permutation(count).tolist() for _ in range(repeats)]
    return intact + [(repeat, frozenset(one[:size])) for repeat, one in enumerate(orders) for size in range(1, count + 1)]


def _branches(net: nn.Module, steps: list[nn.Module], units: list[nn.Module], x: Tensor,
              sets: Mapping[int, frozenset[int]]) -> Iterator[tuple[Tensor, list[int]]]:
    """Logits for every set of removed units, with the names of the sets; a prefix that sets share is computed once."""
    for here, step in enumerate(steps):
        unit = next((position for position, one in enumerate(units) if one is step), None)
        without = {name: chosen for name, chosen in sets.items() if unit in chosen}
        if without:
            yield from _branches(net, steps[here + 1:], units, step.bypass(x), without)
            sets = {name: chosen for name, chosen in sets.items() if unit not in chosen}
        if not sets:
            return
        x = step(x)
    yield net.head(x), list(sets)


# Scores of units: how much the feature maps T of a unit say about the label.


def fisher_score(net: nn.Module, data: ImageData, density: str = "diagonal", pairs: str = "all", feature: str = "flat",
                 standardise: str = "feature", formula: str = "fisher", images: int = 5000, floor: float = 1e-2,
                 seed: int = 0, batch_size: int = 125) -> pd.Series:
    """Fisher score of every active unit: ``F(T, Y) = max over ordered pairs (i, j) of D_F(p_i, p_j)``.

    p_i is the density of the unit's feature maps T (before the addition) given class i, estimated on training images
    without augmentation; D_F sums over features (see `divergence.fisher_divergence`). One pass over the images; class
    means and variances merge batch by batch in float64.

    Parameters
    ----------
    density : "diagonal" or "full" (covariance shrunk by a tenth) Gaussians, or gradients of log-densities fitted by sliced
        "score-matching"; the latter two need features that fit into memory
    pairs : "all" ordered pairs as defined, or "reference": every class against the most frequent one, as published
    feature : "flat" takes all C H W numbers, "pooled" the C means over pixels
    standardise : "feature" gives each feature mean 0 and variance 1 over all images; "sample" does so for each image over
        its features, as published
    formula : "fisher", or "published" for that of the published code (diagonal only)
    images : number of training images, evenly spaced in the training split
    floor : class variances below this are raised to it, in units of the standardised features, for "score-matching" by
        adding noise: without a floor, pixels that hardly vary within a class would decide alone. "full" densities, which
        are shrunk, need it only in a class where nothing varies

    Returns
    -------
    Series
        the score, indexed by position in ``net.units``; larger means more different classes. A feature that never changes
        counts nothing.

    Raises
    ------
    ValueError
        no units, no images, fewer than two classes, a class with a single image, features that are not finite or do not
        fit into memory, a negative floor
    """
    for name, value, choices in (("density", density, DENSITIES), ("pairs", pairs, PAIRS), ("feature", feature, FEATURES),
                                 ("standardise", standardise, STANDARDISE), ("formula", formula, FORMULAS)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
    if formula == "published" and density != "diagonal":
        raise ValueError("the published formula is for diagonal densities: use density='diagonal'")
    if not 0 <= floor < np.inf:
        raise ValueError(f"floor={floor}: use a variance of at least 0, such as 0.01")
    if density == "diagonal":
        values = _diagonal_scores(net, data, pairs, feature, standardise, formula, images, floor, batch_size)
    else:
        values = _density_scores(net, data, density, pairs, feature, standardise, images, floor, seed)
    return _series(net, values, "fisher")


def _diagonal_scores(net: nn.Module, data: ImageData, pairs: str, feature: str, standardise: str, formula: str,
                     images: int, floor: float, batch_size: int) -> list[float]:
    sample = _sample(data, images, batch_size)
    classes = _check_classes(sample.labels)
    moments: list[Moments | None] = [None] * len(_active(net))

    def take(position: int, maps: Tensor, labels: Tensor) -> None:
        x = _features(maps, feature, standardise)
        if moments[position] is None:
            moments[position] = Moments(classes, x.shape[1], x.device)
        moments[position].add(x, labels)

    _stream(net, sample, take)
    reference = int(torch.bincount(sample.labels).argmax())
    return [_largest_divergence(one, pairs, standardise, formula, floor, reference) for one in moments]


def _largest_divergence(moments: Moments, pairs: str, standardise: str, formula: str, floor: float,
                        reference: int) -> float:
    present = moments.counts > 0
    mean, var = moments.mean[present], moments.variance[present]
    if not torch.isfinite(var).all():
        raise ValueError("feature maps are not finite: the network has NaN or infinite weights, or its input has")
    reference = int(present[:reference].sum())
    if standardise == "feature":
        share = (moments.counts[present] / moments.counts.sum())[:, None]
        centre = (share * mean).sum(0)
        total = (share * (var + (mean - centre).square())).sum(0)
        varies = total > _rounding(centre)
        # The published formula depends on where the features lie, so the mean over all images goes as well.
        mean, var = (mean - centre)[:, varies] / total[varies].sqrt(), var[:, varies] / total[varies]
    var = var.clamp_min(floor)
    if formula == "fisher" and pairs == "all":
        return float(divergence.fisher_divergence_pairs(mean, var).max())
    formula = divergence.fisher_divergence if formula == "fisher" else divergence.published_divergence
    others = [reference] if pairs == "reference" else range(len(mean))
    return max(float(formula(mean, var, mean[q], var[q]).max()) for q in others)


def _rounding(mean: Tensor) -> Tensor:
    """The variance below which a feature of this mean counts as constant: single precision makes about so much of nothing."""
    return 1e-12 * (1 + mean.square())


class Moments:
    """Means and variances of rows by class, merged batch by batch in float64 [Chan et al. 1983]."""

    def __init__(self, classes: int, features: int, device: torch.device):
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self.mean = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)  # sums of squared deviations from the class mean

    @property
    def variance(self) -> Tensor:
        """With divisor n - 1, shape (classes, features)."""
        return self.squares / (self.counts - 1).clamp_min(1)[:, None]

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Rows x (N, D) with labels (N,)."""
        member = F.one_hot(labels, len(self.counts)).to(x.dtype).T
        new = member.sum(1).double()
        mean = (member / new.to(x.dtype).clamp_min(1)[:, None]) @ x
        squares = member @ (x - mean[labels]).square_()
        total = self.counts + new
        share = (new / total.clamp_min(1))[:, None]
        difference = mean.double().sub_(self.mean)
        self.squares += squares
        self.squares.addcmul_(difference.square(), self.counts[:, None] * share)
        self.mean.addcmul_(difference, share)
        self.counts = total


def _density_scores(net: nn.Module, data: ImageData, density: str, pairs: str, feature: str, standardise: str,
                    images: int, floor: float, seed: int) -> list[float]:
    features, labels = collect(net, data, feature, standardise, images)
    classes, reference = labels.unique().tolist(), int(torch.bincount(labels).argmax())
    widest = max(x.shape[1] for x in features)
    if density == "full" and 8 * len(classes) * widest**2 > MEMORY:
        raise ValueError(f"{len(classes)} covariances of {widest:,} {feature} features take over {MEMORY >> 20} MiB: use "
                         "feature='pooled' or density='diagonal'")
    between = [(p, q) for q in (classes if pairs == "all" else [reference]) for p in classes if p != q]
    varying = (x[:, x.var(0) > _rounding(x.mean(0))].double() for x in features)  # the others count nothing
    return [max(_pairwise(x, labels, density, between, floor, seed)) if x.shape[1] else 0.0 for x in varying]


def _pairwise(x: Tensor, labels: Tensor, density: str, between: list[tuple[int, int]], floor: float,
              seed: int) -> list[float]:
    rows = {label: x[labels == label] for label in labels.unique().tolist()}
    if density == "full":
        cov = {label: divergence.shrunk_covariance(one) for label, one in rows.items()}
        for one in cov.values():
            if one.trace() == 0:  # nothing varies within the class
                one.diagonal().fill_(floor)
        mean = {label: one.mean(0) for label, one in rows.items()}
        return [float(divergence.fisher_divergence_gaussian(mean[p], cov[p], mean[q], cov[q])) for p, q in between]
    rows = {label: _raised(one, floor, seed + label).float() for label, one in rows.items()}
    scores = {label: divergence.fit_score(one, seed=seed) for label, one in rows.items()}
    return [float(divergence.fisher_divergence_sampled(rows[p], scores[p], scores[q])) for p, q in between]


def _raised(x: Tensor, floor: float, seed: int) -> Tensor:
    """Rows with so much noise that every feature has a variance of `floor` or more: a density, which an atom has not."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    return x + noise * (floor - x.var(0)).clamp_min(0).sqrt()


def energy_score(net: nn.Module, data: ImageData, feature: str = "pooled", standardise: str = "feature",
                 images: int = 1000, seed: int = 0) -> pd.Series:
    """Distance correlation of each active unit's features with the label, in [0, 1]: an energy distance, no density."""
    return _dependence(net, data, feature, standardise, images, divergence.distance_correlation, "energy")


def kde_score(net: nn.Module, data: ImageData, feature: str = "pooled", standardise: str = "feature",
              images: int = 1000, seed: int = 0) -> pd.Series:
    """Mutual information in nats of each active unit's features with the label, from kernel densities."""
    return _dependence(net, data, feature, standardise, images, divergence.kde_mutual_information, "kde")


def cka_score(net: nn.Module, data: ImageData, feature: str = "pooled", standardise: str = "feature",
              images: int = 1000, seed: int = 0) -> pd.Series:
    """Linear centred kernel alignment of each active unit's features with the one-hot label, in [0, 1]."""
    return _dependence(net, data, feature, standardise, images,
                       lambda x, labels: divergence.linear_cka(x, F.one_hot(labels).to(x.dtype)), "cka")


def taylor_score(net: nn.Module, data: ImageData, images: int = 1000, seed: int = 0) -> pd.Series:
    """Mean over images of ``<T, dL/dT>^2``: the squared first-order change of the loss when alpha goes [Molchanov 2017].

    The gradients of the network's parameters stay as they are.
    """
    units = _active(net)
    total = [0.0] * len(units)
    with evaluation_mode(net), torch.enable_grad():
        for batch, labels in _sample(data, images, 125):
            maps: dict[int, Tensor] = {}
            with _watching(units, maps.__setitem__):
                logits = net(batch.to(_device(net)).requires_grad_())
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, list(maps.values()))
            for position, gradient in zip(maps, gradients, strict=True):
                change = (maps[position].detach() * gradient).flatten(1).sum(1)
                total[position] += float(change.double().square().sum())
    return _series(net, [one / min(images, data.size("train")) for one in total], "taylor")


def norm_score(net: nn.Module, data: ImageData | None = None, seed: int = 0) -> pd.Series:
    """Root mean square of the convolution weights of each active unit; needs no data."""
    values = []
    for unit in _active(net):
        weights = torch.cat([m.weight.detach().flatten() for m in unit.modules() if isinstance(m, nn.Conv2d)])
        values.append(float(weights.double().square().mean().sqrt()))
    return _series(net, values, "norm")


def random_score(net: nn.Module, data: ImageData | None = None, seed: int = 0) -> pd.Series:
    """Uniform numbers: what every other score has to beat."""
    return _series(net, np.random.default_rng(seed).random(len(_active(net))).tolist(), "random")


def published_score(net: nn.Module, data: ImageData, images: int = 5000, seed: int = 0) -> pd.Series:
    """`fisher_score` with the choices of the published code (`PUBLISHED`)."""
    return fisher_score(net, data, images=images, **PUBLISHED).rename("published")


SCORES: dict[str, Callable[..., pd.Series]] = {
    "fisher": fisher_score, "published": published_score, "energy": energy_score, "kde": kde_score, "cka": cka_score,
    "taylor": taylor_score, "norm": norm_score, "random": random_score}


@torch.no_grad()
def collect(net: nn.Module, data: ImageData, feature: str = "pooled", standardise: str = "feature",
            images: int = 1000) -> tuple[list[Tensor], Tensor]:
    """Standardised features (N, D) of each active unit, and the labels (N,), of training images without augmentation."""
    sample = _sample(data, images, 125)
    _check_classes(sample.labels)
    parts: list[list[Tensor]] = [[] for _ in _active(net)]
    used = 0

    def take(position: int, maps: Tensor, labels: Tensor) -> None:
        nonlocal used
        x = _features(maps, feature, standardise)
        used += x.nbytes
        if used > MEMORY:
            raise ValueError(f"{feature} features of {len(sample.labels)} images take over {MEMORY >> 20} MiB: use "
                             "feature='pooled' or fewer images")
        parts[position].append(x)

    _stream(net, sample, take)
    features = [torch.cat(part) for part in parts]
    if not all(torch.isfinite(x).all() for x in features):
        raise ValueError("feature maps are not finite: the network has NaN or infinite weights, or its input has")
    if standardise == "feature":
        features = [(x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6) for x in features]
    return features, sample.labels.to(_device(net))


def _dependence(net: nn.Module, data: ImageData, feature: str, standardise: str, images: int,
                measure: Callable[[Tensor, Tensor], Tensor], name: str) -> pd.Series:
    features, labels = collect(net, data, feature, standardise, images)
    return _series(net, [float(measure(x.double(), labels)) for x in features], name)


def _active(net: nn.Module) -> list[nn.Module]:
    if not (active := [unit for unit in units_of(net) if unit.active]):
        raise ValueError("all units of the network are switched off: there is nothing to score")
    return active


def _series(net: nn.Module, values: list[float], name: str) -> pd.Series:
    positions = [position for position, unit in enumerate(net.units) if unit.active]
    if broken := [position for position, value in zip(positions, values, strict=True) if not np.isfinite(value)]:
        raise ValueError(f"the {name} score of unit {broken[0]} is not finite: the network has NaN or infinite weights, or "
                         "its input has")
    return pd.Series(values, index=pd.Index(positions, name="unit"), name=name, dtype=float)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _sample(data: ImageData, images: int, batch_size: int) -> Batches:
    if images < 1 or batch_size < 1:
        raise ValueError(f"images={images}, batch_size={batch_size}: use at least 1 of each")
    return _evenly_spaced(data.batches("train", batch_size, shuffle=False), images)


def _evenly_spaced(every: Batches, images: int) -> Batches:
    """Batches of so many of the images, from the first to the last."""
    count = len(every.labels)
    chosen = torch.linspace(0, count - 1, min(images, count), dtype=torch.float64).round().long().to(every.labels.device)
    return Batches(every.images[chosen], every.labels[chosen], every.mean, every.std, every.batch_size)


def _check_classes(labels: Tensor) -> int:
    """Number of classes up to the largest label; ValueError unless there are two, each with two images or more."""
    counts = torch.bincount(labels)
    if int((counts > 0).sum()) < 2:
        raise ValueError("the images are of one class only: a score compares the classes of a unit's features")
    if bool((counts == 1).any()):
        raise ValueError(f"class {int((counts == 1).nonzero()[0])} has a single image among the {len(labels)}: a variance "
                         "needs two or more, so raise `images` or leave the class out")
    return len(counts)


def _features(maps: Tensor, feature: str, standardise: str) -> Tensor:
    x = maps.mean((2, 3)) if feature == "pooled" else maps.flatten(1)
    x = x.float()
    if standardise == "sample":
        x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp_min(1e-6)
    return x


@torch.no_grad()
def _stream(net: nn.Module, sample: Batches, take: Callable[[int, Tensor, Tensor], None]) -> None:
    """One pass in evaluation mode; ``take(position among active units, maps, labels)`` sees each map once."""
    units, device = _active(net), _device(net)
    with evaluation_mode(net):
        for images, labels in sample:
            labels = labels.to(device)
            with _watching(units, lambda position, maps, labels=labels: take(position, maps, labels)):
                net(images.to(device))


@contextlib.contextmanager
def _watching(units: Sequence[nn.Module], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    hooks = [unit.writer.register_forward_hook(lambda module, inputs, output, position=position: take(position, output))
             for position, unit in enumerate(units)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Clusters of scores.


def cluster(scores: Sequence[float], k: int) -> np.ndarray:
    """Optimal k-means of numbers: cluster labels 0 to k - 1 from the lowest centroid up, shape (n,).

    Minimises the sum of squared distances to the centroids exactly, by dynamic programming over the sorted numbers
    [Wang and Song 2011]: O(k n^2). All k clusters are non-empty; where scores are equal, the order of the units decides, so
    that equal scores give the same clusters every time.

    Raises
    ------
    ValueError
        scores that are not finite, k below 1 or above the number of scores
    """
    values = np.asarray(scores, dtype=float)
    n = len(values)
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite: look for NaN features in the unit that has it")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} clusters of {n} units: use a k from 1 to {n}")
    order = np.argsort(values, kind="stable")
    spread = _spreads(values[order])
    best = np.full((k + 1, n + 1), np.inf)  # of the first `end` numbers in `parts` clusters
    best[0, 0] = 0
    split = np.zeros((k + 1, n + 1), dtype=int)
    for parts in range(1, k + 1):
        for end in range(parts, n + 1):
            starts = np.arange(parts - 1, end)
            totals = best[parts - 1, starts] + spread[starts, end]
            split[parts, end] = starts[np.argmin(totals)]
            best[parts, end] = totals.min()
    labels = np.empty(n, dtype=int)
    end = n
    for part in range(k, 0, -1):
        labels[order[split[part, end]:end]] = part - 1
        end = split[part, end]
    return labels


def _spreads(ordered: np.ndarray) -> np.ndarray:
    """Entry (start, end): sum of squared distances of ``ordered[start:end]`` to their mean, shape (n, n + 1).

    Each start has its own running mean [Welford 1962]: differences of sums over everything before would lose small
    clusters beside large numbers.
    """
    spread = np.zeros((len(ordered), len(ordered) + 1))
    for start in range(len(ordered)):
        mean, total = 0.0, 0.0
        for size, value in enumerate(ordered[start:].tolist(), 1):
            difference = value - mean
            mean += difference / size
            total += difference * (value - mean)
            spread[start, start + size] = total
    return spread


def heads(scores: Sequence[float], labels: Sequence[int], head: str = "centroid") -> list[int]:
    """One place of each cluster, in order: the score nearest to the mean ("centroid") or the first place ("lowest").

    "centroid" is the definition; "lowest" is what the published code does: the unit nearest to the input. Ties go to the
    lowest place; so it is in every cluster of two, whose members are equally near to their mean.
    """
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}: use one of {', '.join(HEADS)}")
    values, labels = np.asarray(scores, dtype=float), np.asarray(labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if head == "lowest":
        return sorted(int(one[0]) for one in members)
    return sorted(int(one[_nearest(values[one])]) for one in members)


def _nearest(values: np.ndarray) -> int:
    """The first of the values that are nearest to their mean, but for rounding."""
    distance = np.abs(values - values.mean())
    return int(np.argmax(distance <= distance.min() + 1e-9 * np.abs(values).max()))


# The pruning algorithm.


@dataclass(frozen=True)
class Pruned:
    """What `prune_units` returns.

    Attributes
    ----------
    net : the pruned and retrained network
    kept : positions in the units of the network that was given
    table : one row per candidate: stage, k, kept, train_error and validation_error (before retraining),
        train_error_after and validation_error_after (of those retrained), parameters, macs, flops, chosen. Row 0, stage -1,
        is the network that was given.
    scores : one row per unit and stage: stage, unit, score, and for each candidate k its cluster
    """

    net: nn.Module
    kept: list[int]
    table: pd.DataFrame
    scores: pd.DataFrame


def prune_units(net: nn.Module, data: ImageData, stages: int = 3, candidates: Sequence = (0.9, 0.75, 0.6),
                score: str | Callable[[nn.Module, ImageData], pd.Series] = "fisher", tolerance: float = 0.0,
                head: str = "centroid", retrain: Mapping[str, Any] | None = None, decide: str = "validation",
                compare: str = "before", folder: str | Path | None = None, seed: int = 0,
                progress: bool | None = None) -> Pruned:
    """Prune whole units in stages: score, cluster, keep one head of each cluster, retrain [Soltani, algorithm 1].

    In each stage, for every k of the candidates, the scores of the units left are put into k clusters and one unit of each
    stays. The smallest k whose error is at most `tolerance` above the least error of all candidates is taken, and the smaller
    network is retrained from the weights that it has. The test split is never read.

    Parameters
    ----------
    candidates : numbers of clusters, or shares of the active units between 0 and 1; one list for all stages, or a list of
        lists. Numbers that are not below the number of active units are left out; a stage without any ends the run.
    score : a name out of `SCORES`, or a function of network and data to a Series of every unit, indexed by position
    tolerance : in units of the error, a fraction. The paper's rule is 0: with the training error it favours the largest k.
    head : see `heads`
    retrain : keyword arguments of `fit` other than `checkpoint` and `seed`; None leaves the weights
    decide : split whose error decides, "validation" or "train" (the paper's)
    compare : "before": candidates are compared as they are cut, and only the chosen one is retrained; "after": each one is
        retrained first, which costs more
    folder : where each finished stage is kept; with the same arguments the run goes on from there to the same result.
        Functions are told apart by their code and what it encloses, objects by their repr
    seed : of retraining and of scores that draw
    progress : a progress bar; by default in terminals only

    Raises
    ------
    ValueError
        wrong arguments, a network without units, a folder that is damaged or of a run with other arguments, or one for
        arguments that cannot be told apart
    """
    candidates = _as_lists(candidates)
    _check_pruning(net, stages, candidates, tolerance, decide, compare, score, retrain or {})
    net = keep(net, range(len(units_of(net)))).to(data.device)
    active = [position for position, unit in enumerate(net.units) if unit.active]
    store = Store(folder, {
        "stages": stages, "candidates": candidates, "score": score, "tolerance": tolerance, "head": head,
        "retrain": dict(retrain or {}), "decide": decide, "compare": compare, "seed": seed, "data": data.fingerprint,
        "images": data.size("train"), "split": data.seed, "batch_size": data.batch_size, "augment": data.augment,
        "network": digest(net.state_dict())})
    done = store.load()
    if not done:
        done = [{"kept": active, "scores": [], "candidates": [_measure(keep(net, active), active, data)
                                                              | {"stage": -1, "chosen": True}]}]
        store.save(done, keep(net, active))
    current = keep(net, done[-1]["kept"])
    store.restore(current, len(done) - 1)
    rule = Rule(score, tolerance, head, dict(retrain or {}), decide, compare, seed)
    with _bar(stages, len(done) - 1, progress) as bar:
        for stage in range(len(done) - 1, stages):
            ks = _candidates(candidates, stage, len(done[-1]["kept"]))
            if not ks:
                break
            row, current = _stage(current, done[-1]["kept"], data, stage, ks, rule, store)
            done.append(row)
            store.save(done, current)
            bar.update()
    return Pruned(current.eval(), done[-1]["kept"], pd.DataFrame([row for one in done for row in one["candidates"]]),
                  pd.DataFrame([row for one in done for row in one["scores"]]))


@dataclass(frozen=True)
class Rule:
    """How a stage decides and retrains; see `prune_units`."""

    score: str | Callable
    tolerance: float
    head: str
    retrain: dict[str, Any]
    decide: str
    compare: str
    seed: int


def _stage(net: nn.Module, kept: list[int], data: ImageData, stage: int, ks: list[int], rule: Rule,
           store: Store) -> tuple[dict[str, Any], nn.Module]:
    if callable(rule.score):
        scores = _check_scores(rule.score(net, data), len(kept))
    else:
        scores = SCORES[rule.score](net, data, seed=rule.seed + stage)
    clusters = {k: cluster(scores.to_numpy(), k) for k in ks}
    smaller, rows = {}, {}
    for k in ks:
        stay = heads(scores.to_numpy(), clusters[k], rule.head)
        smaller[k] = keep(net, stay)
        rows[k] = _measure(smaller[k], [kept[place] for place in stay], data) | {"stage": stage, "chosen": False}

    def retrain(k: int) -> None:
        if rule.retrain:
            smaller[k], _ = fit(smaller[k], data, seed=rule.seed + 1 + stage, checkpoint=store.checkpoint(stage, k),
                                **rule.retrain)
            rows[k] |= {f"{split}_error_after": 1 - evaluate(smaller[k], data, split).accuracy
                        for split in ("train", "validation")}

    if rule.compare == "after":
        for k in ks:
            retrain(k)
    column = f"{rule.decide}_error" + ("_after" if rule.compare == "after" and rule.retrain else "")
    chosen = choose({k: rows[k][column] for k in ks}, rule.tolerance)
    if rule.compare == "before":
        retrain(chosen)
    rows[chosen]["chosen"] = True
    table = [{"stage": stage, "unit": kept[place], "score": float(value)}
             | {f"cluster_{k}": int(clusters[k][place]) for k in ks} for place, value in enumerate(scores)]
    return {"kept": rows[chosen]["kept"], "scores": table, "candidates": list(rows.values())}, smaller[chosen]


def _check_scores(scores: Any, count: int) -> pd.Series:
    if not isinstance(scores, pd.Series) or sorted(scores.index) != list(range(count)):
        given = f"of {list(scores.index)}" if isinstance(scores, pd.Series) else f"a {type(scores).__name__}"
        raise ValueError(f"the score gave {given}: let it give a pandas Series with one value for each of the units 0 to "
                         f"{count - 1}, indexed by them")
    return scores.sort_index()


def choose(errors: Mapping[int, float], tolerance: float = 0.0) -> int:
    """The smallest k whose error is at most `tolerance` above the least one."""
    least = min(errors.values())
    return min(k for k, error in errors.items() if error <= least + tolerance + 1e-12)


def _measure(net: nn.Module, kept: list[int], data: ImageData) -> dict[str, Any]:
    """Errors and cost of a network, in the columns of the record."""
    counted = cost.count(net, data.shape)
    errors = {f"{split}_error": 1 - evaluate(net, data, split).accuracy for split in ("train", "validation")}
    return {"stage": None, "k": len(kept), "kept": list(kept)} | errors | {
        "train_error_after": None, "validation_error_after": None, "parameters": counted.parameters,
        "macs": counted.macs, "flops": counted.flops}


def _check_pruning(net: nn.Module, stages: int, candidates: Sequence, tolerance: float, decide: str, compare: str,
                   score: Any, retrain: Mapping[str, Any]) -> None:
    count = len(units_of(net))
    if stages < 1:
        raise ValueError(f"stages={stages}: use at least 1")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: use an error of at least 0, such as 0.01")
    if decide not in ("train", "validation"):
        raise ValueError(f"decide={decide!r}: use 'train' or 'validation'; the test split decides nothing")
    if compare not in ("before", "after"):
        raise ValueError(f"compare={compare!r}: use 'before' or 'after'")
    if not callable(score) and score not in SCORES:
        raise ValueError(f"unknown score {score!r}: use one of {', '.join(SCORES)}")
    taken = [name for name in inspect.signature(fit).parameters if name not in ("net", "data", "checkpoint", "seed")]
    if wrong := [name for name in retrain if name not in taken]:
        raise ValueError(f"retrain has {', '.join(wrong)}: use {', '.join(taken)}; the folder keeps the checkpoints, and the "
                         "seed is that of prune_units")
    given = candidates if isinstance(candidates, list) else []
    values = [one for part in given for one in (part if isinstance(part, list) else [part])]
    mixed = len({isinstance(part, list) for part in given}) > 1 or not all(isinstance(one, int | float) for one in values)
    if not given or mixed or (_nested(given) and len(given) < stages):
        raise ValueError(f"candidates {candidates!r}: give numbers or shares, or {stages} lists of them")
    for value in values:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"candidate {value}: a share lies between 0 and 1, a number of clusters is an integer")
        if not isinstance(value, float) and not 1 <= value <= count:
            raise ValueError(f"candidate k={value}: the network has {count} units")


def _as_lists(candidates: Any) -> Any:
    """Sequences and NumPy's arrays as lists, NumPy's numbers as Python's."""
    if isinstance(candidates, np.ndarray | np.generic):
        return candidates.tolist()
    if isinstance(candidates, Sequence) and not isinstance(candidates, str):
        return [_as_lists(one) for one in candidates]
    return candidates


def _nested(candidates: Sequence) -> bool:
    return isinstance(candidates[0], list)


def _candidates(candidates: Sequence, stage: int, active: int) -> list[int]:
    given = candidates[stage] if _nested(candidates) else candidates
    ks = {max(1, round(one * active)) if isinstance(one, float) else int(one) for one in given}
    return sorted(k for k in ks if k < active)


class Store:
    """The folder of a pruning run: settings and record in record.json, weights of each stage beside it; or no folder.

    Weights are written before the record that counts them, each file in one step, so that a run that was stopped anywhere
    finds a whole stage.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]):
        self.folder = Path(folder) if folder else None
        self.settings = {name: _plain(value, name) for name, value in settings.items()} if folder else {}

    def load(self) -> list[dict[str, Any]]:
        """The finished stages; ValueError for the folder of a run with other settings."""
        if not self.folder or not (self.folder / "record.json").exists():
            return []
        try:
            found = json.loads((self.folder / "record.json").read_text())
            settings, stages = found["settings"], found["stages"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'record.json'} is damaged ({error}): delete the folder to start "
                             "anew") from error
        if changed := [f"{key} {settings.get(key)} there, {value} here" for key, value in self.settings.items()
                       if settings.get(key) != value]:
            raise ValueError(f"{self.folder} holds a run with other settings ({'; '.join(changed)}): choose another folder, "
                             "or delete it to start anew")
        return stages

    def save(self, stages: list[dict[str, Any]], net: nn.Module) -> None:
        if not self.folder:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        last = len(stages) - 1
        _replace(self.folder / f"stage-{last}.pt", lambda path: torch.save(net.state_dict(), path))
        content = json.dumps({"settings": self.settings, "stages": stages}, indent=1)
        _replace(self.folder / "record.json", lambda path: path.write_text(content))
        for checkpoint in self.folder.glob("retrain-*.ckpt"):
            checkpoint.unlink()

    def restore(self, net: nn.Module, stage: int) -> None:
        """Load the weights of a finished stage into its network; ValueError if they are lost or damaged."""
        if not self.folder:
            return
        file = self.folder / f"stage-{stage}.pt"
        try:
            net.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            raise ValueError(f"{file} is lost or damaged: delete the folder to start anew") from error

    def checkpoint(self, stage: int, k: int) -> Path | None:
        return self.folder / f"retrain-{stage}-{k}.ckpt" if self.folder else None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any, name: str) -> Any:
    """A setting as JSON holds it, so that a stored one compares equal; ValueError for what cannot be told apart."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(one, f"{name}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, nn.Module):
        return [type(value).__qualname__, digest(value.state_dict())]
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords], name)
    if isinstance(value, type) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    if inspect.isfunction(value):
        enclosed = _plain(inspect.getclosurevars(value).nonlocals, name)
        return [value.__qualname__, _code(value.__code__), _plain(value.__defaults__, name), enclosed]
    if type(value).__repr__ is object.__repr__ or " at 0x" in repr(value):
        raise ValueError(f"{name}: a folder cannot tell {value!r} from another one: give it a __repr__ that says its "
                         "settings, or use no folder")
    networks = [one for one in getattr(value, "__dict__", {}).values() if isinstance(one, nn.Module)]
    return [repr(value), *(digest(one.state_dict()) for one in networks)]


def _code(code: CodeType) -> str:
    """A digest of what a function does, whatever file and line it stands in."""
    constants = [_code(one) if isinstance(one, CodeType) else sorted(map(repr, one)) if isinstance(one, frozenset)
                 else repr(one) for one in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:16]


def _bar(total: int, done: int, progress: bool | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="stages of pruning", disable=None if progress is None else not progress)


# Controls: sets of units that no score has chosen.


def controls(net: nn.Module, kept: Sequence[int], shape: Sequence[int], seed: int = 0) -> dict[str, list[int]]:
    """Sets of units to compare `kept` with.

    Returns
    -------
    dict
        "random": as many units of each stage, drawn; "first": as many, the first of each stage; "uniform": equally many in
        each stage, so many that the MACs for images of `shape` (C, H, W) come nearest to those of `kept`: a network of less
        depth
    """
    every = units_of(net)
    kept = _positions(every, kept)
    stages = [[position for position, unit in enumerate(every) if unit.stage == stage]
              for stage in sorted({unit.stage for unit in every})]
    numbers = [len(set(stage) & set(kept)) for stage in stages]
    rng = np.random.default_rng(seed)
    drawn = [sorted(rng.choice(stage, number, replace=False).tolist())
             for stage, number in zip(stages, numbers, strict=True)]
    wanted = cost.count(keep(net, kept), shape).macs
    depths = [[position for stage in stages for position in stage[:depth]]
              for depth in range(1, max(map(len, stages)) + 1)]
    uniform = min(depths, key=lambda units: abs(cost.count(keep(net, units), shape).macs - wanted))
    first = [stage[:number] for stage, number in zip(stages, numbers, strict=True)]
    return {"random": list(chain(*drawn)), "first": list(chain(*first)), "uniform": uniform}
