"""Few bits a weight: shared values, bits by Fisher information, and a file that decodes back to the network bit for bit.

A quantiser makes the weights of a network take few different values (`quantize` after training, `RoundedWeights` and
`SharedWeights` during it). `compress` needs to know nothing of that: it finds the values that a tensor takes, and codes
which of them stands where by a range coder (`constriction <https://bamler-lab.github.io/constriction/>`_). `load` puts
the weights back, `size` tells what each part of the file costs.
"""

from __future__ import annotations

import hashlib
import operator
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, isqrt, log2, prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .weights import own_classes, plain, prunable, refuse_shared

# -- quantisers -------------------------------------------------------------------------------------------------------

def uniform(weight: Tensor, bits: int) -> Tensor:
    """q(w) = s round(w / s), s = max|w| / (2^(bits-1) - 1): uniform, symmetric, with zero among the values."""
    largest = weight.abs().max()
    step = largest / (2 ** (_checked_bits(bits, 2) - 1) - 1)
    return torch.where(largest > 0, (weight / step).round() * step, weight)


def fixed_point(weight: Tensor, bits: int) -> Tensor:
    """As `uniform`, with the step a power of two: a number of sign, integer and fraction bits, `bits` in all."""
    largest = float(weight.abs().max())
    if largest == 0:
        return weight
    step = 2.0 ** ceil(log2(largest / (2 ** (_checked_bits(bits, 2) - 1) - 1)))
    return (weight / step).round() * step


