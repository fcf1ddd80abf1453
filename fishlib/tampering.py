"""Changing the weights of a trained network, by chance or by an adversary, and certificates against it.

    with perturb(net, "range_noise", 0.1, generator):
        evaluate(net, data, "test")          # the weights are back afterwards, whatever happens inside

Flipped bits of float32 can make outputs that are not numbers, which `accuracies` and `curve` count as wrong.
`changed` gives the changed weights of each kind, `curve` the accuracy against its size, `flip_bits` and `adversary` search
for the worst change, `certify` bounds what any change of a given length can do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from .data import ImageData
from .fisher import fresh_generator
from .per_sample import checkpoints_refused, outputs_at
from .training import evaluation_mode

Weights = dict[str, Tensor]


def _range(w: Tensor) -> Tensor:
    return w.max() - w.min()


def _normal(w: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)


def _kept(w: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(w.shape, generator=generator, device=w.device) >= share


def _keep_smallest(w: Tensor, share: float) -> Tensor:
    order = w.abs().flatten().argsort()
    mask = torch.ones_like(order, dtype=torch.bool)
    mask[order[len(order) - round(share * len(order)):]] = False
    return mask.view(w.shape)


def quantized(w: Tensor, bits: int) -> Tensor:
    """Rounded to 2^bits equidistant levels from the minimum to the maximum of the tensor."""
    low, step = w.min(), _range(w).clamp_min(1e-30) / (2**bits - 1)
    return low + step * ((w - low) / step).round()


def to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Two's complement integers from -127 to 127 and their step, max |w| / 127: w ~ step x integer."""
    step = w.abs().max().clamp_min(1e-30) / 127
    return (w / step).round().to(torch.int8), step


