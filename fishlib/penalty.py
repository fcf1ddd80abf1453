"""Penalties that make a network's outputs survive changes of its weights, each used as ``fit(net, data, penalty=...)``.

If the weights change by a random d with mean zero and covariance S, the expected divergence between the predictions before
and after is 1/2 tr(F S) to second order, with the Fisher information F. So each threat to the weights names its penalty:

    penalty = FisherTrace(0.005, threat="range_noise")

A penalty is one of three kinds: a *term* added to the loss (`FisherTrace`, `KLNoise`, `GradientNorm`, `L2`,
`Distillation`), a *training at other weights*, whose loss takes the place of the plain one (`SAM`, `NoisyWeights`,
`QuantizationAware`), or a *decoupled step* on the weights after the optimizer's own (`FisherWeighted`, `FisherQuantization`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .per_sample import checkpoints_refused, outputs_at
from .tampering import quantized
from .training import digest, evaluation_mode

Threat = Callable[[Tensor], Tensor]


def range_noise(weight: Tensor) -> Tensor:
    """S = (max w - min w)^2 I: Gaussian noise whose deviation is a tensor's range, the unit of relative weight noise."""
    # Two rows hold both extremes: the gradients of amin and amax over the whole tensor cost more than the trace itself.
    rows = weight.flatten(1) if weight.ndim > 1 else weight[None]
    if len(rows) > 2:
        rows = rows[torch.stack([rows.detach().amin(1).argmin(), rows.detach().amax(1).argmax()])]
    low, high = torch.aminmax(rows)
    return (high - low).square()


def relative_noise(weight: Tensor) -> Tensor:
    """S = diag(w^2): each weight times 1 + noise. Deleting each weight with probability r has the mean -r w and the covariance
    r (1 - r) diag(w^2); r diag(w^2) is the diagonal of its second moment.
    """
    return weight.square()


def range_and_relative(weight: Tensor) -> Tensor:
    """S = (max w - min w)^2 I + 100 diag(w^2): both threats; at strength 0.003 noise of eta = 0.077 and, by the
    diagonal of the second moment alone, a deletion of 60 %.
    """
    return range_noise(weight) + 100 * relative_noise(weight)


def isotropic(weight: Tensor) -> Tensor:
    """S = I: the same noise on every weight, so that the penalty is tr F itself. It is not scale-free."""
    return weight.new_ones(())


def quantization(bits: int) -> Threat:
    """S = step^2 / 12 I with step = range / (2^bits - 1): rounding to 2^bits levels between the extremes of a tensor."""
    _check_bits(bits)

    def rounding(weight: Tensor) -> Tensor:
        return range_noise(weight) / (12 * (2**bits - 1) ** 2)

    rounding.__name__ = f"quantization_{bits}_bits"
    return rounding


THREATS: dict[str, Threat] = {"range_noise": range_noise, "relative_noise": relative_noise,
                             "range_and_relative": range_and_relative, "isotropic": isotropic}


def round_to(bits: int) -> Callable[[Tensor], Tensor]:
    """The quantiser that rounds a tensor to the nearest of 2^bits equidistant levels from its minimum to its maximum."""
    _check_bits(bits)

    def rounded(weight: Tensor) -> Tensor:
        return quantized(weight, bits)

    rounded.__name__ = f"round_to_{bits}_bits"
    return rounded


def _check_bits(bits: int) -> None:
    if bits not in range(1, 33):
        raise ValueError(f"bits={bits}: use a whole number from 1 to 32")


def _at_least_0(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value}: use a finite number of at least 0")
    return value