def kmeans(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The 2^bits shared values c that minimise sum_i F_i (w_i - c(w_i))^2 as Lloyd's algorithm finds them.

    Zeros stay zero and take none of the values: a pruned weight stays pruned. The start is a grid from the lowest to the
    highest weight (arXiv:1510.00149). F is `importance`, one for each weight by default; with it the start is the result
    without it, so that the weighted error is never the higher one.
    """
    labels, centroids = cluster(weight, 2 ** _checked_bits(bits, 1), importance)
    table = torch.cat([centroids.new_zeros(1), centroids]).to(weight)
    return table[labels]


def cluster(weight: Tensor, levels: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k-means of the weights that are not zero: labels shaped as `weight`, 0 for zero and 1..levels, and the centroids."""
    from sklearn.cluster import KMeans

    flat = weight.detach().cpu().double().flatten()
    chosen = flat.nonzero().flatten()
    labels = torch.zeros(len(flat), dtype=torch.int64)
    found = flat[chosen].unique()
    if len(found) <= levels:
        labels[chosen] = torch.searchsorted(found, flat[chosen]) + 1
        return labels.view(weight.shape).to(weight.device), found.to(weight)
    points = flat[chosen, None].numpy()
    fitted = KMeans(levels, init=np.linspace(points.min(), points.max(), levels)[:, None], n_init=1).fit(points)
    if importance is not None:
        counted = importance.detach().cpu().double().flatten()[chosen].clamp_min(1e-30)
        fitted = KMeans(levels, init=fitted.cluster_centers_, n_init=1, tol=1e-8).fit(points, None, counted / counted.mean())
    labels[chosen] = torch.from_numpy(fitted.labels_).long() + 1
    centroids = torch.from_numpy(fitted.cluster_centers_[:, 0])
    return labels.view(weight.shape).to(weight.device), centroids.to(weight)


def _checked_bits(bits: int, low: int) -> int:
    whole = bits if type(bits) is int else _whole(bits)
    if whole is None or not low <= whole <= 16:
        given = repr(bits) if whole is None else whole
        raise ValueError(f"bits={given}: this quantiser takes a whole number from {low} to 16 bits")
    return whole


def _whole(number: Any) -> int | None:
    """A number of any integer type as an int; None for anything else, also for what is rounded to one, and for yes and no."""
    try:
        return None if isinstance(number, bool | np.bool_) else operator.index(number)
    except TypeError:
        return None


QUANTIZERS: dict[str, Callable[..., Tensor]] = {"uniform": uniform, "fixed_point": fixed_point, "kmeans": kmeans}


def quantize(net: nn.Module, bits: int | Mapping[str, int], by: str = "kmeans",
             importance: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A plain copy of `net` whose linear and convolutional weights take few values; other parameters stay.

    Parameters
    ----------
    bits : of every layer's weights, or by name of the weight, as from `allocate`
    by : "uniform", "fixed_point" or "kmeans"
    importance : by name of the weight, for "kmeans": the Fisher diagonal makes it Fisher-weighted

    Raises
    ------
    ValueError
        an unknown quantiser, bits that it does not take, or names that lack a weight
    """
    if by not in QUANTIZERS:
        raise ValueError(f"unknown quantiser {by!r}: use one of {', '.join(QUANTIZERS)}")
    if importance is not None and by != "kmeans":
        raise ValueError(f"by={by!r} has no use for importance: use by='kmeans'")
    net = plain(net)
    by_name = isinstance(bits, Mapping | pd.Series)
    _refuse_missing("bits", bits if by_name else None, prunable(net))
    _refuse_missing("importance", importance, prunable(net))
    for name, layer in prunable(net).items():
        options = {} if importance is None else {"importance": importance[name]}
        chosen = bits[name] if by_name else bits
        with torch.no_grad():
            layer.weight.copy_(QUANTIZERS[by](layer.weight, chosen, **options))
    return net


def _refuse_missing(what: str, values: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    if values is not None and (missing := [name for name in wanted if name not in values]):
        raise ValueError(f"{what} lacks {', '.join(missing)}: give every linear and convolutional weight by its name")


# -- bits by information ----------------------------------------------------------------------------------------------

def divergence_costs(weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], bits: tuple[int, ...] = tuple(range(2, 9)),
                     by: str = "uniform") -> pd.DataFrame:
    """The expected divergence 1/2 sum_i F_i (w_i - q_b(w_i))^2 of the predictions, by group of weights and bits b.

    It is the second-order KL in nats for one prediction (F the mean over images), the cross terms left out.

    Returns
    -------
    a table with one row a group, columns `size` (weights that are not zero) and one for each number of bits
    """
    rows = {}
    for name, weight in weights.items():
        error = {b: (fisher[name] * (weight - QUANTIZERS[by](weight, b)).square()).sum().item() / 2 for b in bits}
        rows[name] = {"size": int(weight.count_nonzero())} | error
    return pd.DataFrame.from_dict(rows, orient="index")


def allocate(costs: pd.DataFrame, average: float) -> dict[str, int]:
    """Bits for each group so that the summed divergence is least and the average at most `average` bits a weight.

    A knapsack with one choice a group, solved exactly: group by group, only those choices so far are kept that no other one
    beats in both stored bits and divergence. Of equal divergences the one of fewer bits is taken. Of the budget
    nearly one bit of the largest group can be left.

    Parameters
    ----------
    costs : as from `divergence_costs`

    Raises
    ------
    ValueError
        an average below the fewest bits in the table
    """
    choices = sorted(column for column in costs.columns if column != "size")
    if average < choices[0]:
        raise ValueError(f"average={average}: the table starts at {choices[0]} bits")
    sizes = costs["size"].to_numpy(float)
    budget = average * sizes.sum() * (1 + 1e-12)
    least_rest = choices[0] * (sizes.sum() - sizes.cumsum())  # what the groups still to come take at least
    spent, divergence, steps = np.zeros(1), np.zeros(1), []
    for size, prices, rest in zip(sizes, costs[choices].to_numpy(float), least_rest, strict=True):
        spent = np.add.outer(spent, size * np.array(choices)).ravel()
        divergence = np.add.outer(divergence, prices).ravel()
        order = np.lexsort((divergence, spent))
        order = order[spent[order] + rest <= budget]
        lowest = np.minimum.accumulate(divergence[order])
        order = order[np.append(True, lowest[1:] < lowest[:-1])]
        spent, divergence = spent[order], divergence[order]
        steps.append(order)
    bits, at = {}, -1
    for name, order in zip(reversed(costs.index), reversed(steps), strict=True):
        at, choice = divmod(int(order[at]), len(choices))
        bits[name] = choices[choice]
    return {name: bits[name] for name in costs.index}


def fisher_clusters(fisher: Mapping[str, Tensor], kept: Mapping[str, Tensor], clusters: int) -> dict[str, Tensor]:
    """k-means of log F over all kept weights together: for each weight its cluster, 1 the least informative; 0 where
    nothing is kept."""
    flat = torch.cat([torch.where(kept[name], fisher[name].clamp_min(1e-30).log() - 100, 0.0).flatten() for name in fisher])
    labels, centroids = cluster(flat, clusters)
    ranks = torch.cat([labels.new_zeros(1), centroids.argsort().argsort() + 1])  # k-means may move an empty cluster elsewhere
    labels = ranks[labels]
    parts = labels.split([f.numel() for f in fisher.values()])
    return {name: part.view_as(f) for (name, f), part in zip(fisher.items(), parts, strict=True)}


def tu(net: nn.Module, fisher: Mapping[str, Tensor], sparsity: float, average: float = 4.0, clusters: int = 4,
       small: float = 0.5) -> tuple[nn.Module, dict[int, int]]:
    """The procedure of Tu et al. (arXiv:1605.04859): small magnitudes go first, then weights of low F; bits by F.

    Of the share to remove, the part `small` goes by magnitude, the rest by F alone. The kept weights are clustered by
    k-means on log F, and each cluster is rounded to fixed point with bits that grow with its F, here by `allocate`.

    Returns
    -------
    net : a plain copy, pruned and rounded
    bits : by cluster, 1 the least informative
    """
    from .weights import select, values

    net = plain(net)
    weights = values(net)
    first = select({name: w.abs() for name, w in weights.items()}, sparsity * small)
    kept = select({name: torch.where(first[name], fisher[name], -1.0) for name in weights}, sparsity)
    groups = fisher_clusters(fisher, kept, clusters)
    flat, F, group = (torch.cat([one[name].flatten() for name in weights]) for one in (weights, fisher, groups))
    members = {str(g): (group == g).nonzero().flatten() for g in range(1, clusters + 1)}
    parts = {g: flat[index] for g, index in members.items() if len(index)}
    bits = allocate(divergence_costs(parts, {g: F[members[g]] for g in parts}, by="fixed_point"), average)
    rounded = torch.zeros_like(flat)
    for g, part in parts.items():
        rounded[members[g]] = fixed_point(part, bits[g])
    sizes = [w.numel() for w in weights.values()]
    with torch.no_grad():
        for layer, part in zip(prunable(net).values(), rounded.split(sizes), strict=True):
            layer.weight.copy_(part.view_as(layer.weight))
    return net, {int(g): b for g, b in bits.items()}


# -- during training --------------------------------------------------------------------------------------------------

class _Straight(torch.autograd.Function):
    """Forward the second argument, backward to the first (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Rounded(nn.Module):
    """The parametrization W -> q(W) with the straight-through gradient; the identity until `active`."""

    def __init__(self, bits: int, by: str):
        super().__init__()
        self.bits, self.by = bits, by
        self.register_buffer("active", torch.tensor(False))

    def forward(self, weight: Tensor) -> Tensor:
        return _Straight.apply(weight, QUANTIZERS[self.by](weight.detach(), self.bits)) if self.active else weight


class Shared(nn.Module):
    """The parametrization that gives all weights of a cluster their mean; the identity until `assign` was called.

    The gradient of a mean reaches all members alike, so the optimizer trains the shared values themselves. They are
    rounded to float16, as the file holds them.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("labels", torch.full(weight.shape, -1, dtype=torch.int32, device=weight.device))
        self._found = None

    def assign(self, weight: Tensor, levels: int, importance: Tensor | None = None) -> None:
        """Cluster the weights anew, zeros apart."""
        self.labels.copy_(cluster(weight, levels, importance)[0])

    def _members(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flat positions of the members, their clusters from 0, and the clusters' sizes."""
        if self._found is None or self._found[0] != self.labels._version or self._found[1].device != self.labels.device:
            flat = self.labels.flatten().long()
            positions = (flat > 0).nonzero().flatten()
            clusters = flat[positions] - 1
            self._found = self.labels._version, positions, clusters, clusters.bincount().clamp_min(1)
        return self._found[1:]

    def forward(self, weight: Tensor) -> Tensor:
        positions, clusters, sizes = self._members()
        if not len(positions):
            return weight
        # A GPU adds in any order; from sums in double precision the rounded means come out alike.
        exact = weight.flatten()[positions].to(torch.float64 if weight.is_cuda else weight.dtype)
        means = (exact.new_zeros(len(sizes)).index_add(0, clusters, exact) / sizes).to(weight.dtype)
        means = _Straight.apply(means, means.detach().half().to(weight.dtype))
        return torch.zeros_like(weight).flatten().index_copy(0, positions, means[clusters]).view_as(weight)


class RoundedWeights(L.Callback):
    """Quantisation-aware training: from a share of the training on, the forward pass uses rounded weights.

    Parameters
    ----------
    bits : of every linear and convolutional weight
    by : "uniform", "fixed_point" or "kmeans"
    start : share of the training after which weights are rounded
    """

    def __init__(self, bits: int, by: str = "uniform", start: float = 0.5):
        if by not in QUANTIZERS:
            raise ValueError(f"unknown quantiser {by!r}: use one of {', '.join(QUANTIZERS)}")
        self.bits, self.by, self.start = _checked_bits(bits, 1 if by == "kmeans" else 2), by, _checked_share(start)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.rounded = [_append(layer, "weight", Rounded(self.bits, self.by))
                        for layer in prunable(refuse_shared(own_classes(module.net))).values()]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.start * trainer.estimated_stepping_batches:
            for one in self.rounded:
                one.active.fill_(True)


class SharedWeights(L.Callback):
    """Shared values with trained centroids: weights and biases are clustered at `start`, then train cluster by cluster.

    Zeros stay zero, so that it follows `fishlib.weights.Pruning` whose `end` lies before this `start`.

    Parameters
    ----------
    bits : 2^bits shared values for each layer's weights
    bias_bits : the same for each layer's biases; None leaves them alone
    start : share of the training after which values are shared
    rounds : number of times that the clusters are formed, spread over the rest of the training
    importance : "fisher" weighs the clustering by Adam's second moment; None counts all weights alike
    """

    def __init__(self, bits: int, bias_bits: int | None = 4, start: float = 0.8, rounds: int = 3,
                 importance: str | None = None):
        if importance not in (None, "fisher"):
            raise ValueError(f"unknown importance {importance!r}: use 'fisher' or None")
        self.bits, self.bias_bits = _checked_bits(bits, 1), bias_bits and _checked_bits(bias_bits, 1)
        self.start, self.rounds, self.importance = _checked_share(start), rounds, importance

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.shared = []
        for layer in prunable(refuse_shared(own_classes(module.net))).values():
            kinds = [("weight", self.bits)] + ([("bias", self.bias_bits)] if self.bias_bits and layer.bias is not None else [])
            for name, bits in kinds:
                self.shared.append((layer, name, _append(layer, name, Shared(getattr(layer, name))), 2**bits))

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self.steps = {round((self.start + (1 - self.start) * i / self.rounds) * total) for i in range(self.rounds)}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps:
            for layer, name, shared, levels in self.shared:
                self._form(layer, name, shared, levels, trainer.optimizers[0])

    @torch.no_grad()
    def _form(self, layer: nn.Module, name: str, shared: Shared, levels: int, optimizer: torch.optim.Optimizer) -> None:
        original = layer.parametrizations[name].original
        kept = getattr(layer, name) != 0
        importance = optimizer.state[original].get("exp_avg_sq") if self.importance and name == "weight" else None
        shared.assign(torch.where(kept, original, 0.0), levels, importance)


def _append(layer: nn.Module, name: str, parametrization: nn.Module) -> nn.Module:
    """Attach the last parametrization of a tensor, in place of one of the same kind from an earlier training."""
    if parametrize.is_parametrized(layer, name):
        for one in layer.parametrizations[name]:
            if type(one) is type(parametrization):
                return one
    parametrize.register_parametrization(layer, name, parametrization)
    return parametrization


def _checked_share(start: float) -> float:
    if not 0 <= start < 1:
        raise ValueError(f"start={start}: use a share of the training from 0 up to, not including, 1")
    return start


# -- the file ---------------------------------------------------------------------------------------------------------
#
# "FISH", version (1 byte), digest of all that follows (8), checksum of names, shapes and types (4), checksum of the
# decoded tensors (4), length of each section (variable), sections. Integers are little-endian; variable ones are LEB128.

MAGIC, VERSION = b"FISH", 1
SECTIONS = ("tables", "codebooks", "positions", "values", "biases", "BatchNorm", "uncoded")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool)
RAW, DENSE, SPARSE = range(3)
MOST_VALUES = 4096
MOST_ELEMENTS = 2**31


class CompressedFileError(ValueError):
    """A file that is damaged, of another kind, of another version, or of another network."""


def compress(net: nn.Module, path: str | Path) -> pd.Series:
    """Write `net` to `path` in few bytes, without loss, and return `size` of it.

    A tensor that takes few values is stored as a codebook and the entropy-coded places of its entries; any other as it
    is. Quantise and prune first, or the file has the size of the network. Masks and quantisers that are attached count
    as applied. The file is written whole or not at all.

    Parameters
    ----------
    net : a network; everything in its ``state_dict`` is stored, under no name: `load` needs the same architecture

    Raises
    ------
    FileNotFoundError
        there is no folder of that name
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}: make it first")
    sections = {name: bytearray() for name in SECTIONS}
    coders = {name: _encoder() for name in ("positions", "values", "biases")}
    tensors, modules = _tensors(plain(net)), dict(net.named_modules())
    previous = None
    for name, tensor in tensors.items():
        part = _Part.of(name, tensor, modules)
        previous = _latest(part.write(tensor, sections, coders, previous), previous)
    for name, coder in coders.items():
        sections[name] += coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    body = struct.pack("<II", _structure(tensors), _content(tensors))
    body += b"".join(_varint(len(sections[name])) for name in SECTIONS) + b"".join(sections.values())
    _write_whole(Path(path), MAGIC + bytes([VERSION]) + _digest(body) + body)
    return size(path)


def load(path: str | Path, net: nn.Module) -> nn.Module:
    """A copy of `net` with the tensors of the file `path`, equal to the compressed network's to the last bit.

    Raises
    ------
    CompressedFileError
        the file is damaged, foreign, of another version, or holds another architecture than `net` has; nothing was
        loaded then
    """
    net = plain(net)
    tensors = _tensors(net)
    file = _File.read(path)
    if file.structure != _structure(tensors):
        raise CompressedFileError(f"{path} holds another network: its parameters' names, shapes or types differ from those "
                                  "of the network given")
    decoded = _guarded(path, lambda: file.decode([tuple(t.shape) for t in tensors.values()]))
    decoded = dict(zip(tensors, decoded, strict=True))
    if _content(decoded) != file.content:
        raise CompressedFileError(f"{path} decodes to other weights than were stored: it is damaged, or was written with "
                                  "another version of the coder")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(decoded[name])
    return net


def size(path: str | Path) -> pd.Series:
    """Bytes of a compressed file by what they are for; they sum to the file's size.

    Header (with both checksums), tables (shapes, types, frequencies), codebooks (the values), positions (of what is not
    zero), values (which codebook entry), biases, BatchNorm (with its running statistics), uncoded (tensors as they are).
    """
    file = _File.read(path)
    parts = {name: len(content) for name, content in file.sections.items()}
    return pd.Series({"header": file.bytes - sum(parts.values())} | parts, name="bytes")


def ratio(path: str | Path, net: nn.Module) -> float:
    """How many times smaller the file is than the network's parameters and buffers in memory (float32: 4 bytes each)."""
    return sum(t.numel() * t.element_size() for t in _tensors(plain(net)).values()) / Path(path).stat().st_size


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """The state of a plain network, a tensor with several names under its first."""
    seen, tensors = set(), {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _structure(tensors: Mapping[str, Tensor]) -> int:
    return zlib.crc32(repr([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]).encode())


def _content(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for tensor in tensors.values():
        total = zlib.crc32(_bytes(tensor), total)
    return total


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).digest()


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _encoder() -> Any:
    import constriction

    return constriction.stream.queue.RangeEncoder()


def _decoder(content: bytes) -> Any:
    import constriction

    words = np.frombuffer(content + bytes(-len(content) % 4), dtype="<u4").astype(np.uint32)
    return constriction.stream.queue.RangeDecoder(words)


def _categorical(counts: np.ndarray) -> Any:
    import constriction

    return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)


def _bernoulli() -> Any:
    import constriction

    return constriction.stream.model.Bernoulli(perfect=False)


def _code(coder: Any, symbols: np.ndarray, counts: np.ndarray) -> None:
    if len(counts) > 1 and len(symbols):
        coder.encode(symbols.astype(np.int32), _categorical(counts))


def _decode(coder: Any, number: int, counts: np.ndarray) -> np.ndarray:
    if len(counts) < 2 or not number:
        return np.zeros(number, dtype=np.int64)
    return coder.decode(_categorical(counts), number).astype(np.int64)


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


class _Reader:
    """Bytes that are taken one after the other and run out with an error."""

    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def take(self, number: int) -> bytes:
        if number > len(self.content) - self.place:
            raise CompressedFileError("it ends too early")
        self.place += number
        return self.content[self.place - number : self.place]

    def varint(self, most: int = MOST_ELEMENTS) -> int:
        number, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 35:
                raise CompressedFileError("a number in it is too long")
        if number > most:
            raise CompressedFileError(f"a number in it is {number}, at most {most} can be")
        return number

    def end(self) -> None:
        if self.place != len(self.content):
            raise CompressedFileError("it holds more than it should")


@dataclass
class _Part:
    """How one tensor is stored: what the tables say of it."""

    kind: int
    section: str
    dtype: int
    shape: tuple[int, ...]
    codebook: np.ndarray | None = None
    half: bool = False
    counts: np.ndarray | None = None
    layout: int = 0
    rows: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> _Part:
        owner, _, last = name.rpartition(".")
        norm = "Norm" in type(modules.get(owner)).__name__
        if tensor.dtype not in DTYPES or tensor.ndim > 7:
            raise ValueError(f"{name} is {tensor.dtype} of {tensor.ndim} dimensions: the file holds real numbers of up to 7")
        part = cls(RAW, "BatchNorm" if norm else "uncoded", DTYPES.index(tensor.dtype), tuple(tensor.shape))
        if tensor.dtype != torch.float32 or norm or not tensor.numel():
            return part
        # By bit pattern, so that -0.0 and NaN come back as they were.
        patterns, counts = np.unique(_patterns(tensor), return_counts=True)
        with np.errstate(over="ignore"):
            halves = patterns.view(np.float32).astype(np.float16)
        half = bool((halves.astype(np.float32).view(np.uint32) == patterns).all())
        # At most: a codebook, about a byte for each frequency, and an index for each entry.
        coded = (3 if half else 5) * len(patterns) + tensor.numel() * log2(len(patterns)) / 8
        if len(patterns) > MOST_VALUES or coded > 4 * tensor.numel():
            return part
        part.half, part.section = half, "biases" if last == "bias" else "values"
        part.kind = SPARSE if tensor.ndim > 1 and counts[patterns == 0].sum() > 0.1 * tensor.numel() else DENSE
        kept = (patterns != 0) | (part.kind == DENSE)
        part.codebook, part.counts = patterns[kept].view(np.float32), counts[kept]
        return part

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], prod(self.shape[1:])

    def write(self, tensor: Tensor, sections: dict[str, bytearray], coders: dict[str, Any],
              previous: np.ndarray | None) -> np.ndarray | None:
        """Append the tensor to the sections; which rows of it hold anything."""
        table = bytes([self.kind | SECTIONS.index(self.section) << 2, self.dtype << 4 | self.half << 3 | len(self.shape)])
        table += b"".join(_varint(n) for n in self.shape)
        alive = None
        if self.kind == RAW:
            sections[self.section] += _bytes(tensor)
        else:
            symbols = np.searchsorted(self.codebook.view(np.uint32), patterns := _patterns(tensor))
            if self.kind == SPARSE:
                places = (patterns != 0).reshape(self.matrix)
                self.layout = _best_layout(places, previous)
                self.rows = _encode_places(coders["positions"], places, self.layout, previous)
                symbols, alive = symbols[patterns != 0], places.any(1)
                table += bytes([self.layout]) + b"".join(_varint(n) for n in self.rows)
            table += _varint(len(self.counts)) + b"".join(_varint(n) for n in self.counts.tolist())
            sections["codebooks"] += self.codebook.astype("<f2" if self.half else "<f4").tobytes()
            _code(coders["biases" if self.section == "biases" else "values"], symbols, self.counts)
        sections["tables"] += table
        return alive

    @classmethod
    def read(cls, tables: _Reader, codebooks: _Reader) -> _Part:
        first, second = tables.take(2)
        kind, section, dtype, dimensions = first & 3, first >> 2, second >> 4, second & 7
        if kind > SPARSE or section >= len(SECTIONS) or dtype >= len(DTYPES) or (kind == SPARSE and not 1 < dimensions):
            raise CompressedFileError("a tensor in it is of an unknown kind")
        shape = tuple(tables.varint() for _ in range(dimensions))
        if prod(shape) > MOST_ELEMENTS:
            raise CompressedFileError(f"a tensor in it has {prod(shape)} entries")
        part = cls(kind, SECTIONS[section], dtype, shape, half=bool(second >> 3 & 1))
        if kind != RAW:
            part._read_values(tables, codebooks)
        return part

    def _read_values(self, tables: _Reader, codebooks: _Reader) -> None:
        elements = prod(self.shape)
        if self.kind == SPARSE:
            self.layout = tables.take(1)[0]
            lines, length = self.matrix[::-1] if self.layout & 1 else self.matrix
            self.rows = np.array([tables.varint(lines) for _ in range(length.bit_length() + 1)])
            if self.rows.sum() != lines:
                raise CompressedFileError("its rows do not add up")
        levels = tables.varint(min(MOST_VALUES, elements))
        self.counts = np.array([tables.varint(elements) for _ in range(levels)], dtype=np.int64)
        number = int(self.counts.sum())
        if (self.counts < 1).any() or number > elements or (self.kind == DENSE and number != elements):
            raise CompressedFileError("its values do not add up")
        kind = "<f2" if self.half else "<f4"
        self.codebook = np.frombuffer(codebooks.take(levels * (2 if self.half else 4)), kind).astype(np.float32)

    def decode(self, sections: Mapping[str, _Reader], coders: Mapping[str, Any],
               previous: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        dtype = DTYPES[self.dtype]
        if self.kind == RAW:
            content = sections[self.section].take(prod(self.shape) * torch.empty(0, dtype=dtype).element_size())
            raw = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            return raw.view(dtype).view(self.shape), None
        coder = coders["biases" if self.section == "biases" else "values"]
        if self.kind == DENSE:
            entries = self.codebook[_decode(coder, prod(self.shape), self.counts)]
            return torch.from_numpy(entries).view(self.shape), None
        places = _decode_places(coders["positions"], self.matrix, self.layout, self.rows, previous)
        if places.sum() != self.counts.sum():
            raise CompressedFileError("its positions and values do not add up")
        entries = np.zeros(places.shape, dtype=np.float32)
        entries[places] = self.codebook[_decode(coder, int(self.counts.sum()), self.counts)]
        return torch.from_numpy(entries).view(self.shape), places.any(1)


def _latest(rows: np.ndarray | None, before: np.ndarray | None) -> np.ndarray | None:
    return before if rows is None else rows


def _patterns(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(-1).view(np.uint32)


@dataclass
class _File:
    """A compressed file, its digest checked and its sections cut."""

    path: Path
    bytes: int
    structure: int
    content: int
    sections: dict[str, bytes]

    @classmethod
    def read(cls, path: str | Path) -> _File:
        everything = Path(path).read_bytes()
        if everything[:4] != MAGIC:
            raise CompressedFileError(f"{path} is no compressed network of this library: it does not begin with {MAGIC!r}")
        if everything[4:5] != bytes([VERSION]):
            raise CompressedFileError(f"{path} is of format {everything[4:5].hex() or '(none)'}, this library reads format "
                                      f"{VERSION}: write it anew, or use the library that wrote it")
        body = everything[13:]
        if everything[5:13] != _digest(body):
            raise CompressedFileError(f"{path} is damaged: its checksum does not fit; get a whole copy")
        return _guarded(path, lambda: cls._cut(Path(path), body))

    @classmethod
    def _cut(cls, path: Path, body: bytes) -> _File:
        reader = _Reader(body)
        structure, content = struct.unpack("<II", reader.take(8))
        lengths = [reader.varint() for _ in SECTIONS]
        sections = {name: reader.take(length) for name, length in zip(SECTIONS, lengths, strict=True)}
        reader.end()
        return cls(path, len(body) + 13, structure, content, sections)

    def decode(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        readers = {name: _Reader(content) for name, content in self.sections.items()}
        parts = [_Part.read(readers["tables"], readers["codebooks"]) for _ in shapes]
        # Before anything of that size is allocated.
        if [part.shape for part in parts] != shapes:
            raise CompressedFileError("its shapes are not those of the network")
        readers["tables"].end()
        readers["codebooks"].end()
        coders = {name: _decoder(self.sections[name]) for name in ("positions", "values", "biases")}
        tensors, alive = [], None
        for part in parts:
            tensor, rows = part.decode(readers, coders, alive)
            alive = _latest(rows, alive)
            tensors.append(tensor)
        return tensors


def _guarded(path: str | Path, action: Callable[[], Any]) -> Any:
    """Any way in which decoding fails, as one error that names the file."""
    try:
        return action()
    except (ValueError, AssertionError, IndexError, OverflowError, RuntimeError, TypeError) as error:
        raise CompressedFileError(f"{path} is damaged: {error}; get a whole copy") from error


# -- where the weights are --------------------------------------------------------------------------------------------
#
# Places of non-zeros are coded line by line. A line's number of non-zeros k comes first: the number of its bits by
# frequency, then those bits. Place j is then taken with probability k w_j / sum(w), where w_j counts the earlier lines'
# non-zeros in and beside column j, plus a prior. Counts are integers and the division is the only rounding, so that
# every machine computes the same probabilities.

SMALLEST = 2.0**-14


def _best_layout(places: np.ndarray, alive: np.ndarray | None) -> int:
    """The cheapest way, greedily: bit 0, lines are columns; bits 1-2, neighbours counted; bit 3, removed units of the layer
    before are heeded; bits 4-7, the prior."""
    best = min((flip | near << 1 | heed << 3 | 7 << 4 for flip, heed in ((0, 0), (0, 1), (1, 0)) for near in (0, 1, 2)),
               key=lambda layout: _cost(places, layout, alive))
    return min((best & 15 | prior << 4 for prior in range(2, 14)), key=lambda layout: _cost(places, layout, alive))


def _cost(places: np.ndarray, layout: int, alive: np.ndarray | None) -> float:
    """Bits of the places, without those of the lines' numbers."""
    lines = places.T if layout & 1 else places
    lines = lines[lines.any(1)]
    seen = np.zeros(lines.shape, dtype=np.int64)
    np.cumsum(lines[:-1], axis=0, out=seen[1:])
    chances = _chances(lines.sum(1, keepdims=True), seen, layout, _prior(lines.shape[1], layout, alive))
    return float(-np.log2(np.where(lines, chances, 1 - chances)).sum()) + 2 * (len(places.T if layout & 1 else places))


def _prior(columns: int, layout: int, alive: np.ndarray | None) -> np.ndarray:
    """A prior for each column; low where the layer before has removed the unit that a column reads."""
    prior = np.full(columns, 1 << (layout >> 4), dtype=np.int64)
    if layout >> 3 & 1 and not layout & 1 and alive is not None and columns % len(alive) == 0:
        prior = np.where(np.repeat(alive, columns // len(alive)), 8 * prior, 1)
    return prior


def _chances(number: np.ndarray | int, seen: np.ndarray, layout: int, prior: np.ndarray) -> np.ndarray:
    near, columns = layout >> 1 & 3, seen.shape[-1]
    counted = 4 * seen
    for shift in (1, isqrt(columns))[:near]:
        if shift < columns:
            counted[..., shift:] += seen[..., :-shift]
            counted[..., :-shift] += seen[..., shift:]
    counted = 32 * counted + prior
    return np.clip(number * counted / counted.sum(-1, keepdims=True), SMALLEST, 1 - SMALLEST)


def _encode_places(coder: Any, places: np.ndarray, layout: int, alive: np.ndarray | None) -> np.ndarray:
    """Code the places; the frequencies of the bit lengths of the lines' numbers."""
    lines = places.T if layout & 1 else places
    numbers = lines.sum(1)
    widths = np.array([int(n).bit_length() for n in numbers])
    frequencies = np.bincount(widths, minlength=lines.shape[1].bit_length() + 1)
    used = np.flatnonzero(frequencies)
    _code(coder, np.searchsorted(used, widths), frequencies[used])
    for width in range(2, len(frequencies)):
        _code(coder, numbers[widths == width] - (1 << width - 1), np.ones(1 << width - 1))
    seen, prior, model = np.zeros(lines.shape[1], dtype=np.int64), _prior(lines.shape[1], layout, alive), _bernoulli()
    for line, number in zip(lines, numbers, strict=True):
        if number:
            coder.encode(line.astype(np.int32), model, _chances(int(number), seen, layout, prior))
            seen += line
    return frequencies


def _decode_places(coder: Any, shape: tuple[int, int], layout: int, frequencies: np.ndarray,
                   alive: np.ndarray | None) -> np.ndarray:
    lines, columns = shape[::-1] if layout & 1 else shape
    used = np.flatnonzero(frequencies)
    widths = used[_decode(coder, lines, frequencies[used])]
    numbers = (widths == 1).astype(np.int64)
    for width in range(2, len(frequencies)):
        chosen = widths == width
        numbers[chosen] = _decode(coder, int(chosen.sum()), np.ones(1 << width - 1)) + (1 << width - 1)
    if (numbers > columns).any():
        raise CompressedFileError("a row in it has more entries than places")
    places = np.zeros((lines, columns), dtype=bool)
    seen, prior, model = np.zeros(columns, dtype=np.int64), _prior(columns, layout, alive), _bernoulli()
    for line, number in zip(places, numbers.tolist(), strict=True):
        if number:
            line[:] = coder.decode(model, _chances(number, seen, layout, prior))
            seen += line
    return places.T if layout & 1 else places
