"""The Fisher information of a network's predictions.

A network with outputs f(x) and a likelihood p(y | f) has the Fisher information matrix

    F = E_x E_{y ~ p(y | x)} [g g^T],        g = gradient of log p(y | x) with respect to the parameters,

and KL(p_theta || p_{theta + d}) = 1/2 d^T F d + O(|d|^3). Everything here is the *mean* over the images given. Three kinds:

- ``"exact"``: the expectation over y in closed form, from square-root factors of the Fisher information of the outputs;
- ``"sampled"``: labels drawn from the network's own prediction; unbiased;
- ``"empirical"``: the labels of the data. It is no Fisher information: it vanishes as the training loss does
  [Kunstner et al. 2019, arXiv:1905.12558].
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishlib.per_sample import (
    Checks,
    Recorder,
    asking,
    buffers_kept,
    checkpoints_refused,
    logits,
    outputs_at,
    record,
    reduced,
    sample_by_sample,
    slices,
)

KINDS = ("exact", "sampled", "empirical")
NOT_FINITE = "the network's outputs hold NaN or infinite values: look at its weights and at the images"
COLUMN_ELEMENTS = 100_000_000  # elements of output gradients held at a time when several columns share a forward pass
LARGE = 1 << 18  # elements of images above which two of them go ahead, to tell how many may follow at a time


# Likelihoods -----------------------------------------------------------------------------------------------------------

def _probabilities(outputs: Tensor) -> Tensor:
    """The softmax over classes, faster along the first dimension than along a short last one."""
    return outputs.T.softmax(0).T


class Softmax:
    """p(y | f) = softmax(f)_y for logits f of shape (N, C).

    The Fisher information of the outputs is diag(p) - p p^T. This is also the pattern for a likelihood of one's own: the five
    methods below are all that is asked of it.
    """

    def check(self, outputs: Tensor, labels: Tensor | None) -> None:
        """Refuse outputs that are no logits, and, unless None, labels that do not fit them."""
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(f"the network has to return logits (N, classes) with two classes or more, got "
                             f"{tuple(outputs.shape)}; for other outputs pass another likelihood")
        if float(outputs.amin()) >= 0 and bool(((outputs.sum(1) - 1).abs() < 1e-5).all()):
            raise ValueError("the network returns probabilities: take its final softmax away, logits are needed")
        if labels is None:
            return
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != outputs.shape[:1]:
            raise ValueError(f"labels have to be {len(outputs)} class numbers of integer type, got {labels.dtype} "
                             f"{tuple(labels.shape)}")
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(f"labels from {low} to {high} are out of range: the network has "
                             f"{outputs.shape[1]} classes, numbered from 0")

    def columns(self, outputs: Tensor) -> Tensor:
        """(N, C - 1, C): columns b_k with sum_k b_k b_k^T = diag(p) - p p^T [Tanabe and Sagae 1992]."""
        p = _probabilities(outputs)
        rest = p.flip(1).cumsum(1).flip(1)  # sums of p from each class on
        tiny = torch.finfo(p.dtype).tiny
        after = rest[:, 1:].clamp_min(tiny)
        scale = (p[:, :-1] * (after / rest[:, :-1].clamp_min(tiny))).sqrt()
        below = -(p[:, None, :] / after[:, :, None]).triu(1)
        return scale[:, :, None] * below.diagonal_scatter(torch.ones_like(scale), dim1=1, dim2=2)

    def sampled(self, outputs: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """(N, samples, C): gradients of log p(y | f) for drawn labels y."""
        p = _probabilities(outputs)
        cumulative = p.cumsum(1).contiguous()
        uniform = torch.rand(len(p), samples, generator=generator, dtype=p.dtype, device=generator.device).to(p.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_max_(p.shape[1] - 1)
        g = p[:, None].expand(-1, samples, -1).neg()
        return g.scatter_add_(2, drawn[..., None], g.new_ones(len(g), samples, 1))

    def empirical(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(N, 1, C): gradients of log p(y | f) at the given labels."""
        g = _probabilities(outputs).neg_()
        return g.scatter_add_(1, labels.long()[:, None], g.new_ones(len(g), 1))[:, None]

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """(N,): KL of the predictions `outputs` from the predictions `others`."""
        logs = outputs.log_softmax(1)
        return (logs.exp() * (logs - others.log_softmax(1))).sum(1)