def _flip_int8(w: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    code, step = to_int8(w)
    return _flipped(code, 8, share, generator).to(w.dtype) * step


def _flip_float32(w: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    return _flipped(w.float().view(torch.int32), 32, share, generator).view(torch.float32).to(w.dtype)


def _flipped(code: Tensor, bits: int, share: float, generator: torch.Generator | None) -> Tensor:
    hit = torch.rand((*code.shape, bits), generator=generator, device=code.device) < share
    mask = (hit.long() << torch.arange(bits, device=code.device)).sum(-1)
    return code ^ mask.to(code.dtype)  # the cast wraps, so the highest bit is the sign


KINDS: dict[str, Callable[[Tensor, float, torch.Generator | None], Tensor]] = {
    "range_noise": lambda w, amount, g: w + amount * _range(w) * _normal(w, g),
    "norm_noise": lambda w, amount, g: w + amount * w.norm() / w.numel() ** 0.5 * _normal(w, g),
    "relative_noise": lambda w, amount, g: w * (1 + amount * _normal(w, g)),
    "gaussian": lambda w, amount, g: w + amount * _normal(w, g),
    "deletion": lambda w, share, g: w * _kept(w, share, g),
    "deletion_of_largest": lambda w, share, g: w * _keep_smallest(w, share),
    "bit_flips_int8": _flip_int8,
    "bit_flips_float32": _flip_float32,
    "quantization": lambda w, bits, g: quantized(w, int(bits)),
}
SHARES = ("deletion", "deletion_of_largest", "bit_flips_int8", "bit_flips_float32")


def trained(net: nn.Module, biases: bool = True) -> Weights:
    """The tensors under attack: all parameters by name, or without biases those of two dimensions and more."""
    return {name: p.detach() for name, p in net.named_parameters() if biases or p.ndim > 1}


def changed(net: nn.Module, kind: str, amount: float, generator: torch.Generator | None = None,
            biases: bool = True) -> Weights:
    """New values of the tensors of `net` under one random change; the network stays as it is.

    Parameters
    ----------
    kind : "range_noise", "norm_noise" (Gaussian noise, its deviation in units of each tensor's range or of its root mean
        square), "relative_noise" (each weight times 1 + noise), "gaussian" (absolute), "deletion" (a random share set to
        zero), "deletion_of_largest" (of each tensor, the share of largest magnitude), "bit_flips_int8" and
        "bit_flips_float32" (each stored bit flipped with this probability; the first rounds to 8 bits before),
        "quantization" (rounded to `amount` bits)
    amount : size of the change, a share for deletion and bit flips, bits for quantisation
    generator : by default torch's global one
    biases : whether tensors of one dimension change too

    Raises
    ------
    ValueError
        an unknown kind, or an amount that makes no sense for it
    """
    _check(kind, amount)
    return {name: KINDS[kind](w, amount, generator) for name, w in trained(net, biases).items()}


def _check(kind: str, amount: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of change {kind!r}: use one of {', '.join(KINDS)}")
    whole = kind != "quantization" or (amount >= 1 and amount % 1 == 0)
    if not amount >= 0 or (kind in SHARES and amount > 1) or not whole:
        valid = "a share from 0 to 1" if kind in SHARES else "a whole number of bits" if not whole else "at least 0"
        raise ValueError(f"amount={amount} makes no sense for {kind}: use {valid}")


@contextlib.contextmanager
def perturb(net: nn.Module, kind: str, amount: float, generator: torch.Generator | None = None,
            biases: bool = True) -> Iterator[nn.Module]:
    """The network with changed weights, see `changed`; the old ones come back at the end, also after an exception."""
    with replaced(net, changed(net, kind, amount, generator, biases)):
        yield net


@contextlib.contextmanager
def replaced(net: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """The network with other `weights`, by name of parameter; the old ones come back at the end."""
    parameters = dict(net.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield net
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def curve(net: nn.Module, data: ImageData, kind: str, amounts: Sequence[float], repeats: int = 10,
          split: str = "test", biases: bool = True, reestimate: bool = False, seed: int = 0,
          batch_size: int | None = None) -> pd.DataFrame:
    """Accuracy after changes of growing size, `repeats` draws each: one row an amount.

    Small networks run all draws at once (vmap over stacked weights), which saves the time of many small operators.

    Parameters
    ----------
    kind, biases : as for `changed`
    reestimate : take BatchNorm's statistics anew after each change, as means over the batches of the training split
    seed : of the draws; the global generator is not used

    Returns
    -------
    Columns kind, amount, accuracy (mean over draws), deviation (standard deviation over draws), low and high (the 95 %
    interval of the mean over draws, Student's t; the images are held fixed; one draw has none), repeats.
    """
    if repeats < 1 or not len(amounts):
        raise ValueError(f"repeats={repeats}, amounts={list(amounts)}: use at least 1 draw and 1 amount")
    for amount in amounts:
        _check(kind, amount)
    rows = []
    for amount in amounts:
        generator = torch.Generator(data.device).manual_seed(seed)
        draws = [changed(net, kind, amount, generator, biases) for _ in range(repeats)]
        values = np.array(accuracies(net, data, draws, split, reestimate, batch_size))
        spread = values.std(ddof=1) if repeats > 1 else 0.0
        half = student.ppf(0.975, repeats - 1) * spread / repeats**0.5 if repeats > 1 else 0.0
        rows.append({"kind": kind, "amount": amount, "accuracy": values.mean(), "deviation": spread,
                     "low": values.mean() - half, "high": values.mean() + half, "repeats": repeats})
    return pd.DataFrame(rows)


@torch.no_grad()
def accuracies(net: nn.Module, data: ImageData, draws: list[Weights], split: str = "test", reestimate: bool = False,
               batch_size: int | None = None) -> list[float]:
    """Accuracy of `net` with each of several sets of weights; a prediction that is not a number counts as wrong."""
    with evaluation_mode(net):
        if reestimate:
            draws = [weights | reestimated(net, data, weights) for weights in draws]
        correct, samples = torch.zeros(len(draws), device=data.device), 0
        for images, labels in data.batches(split, batch_size, shuffle=False):
            correct += (predictions(net, images, draws) == labels).sum(1)
            samples += len(labels)
    return (correct / samples).tolist()


# Below this many weights the operators' fixed cost exceeds their work on one set of weights (measured on a CPU).
SMALL = 30_000


def predictions(net: nn.Module, images: Tensor, draws: list[Weights]) -> Tensor:
    """Predicted classes (draws, N) under each set of weights; -1 where an output is not a number."""
    logits = _together(net, images, draws)
    if logits is None:
        logits = torch.stack([outputs_at(net, weights, images) for weights in draws])
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def _together(net: nn.Module, images: Tensor, draws: list[Weights]) -> Tensor | None:
    """Outputs (draws, N, classes) of a small network; None for others and for those that vmap cannot follow."""
    if len(draws) < 2 or sum(w.numel() for w in draws[0].values()) >= SMALL:
        return None
    stacked = {name: torch.stack([weights[name] for weights in draws]) for name in draws[0]}
    try:
        return vmap(lambda weights: outputs_at(net, weights, images))(stacked)
    except RuntimeError:  # layers without a batching rule (nn.GRU), branches that depend on values
        return None


@torch.no_grad()
def reestimated(net: nn.Module, data: ImageData, weights: Weights, batches: int = 10) -> Weights:
    """BatchNorm's running means and variances under other weights, as means over some batches of training images."""
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return {}
    before = [(m.momentum, m.training) for m in norms]
    try:
        for m in norms:
            m.train()
        for count, (images, _) in zip(range(1, batches + 1), data.batches("train", 512, shuffle=False), strict=False):
            for m in norms:
                m.momentum = 1 / count
            outputs_at(net, weights | buffers, images)
    finally:
        for m, (momentum, training) in zip(norms, before, strict=True):
            m.momentum, m.training = momentum, training
    return buffers


def expected_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of 1 - p(y | x): unlike the loss, it cannot be raised for ever on images that are wrong already."""
    return 1 - logits.softmax(1).gather(1, labels[:, None]).mean()


def clipped_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of min(1, largest other logit - own logit): an image that is clearly wrong no longer counts.

    Images that are surely right keep their slope, where those of the loss and of `expected_error` vanish: the search does
    not get stuck once one class is lost.
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    return (logits.masked_fill(own, -torch.inf).amax(1) - logits[own]).clamp(max=1).mean()


# What an attacker may raise. No goal is the strongest everywhere: a claim of robustness needs the worst of them.
GOALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": F.cross_entropy, "expected error": expected_error, "clipped margin": clipped_margin}


Goal = str | Callable[[Tensor, Tensor], Tensor]


def _goal(goal: Goal) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(goal):
        return goal
    if goal not in GOALS:
        raise ValueError(f"unknown goal {goal!r}: use one of {', '.join(GOALS)}, or a function of logits and labels")
    return GOALS[goal]


def _value(net: nn.Module, weights: Weights, images: Tensor, labels: Tensor, goal: Callable = F.cross_entropy) -> Tensor:
    with checkpoints_refused():
        return goal(outputs_at(net, weights, images), labels)


def _slopes(net: nn.Module, weights: Weights, images: Tensor, labels: Tensor, goal: Callable) -> list[Tensor]:
    """Gradients of the goal by tensor, zero for one that the outputs do not depend on."""
    leaves = [w.detach().requires_grad_() for w in weights.values()]
    with torch.enable_grad():
        value = _value(net, dict(zip(weights, leaves, strict=True)), images, labels, goal)
        if not value.isfinite():
            raise ValueError(f"the attacker's goal is {value.item()} on these images and cannot be raised: use a network "
                             "with finite weights and images without nan")
        return list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))


def flip_bits(net: nn.Module, images: Tensor, labels: Tensor, flips: int, biases: bool = False,
              goal: Goal = F.cross_entropy) -> list[tuple[str, int, int, Weights]]:
    """The progressive bit-flip attack on 8-bit weights [Rakin et al. 2019], one flip after the other.

    Each round takes the gradient of the goal on the given images, ranks in every tensor the flips by their first-order
    gain, gradient x change of the weight, tries the best one of each tensor, and keeps the one that raises the goal most.

    Parameters
    ----------
    images, labels : the attacker's batch
    flips : rounds, from 0
    biases : whether tensors of one dimension are in 8 bits and under attack too; unlike elsewhere in this module not by
        default, since fixed-point hardware keeps biases in the 32 bits of its accumulators, as the published attack does
    goal : what the attack raises, a name in `GOALS` or a function of logits and labels: the loss, as published, or another.
        One goal can get stuck where another does not, so run several and take the worst

    Returns
    -------
    A list with one entry a flip: name of the tensor, flat index, bit (7 is the sign), and the weights after it; shorter than
    `flips` only if all bits have been flipped.

    Raises
    ------
    ValueError
        a negative number of flips, an unknown goal, or one that is not finite
    """
    goal = _goal(goal)
    if flips < 0:
        raise ValueError(f"flips={flips}: use at least 0")
    with evaluation_mode(net):
        start = trained(net, biases)
        codes, steps = {}, {}
        for name, w in start.items():
            codes[name], steps[name] = to_int8(w)
        weights = {name: codes[name].to(w.dtype) * steps[name] for name, w in start.items()}
        history, done = [], set()
        for _ in range(flips):
            best = _best_flip(net, weights, codes, steps, images, labels, goal, done)
            if best is None:
                break
            name, index, bit = best
            done.add(best)
            codes[name] = _with_flip(codes[name], index, bit)
            weights = weights | {name: codes[name].to(start[name].dtype) * steps[name]}
            history.append((name, index, bit, weights))
    return history


def _with_flip(code: Tensor, index: int, bit: int) -> Tensor:
    flat = code.flatten().clone()
    flat[index] ^= torch.tensor(1 << bit, device=code.device).to(torch.int8)
    return flat.view(code.shape)


def _best_flip(net: nn.Module, weights: Weights, codes: Weights, steps: Weights, images: Tensor, labels: Tensor,
               goal: Callable, done: set) -> tuple[str, int, int] | None:
    gradients = _slopes(net, weights, images, labels, goal)
    best, highest = None, -float("inf")
    with torch.no_grad():
        for (name, code), gradient in zip(codes.items(), gradients, strict=True):
            bits = torch.arange(8, device=code.device, dtype=torch.int8)
            ones = code.flatten()[:, None] >> bits & 1
            size = 2.0 ** bits * torch.where(bits == 7, -1, 1)  # the sign bit counts -128
            gain = (gradient * steps[name]).flatten()[:, None] * ((1 - 2 * ones) * size.to(gradient.dtype))
            for old, index, bit in done:
                if old == name:
                    gain[index, bit] = -float("inf")  # flipping back would end the search in a circle
            index, bit = divmod(int(gain.argmax()), 8)
            if not torch.isfinite(gain[index, bit]):
                continue
            tried = weights | {name: _with_flip(code, index, bit).to(gradient.dtype) * steps[name]}
            if (value := _value(net, tried, images, labels, goal).item()) > highest:
                best, highest = (name, index, bit), value
    return best


def adversary(net: nn.Module, images: Tensor, labels: Tensor, radius: float, norm: str = "l2", steps: int = 20,
              biases: bool = True, goal: Goal = F.cross_entropy) -> Weights:
    """Weights that raise the goal, found by projected gradient ascent within a budget around those of `net`.

    Parameters
    ----------
    images, labels : the attacker's batch
    radius : budget, relative to the weights: for "l2" the length of the change over that of all weights together, for
        "linf" the change of each weight over its tensor's range
    steps : of size 2.5 radius / steps, along the gradient ("l2") or its sign ("linf")
    biases : whether tensors of one dimension change too
    goal : what the attack raises, a name in `GOALS` or a function of logits and labels; run several and take the worst

    Raises
    ------
    ValueError
        an unknown norm or goal, a negative radius, fewer than one step, or a goal that is not finite
    """
    goal = _goal(goal)
    if norm not in ("l2", "linf"):
        raise ValueError(f"unknown norm {norm!r}: use l2 or linf")
    if not radius >= 0 or steps < 1:
        raise ValueError(f"radius={radius}, steps={steps}: use a radius of at least 0 and at least 1 step")
    start = trained(net, biases)
    length = torch.stack([w.square().sum() for w in start.values()]).sum().sqrt()
    limits = {name: radius * (length if norm == "l2" else _range(w)) for name, w in start.items()}
    change = {name: torch.zeros_like(w) for name, w in start.items()}
    with evaluation_mode(net):
        for _ in range(steps):
            moved = {name: start[name] + d for name, d in change.items()}
            gradients = _slopes(net, moved, images, labels, goal)
            change = _ascend(change, gradients, limits, norm, 2.5 / steps)
    return {name: start[name] + d for name, d in change.items()}


def _ascend(change: Weights, gradients: Sequence[Tensor], limits: Weights, norm: str, rate: float) -> Weights:
    if norm == "linf":
        return {name: (change[name] + rate * limits[name] * g.sign()).clamp(-limits[name], limits[name])
                for name, g in zip(change, gradients, strict=True)}
    size = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().clamp_min(1e-30)
    moved = {name: change[name] + rate * limits[name] * g / size for name, g in zip(change, gradients, strict=True)}
    length = torch.stack([d.square().sum() for d in moved.values()]).sum().sqrt()
    return {name: d * (limits[name] / length).clamp(max=1) for name, d in moved.items()}


@dataclass(frozen=True)
class Certificate:
    """Predictions of a network smoothed over its weights, and the radius within which each cannot change.

    Attributes
    ----------
    predictions : class of each image, -1 where the procedure abstains; shape (N,)
    radii : certified length of a change of all weights, in units of each tensor's `scale`; 0 where it abstains
    scales : unit of length of each tensor; 0 for one of a single value, see `uncovered`
    sigma : deviation of the smoothing noise in the same units
    alpha : each certificate fails with at most this probability over the draws of the noise
    """

    predictions: Tensor
    radii: Tensor
    scales: Weights
    sigma: float
    alpha: float

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Tensors of range 0: they get no noise, so the certificate promises nothing about a change of them."""
        return tuple(name for name, scale in self.scales.items() if not scale > 0)

    @property
    def abstained(self) -> int:
        return int((self.predictions < 0).sum())

    def accuracy(self, labels: Tensor, radii: Sequence[float]) -> pd.DataFrame:
        """Certified accuracy: the share of images that are right and certified at each radius, abstentions counted as wrong."""
        right = self.predictions == labels.to(self.predictions.device)
        return pd.DataFrame({"radius": list(radii), "accuracy": [
            ((right & (self.radii >= r)).double().mean()).item() for r in radii]})


def certify(net: nn.Module, images: Tensor, sigma: float, samples: int = 1000, alpha: float = 0.001,
            scale: str = "range", biases: bool = True, generator: torch.Generator | None = None,
            chunk: int = 50) -> Certificate:
    """Randomised smoothing over the *weights* [Cohen et al. 2019]: radius sigma Phi^-1(p_A).

    The smoothed network predicts the most frequent class under weights w + sigma scale n, n standard normal. p_A is the
    Clopper-Pearson lower bound, at confidence 1 - alpha, on the probability of that class; below 1/2 the procedure abstains.
    The class is chosen from a tenth of the samples and the bound from the others, which are independent of them.
    The same draws serve all images: each certificate holds at 1 - alpha by itself, not all of them together. It covers the
    tensors that get noise. In units of ranges a tensor whose values are all equal (fresh scales of BatchNorm, biases of 0)
    gets none: `Certificate.uncovered` names those; use scale="absolute" or biases=False where there are any.

    Parameters
    ----------
    images : (N, C, H, W)
    sigma : deviation of the noise in units of `scale`
    samples : draws of the weights
    alpha : failure probability of each certificate
    scale : "range" measures every tensor's change in units of its range, "absolute" as it is
    biases : whether tensors of one dimension get noise and are covered too
    generator : of the noise; None draws from fresh entropy. The global random state is neither used nor changed.
    chunk : draws at a time
    """
    if not sigma > 0 or not 0 < alpha < 1 or samples < 20 or chunk < 1:
        raise ValueError(f"sigma={sigma}, alpha={alpha}, samples={samples}, chunk={chunk}: use sigma above 0, alpha between "
                         "0 and 1, at least 20 samples and a chunk of at least 1")
    if scale not in ("range", "absolute"):
        raise ValueError(f"unknown scale {scale!r}: use range or absolute")
    weights, generator = trained(net, biases), generator or fresh_generator(images.device)
    scales = {name: _range(w) if scale == "range" else torch.ones_like(w.flatten()[0]) for name, w in weights.items()}
    first = votes(net, images, weights, scales, sigma, max(10, samples // 10), generator, chunk)
    top = first.argmax(1)
    second = votes(net, images, weights, scales, sigma, samples - max(10, samples // 10), generator, chunk)
    agreed, total = second.gather(1, top[:, None])[:, 0], samples - max(10, samples // 10)
    low = lower_bound(agreed, total, alpha)
    sure = low > 0.5
    radii = torch.where(sure, sigma * torch.special.ndtri(low.clamp(max=1 - 1e-12)), 0.0)
    return Certificate(torch.where(sure, top, -1), radii, scales, sigma, alpha)


@torch.no_grad()
def votes(net: nn.Module, images: Tensor, weights: Weights, scales: Weights, sigma: float, samples: int,
          generator: torch.Generator | None = None, chunk: int = 50) -> Tensor:
    """How often each class is predicted under Gaussian noise of the weights, by default of torch's global generator.

    Returns
    -------
    Tensor (N, classes)
    """
    counts = None
    with evaluation_mode(net):
        classes = net(images[:1]).shape[1]
        counts = torch.zeros(len(images), classes, dtype=torch.long, device=images.device)
        for begin in range(0, samples, chunk):
            draws = [{name: w + sigma * scales[name] * _normal(w, generator) for name, w in weights.items()}
                     for _ in range(min(chunk, samples - begin))]
            predicted = predictions(net, images, draws)
            counts += F.one_hot(predicted.clamp_min(0), classes).mul((predicted >= 0)[..., None]).sum(0)
    return counts


def lower_bound(successes: Tensor, trials: int, alpha: float) -> Tensor:
    """Clopper-Pearson lower bound, at confidence 1 - alpha, on a probability with so many successes; float64."""
    from scipy.stats import beta

    k = successes.cpu().numpy()
    bound = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), trials - k + 1), 0.0)
    return torch.from_numpy(bound).to(successes.device)


def attack_certified(net: nn.Module, images: Tensor, certificate: Certificate, fraction: float = 1.0, steps: int = 10,
                     draws: int = 8, samples: int = 200, generator: torch.Generator | None = None,
                     chunk: int = 20) -> pd.DataFrame:
    """Attack each certified prediction by an adversary of its own, of length `fraction` times its own radius.

    Projected gradient ascent on the smoothed loss, a mean over `draws` of the noise at each step; then a vote of `samples`
    fresh draws around the attacked weights. Up to fraction 1 a certificate promises the certified class at least half of the
    probability. Votes of a class near one half are often in the minority by chance: those go to a second, ten times larger
    vote, unless the first is beyond doubt already (alpha / 1000), and only a minority that chance explains with less than
    probability alpha counts as a violation.

    Parameters
    ----------
    certificate : of `certify`, for these images
    fraction : length of each attack in units of its radius
    steps, draws : of the search
    samples : votes after it
    generator : of the noise; None draws from fresh entropy. The global random state is neither used nor changed.
    chunk : images at a time

    Returns
    -------
    One row a certified image: image (its index), radius (certified), length (of the attack), certified (class), attacked
    (class of most votes after the attack, -1 where no output was a number), votes (share of the certified class after it),
    violated (a minority beyond chance: up to fraction 1 the certificate is refuted, beyond it has promised nothing).
    """
    from scipy.stats import binom

    if not fraction >= 0 or min(steps, draws, samples, chunk) < 1:
        raise ValueError(f"fraction={fraction}, steps={steps}, draws={draws}, samples={samples}, chunk={chunk}: use a fraction "
                         "of at least 0 and at least 1 of the others")
    start = {name: w for name, w in trained(net).items() if name in certificate.scales}
    generator, rows = generator or fresh_generator(images.device), []
    with evaluation_mode(net):
        for part in (certificate.predictions >= 0).nonzero()[:, 0].split(chunk):
            if not len(part):
                continue  # nothing is certified
            labels = certificate.predictions[part]
            change = _attack(net, start, images[part], labels, certificate, fraction * certificate.radii[part].to(images.dtype),
                             steps, draws, generator)
            votes = _votes_each(net, start, change, images[part], certificate, samples, generator)
            own = votes.gather(1, labels[:, None])[:, 0]
            chance = torch.from_numpy(binom.cdf(own.cpu().numpy(), samples, 0.5)).to(own.device)
            unsure = ((2 * own <= samples) & (chance > certificate.alpha / 1000)).nonzero()[:, 0]
            total = torch.full_like(labels, samples).index_fill(0, unsure, 10 * samples)
            if len(unsure):
                some = {name: d[unsure] for name, d in change.items()}
                votes[unsure] = _votes_each(net, start, some, images[part[unsure]], certificate, 10 * samples, generator)
            own = votes.gather(1, labels[:, None])[:, 0]
            most = torch.where(votes.amax(1) > 0, votes.argmax(1), -1)
            rows.append(pd.DataFrame({
                "image": part.tolist(), "radius": certificate.radii[part].tolist(), "length": _lengths(change).tolist(),
                "certified": labels.tolist(), "attacked": most.tolist(), "votes": (own / total).tolist(),
                "violated": binom.cdf(own.cpu().numpy(), total.cpu().numpy(), 0.5) < certificate.alpha}))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(
        columns=["image", "radius", "length", "certified", "attacked", "votes", "violated"])


def _attack(net: nn.Module, start: Weights, images: Tensor, labels: Tensor, certificate: Certificate, radii: Tensor,
            steps: int, draws: int, generator: torch.Generator | None) -> Weights:
    """Changes of the weights, in units of their scales, stacked over images; each no longer than its radius."""
    def loss(change: Weights, noise: Weights, image: Tensor, label: Tensor) -> Tensor:
        moved = {name: w + certificate.scales[name] * (change[name] + noise[name]) for name, w in start.items()}
        return F.cross_entropy(outputs_at(net, moved, image[None]), label[None])

    def smoothed(change: Weights, noise: Weights, image: Tensor, label: Tensor) -> Tensor:
        return vmap(loss, (None, 0, None, None))(change, noise, image, label).mean()

    gradient = vmap(torch.func.grad(smoothed), (0, None, 0, 0))
    change = {name: w.new_zeros(len(images), *w.shape) for name, w in start.items()}
    for _ in range(steps):
        noise = {name: certificate.sigma * torch.stack([_normal(w, generator) for _ in range(draws)])
                 for name, w in start.items()}
        g = gradient(change, noise, images, labels)
        rise = _scaled(g, 2.5 / steps * radii / _lengths(g))
        moved = {name: change[name] + rise[name] for name in change}
        change = _scaled(moved, (radii / _lengths(moved)).clamp(max=1))
    return change


@torch.no_grad()
def _votes_each(net: nn.Module, start: Weights, change: Weights, images: Tensor, certificate: Certificate, samples: int,
                generator: torch.Generator | None) -> Tensor:
    """Votes (N, classes) under noise, each image at weights of its own; an output that is not a number has no vote."""
    centres = {name: w + certificate.scales[name] * change[name] for name, w in start.items()}
    predict = vmap(lambda weights, image: outputs_at(net, weights, image[None])[0])
    counts: Tensor | int = 0
    for _ in range(samples):
        noise = {name: certificate.sigma * certificate.scales[name] * _normal(w, generator) for name, w in start.items()}
        logits = predict({name: centres[name] + noise[name] for name in start}, images)
        counts = counts + F.one_hot(logits.argmax(1), logits.shape[1]) * logits.isfinite().all(1, keepdim=True)
    return counts


def _lengths(values: Weights) -> Tensor:
    return torch.stack([v.flatten(1).square().sum(1) for v in values.values()]).sum(0).sqrt().clamp_min(1e-30)


def _scaled(values: Weights, factors: Tensor) -> Weights:
    return {name: v * factors.view(-1, *[1] * (v.ndim - 1)) for name, v in values.items()}
