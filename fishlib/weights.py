"""Which weights of a network matter, and removing those that do not.

The way is scores -> masks -> a pruned copy: `score` gives each weight a number, `select` decides from the numbers
alone, `apply` attaches the decision as masks that hold through further training (``torch.nn.utils.parametrize``).
`Pruning` does the same while a network trains, as a callback of `fishlib.training.fit`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .data import ImageData
from .fisher import diagonal
from .per_sample import asking, outputs_at
from .training import evaluation_mode

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
SCOPES = ("global", "layer")
Scores = dict[str, Tensor]
Masks = dict[str, Tensor]


class Mask(nn.Module):
    """The parametrization W -> W where `kept`, 0 elsewhere.

    With `straight` the removed weights still receive the gradient that they would have as zeros, so that they go on
    learning and may come back (dynamic network surgery, arXiv:1608.04493).
    """

    def __init__(self, kept: Tensor, straight: bool = False):
        super().__init__()
        self.register_buffer("kept", kept.clone())
        self.straight = straight

    def forward(self, weight: Tensor) -> Tensor:
        zero = weight - weight.detach() if self.straight else torch.zeros((), dtype=weight.dtype, device=weight.device)
        return torch.where(self.kept, weight, zero)


# -- the weights of a network -----------------------------------------------------------------------------------------

def prunable(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights may be removed, by the name of the weight: linear and convolutional ones.

    A layer that occurs twice is listed once.
    """
    return {f"{name}.weight" if name else "weight": module for name, module in net.named_modules()
            if isinstance(module, PRUNABLE)}


def refuse_shared(net: nn.Module) -> nn.Module:
    """`net`, unless two layers hold one weight, of which a mask or a quantiser would change one layer only: ValueError."""
    holders: dict[int, str] = {}
    for name, module in prunable(net).items():
        weight = module.parametrizations.weight.original if parametrize.is_parametrized(module, "weight") else module.weight
        if (first := holders.setdefault(id(weight), name)) != name:
            raise ValueError(f"{first} and {name} are one weight, and a mask would hold in one of the two layers only: give "
                             "each layer a weight of its own")
    return net


def values(net: nn.Module) -> dict[str, Tensor]:
    """The weights as the network uses them, masks and quantisers applied, detached."""
    with torch.no_grad():
        return {name: module.weight.detach() for name, module in prunable(net).items()}


def masks(net: nn.Module) -> Masks:
    """The masks attached to a network; True is kept."""
    return {name: mask.kept for name, module in prunable(net).items() for mask in _attached(module)}


def _attached(module: nn.Module) -> list[Mask]:
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return [one for one in module.parametrizations.weight if isinstance(one, Mask)]