def _above_0(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: use a finite number above 0")
    return value


class Penalty(L.Callback):
    """What all penalties share: a strength, its schedule, and a stop when the term is no longer finite.

    Parameters
    ----------
    strength : factor of the term
    every : apply at each `every`-th step only, then `every` times as strongly, which keeps the mean gradient
    warmup : share of the training over which the strength rises linearly from zero
    """

    def __init__(self, strength: float, every: int = 1, warmup: float = 0.0):
        if every < 1 or every % 1:
            raise ValueError(f"every={every}: use 1 for each step, or a larger whole number")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup}: it is a share of the training, from 0 to 1")
        self.strength, self.every, self.warmup = _at_least_0("strength", strength), every, warmup
        self.step, self.steps = 0, 1
        self.memory: dict[str, Tensor] = {}
        self.rates: list[float] = []

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """The penalty at strength 1; zero for those that act on the loss or on the weights instead."""
        return logits.new_zeros(())

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """The term of this step, weighted. `logits` are the outputs of `net` for `images`, with their graph."""
        strength = self.current_strength()
        if strength == 0 or type(self).term is Penalty.term:
            return logits.new_zeros(())
        return self.finite(strength * self.term(net, images, labels, logits))

    def current_strength(self) -> float:
        """The strength of this step, with warm-up, and zero at the steps that `every` leaves out."""
        return self.strength * self.every * self.rise()

    def rise(self) -> float:
        """How much of the full size this step has: zero at the steps that `every` leaves out, growing over the warm-up."""
        if self.step % self.every:
            return 0.0
        return min(1.0, self.step / (self.warmup * self.steps)) if self.warmup else 1.0

    def finite(self, value: Tensor, what: str = "") -> Tensor:
        """`value`, or FloatingPointError with the step, the term and its value when it is not finite."""
        if not torch.isfinite(value):
            raise FloatingPointError(f"step {self.step}: {what}{self!r} became {value.item()}: lower its strength or the "
                                     "learning rate")
        return value

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        # A checkpoint is read on the CPU.
        self.memory = {name: value.to(module.device) for name, value in self.memory.items()} if trainer.global_step else {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.step = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        # Kept for the decoupled steps, since the schedule moves on to the next rates before a batch ends.
        self.rates = _rates(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]

    def _chosen(self) -> dict[str, Any]:
        """What the constructor was given; the trainer hangs methods of its own on its callbacks."""
        names = ("strength", *inspect.signature(type(self)).parameters)
        return {key: value for key, value in vars(self).items() if key in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={_short(value)}' for key, value in self._chosen().items())})"

    def identity(self, net: nn.Module) -> str:
        """What a checkpoint knows this penalty by: `repr`, a teacher's weights, and what functions make of those of `net`.

        A name does not tell two functions apart, nor does their code where it reads a variable.
        """
        digests = []
        for value in self._chosen().values():
            if isinstance(value, nn.Module):
                digests.append(digest(value.state_dict()))
            elif callable(value):
                weights = _trained(net, getattr(self, "biases", True))
                digests.append(digest({name: value(p.detach()) for name, p in weights.items()}))
        return " ".join([repr(self), *digests])


def _short(value: Any) -> str:
    """In words that are the same in the next process, so without addresses."""
    if isinstance(value, partial):
        options = [*map(repr, value.args), *(f"{key}={option!r}" for key, option in value.keywords.items())]
        return f"{_short(value.func)}({', '.join(options)})"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def forward(net: nn.Module, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs of `net` in its own mode, with other `parameters` where given; BatchNorm's running statistics stay."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    if parameters is None:
        return outputs_at(net, buffers, images)
    with checkpoints_refused():
        return outputs_at(net, buffers | parameters, images)


def _trained(net: nn.Module, biases: bool) -> dict[str, Tensor]:
    """Parameters that are trained, by name; without biases those of two dimensions and more. ValueError if there are none."""
    if trained := {name: p for name, p in net.named_parameters() if p.requires_grad and (biases or p.ndim > 1)}:
        return trained
    dimensions = "" if biases else " and has two dimensions or more"
    raise ValueError(f"no parameter of the network requires gradients{dimensions}: call requires_grad_(True) on those that the "
                     "penalty is about" + ("" if biases else ", or use biases=True"))


def _threat(threat: str | Threat) -> Threat:
    if callable(threat):
        return threat
    if threat not in THREATS:
        raise ValueError(f"unknown threat {threat!r}: use one of {', '.join(THREATS)}, quantization(bits), or a function "
                         "from a weight tensor to the variances of its change")
    return THREATS[threat]


def _full(values: Tensor) -> Tensor:
    """At least single precision: squares and divergences lose too much below."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _subset(share: float, images: Tensor) -> Tensor:
    return images[: max(2, round(share * len(images)))]  # a single image has no batch statistics


def _gradients(value: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """As ``torch.autograd.grad``, with zeros for inputs that `value` does not depend on."""
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True, **options)


class _LinearCalls(TorchFunctionMode):
    """Keeps input and output of every call of F.linear, and counts how often each parameter is used at all."""

    def __init__(self, parameters: dict[str, Tensor]):
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.uses, self.calls = dict.fromkeys(parameters, 0), []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is F.batch_norm and _takes_batch_statistics(*args, **(kwargs or {})):
            self.calls.clear()  # behind them an image's loss depends on the other images' rows too
        for value in _leaves((*args, *(kwargs or {}).values())):
            if name := self.names.get(id(value)):
                self.uses[name] += 1
        if function is F.linear and not kwargs and args[0].ndim == 2:
            names = [self.names[id(value)] for value in args[1:] if id(value) in self.names]
            self.calls.append((args[0], output, output._version, names))
        return output

    def simple(self, images: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Calls with a row for each of so many images, whose parameters are used nowhere else and whose output was not
        overwritten: (input, output, names).
        """
        for a, z, version, names in self.calls:
            if names and len(a) == images and z._version == version and all(self.uses[name] == 1 for name in names):
                yield a, z, names


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """All values, with those of lists and tuples among them, as `torch.cat` takes."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _takes_batch_statistics(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                            weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                            *rest: float, **options: float) -> bool:
    return training


def fisher_trace(net: nn.Module, images: Tensor, threat: str | Threat = "isotropic", biases: bool = True,
                 generator: torch.Generator | None = None, held: bool = False) -> dict[str, Tensor]:
    """tr(F S) of each parameter, in nats: a mean over images, one draw of random signs, differentiable.

    The scores of an image are J^T (p - y) with the Jacobian J of its logits and labels y drawn from the model, whose
    covariance is C = diag p - p p^T. Here r = (diag s - p s^T) e with s = sqrt p and random signs e takes the place of p - y:
    its covariance is C as well, and it is differentiable in p, so that the *gradient* of the estimate is unbiased too. That
    of drawn labels is not: it leaves out that their distribution moves with the weights. The gradient G of the *sum* of
    r^T logits over B images gives F_ii ~ G_i^2 / B from a single backward pass. Linear layers that are used once, on one row
    an image, have the scores of single images in closed form, g_n a_n^T, whose squares are summed without the noise of the
    cross terms: tr(F S) = 1/B sum_n (g_n^2)^T S a_n^2. Not so in front of a BatchNorm in training mode, behind which each
    score depends on all rows; batch statistics that a network takes by operations of its own are not noticed.

    Parameters
    ----------
    net : returns logits (N, classes); runs in its own mode (BatchNorm takes the statistics of these images in training
        mode, and keeps its running ones)
    threat : name out of `THREATS`, or a function from a weight tensor to the variances S of its change
    biases : whether tensors of one dimension change too
    generator : of the signs; by default torch's global one
    held : take C as given, so that the gradient is that through J and S alone; the value is the same

    Returns
    -------
    Name of each parameter -> scalar. The sum is tr(F S), half of it the expected divergence for small S.

    Raises
    ------
    ValueError
        no images, or no parameter of the network that requires gradients and is under the threat
    """
    if not len(images):
        raise ValueError("there are no images: a trace is a mean over them, give at least one")
    with torch.enable_grad():
        traces = _summed_traces(net, images, threat, biases, generator, held)
    return {name: trace / len(images) for name, trace in traces.items()}


def _summed_traces(net: nn.Module, images: Tensor, threat: str | Threat, biases: bool,
                   generator: torch.Generator | None = None, held: bool = False) -> dict[str, Tensor]:
    """`fisher_trace`, summed over images instead of the mean."""
    threat, parameters = _threat(threat), _trained(net, biases)
    with _LinearCalls(parameters) as seen:
        logits = _full(forward(net, images))
    if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in net.modules()):
        seen.calls.clear()  # several devices take batch statistics without calling F.batch_norm
    closed = list(seen.simple(len(images)))
    done = {name for _, _, names in closed for name in names}
    rest = [name for name in parameters if name not in done]
    wanted = [z for _, z, _ in closed] + [parameters[name] for name in rest]
    residuals = _residuals(logits.detach() if held else logits, generator)
    gradients = _gradients(logits, wanted, grad_outputs=residuals, create_graph=True)
    traces = {}
    for (a, _, names), g in zip(closed, gradients, strict=False):
        traces |= _closed_form(_full(a), _full(g), {name: parameters[name] for name in names}, threat)
    for name, G in zip(rest, gradients[len(closed):], strict=True):
        traces[name] = (threat(parameters[name]) * G.square()).sum()
    return {name: traces[name] for name in parameters}


def _residuals(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(diag s - p s^T) e with s = sqrt p and random signs e: mean 0, covariance diag p - p p^T, differentiable in p."""
    signs = torch.randint(2, logits.shape, generator=generator, device=logits.device).to(logits.dtype) * 2 - 1
    s = (logits.log_softmax(1) / 2).exp()  # the root of p itself has no finite slope where p is rounded to zero
    return s * (signs - s * (s * signs).sum(1, keepdim=True))


def _closed_form(a: Tensor, g: Tensor, parameters: dict[str, Tensor], threat: Threat) -> dict[str, Tensor]:
    a2, g2, traces = a * a, g * g, {}  # `square` takes longer backwards
    norms = g2.sum(1)
    for name, p in parameters.items():
        S = threat(p)
        if S.ndim == 0:
            traces[name] = S * (norms.sum() if p.ndim == 1 else norms @ a2.sum(1))
        else:
            traces[name] = (g2 * (S if p.ndim == 1 else F.linear(a2, S))).sum()
    return traces


class FisherTrace(Penalty):
    """strength x tr(F S): twice the expected divergence under the threat's change of weights at unit size.

    F is the Fisher information, a mean over images, and S the covariance of the change; both are differentiated, and value
    and gradient are unbiased (see `fisher_trace`). There are two ways to a small F: outputs that move little with the weights,
    and predictions so sure that moving them changes nothing. The second needs ever larger outputs, and a training can run
    away on it; `held` closes it (in chapter 2 both train LeNet-300-100 alike, and only the held one trains LeNet-5 from every
    seed). With ``strength = eta ** 2 / 2`` and ``range_noise`` the term is the expected divergence under noise of eta times
    each tensor's range. Threats add up: ``lambda w: range_noise(w) + 0.3 * relative_noise(w)``.

    Parameters
    ----------
    threat : `range_noise`, `relative_noise`, `isotropic` (by name or function), ``quantization(bits)``, or a function
        from a weight tensor to the variances of its change, a scalar or a tensor of its shape
    share : of the batch that the estimate uses. It is unbiased on any; the noise, which averages out over the steps, grows as
        the share falls, and the cost falls. `benchmarks/penalty.py` measures both
    biases : whether tensors of one dimension are under the threat
    held : differentiate with the confidence of the predictions held as it is, through how outputs move with the weights alone
    """

    def __init__(self, strength: float, threat: str | Threat = "range_noise", share: float = 0.25, biases: bool = True,
                 every: int = 1, warmup: float = 0.0, held: bool = False):
        super().__init__(strength, every, warmup)
        self.threat, self.share, self.biases, self.held = _threat(threat), _checked_share(share), biases, held

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        images = _subset(self.share, images)
        traces = _summed_traces(net, images, self.threat, self.biases, held=self.held)
        return torch.stack(list(traces.values())).sum() / len(images)


def _checked_share(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: use a share of the batch above 0 and at most 1")
    return share


def noisy(parameters: dict[str, Tensor], threat: Threat, amount: float) -> dict[str, Tensor]:
    """w + amount sqrt(S) n with standard normal n, differentiable through S."""
    return {name: p + amount * threat(p).clamp_min(1e-30).sqrt() * torch.randn_like(p) for name, p in parameters.items()}


class KLNoise(Penalty):
    """strength x KL(p_theta || p_theta+d), a mean over images in nats, with one draw of d = sigma sqrt(S) n a step.

    For small sigma the expectation of the divergence is sigma^2 / 2 tr(F S), the term of `FisherTrace` at strength
    sigma^2 / 2; for larger ones it goes beyond the second order. Both sides are differentiated. Dropout draws another mask for
    each side, so that the term measures it too.

    Parameters
    ----------
    sigma : size of the change in units of the threat (for `range_noise`: shares of each tensor's range)
    threat, biases : as for `FisherTrace`
    """

    def __init__(self, strength: float, sigma: float = 0.1, threat: str | Threat = "range_noise", biases: bool = True,
                 every: int = 1, warmup: float = 0.0):
        super().__init__(strength, every, warmup)
        self.sigma, self.threat, self.biases = _above_0("sigma", sigma), _threat(threat), biases

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        changed = forward(net, images, noisy(_trained(net, self.biases), self.threat, self.sigma))
        return F.kl_div(_full(changed).log_softmax(1), _full(logits).log_softmax(1), log_target=True,
                        reduction="batchmean")


class GradientNorm(Penalty):
    """strength x |grad loss|^2, the squared norm of the batch's mean gradient with the labels of the *data*.

    It does explicitly what gradient descent does implicitly, by its steps of finite size [Barrett and Dherin 2021]. It is not
    the trace of the Fisher information, which it underestimates by far.

    Parameters
    ----------
    share : of the batch that the gradient is taken of
    biases : whether tensors of one dimension are among the parameters of the gradient
    """

    def __init__(self, strength: float, share: float = 1.0, biases: bool = True, every: int = 1, warmup: float = 0.0):
        super().__init__(strength, every, warmup)
        self.share, self.biases = _checked_share(share), biases

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        if self.share < 1:
            images = _subset(self.share, images)
            labels, logits = labels[: len(images)], forward(net, images)
        loss = F.cross_entropy(_full(logits), labels)
        gradients = _gradients(loss, list(_trained(net, self.biases).values()), create_graph=True)
        return torch.stack([g.square().sum() for g in gradients]).sum()


class L2(Penalty):
    """strength x sum w^2 over all trained parameters, or without those of one dimension."""

    def __init__(self, strength: float, biases: bool = True, every: int = 1, warmup: float = 0.0):
        super().__init__(strength, every, warmup)
        self.biases = biases

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.stack([p.square().sum() for p in _trained(net, self.biases).values()]).sum()


class Distillation(Penalty):
    """strength x T^2 KL(teacher || network), both softened by the temperature T, a mean over images [Hinton 2015].

    Parameters
    ----------
    teacher : network whose outputs are followed; run in evaluation mode and never changed
    temperature : T; the factor T^2 keeps the size of the gradient
    """

    def __init__(self, strength: float, teacher: nn.Module, temperature: float = 4.0, every: int = 1,
                 warmup: float = 0.0):
        super().__init__(strength, every, warmup)
        self.teacher, self.temperature = teacher, _above_0("temperature", temperature)

    def term(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad(), evaluation_mode(self.teacher):
            goal = (_full(self.teacher(images)) / self.temperature).log_softmax(1)
        own = (_full(logits) / self.temperature).log_softmax(1)
        return self.temperature**2 * F.kl_div(own, goal, log_target=True, reduction="batchmean")


class SAM(Penalty):
    """Sharpness-aware minimisation: the gradient of the loss at w + rho grad / |grad| [Foret et al. 2021].

    Parameters
    ----------
    rho : length of the step uphill; it grows over the warm-up
    biases : whether tensors of one dimension take part in the step uphill
    every : steps between two of this kind, the others with the plain loss
    """

    def __init__(self, rho: float = 0.05, biases: bool = True, every: int = 1, warmup: float = 0.0):
        super().__init__(1.0, every, warmup)
        self.rho, self.biases = _at_least_0("rho", rho), biases

    def objective(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, criterion: Callable) -> Tensor:
        """The loss that takes the place of the plain one, ``criterion(logits, labels)``."""
        rho, parameters = self.rho * self.rise(), _trained(net, self.biases)
        if rho == 0:
            return self.finite(criterion(logits, labels))
        gradients = _gradients(criterion(logits, labels), list(parameters.values()))
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().clamp_min(1e-12)
        uphill = {name: p + rho / length * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        return self.finite(criterion(forward(net, images, uphill), labels))


class NoisyWeights(Penalty):
    """Training at changed weights, drawn anew each step: the gradient of the loss there is applied to the weights.

    Parameters
    ----------
    amount : size of the Gaussian change in units of the threat, or, for "deletion", the share of weights set to zero; it
        grows over the warm-up
    threat : as for `FisherTrace`, or "deletion"
    biases : whether tensors of one dimension change too
    through : also differentiate through the size of the change, where by default it counts as given
    every : steps between two of this kind, the others with the plain loss
    """

    def __init__(self, amount: float, threat: str | Threat = "range_noise", biases: bool = True, through: bool = False,
                 every: int = 1, warmup: float = 0.0):
        super().__init__(1.0, every, warmup)
        if threat == "deletion" and not 0 <= amount <= 1:
            raise ValueError(f"amount={amount}: use a share of weights from 0 to 1")
        self.amount, self.biases, self.through = _at_least_0("amount", amount), biases, through
        self.threat = threat if threat == "deletion" else _threat(threat)

    def objective(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, criterion: Callable) -> Tensor:
        """The loss that takes the place of the plain one, ``criterion(logits, labels)``."""
        amount, parameters = self.amount * self.rise(), _trained(net, self.biases)
        if amount == 0:
            return self.finite(criterion(logits, labels))
        if self.threat == "deletion":
            changed = {name: p * (torch.rand_like(p) >= amount) for name, p in parameters.items()}
        else:
            changed = noisy(parameters, self.threat, amount)
            if not self.through:
                changed = {name: p + (changed[name] - p).detach() for name, p in parameters.items()}
        return self.finite(criterion(forward(net, images, changed), labels))


class QuantizationAware(Penalty):
    """Quantisation-aware training: the gradient of the loss at the rounded weights q(w) is applied to w [Jacob et al. 2018].

    q(w) has 2^bits equidistant levels from the minimum to the maximum of each tensor (`round_to`). It is a staircase, whose
    own gradient is zero almost everywhere, so that the gradient at q(w) is passed *straight through* to w [Bengio et al. 2013].
    Zero itself is in general none of the levels, unlike with `codec.RoundedWeights`, whose uniform ones are symmetric about it.

    Parameters
    ----------
    bits : a whole number from 1 to 32
    biases : whether tensors of one dimension are rounded too; by default the weight matrices alone, as chapter 2 rounds
        where it measures the accuracy at few bits
    every : steps between two of this kind, the others with the plain loss
    warmup : share of the training over which the weights move from w to q(w), by a growing part of the way

    Raises
    ------
    ValueError
        another number of bits
    """

    def __init__(self, bits: int = 4, biases: bool = False, every: int = 1, warmup: float = 0.0):
        super().__init__(1.0, every, warmup)
        _check_bits(bits)
        self.bits, self.biases = int(bits), biases

    def objective(self, net: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, criterion: Callable) -> Tensor:
        """The loss that takes the place of the plain one, ``criterion(logits, labels)``."""
        part, parameters = self.rise(), _trained(net, self.biases)
        if part == 0:
            return self.finite(criterion(logits, labels))
        rounded = {name: p + part * (quantized(p, self.bits) - p).detach() for name, p in parameters.items()}
        return self.finite(criterion(forward(net, images, rounded), labels))


class FisherWeighted(Penalty):
    """Decoupled descent on strength x sum_i F_ii (w_i - q_i)^2, F and q held fixed: w <- q + (w - q) / (1 + 2 lr strength F).

    The target q is zero, or the quantised weights. This is the proximal step, stable at any strength. It acts beside the
    loss, so that it never enters the moments that F is read from; a weight decay of the optimizer that does so is refused.

    Parameters
    ----------
    source : "adam" takes F = B v / (1 - beta2^t), the bias-corrected second moment of Adam or AdamW times the batch size:
        near the *empirical* diagonal where the mean gradient is small, above it elsewhere, and free. "diagonal" takes
        the *sampled* diagonal of `fishlib.fisher.diagonal`, on the current batch in evaluation mode
    refresh : steps between two estimates of "diagonal"
    biases : whether tensors of one dimension are shrunk too
    quantize : from a weight tensor to the target, such as ``round_to(4)``; None for zero
    """

    def __init__(self, strength: float, source: str = "adam", refresh: int = 10, biases: bool = True, every: int = 1,
                 warmup: float = 0.0, quantize: Callable[[Tensor], Tensor] | None = None):
        super().__init__(strength, every, warmup)
        if source not in ("adam", "diagonal"):
            raise ValueError(f"unknown source {source!r}: use adam or diagonal")
        if refresh < 1:
            raise ValueError(f"refresh={refresh}: use at least 1")
        self.source, self.refresh, self.biases, self.quantize = source, refresh, biases, quantize

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any,
                           index: int) -> None:
        strength = self.current_strength()
        if self.source == "diagonal" and self.step % self.refresh == 0:
            self.memory = _diagonal(module.net, batch)
        if strength:
            self.shrink(trainer.optimizers[0], module.net, strength, len(batch[1]) * trainer.world_size, self.rates)

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer, net: nn.Module, strength: float, batch_size: int,
               rates: Sequence[float] = ()) -> None:
        """One proximal step on the weights of `net`, with a learning rate for each group, or those of the optimizer."""
        for lr, group in zip(rates or _rates(optimizer), optimizer.param_groups, strict=True):
            weights = [p for p in group["params"] if p.grad is not None and (self.biases or p.ndim > 1)]
            if not weights:
                continue
            rate = 2 * lr * strength
            if self.source == "adam":
                F_ii, scale = _second_moments(optimizer, group, weights)
                rate *= batch_size * scale
            else:
                names = {id(p): name for name, p in net.named_parameters()}
                F_ii = [self.memory[names[id(p)]] for p in weights]
            one, targets = weights[0].new_ones(()), [self.quantize(p) for p in weights] if self.quantize else None
            if targets:
                torch._foreach_sub_(weights, targets)
            torch._foreach_div_(weights, [torch.add(one, f, alpha=rate) for f in F_ii])
            if targets:
                torch._foreach_add_(weights, targets)


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _second_moments(optimizer: torch.optim.Optimizer, group: dict, weights: list[Tensor]) -> tuple[list[Tensor], float]:
    if group.get("weight_decay") and not group.get("decoupled_weight_decay"):
        raise ValueError(f"{type(optimizer).__name__} adds weight_decay={group['weight_decay']} to the gradients, so that its "
                         "second moments are not those of the loss: use optimizer='adamw', or weight_decay=0")
    states = [optimizer.state.get(p, {}) for p in weights]
    if any("exp_avg_sq" not in state for state in states):
        raise ValueError(f"{type(optimizer).__name__} keeps no second moments after its step: use optimizer='adam' or "
                         "'adamw', or FisherWeighted(source='diagonal')")
    return [state["exp_avg_sq"] for state in states], 1 / (1 - group["betas"][1] ** float(states[0]["step"]))


def _diagonal(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    from . import fisher

    with evaluation_mode(net), torch.enable_grad():
        return fisher.diagonal(net, batch, kind="sampled")


class FisherQuantization(Penalty):
    """Decoupled steps towards the quantised weights, w <- w - lr strength (F_hat d + c d), d = w - q(w).

    The form of the published follow-up [Kadambi et al. 2020], with its constants strength = 0.01 and c = 0.005: F_hat is the
    moving average of the squared batch gradient (an *empirical* estimate), divided by each tensor's maximum. It descends
    on strength / 2 x sum (F_hat + c) (w - q(w))^2 with F_hat held fixed. Works with every optimizer.

    Parameters
    ----------
    quantize : from a weight tensor to its quantised values, such as ``round_to(4)``; a quantiser of `fishlib.codec` takes
        its bits by ``functools.partial(codec.uniform, bits=4)``
    constant : c, the share that does not depend on F
    decay : of the moving average
    biases : whether tensors of one dimension are quantised too
    """

    def __init__(self, strength: float = 0.01, quantize: Callable[[Tensor], Tensor] | None = None,
                 constant: float = 0.005, decay: float = 0.99, biases: bool = False, every: int = 1,
                 warmup: float = 0.0):
        super().__init__(strength, every, warmup)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: use a number from 0 to below 1")
        self.quantize, self.constant = quantize or round_to(4), _at_least_0("constant", constant)
        self.decay, self.biases = decay, biases

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any,
                           index: int) -> None:
        self.pull(trainer.optimizers[0], module.net, self.current_strength(), self.rates)

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer, net: nn.Module, strength: float, rates: Sequence[float] = ()) -> None:
        """Bring the moving average up to date with the last gradient and take one step towards the quantised weights."""
        groups = zip(rates or _rates(optimizer), optimizer.param_groups, strict=True)
        rate_of = {id(p): lr for lr, group in groups for p in group["params"]}
        weights = {name: p for name, p in _trained(net, self.biases).items() if p.grad is not None and id(p) in rate_of}
        for name, p in weights.items():
            mean = self.memory.setdefault(name, torch.zeros_like(p))
            mean.lerp_(p.grad.square(), 1 - self.decay)
            if strength:
                distance = p - self.quantize(p)
                p -= rate_of[id(p)] * strength * (mean / mean.max().clamp_min(1e-30) + self.constant) * distance
        if weights:
            self.finite(torch.stack([p.sum() for p in weights.values()]).sum(), "the sum of the weights under ")


NAMES: dict[str, Callable[[float], Penalty | None]] = {
    "none": lambda strength: None,
    "l2": L2,
    "sam": SAM,
    "weight_noise": NoisyWeights,
    "weight_deletion": partial(NoisyWeights, threat="deletion"),
    "rounded_weights": QuantizationAware,
    "gradient_norm": GradientNorm,
    "distillation": Distillation,
    "distillation_hot": partial(Distillation, temperature=20.0),
    "kl_noise": KLNoise,
    "kl_sum": partial(KLNoise, threat="range_and_relative"),
    "fisher_trace": FisherTrace,
    "fisher_held": partial(FisherTrace, held=True),
    "fisher_relative": partial(FisherTrace, threat="relative_noise"),
    "fisher_sum": partial(FisherTrace, threat="range_and_relative"),
    "fisher_held_sum": partial(FisherTrace, threat="range_and_relative", held=True),
    "fisher_isotropic": partial(FisherTrace, threat="isotropic"),
    "fisher_weighted": FisherWeighted,
    "fisher_rounding": lambda strength: FisherWeighted(strength, biases=False, quantize=round_to(4)),
    "fisher_quantization": FisherQuantization,
}


def named(name: str, strength: float, teacher: nn.Module | None = None, biases: bool = True) -> Penalty | None:
    """The penalty of a name in `NAMES`, `strength` being its one number: rho for `sam`, the amount for noise and deletion,
    the bits for `rounded_weights`.

    Parameters
    ----------
    teacher : network that `distillation` (temperature 4) and `distillation_hot` (temperature 20) follow
    biases : False leaves tensors of one dimension out of the penalty. The distillations, which are about outputs, have no
        such choice; `rounded_weights` and `fisher_quantization` leave them out anyway
    """
    if name not in NAMES:
        raise ValueError(f"unknown penalty {name!r}: use one of {', '.join(NAMES)}")
    if name.startswith("distillation"):
        if teacher is None:
            raise ValueError(f"{name} needs a teacher: give the network whose outputs are followed")
        return NAMES[name](strength, teacher)
    penalty = NAMES[name](strength)
    if not biases and hasattr(penalty, "biases"):
        penalty.biases = False
    return penalty