class Gaussian:
    """p(y | f) = N(f, std^2 I) for outputs and targets of shape (N, D); the outputs' Fisher information is I / std^2."""

    def __init__(self, std: float = 1.0):
        if not std > 0:
            raise ValueError(f"std={std}: a standard deviation is positive")
        self.std = std

    def check(self, outputs: Tensor, labels: Tensor | None) -> None:
        if outputs.ndim != 2:
            raise ValueError(f"the network has to return outputs (N, D), got {tuple(outputs.shape)}")
        if labels is not None and labels.shape != outputs.shape:
            raise ValueError(f"targets {tuple(labels.shape)} have to have the shape {tuple(outputs.shape)} of the outputs")

    def columns(self, outputs: Tensor) -> Tensor:
        identity = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device) / self.std
        return identity.expand(len(outputs), -1, -1)

    def sampled(self, outputs: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        shape = (len(outputs), samples, outputs.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=generator.device)
        return noise.to(outputs.device) / self.std

    def empirical(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return ((labels - outputs) / self.std**2)[:, None]

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        return (outputs - others).square().sum(1) / (2 * self.std**2)


SOFTMAX = Softmax()


# Sums over one batch --------------------------------------------------------------------------------------------------------

@dataclass
class _Kind:
    """Which output gradients are squared: their `count` and how to get them, scaled so that squares are summed over columns."""

    name: str
    samples: int
    generator: torch.Generator | None
    likelihood: Softmax

    def columns(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """(N, K, C) from outputs (N, C)."""
        with torch.no_grad():
            outputs = outputs.detach()
            self._check(outputs, labels)
            if self.name == "exact":
                return self.likelihood.columns(outputs)
            if self.name == "sampled":
                g = self.likelihood.sampled(outputs, self.samples, self.generator)
                return g if self.samples == 1 else g / math.sqrt(self.samples)
            return self.likelihood.empirical(outputs, labels)

    def _check(self, outputs: Tensor, labels: Tensor | None) -> None:
        if not all(math.isfinite(bound) for bound in outputs.aminmax()):
            raise ValueError(NOT_FINITE)
        if self.name == "empirical" and labels is None:
            raise ValueError('kind="empirical" needs labels: pass (images, labels) batches')
        self.likelihood.check(outputs, labels if self.name == "empirical" else None)


def _kind(kind: str, samples: int, generator: torch.Generator | None, likelihood: Softmax) -> _Kind:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    if samples < 1:
        raise ValueError(f"samples={samples}: draw at least one label an image")
    return _Kind(kind, samples, fresh_generator() if generator is None and kind == "sampled" else generator, likelihood)


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """Seeded from entropy, so that the global random state is neither used nor changed."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


def _reduce(net: nn.Module, images: Tensor, labels: Tensor | None, wanted: dict[str, Tensor], kind: _Kind,
            reduction: str) -> dict[str, Tensor]:
    """Of one batch, the mean of ``"squares"``, or ``"norms"`` (N,) (see `Rule`), of every wanted parameter."""
    samples = len(images)
    rows = samples
    several = kind.name == "exact" or kind.samples > 1
    if several and samples > 2 and images.numel() > LARGE:
        outputs, recorder = record(net, images[:2], wanted)
        rows = _rows_together(recorder, logits(outputs, 2), kind)
    if rows >= samples:
        outputs, recorder = record(net, images, wanted)
        rows = _rows_together(recorder, logits(outputs, samples), kind)
        if samples > 1 and recorder.ambiguous():
            rows = min(rows, samples - 1)  # a batch of another size cannot be mistaken for that dimension
    if rows < samples:
        del outputs, recorder
        parts = [(len(images[part]) / samples,
                  _reduce(net, images[part], None if labels is None else labels[part], wanted, kind, reduction))
                 for part in slices(samples, rows)]
        return {name: sum(share * found[name] for share, found in parts) if reduction == "squares" else
                torch.cat([found[name] for _, found in parts]) for name in wanted}
    columns = kind.columns(outputs, labels)
    if reduction == "squares":
        columns = columns / math.sqrt(samples)
    unruled = recorder.unruled()
    found = reduced(outputs, columns, recorder, reduction)
    del outputs, recorder
    found |= sample_by_sample(net, images, columns, {name: wanted[name] for name in unruled}, reduction)
    for name in wanted.keys() - found.keys():
        found[name] = torch.zeros_like(wanted[name]) if reduction == "squares" else columns.new_zeros(samples)
    return {name: found[name] for name in wanted}


def _rows_together(recorder: Recorder, outputs: Tensor, kind: _Kind) -> int:
    """How many samples can be taken at a time, so that their columns of output gradients are not too many to hold."""
    columns = {"exact": outputs.shape[1:].numel(), "sampled": kind.samples, "empirical": 1}[kind.name]
    held = 0 if columns == 1 else columns * sum(use.outputs for use in recorder.uses if not use.merges())
    return max(1, COLUMN_ELEMENTS * len(outputs) // held) if held else sys.maxsize


# Batches, parameters, sums over processes ------------------------------------------------------------------------------------

Batches = Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor] | Tensor


def stream(batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(images, labels) batches from an iterable of them, from one such pair, or from images alone (labels None).

    A tuple of two tensors is a pair; a list of two, as loaders give, is one where their numbers of dimensions differ, and else
    two batches of images.
    """
    if isinstance(batches, Tensor):
        batches = [(batches, None)]
    elif isinstance(batches, (tuple, list)) and len(batches) == 2 and all(isinstance(t, Tensor | None) for t in batches):
        first, second = batches
        if isinstance(batches, tuple) or second is None or first.ndim != second.ndim:
            batches = [batches]
    for batch in batches:
        if isinstance(batch, Tensor):
            batch = (batch, None)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            raise TypeError(f"a batch has to be a pair (images, labels) of tensors, got {type(batch).__name__}")
        images, labels = batch
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"a batch of {len(images)} images came with {len(labels)} labels")
        if len(images):
            yield images.detach(), labels


def select(net: nn.Module, parameters: Iterable[str | Tensor] | None = None) -> dict[str, Tensor]:
    """Name -> parameter: those that ask for gradients, or the ones given by name or as tensors."""
    if parameters is None:
        chosen = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if not chosen:
            raise ValueError("no parameter of the network requires gradients: name the wanted ones in parameters=")
        return chosen
    named = dict(net.named_parameters(remove_duplicate=False))
    parameters = [parameters] if isinstance(parameters, (str, Tensor)) else list(parameters)
    names = {id(p): name for name, p in reversed(named.items())}
    chosen = {}
    for wanted in parameters:
        name = wanted if isinstance(wanted, str) else names.get(id(wanted))
        if name not in named:
            shown = repr(wanted) if isinstance(wanted, str) else f"a tensor of shape {tuple(wanted.shape)}"
            raise ValueError(f"{shown} is no parameter of the network: use one of {', '.join(named)}")
        if not any(named[name] is p for p in chosen.values()):
            chosen[name] = named[name]
    if not chosen:
        raise ValueError("parameters is empty: name at least one, or pass None for all")
    return chosen


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_sum(values: Iterable[Tensor], count: int) -> int:
    """Sum tensors in place, and a number of samples, over all processes; refuse when there are no samples at all."""
    if _distributed():
        values = list(values)
        device = values[0].device if values else "cpu"
        number = torch.tensor(count, dtype=torch.int64, device=device)
        for value in [number, *values]:
            torch.distributed.all_reduce(value)
        count = int(number)
    if count == 0:
        raise ValueError("there are no images in batches: an iterator can be used up, or a split can be empty")
    return count


def all_mean(means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The means over the samples of all processes, from each one's own and its number of samples."""
    if not _distributed():
        all_sum((), count)
        return means
    total = all_sum([mean.mul_(count) for mean in means.values()], count)
    return {name: value.div_(total) for name, value in means.items()}


def _summed_as(p: Tensor) -> torch.dtype:
    """At least single precision: in bfloat16 a sum over many batches stops growing."""
    return torch.promote_types(p.dtype, torch.float32)


def _zeros(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=_summed_as(p), requires_grad=False) for name, p in wanted.items()}


# What the book calls ---------------------------------------------------------------------------------------------------------

def diagonal(net: nn.Module, batches: Batches, kind: str = "exact", samples: int = 1,
             generator: torch.Generator | None = None, parameters: Iterable[str | Tensor] | None = None,
             likelihood: Softmax = SOFTMAX) -> dict[str, Tensor]:
    """Diagonal of the Fisher information, F_ii = mean over images of E_y[(d log p(y | x) / d theta_i)^2].

    Mean over images; for "exact" the expectation over y ~ p(y | x) in closed form, for "sampled" the mean over `samples` drawn
    labels, for "empirical" the given label alone. Any number of batches takes the memory of one. With
    `torch.distributed` initialised, the mean is over the images of all processes.

    Parameters
    ----------
    net : evaluated in the mode it is in; nothing of it changes
    batches : iterable of (images, labels) batches, one such pair, or images alone. Labels matter to "empirical" only.
    kind : "exact", "sampled" or "empirical"
    samples : labels drawn an image, for "sampled"
    generator : of the drawn labels; None draws from fresh entropy. The global random state is neither used nor changed.
    parameters : names or tensors; by default all that require gradients
    likelihood : `Softmax`, `Gaussian` or an object with the same methods

    Returns
    -------
    dict of parameter name -> tensor shaped like the parameter

    Raises
    ------
    ValueError
        BatchNorm, Dropout or other randomness in training mode, outputs that are NaN or no logits, labels out of range, no
        images, gradient checkpointing inside the network

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> {name: f.shape for name, f in diagonal(net, torch.randn(5, 3)).items()}
    {'weight': torch.Size([2, 3]), 'bias': torch.Size([2])}
    """
    wanted, kind = select(net, parameters), _kind(kind, samples, generator, likelihood)
    mean: dict[str, Tensor] = {}
    count = 0
    for images, labels in stream(batches):
        found = _reduce(net, images, labels, wanted, kind, "squares")
        count += len(images)
        for name, value in found.items():
            value = value.to(_summed_as(wanted[name]))
            mean[name] = mean[name].lerp_(value, len(images) / count) if name in mean else value
    mean = all_mean(mean or _zeros(wanted), count)
    return {name: value.to(wanted[name].dtype) for name, value in mean.items()}


@dataclass(frozen=True)
class Estimate:
    """A mean and the standard error of that mean (nan where one draw alone gives none)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Trace(Estimate):
    """Trace of the Fisher information; `layers` maps a module's name to the part of its own parameters."""

    layers: dict[str, Estimate]


def trace(net: nn.Module, batches: Batches, kind: str = "exact", samples: int = 1, generator: torch.Generator | None = None,
          parameters: Iterable[str | Tensor] | None = None, likelihood: Softmax = SOFTMAX) -> Trace:
    """Trace of the Fisher information, tr F = mean over images of E_y |grad log p(y | x)|^2, whole and per layer.

    Mean over images, of the three kinds that `diagonal` has and with its parameters. The standard error is the
    standard deviation over images (and their drawn labels) over the square root of their number.
    """
    wanted, kind = select(net, parameters), _kind(kind, samples, generator, likelihood)
    layers = _layers(wanted)
    reference = next(iter(wanted.values()))
    sums = torch.zeros(2, 1 + len(layers), dtype=torch.float64, device=reference.device)
    count = 0
    for images, labels in stream(batches):
        norms = _reduce(net, images, labels, wanted, kind, "norms")
        parts = torch.stack([sum(norms[name].double() for name in names) for names in layers.values()])
        values = torch.cat([parts.sum(0, keepdim=True), parts])
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        count += len(images)
    count = all_sum([sums], count)
    mean = sums[0] / count
    variance = (sums[1] / count - mean.square()).clamp_min(0) * count / max(count - 1, 1)
    return _trace(mean, (variance / count).sqrt() if count > 1 else torch.full_like(mean, math.nan), layers)


def trace_estimate(net: nn.Module, batches: Batches, samples: int = 1, generator: torch.Generator | None = None,
                   parameters: Iterable[str | Tensor] | None = None, likelihood: Softmax = SOFTMAX) -> Trace:
    """Unbiased estimate of tr F from one ordinary backward pass a batch: |sum_i g_i|^2 / N with labels drawn from the network.

    Drawn so, the scores g_i of the N images of a batch have mean zero and are independent, so their cross terms vanish in
    expectation. Mean over images; `samples` independent draws (and backward passes) a batch. The standard error comes from the
    spread over batches and draws; nan when there is one of both.
    """
    wanted, kind = select(net, parameters), _kind("sampled", samples, generator, likelihood)
    layers = _layers(wanted)
    rows, weights, count = [], [], 0
    for images, _ in stream(batches):
        with asking(wanted.values()), torch.enable_grad(), buffers_kept(net):  # for checkpoints, which run again
            with Checks(net):
                outputs = logits(net(images), len(images))
            columns = kind.columns(outputs, None) * math.sqrt(samples)
            for k in range(samples):
                g = torch.autograd.grad(outputs, list(wanted.values()), columns[:, k], retain_graph=k < samples - 1,
                                        allow_unused=True, materialize_grads=True)
                norms = dict(zip(wanted, (part.detach().double().square().sum() for part in g), strict=True))
                rows.append(torch.stack([sum(norms[name] for name in names) for names in layers.values()]) / len(images))
                weights.append(len(images))
        count += len(images)
    reference = next(iter(wanted.values()))
    sums = torch.zeros(4, 1 + len(layers), dtype=torch.float64, device=reference.device)
    for row, weight in zip(rows, weights, strict=True):
        row = torch.cat([row.sum(0, keepdim=True), row])
        # w e, w^2 e^2, w^2 e and, in the first entry of the last row, w^2: sums that processes can add up
        sums += torch.stack([weight * row, weight**2 * row.square(), weight**2 * row, torch.full_like(row, weight**2)])
    draws = torch.tensor(float(len(rows)), dtype=torch.float64, device=reference.device)
    count = all_sum([sums, draws], count)
    total, draws = count * samples, float(draws)
    mean = sums[0] / total
    spread = (sums[1] - 2 * mean * sums[2] + mean.square() * sums[3]).clamp_min(0) / total**2
    error = (spread * draws / (draws - 1)).sqrt() if draws > 1 else torch.full_like(mean, math.nan)
    return _trace(mean, error, layers)


def _layers(wanted: dict[str, Tensor]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        layers[name.rpartition(".")[0]].append(name)
    return dict(layers)


def _trace(mean: Tensor, error: Tensor, layers: Iterable[str]) -> Trace:
    pairs = list(zip(mean.tolist(), error.tolist(), strict=True))
    return Trace(*pairs[0], layers={name: Estimate(*pair) for name, pair in zip(layers, pairs[1:], strict=True)})


def quadratic(net: nn.Module, batches: Batches, direction: dict[str, Tensor], kind: str = "exact", samples: int = 1,
              generator: torch.Generator | None = None, likelihood: Softmax = SOFTMAX) -> float:
    """d^T F d, twice the KL divergence that a small change d of the parameters brings about.

    Mean over images, of the three kinds that `diagonal` has. `direction` maps names of parameters to changes of their shape;
    parameters left out do not change. One forward-mode pass a batch gives J d, and F is J^T (b b^T) J.
    """
    wanted, kind = _changed(net, direction), _kind(kind, samples, generator, likelihood)
    total, count = torch.zeros((), dtype=torch.float64, device=next(iter(wanted.values())).device), 0
    for images, labels in stream(batches):
        outputs, tangent, _ = _linearised(net, images, wanted, direction)
        along = torch.einsum("nkc,nc->nk", kind.columns(outputs, labels), tangent)
        total += along.double().square().sum()
        count += len(images)
    count = all_sum([total], count)
    return float(total) / count


def vector_product(net: nn.Module, batches: Batches, vector: dict[str, Tensor], kind: str = "exact", samples: int = 1,
                   generator: torch.Generator | None = None, likelihood: Softmax = SOFTMAX) -> dict[str, Tensor]:
    """F v, by one forward-mode and one backward pass a batch.

    Mean over images, of the three kinds that `diagonal` has. The product is restricted to the parameters named in `vector`, and
    has its names and shapes.
    """
    wanted, kind = _changed(net, vector), _kind(kind, samples, generator, likelihood)
    total, count = _zeros(wanted), 0
    for images, labels in stream(batches):
        outputs, tangent, values = _linearised(net, images, wanted, vector)
        columns = kind.columns(outputs, labels)
        pulled = torch.einsum("nkc,nkd,nd->nc", columns, columns, tangent).to(outputs.dtype)
        gradients = torch.autograd.grad(outputs, list(values.values()), pulled, allow_unused=True, materialize_grads=True)
        for name, g in zip(values, gradients, strict=True):
            total[name] += g.detach()
        count += len(images)
    count = all_sum(total.values(), count)
    return {name: value.div_(count).to(wanted[name].dtype) for name, value in total.items()}


def _changed(net: nn.Module, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = select(net, direction)
    for name, p in wanted.items():
        if direction[name].shape != p.shape:
            raise ValueError(f"the direction of {name} has shape {tuple(direction[name].shape)}, the parameter "
                             f"{tuple(p.shape)}")
    return wanted


def _linearised(net: nn.Module, images: Tensor, wanted: dict[str, Tensor],
                direction: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs with their graph, their derivative J d, and the copies of the parameters that the graph ends in."""
    values = {name: p.detach().requires_grad_() for name, p in wanted.items()}
    direction = {name: direction[name].detach().to(p.dtype) for name, p in wanted.items()}

    def outputs_of(inputs: dict[str, Tensor]) -> Tensor:
        with checkpoints_refused(), Checks(net):
            return logits(outputs_at(net, inputs, images), len(images))

    with torch.enable_grad():
        try:
            with forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(v, direction[name]) for name, v in values.items()}
                outputs, tangent = forward_ad.unpack_dual(outputs_of(duals))
                tangent = torch.zeros_like(outputs) if tangent is None else tangent
        except (RuntimeError, NotImplementedError):  # an operation without forward mode
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention cannot be differentiated twice
                outputs = outputs_of(values)
            tangent = _twice_backward(outputs, list(values.values()), list(direction.values()))
    return outputs, tangent.detach(), values


def _twice_backward(outputs: Tensor, values: list[Tensor], direction: list[Tensor]) -> Tensor:
    """J d as the gradient of u -> <J^T u, d>, which is linear in u."""
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, values, u, create_graph=True, allow_unused=True, materialize_grads=True)
    product = sum((p * d).sum() for p, d in zip(pulled, direction, strict=True))
    return torch.autograd.grad(product, u, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def kl(net_a: nn.Module, net_b: nn.Module, batches: Batches, likelihood: Softmax = SOFTMAX) -> float:
    """KL(p_a || p_b) between the predictions of two networks, in nats: the mean over images of sum_y p_a log(p_a / p_b)."""
    total, count = torch.zeros((), dtype=torch.float64, device=next(net_a.parameters()).device), 0
    for images, _ in stream(batches):
        outputs = []
        for net in (net_a, net_b):
            with torch.no_grad(), Checks(net):
                outputs.append(logits(net(images), len(images)))
            if not bool(torch.isfinite(outputs[-1]).all()):
                raise ValueError(NOT_FINITE)
            likelihood.check(outputs[-1], None)
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(f"the networks return {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)} for the same images")
        total += likelihood.divergence(*(one.double() for one in outputs)).sum()
        count += len(images)
    count = all_sum([total], count)
    return float(total) / count


def from_adam(optimizer: torch.optim.Optimizer, batch_size: int, net: nn.Module | None = None) -> dict[str | int, Tensor]:
    """The diagonal hidden in a running Adam: batch_size * v / (1 - beta2^t), an estimate of the *empirical* diagonal.

    v is Adam's moving average of squared *batch* gradients. For a loss averaged over B images, E[gbar^2] = Var(g)/B +
    (E g)^2, so B v is near the mean per-sample square only where the mean gradient is small beside its noise; elsewhere it
    counts (E g)^2 another B - 1 times. It looks back over about 1 / (1 - beta2) steps, not at the network as it is now. Coupled
    weight decay (Adam's, not AdamW's), gradient clipping and penalties in the loss leak into v. And it is empirical.

    Parameters
    ----------
    optimizer : Adam, AdamW, NAdam, RAdam or another that keeps ``exp_avg_sq`` and ``step``
    batch_size : B of the steps taken, for a loss averaged over the batch; 1 for a summed loss of single images
    net : gives the names; without it the names the optimizer was built with, else positions as in its ``state_dict()``

    Raises
    ------
    ValueError
        no such state, or no step taken yet
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give the number of images of a training batch")
    names = {} if net is None else {id(p): name for name, p in net.named_parameters()}
    found: dict[str | int, Tensor] = {}
    position = 0
    for group in optimizer.param_groups:
        given = group.get("param_names", [None] * len(group["params"]))
        for p, own in zip(group["params"], given, strict=True):
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state and float(state["step"]) > 0:
                correction = 1 - group["betas"][1] ** float(state["step"])
                found[names.get(id(p), own or position)] = state["exp_avg_sq"].detach() * (batch_size / correction)
            position += 1
    if not found:
        raise ValueError("the optimizer holds no second moments: pass an Adam that has taken a step")
    return found


def __getattr__(name: str):
    if name in ("natural_gradient", "NaturalGradient"):
        from fishlib import natural_gradient

        return getattr(natural_gradient, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