def duplicate(net: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with `net`, its parametrizations included."""
    return own_classes(copy.deepcopy(net))


def own_classes(net: nn.Module) -> nn.Module:
    """Give each parametrized module of `net` a class of its own; returns `net`.

    torch makes a class for a parametrized module and lets its deep copies share it, so that adding or removing a
    parametrization of a copy would break the original.
    """
    for module in net.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    return net


def plain(net: nn.Module) -> nn.Module:
    """A copy without parametrizations: masks and quantisers become the values of ordinary parameters."""
    net = duplicate(net)
    for module in net.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            # A tensor that was parametrized has moved behind the others; linear and convolutional layers begin with it.
            for name in sorted(module._parameters, key=lambda name: (name != "weight", name)):
                module._parameters[name] = module._parameters.pop(name)
    return net


def sparsity(net: nn.Module) -> float:
    """Share of the prunable weights that are zero."""
    weights = values(net).values()
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))


def summary(net: nn.Module) -> pd.DataFrame:
    """A table with one row a layer, and a last row for all: weights, kept (the non-zero ones) and the share kept."""
    rows = [{"layer": name.removesuffix(".weight"), "weights": w.numel(), "kept": int(w.count_nonzero())}
            for name, w in values(net).items()]
    table = pd.DataFrame([*rows, {"layer": "all", "weights": sum(r["weights"] for r in rows),
                                  "kept": sum(r["kept"] for r in rows)}])
    return table.assign(share=table.kept / table.weights)


# -- scores -----------------------------------------------------------------------------------------------------------

def score(net: nn.Module, data: ImageData | Iterable[tuple[Tensor, Tensor]], by: str = "fisher_weight",
          samples: int = 1000, seed: int = 0, **options: Any) -> Scores:
    """How much each weight w of the linear and convolutional layers matters; higher is more worth keeping.

    - ``magnitude``: |w|.
    - ``random``: uniform.
    - ``fisher``: F, the diagonal of the Fisher information (mean over images), alone (Tu et al., arXiv:1605.04859).
      Option ``kind``: "sampled" (labels drawn from the model), "exact" or "empirical".
    - ``fisher_weight``: 1/2 w^2 F, to second order the mean KL divergence of the predictions when w goes.
    - ``hessian``: 1/2 h w^2 (optimal brain damage), h the diagonal of the Hessian of the mean loss by Hutchinson's
      estimator, E[z * Hz] over signs z, ``draws`` (1) for each batch; negative h counts as zero.
    - ``taylor``: (g w)^2, g the gradient of the mean loss of a batch, averaged over batches (arXiv:1906.10771).
    - ``woodfisher``: 1/2 w^2 / [F^-1]_ii, F the empirical Fisher information in blocks of ``block`` (64) consecutive
      weights, plus ``damping`` (0.001) times the mean of the blocks' diagonals (arXiv:2004.14340). The last block of a layer is
      filled up with zeros, which count in that mean.

    Weights that are zero behind a mask score -1: what was removed stays removed.

    Parameters
    ----------
    data : its training images in order, or an iterable of batches (images, labels)
    samples : number of images, at most; `magnitude` and `random` read none
    seed : of drawn labels, signs and `random`
    """
    if by not in SCORES:
        raise ValueError(f"unknown score {by!r}: use one of {', '.join(SCORES)}")
    attached, net = masks(net), plain(net)
    batches = list(_first(data, samples)) if by not in ("magnitude", "random") else []
    if not batches and by not in ("magnitude", "random"):
        raise ValueError(f"the score {by!r} needs images, and there are none: an iterator may be used up, or samples={samples}")
    with evaluation_mode(net), torch.random.fork_rng():
        torch.manual_seed(seed)
        scores = SCORES[by](net, batches, **options)
    return {name: torch.where(attached[name], s, -1.0) if name in attached else s for name, s in scores.items()}


def _first(data: ImageData | Iterable[tuple[Tensor, Tensor]], samples: int) -> Iterable[tuple[Tensor, Tensor]]:
    batches = data.batches("train", 256, shuffle=False) if isinstance(data, ImageData) else data
    for images, labels in batches:
        if samples <= 0:
            return
        yield images[:samples], labels[:samples]
        samples -= len(labels)


def _magnitude(net: nn.Module, batches: list) -> Scores:
    return {name: w.abs() for name, w in values(net).items()}


def _random(net: nn.Module, batches: list) -> Scores:
    return {name: torch.rand(w.shape).to(w.device) for name, w in values(net).items()}


def _fisher(net: nn.Module, batches: list, kind: str = "sampled") -> Scores:
    generator = torch.Generator(batches[0][0].device).manual_seed(torch.initial_seed())
    return diagonal(net, batches, kind, generator=None if kind != "sampled" else generator, parameters=prunable(net))


def _fisher_weight(net: nn.Module, batches: list, kind: str = "sampled") -> Scores:
    weights = values(net)
    return {name: weights[name].square() * f / 2 for name, f in _fisher(net, batches, kind).items()}


def _taylor(net: nn.Module, batches: list) -> Scores:
    weights = {name: layer.weight for name, layer in prunable(net).items()}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    with asking(weights.values()), torch.enable_grad():
        for images, labels in batches:
            gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(weights.values()), allow_unused=True,
                                            materialize_grads=True)
            for name, g in zip(weights, gradients, strict=True):
                total[name] += (g * weights[name].detach()).square() / len(batches)
    return total


def _hessian(net: nn.Module, batches: list, draws: int = 1) -> Scores:
    weights = {name: layer.weight for name, layer in prunable(net).items()}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    count = sum(len(labels) for _, labels in batches)
    with asking(weights.values()), torch.enable_grad():
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels, reduction="sum") / count
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True,
                                            materialize_grads=True)
            for draw in range(draws):
                signs = [torch.randint(0, 2, w.shape).to(w) * 2 - 1 for w in weights.values()]
                products = _times_hessian(gradients, list(weights.values()), signs, draw + 1 < draws)
                for name, z, hz in zip(weights, signs, products, strict=True):
                    total[name] += z * hz / draws
    return {name: weights[name].detach().square() * h.clamp_min(0) / 2 for name, h in total.items()}


def _times_hessian(gradients: Sequence[Tensor], weights: list[Tensor], signs: list[Tensor], again: bool) -> Sequence[Tensor]:
    """H z from gradients with their graph, which those of layers that do not run have not; `again` keeps the graph."""
    pairs = [(g, z) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(w) for w in weights]
    return torch.autograd.grad([g for g, _ in pairs], weights, [z for _, z in pairs], retain_graph=again, allow_unused=True,
                               materialize_grads=True)


def _woodfisher(net: nn.Module, batches: list, block: int = 64, damping: float = 1e-3) -> Scores:
    weights, total, count = values(net), {}, 0
    for images, labels in batches:
        for chunk in range(0, len(labels), 64):
            for name, g in _gradients(net, images[chunk : chunk + 64], labels[chunk : chunk + 64]).items():
                blocks = F.pad(g.flatten(1), (0, -g[0].numel() % block)).unflatten(1, (-1, block))
                total[name] = total.get(name, 0) + torch.einsum("nbi,nbj->bij", blocks, blocks)
        count += len(labels)
    scores = {}
    for name, sums in total.items():
        w, fisher = weights[name], sums / count
        level = damping * fisher.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-20)
        inverse = torch.linalg.inv(fisher + level * torch.eye(block, device=w.device, dtype=w.dtype))
        diagonal = inverse.diagonal(dim1=1, dim2=2).flatten()[: w.numel()].view_as(w)
        scores[name] = w.square() / (2 * diagonal.clamp_min(torch.finfo(w.dtype).tiny))
    return scores


def _gradients(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of each image's own loss, (N, *weight.shape), by weight; one that layers share has its first name."""
    parameters = dict(net.named_parameters())
    weights = {name: w for name, w in values(net).items() if name in parameters}
    rest = {name: p.detach() for name, p in parameters.items() if name not in weights} | dict(net.named_buffers())

    def loss(some: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(outputs_at(net, some | rest, image[None]), label[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, images, labels)


SCORES = {"magnitude": _magnitude, "random": _random, "fisher": _fisher, "fisher_weight": _fisher_weight,
          "hessian": _hessian, "taylor": _taylor, "woodfisher": _woodfisher}


# -- decisions --------------------------------------------------------------------------------------------------------

def select(scores: Mapping[str, Tensor], sparsity: float, scope: str = "global", allow_empty: bool = False) -> Masks:
    """The masks that keep the weights of highest score; exactly round(sparsity * N) of the N weights go.

    Parameters
    ----------
    scores : by weight; higher is more worth keeping. Among equal scores the later weight goes first.
    sparsity : share to remove, from 0 up to, not including, 1
    scope : "global" compares all weights of the network, "layer" removes the same share of each layer
    allow_empty : whether a layer may lose all of its weights; otherwise the best weight of each layer stays

    Raises
    ------
    ValueError
        unknown scope, scores that are not numbers, a sparsity outside [0, 1), or one that would empty a layer although
        `allow_empty` is off

    Examples
    --------
    >>> select({"a": torch.tensor([1., 5., 2.]), "b": torch.tensor([4., 3.])}, 0.4)
    {'a': tensor([False,  True, False]), 'b': tensor([True, True])}
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: use one of {', '.join(SCOPES)}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: use a share to remove from 0 up to, not including, 1, such as 0.9")
    if not scores or not all(score.numel() for score in scores.values()):
        raise ValueError("there are no scores to select from: the network has no linear or convolutional weights")
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ValueError(f"the scores of {name} hold values that are not numbers: was the network's loss finite?")
    if scope == "layer":
        return {name: _highest({name: score}, sparsity, allow_empty)[name] for name, score in scores.items()}
    return _highest(scores, sparsity, allow_empty)


def _highest(scores: Mapping[str, Tensor], sparsity: float, allow_empty: bool) -> Masks:
    total = sum(score.numel() for score in scores.values())
    keep = total - round(sparsity * total)
    if not allow_empty and keep < len(scores):
        layers = ", ".join(scores)
        raise ValueError(f"sparsity={sparsity} keeps {keep} of {total} weights, less than one in each of {layers}: use "
                         f"at most {1 - len(scores) / total:.6g}, or allow_empty=True")
    flat = torch.cat([score.detach().flatten().double() for score in scores.values()])
    if not allow_empty:
        flat = flat.clone()
        begin = 0
        for score in scores.values():
            flat[begin + flat[begin : begin + score.numel()].argmax()] = torch.inf
            begin += score.numel()
    kept = torch.zeros(total, dtype=torch.bool, device=flat.device)
    kept[torch.sort(flat, descending=True, stable=True).indices[:keep]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def apply(net: nn.Module, masks: Mapping[str, Tensor], straight: bool = False) -> nn.Module:
    """A copy of `net` with masks attached; they replace earlier ones of the same weights.

    Raises
    ------
    ValueError
        a mask for a weight that the network does not have, or of another shape
    """
    net = refuse_shared(duplicate(net))
    layers = prunable(net)
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"the network has no prunable weight {name!r}: it has {', '.join(layers) or 'none'}")
        if mask.shape != layers[name].weight.shape:
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the weight "
                             f"{tuple(layers[name].weight.shape)}")
        _attach(layers[name], mask.bool(), straight)
    return net


def _attach(module: nn.Module, mask: Tensor, straight: bool = False) -> Mask:
    mask = mask.to(module.weight.device)
    for attached in _attached(module):
        attached.kept, attached.straight = mask.clone(), straight
        return attached
    parametrize.register_parametrization(module, "weight", attached := Mask(mask, straight))
    return attached


def hold_zeros(net: nn.Module) -> nn.Module:
    """A copy whose weights that are zero stay zero in further training; quantisers become values."""
    net = plain(net)
    return apply(net, {name: w != 0 for name, w in values(net).items()})


def prune(net: nn.Module, scores: Mapping[str, Tensor], sparsity: float, scope: str = "global",
          allow_empty: bool = False) -> nn.Module:
    """A pruned copy of `net`: `select` and `apply` in one call. Its masks hold through further training."""
    return apply(net, select(scores, sparsity, scope, allow_empty))


def rewind(net: nn.Module, train: Callable[[nn.Module], nn.Module], rate: Callable[[nn.Module], Scores], sparsity: float,
           rounds: int = 3, scope: str = "global") -> nn.Module:
    """Iterative pruning with rewinding: train, prune, go back to the weights of `net`, and again (arXiv:1912.05671).

    After round r of R the share (1 - sparsity)^(r/R) is kept. Give the network of an early point of its training as `net`
    for rewinding, a fresh one for the lottery ticket of arXiv:1803.03635.

    Parameters
    ----------
    train : from a network to its trained copy, such as ``lambda net: fit(net, data, epochs=5)[0]``
    rate : from a trained network to scores, such as ``lambda net: score(net, data, "magnitude")``
    """
    trained = train(net)
    for r in range(1, rounds + 1):
        share = 1 - (1 - sparsity) ** (r / rounds)
        trained = train(apply(net, select(rate(trained), share, scope)))
    return trained


def without_dead_ends(net: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """A plain copy in which weights and biases that no output depends on are zero; the function stays the same.

    A weight is a dead end when every path from it to an output passes a zero, or when its own input is always zero. All
    weights are made positive and an input of ones is sent through: nothing can cancel, so the gradient of the outputs'
    sum vanishes for dead ends, and for them only. Holds for networks of linear, convolutional, pooling and ReLU layers.

    Parameters
    ----------
    shape : of an input, (C, H, W)
    """
    net = plain(net)
    positive = copy.deepcopy(net).double()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.requires_grad_().copy_((parameter != 0).double())
    ones = torch.ones(1, *shape, dtype=torch.float64, device=next(positive.parameters()).device)
    with torch.enable_grad(), evaluation_mode(positive), _MeanPooling():
        # Path counts grow fast: the logarithm of the sum keeps the gradients within range.
        gradients = torch.autograd.grad(positive(ones).sum().log(), list(positive.parameters()), allow_unused=True,
                                        materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.masked_fill_(gradient == 0, 0.0)
    return net


MEANS = {maximum: getattr(F, f"{adaptive}avg_pool{n}d") for n in (1, 2, 3) for adaptive in ("", "adaptive_")
         for maximum in (getattr(F, f"{adaptive}max_pool{n}d"), getattr(torch, f"{adaptive}max_pool{n}d", None)) if maximum}


class _MeanPooling(TorchFunctionMode):
    """Max pooling as mean pooling: the gradient of a maximum reaches one of its inputs only."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MEANS and len(args) <= 4 and kwargs.get("dilation", 1) == 1:
            func, given = MEANS[func], kwargs
            kwargs = {name: given[name] for name in ("stride", "padding", "ceil_mode") if name in given}
        return func(*args, **kwargs)


# -- during training --------------------------------------------------------------------------------------------------

class Pruning(L.Callback):
    """Remove weights while a network trains: the share removed is s_T - (s_T - s_0) (1 - t)^3, t from 0 to 1.

    The schedule is that of Zhu and Gupta (arXiv:1710.01878): fast while there is much to remove, slow near the end; s_0 is
    the share that is masked already. Use as ``fit(net, data, callbacks=[Pruning(0.95)])``; the masks stay attached to the
    network that `fit` returns.

    Parameters
    ----------
    sparsity : s_T, the share of the prunable weights to remove
    by : "magnitude"; "fisher_weight", 1/2 w^2 F with F from Adam's second moment up to a common factor (v is neither
        bias-corrected nor multiplied by the batch size), "fisher", that F alone, and "taylor", (g w)^2 with Adam's averages,
        all three free of cost; "random"; or a function from the network to scores
    scope : as for `select`
    start, end : shares of the training between which the removal takes place
    updates : number of times that the masks change
    regrow : removed weights go on learning and may come back until `end` (dynamic network surgery, arXiv:1608.04493)
    """

    def __init__(self, sparsity: float, by: str | Callable[[nn.Module], Scores] = "magnitude", scope: str = "global",
                 start: float = 0.1, end: float = 0.7, updates: int = 100, regrow: bool = False,
                 allow_empty: bool = False):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity}: use a share to remove from 0 up to, not including, 1, such as 0.9")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start={start}, end={end}: use shares of the training with 0 <= start < end <= 1")
        if not callable(by) and by not in RUNNING:
            raise ValueError(f"unknown score {by!r} during training: use one of {', '.join(RUNNING)}, or a function")
        self.sparsity, self.by, self.scope, self.allow_empty = sparsity, by, scope, allow_empty
        self.start, self.end, self.updates, self.regrow = start, end, updates, regrow

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Before the optimizer exists: a parametrized weight is another entry of the network's parameters.
        for layer in prunable(refuse_shared(own_classes(module.net))).values():
            kept = layer.weight.detach() != 0 if _attached(layer) else torch.ones_like(layer.weight, dtype=torch.bool)
            _attach(layer, kept, self.regrow)
        kept = torch.cat([mask.flatten() for mask in masks(module.net).values()])
        removed = len(kept) - int(kept.sum())
        self.initial = 1 - kept.float().mean().item()
        if removed > round(self.sparsity * len(kept)):
            raise ValueError(f"sparsity={self.sparsity}: the network has lost {self.initial:.4f} of its weights already; ask "
                             "for more")

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        first = min(round(self.start * total), total - 1)
        last = max(first + 1, round(self.end * total))
        steps = torch.linspace(first, last, min(self.updates, last - first) + 1).round().int().tolist()
        self.first, self.last, self.steps = first, last, set(steps[1:])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step not in self.steps:
            return
        progress = (trainer.global_step - self.first) / (self.last - self.first)
        share = self.sparsity - (self.sparsity - self.initial) * (1 - progress) ** 3
        layers = prunable(module.net)
        for name, mask in select(self._scores(trainer, module.net), share, self.scope, self.allow_empty).items():
            _attach(layers[name], mask, self.regrow and progress < 1)

    @torch.no_grad()
    def _scores(self, trainer: L.Trainer, net: nn.Module) -> Scores:
        if callable(self.by):
            return self.by(net)
        return {name: RUNNING[self.by](layer, trainer.optimizers[0], self.regrow)
                for name, layer in prunable(net).items()}


def _original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def _running(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """A score from a weight w and Adam's averages of its gradient, m, and squared gradient, v."""

    def score(layer: nn.Module, optimizer: torch.optim.Optimizer, regrow: bool) -> Tensor:
        weight = _original(layer) if regrow else layer.weight
        state = optimizer.state[_original(layer)]
        if "exp_avg_sq" not in state:
            raise ValueError(f"this score reads Adam's moments, which {type(optimizer).__name__} does not keep: use an "
                             "Adam optimizer, by='magnitude', or a function")
        scores = formula(weight, state["exp_avg"], state["exp_avg_sq"])
        kept = _attached(layer)[0].kept
        return scores if regrow else torch.where(kept, scores, -1.0)

    return score


def _running_magnitude(layer: nn.Module, optimizer: torch.optim.Optimizer, regrow: bool) -> Tensor:
    return _original(layer).abs() if regrow else layer.weight.abs()


def _running_random(layer: nn.Module, optimizer: torch.optim.Optimizer, regrow: bool) -> Tensor:
    return torch.where(_attached(layer)[0].kept, torch.rand_like(layer.weight), -1.0)


RUNNING = {
    "magnitude": _running_magnitude,
    "fisher_weight": _running(lambda w, m, v: w.square() * v / 2),
    "fisher": _running(lambda w, m, v: v),
    "taylor": _running(lambda w, m, v: (w * m).square()),
    "random": _running_random,
}
