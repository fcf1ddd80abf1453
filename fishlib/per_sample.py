"""Sums of squared per-sample gradients, layer by layer, inside one backward pass.

One forward pass notes every use of a parameter by a layer with a rule and hangs a hook on that layer's output. The backward
pass carries gradients of *outputs* only; each hook turns a layer's input and output gradient into the sums wanted, then lets
both go. A parameter used in any other way is differentiated sample by sample. `fishlib.fisher` is what the book calls.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BATCHNORM = ("BatchNorm in training mode ({}): its outputs depend on the whole batch, so no sample has a gradient of its own; "
             "call net.eval() first, and keep its running statistics")
RANDOM = ("the network draws random numbers in its forward pass (dropout in attention or in an LSTM, stochastic depth, RReLU): "
          "its predictions are random; call net.eval() first")
CHECKPOINTED = ("gradient checkpointing (torch.utils.checkpoint) inside the network computes activations again in the backward "
                "pass, when the network no longer runs as it did for this call: turn gradient checkpointing off")
CHUNK = 1 << 20  # elements of per-sample gradients held at a time: what a cache holds runs faster than a whole batch
ON_GPU = 32  # times as many there, where few elements do not fill the device


# Rules: per-sample gradients of a layer's parameters from its input and the gradient of its output --------------------------
#
# A rule takes the arguments of the torch function that it stands for. `compress(g)` keeps of an output gradient (N, *output
# shape) what the parameters' gradients need; `gradient(role, g, rows)` is (n, K, *parameter shape) for the samples `rows` and
# what was kept of their K columns of output gradients, g (n, K, *kept shape).

class Rule:
    names: dict[str, str]  # role -> name of the parameter, of those that are wanted
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """The layer's output, for rules that know a faster way than the function they stand for."""
        return compute()

    def tensors(self) -> dict[str, Tensor]:
        return {role: t for role in ("weight", "bias") if (t := getattr(self, role)) is not None}

    def merges(self) -> bool:
        """Whether `merged` gives the reductions from the sum over columns of squared output gradients alone."""
        return False

    def fits(self, samples: int) -> bool:
        """Whether the first dimension of the input counts samples, as far as shapes can tell."""
        return self.input.ndim > 1 and len(self.input) == samples

    def compress(self, g: Tensor) -> Tensor:
        return g

    def elements(self, role: str, g: Tensor) -> int:
        """Elements that the gradient of one sample takes."""
        return g.shape[1] * getattr(self, role).numel()

    def squares(self, role: str, g: Tensor) -> Tensor:
        """Sum over samples and columns of the squared gradients; shaped like the parameter."""
        return sum(chunk.square_().sum((0, 1)) for chunk in self._chunks(role, g))

    def norms(self, role: str, g: Tensor) -> Tensor:
        """(N,): sum over columns and entries of each sample's squared gradients."""
        return torch.cat([chunk.square_().flatten(1).sum(1) for chunk in self._chunks(role, g)])

    def _chunks(self, role: str, g: Tensor) -> Iterator[Tensor]:
        size = max(1, _chunk(g) // max(1, self.elements(role, g)))
        for rows in slices(len(g), size):
            yield self.gradient(role, g[rows], rows)


class Linear(Rule):
    def __init__(self, input, weight, bias=None):
        self.input, self.weight, self.bias = input, weight, bias

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        g = g.flatten(2, -2) if g.ndim > 3 else g.unsqueeze(2)  # (n, K, T, out)
        if role == "bias":
            return g.sum(2)
        return torch.einsum("nkto,nti->nkoi", g, self.input[rows].reshape(len(g), -1, self.input.shape[-1]))

    def merges(self) -> bool:
        return self.input.ndim == 2

    def merged(self, role: str, g2: Tensor, reduction: str) -> Tensor:
        """(g^2)^T a^2, or |g|^2 |a|^2 of every sample; with a = 1 for the bias."""
        if reduction == "norms":
            norms = g2.sum(1)
            return norms if role == "bias" else norms * self.input.square().sum(1)
        if role == "bias":
            return g2.sum(0)
        found = torch.empty_like(self.weight)
        # The squared inputs of some columns at a time, since those of all could take more memory than the result.
        for part in slices(found.shape[1], max(64, _chunk(g2) // (32 * len(g2)))):
            torch.mm(g2.T, self.input[:, part].square(), out=found[:, part])
        return found


class Convolution(Rule):
    def __init__(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        self.weight, self.bias, self.groups = weight, bias, groups
        self.dims = weight.ndim - 2
        self.stride, self.dilation = self._tuple(stride), self._tuple(dilation)
        self.padding = self._tuple(0 if isinstance(padding, str) else padding)
        self.input = self._same(input) if padding == "same" else input

    def _tuple(self, value) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * self.dims if len(value) == 1 else value

    def _same(self, input: Tensor) -> Tensor:
        sides = []
        for size, dilation in zip(reversed(self.weight.shape[2:]), reversed(self.dilation), strict=True):
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
        return F.pad(input.detach(), sides)

    def fits(self, samples: int) -> bool:
        return self.input.ndim == self.dims + 2 and len(self.input) == samples

    def elements(self, role: str, g: Tensor) -> int:
        own = super().elements(role, g)
        if role == "bias":
            return own
        return own + math.prod(g.shape[3:]) * self.weight[0].numel() if self._unfolds(g) else own // 8

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        if role == "bias":
            return g.flatten(3).sum(3)
        input = self.input.detach()[rows]
        return self._by_patches(g, input) if self._unfolds(g) else self._by_groups(g, input)

    def _unfolds(self, g: Tensor) -> bool:
        """Unfolded patches cost a copy of kernel-size times the input and then run as fast matrix products: worth it when each
        patch meets many output channels, on one-channel inputs, and on a GPU."""
        if self.groups > 1:
            return False
        positions, channels = math.prod(g.shape[3:]), g.shape[1] * g.shape[2]
        return g.is_cuda or (self.weight.shape[1] == 1 and g.shape[1] == 1) or 8 * channels > positions

    def _by_groups(self, g: Tensor, input: Tensor) -> Tensor:
        """One weight gradient of a convolution in which every sample is a group of its own."""
        n, columns, groups = len(g), g.shape[1], self.groups
        outputs, kernel = self.weight.shape[0] // groups, self.weight.shape[1:]
        g = g.unflatten(2, (groups, outputs)).transpose(1, 2)  # (n, groups, K, out / groups, ...)
        weight = self.weight.new_empty(n * groups * columns * outputs, *kernel)  # only its shape is read
        found = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[4:]), input.reshape(1, -1, *input.shape[2:]), weight, None, self.stride, self.padding,
            self.dilation, False, [0] * self.dims, n * groups, [False, True, False])[1]
        return found.view(n, groups, columns, outputs, *kernel).transpose(1, 2).flatten(2, 3)

    def _by_patches(self, g: Tensor, input: Tensor) -> Tensor:
        """Batched products of output gradients and unfolded patches, channels innermost when that copies longer runs."""
        n, columns, outputs = g.shape[:3]
        flat = g.reshape(n, columns * outputs, -1)
        input = F.pad(input, [side for p in reversed(self.padding) for side in (p, p)])
        channels, *kernel = self.weight.shape[1:]
        if kernel[-1] * channels > g.shape[-1]:
            unfolded = _windows(input.movedim(1, -1).contiguous(), kernel, self.stride, self.dilation, g.shape[3:], False)
            found = torch.bmm(flat, unfolded.reshape(n, flat.shape[2], -1))
            return found.view(n, columns, outputs, *kernel, channels).movedim(-1, 3)
        unfolded = _windows(input.contiguous(), kernel, self.stride, self.dilation, g.shape[3:], True)
        found = torch.bmm(flat, unfolded.reshape(n, -1, flat.shape[2]).transpose(1, 2))
        return found.view(n, columns, outputs, channels, *kernel)


def _windows(input: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int],
             channels_first: bool) -> Tensor:
    """A view (n, channels, *kernel, *positions) of an input (n, channels, ...), or (n, *positions, *kernel, channels) of one
    with channels last."""
    steps = input.stride()
    space = steps[2:] if channels_first else steps[1:-1]
    moves = [s * t for s, t in zip(space, stride, strict=True)]
    spread = [s * t for s, t in zip(space, dilation, strict=True)]
    if channels_first:
        return input.as_strided((*input.shape[:2], *kernel, *positions), (*steps[:2], *spread, *moves))
    return input.as_strided((len(input), *positions, *kernel, input.shape[-1]), (steps[0], *moves, *spread, steps[-1]))


class BatchNorm(Rule):
    """With running statistics an affine map of each channel: one product forwards and one backwards."""

    def __init__(self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        self.input, self.weight, self.bias = input, weight, bias
        self.mean, self.deviation = running_mean, (running_var + eps).sqrt()

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        scale = 1 / self.deviation if self.weight is None else self.weight / self.deviation
        shift = -self.mean * scale if self.bias is None else self.bias - self.mean * scale
        shape = (-1,) + (1,) * (self.input.ndim - 2)
        return torch.addcmul(shift.view(shape), self.input, scale.view(shape))

    def compress(self, g: Tensor) -> Tensor:
        """(N, 2, C): sums over positions of g a and of g, for input a."""
        if g.ndim == 2:
            return torch.stack([g * self.input, g], 1)
        products = torch.linalg.vecdot(g.flatten(2), self.input.flatten(2))  # einsum's matrix product is thrice as slow
        return torch.stack([products, g.flatten(2).sum(2)], 1)

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        # sum g (a - mean) / deviation, without the normalised input in memory
        return g[:, :, 1].clone() if role == "bias" else (g[:, :, 0] - self.mean * g[:, :, 1]) / self.deviation


class LayerNorm(Rule):
    def __init__(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        self.input, self.weight, self.bias = input, weight, bias
        self.shape, self.eps = tuple(normalized_shape), eps

    def fits(self, samples: int) -> bool:
        return super().fits(samples) and self.input.ndim > len(self.shape)

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        if role == "weight":
            g = g * F.layer_norm(self.input.detach()[rows], self.shape, eps=self.eps).unsqueeze(1)
        between = tuple(range(2, g.ndim - len(self.shape)))
        return g.sum(between) if between else g.clone()

    def elements(self, role: str, g: Tensor) -> int:
        return g[0].numel()


class GroupNorm(Rule):
    def __init__(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        self.input, self.weight, self.bias, self.groups, self.eps = input, weight, bias, num_groups, eps

    def compress(self, g: Tensor) -> Tensor:
        """(N, 2, C): sums over positions of g times the normalised input, and of g."""
        products = g * F.group_norm(self.input, self.groups, eps=self.eps)
        both = torch.stack([products, g], 1)
        return both.flatten(3).sum(3) if both.ndim > 3 else both

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        return g[:, :, 1 if role == "bias" else 0].clone()


class Embedding(Rule):
    bias = None

    def __init__(self, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
        if max_norm is not None:
            raise ValueError("an Embedding with max_norm rescales its weights in every forward pass: set max_norm=None")
        self.input, self.weight, self.scaled = input, weight, scale_grad_by_freq
        self.padding = None if padding_idx is None else padding_idx % len(weight)

    def fits(self, samples: int) -> bool:
        return self.input.ndim > 0 and len(self.input) == samples and not self.scaled

    def gradient(self, role: str, g: Tensor, rows: slice) -> Tensor:
        values, slots = self._by_token(g, rows)
        vocabulary, width = self.weight.shape
        found = g.new_zeros(len(g) * vocabulary, g.shape[1], width)
        found[slots] = values
        return found.view(len(g), vocabulary, g.shape[1], width).transpose(1, 2)

    def squares(self, role: str, g: Tensor) -> Tensor:
        values, slots = self._by_token(g, slice(None))
        return torch.zeros_like(self.weight).index_add_(0, slots % len(self.weight), values.square_().sum(1))

    def norms(self, role: str, g: Tensor) -> Tensor:
        values, slots = self._by_token(g, slice(None))
        return g.new_zeros(len(g)).index_add_(0, slots // len(self.weight), values.square_().sum((1, 2)))

    def _by_token(self, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The gradients (U, K, width) of every different token of a sample, and sample * vocabulary + token (U,)."""
        tokens = self.input[rows].reshape(len(g), -1)
        slots, place = (tokens + len(self.weight) * torch.arange(len(g), device=g.device)[:, None]).unique(return_inverse=True)
        g = g.reshape(len(g), g.shape[1], tokens.shape[1], -1).transpose(1, 2)
        if self.padding is not None:
            g = g * (tokens != self.padding)[:, :, None, None]
        values = g.new_zeros(len(slots), *g.shape[2:]).index_add_(0, place.flatten(), g.flatten(0, 1))
        return values, slots


RULES: dict[Callable, type[Rule]] = {
    F.linear: Linear, F.conv1d: Convolution, F.conv2d: Convolution, F.conv3d: Convolution, F.batch_norm: BatchNorm,
    F.layer_norm: LayerNorm, F.group_norm: GroupNorm, F.embedding: Embedding}
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
HARMLESS = {Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.is_leaf.__get__,
            Tensor.requires_grad.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}


# The forward pass that notes how parameters are used ------------------------------------------------------------------------

class Checks(TorchFunctionMode):
    """Refuses what makes a prediction depend on the other samples of the batch, or on chance."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        for name, module in net.named_modules():
            # Before the forward pass: a BatchNorm counts its batches ahead of any function that could be refused.
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(BATCHNORM.format(name or "the network"))

    def __enter__(self):
        self.around = ExitStack()
        self.around.enter_context(buffers_kept(self.net))
        self.around.enter_context(_randomness_refused(self.net))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.around.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.refuse(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def refuse(self, func: Callable, args: tuple, kwargs: dict) -> None:
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            weight = args[3] if len(args) > 3 else kwargs.get("weight")
            names = [name for name, p in self.net.named_parameters() if p is weight]
            raise ValueError(BATCHNORM.format("".join(names).rpartition(".")[0] or "without a name"))
        if func in DROPOUTS:
            rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            if rate and (args[2] if len(args) > 2 else kwargs.get("training", True)):
                raise ValueError("Dropout in training mode: predictions are random; call net.eval() first")


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Within, the network works on copies of its buffers, which running statistics and power iterations change."""
    # Copies go in and not values back: a graph may hold the tensor, and a network may put another in its place.
    kept = [(module._buffers, name, b) for module in net.modules() for name, b in module._buffers.items() if b is not None]
    copies = {id(b): b.clone() for _, _, b in kept}  # a shared buffer stays shared
    try:
        for buffers, name, b in kept:
            buffers[name] = copies[id(b)]
        yield
    finally:
        for buffers, name, b in kept:
            buffers[name] = b


@contextmanager
def _randomness_refused(net: nn.Module) -> Iterator[None]:
    """By the state of the global generators, for layers draw in many ways; that state is put back."""
    on_gpu = {p.device.index for p in net.parameters() if p.is_cuda}
    generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in on_gpu)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        drawn = [not torch.equal(state, generator.get_state()) for generator, state in zip(generators, states, strict=True)]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    if any(drawn):
        raise ValueError(RANDOM)


class _Root(torch.autograd.Function):
    """Computes the first layer on a path, so that the graph starts at its output and reaches one common anchor."""

    @staticmethod
    def forward(ctx, anchor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx, g: Tensor):
        return None, None


class Recorder(Checks):
    """Notes every use of the `wanted` parameters during one forward pass of `samples` samples.

    `uses` are those by a layer with a rule, whose output calls `arrived(use, g)` in the backward pass; `foreign` are the
    names of parameters that were used in another way as well.
    """

    def __init__(self, net: nn.Module, wanted: dict[str, Tensor], samples: int, anchor: Tensor):
        super().__init__(net)
        self.wanted = {id(p): name for name, p in wanted.items()}
        self.samples, self.anchor = samples, anchor
        self.uses: list[Rule] = []
        self.foreign: set[str] = set()
        self.arrived: Callable[[Rule, Tensor], None] = lambda use, g: None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.refuse(func, args, kwargs)
        leaves = _leaves((args, kwargs))
        touched = [self.wanted[id(leaf)] for leaf in leaves if id(leaf) in self.wanted]
        if not touched or func in HARMLESS:
            return func(*args, **kwargs)
        use = self._use(func, args, kwargs, len(touched))
        if use is None:
            self.foreign.update(touched)
            return func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            output = use.forward(lambda: func(*args, **kwargs))
        else:
            output = _Root.apply(self.anchor, lambda: use.forward(lambda: func(*args, **kwargs)))
        use.input = use.input.detach()
        use.outputs = output.numel()
        self.uses.append(use)
        output.register_hook(lambda g: self.arrived(use, g))
        return output

    def _use(self, func: Callable, args: tuple, kwargs: dict, touched: int) -> Rule | None:
        # Without gradients (inside a custom autograd function, say) no hook would ever be called.
        if func not in RULES or not torch.is_grad_enabled():
            return None
        use = RULES[func](*args, **kwargs)
        use.names = {role: self.wanted[id(t)] for role, t in use.tensors().items() if id(t) in self.wanted}
        return use if len(use.names) == touched and use.fits(self.samples) else None

    def unruled(self) -> list[str]:
        """Names of the parameters to differentiate sample by sample: used in other ways, or never seen."""
        seen = {name for use in self.uses for name in use.names.values()}
        return [name for name in self.wanted.values() if name in self.foreign or name not in seen]

    def ambiguous(self) -> bool:
        """Whether another dimension is as long as the batch, so that the first one need not count samples."""
        layers = (Linear, LayerNorm, Embedding)
        return any(self.samples in use.input.shape[1:None if isinstance(use, Embedding) else -1] for use in self.uses
                   if isinstance(use, layers))


def _leaves(values) -> list:
    leaves = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list, dict)):
            leaves += _leaves(value)
        else:
            leaves.append(value)
    return leaves


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Within, no parameter asks for gradients; afterwards those that did do again."""
    asking = [p for p in net.parameters() if p.requires_grad]
    try:
        for p in asking:
            p.requires_grad_(False)
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def record(net: nn.Module, images: Tensor, wanted: dict[str, Tensor]) -> tuple[Tensor, Recorder]:
    """Outputs, of which only those downstream of a wanted parameter carry a graph, and the uses of the parameters."""
    anchor = torch.zeros((), device=images.device, requires_grad=True)
    recorder = Recorder(net, wanted, len(images), anchor)
    with _frozen(net), torch.enable_grad(), checkpoints_refused(), recorder:
        outputs = net(images)
    return outputs, recorder


# Sums over one batch ----------------------------------------------------------------------------------------------------------

def logits(outputs, samples: int) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim == 0 or len(outputs) != samples:
        got = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"the network has to return one tensor of logits for {samples} images, got {got}")
    return outputs


def propagate(outputs: Tensor, columns: Tensor, recorder: Recorder, consume: Callable[[Rule, Tensor], None],
              merging: Collection[Rule] = ()) -> None:
    """One backward pass for each of the K columns (N, K, C) of output gradients.

    Calls ``consume(use, g)``, g (N, K, *kept shape), for every use as soon as its last gradient is there; uses that the
    outputs do not depend on are left out. `merging` uses get g^2 summed over columns (N, *kept shape) instead.
    """
    waiting: dict[Rule, list[Tensor]] = defaultdict(list)
    arrivals: Counter[Rule] = Counter()
    count = columns.shape[1]

    def arrived(use: Rule, g: Tensor) -> None:
        g, kept = use.compress(as_parameter(use, g)), waiting[use]
        if use not in merging:
            kept.append(g)
        elif kept:
            kept[0].addcmul_(g, g)
        else:
            kept.append(g.square())
        arrivals[use] += 1
        if arrivals[use] == count:
            g = kept[0] if use in merging else torch.stack(kept, 1) if count > 1 else g.unsqueeze(1)
            kept.clear()
            consume(use, g)

    recorder.arrived = arrived
    if outputs.requires_grad:
        for k in range(count):
            torch.autograd.grad(outputs, recorder.anchor, columns[:, k].to(outputs.dtype), retain_graph=k < count - 1,
                                allow_unused=True)


def reduced(outputs: Tensor, columns: Tensor, recorder: Recorder, reduction: str) -> dict[str, Tensor]:
    """The ``"squares"`` or ``"norms"`` of every parameter with rules (see `Rule`), by name."""
    unruled = recorder.unruled()
    uses_of = Counter(name for use in recorder.uses for name in use.names.values())
    alone = {use for use in recorder.uses if all(uses_of[name] == 1 for name in use.names.values())}
    merging = {use for use in alone if use.merges()}
    found: dict[str, Tensor] = {}
    shared: dict[str, list[tuple[Rule, str, Tensor]]] = defaultdict(list)

    def consume(use: Rule, g: Tensor) -> None:
        for role, name in use.names.items():
            if name in unruled:
                continue
            if uses_of[name] > 1:
                shared[name].append((use, role, g))
            elif use in merging:
                found[name] = use.merged(role, g, reduction)
            else:
                found[name] = getattr(use, reduction)(role, g)
        if use in alone:
            use.input = None  # free memory while the backward pass goes on

    propagate(outputs, columns, recorder, consume, merging)
    with torch.no_grad():
        return found | {name: _summed(parts, reduction) for name, parts in shared.items()}


def as_parameter(use: Rule, g: Tensor) -> Tensor:
    """Under autocast activations have less precision than parameters, too little for squares."""
    dtype = (use.bias if use.weight is None else use.weight).dtype
    if g.dtype == dtype:
        return g
    if use.input.is_floating_point():
        use.input = use.input.to(dtype)
    return g.to(dtype)


def _summed(parts: list[tuple[Rule, str, Tensor]], reduction: str) -> Tensor:
    """A parameter used more than once: each sample's gradients are summed over the uses, then squared."""
    samples = len(parts[0][2])
    size = max(1, _chunk(parts[0][2]) // max(use.elements(role, g) for use, role, g in parts))
    total = []
    for rows in slices(samples, size):
        summed = sum(use.gradient(role, g[rows], rows) for use, role, g in parts).square()
        total.append(summed.sum((0, 1)) if reduction == "squares" else summed.flatten(1).sum(1))
    return sum(total) if reduction == "squares" else torch.cat(total)


def sample_by_sample(net: nn.Module, images: Tensor, columns: Tensor, wanted: dict[str, Tensor],
                      reduction: str) -> dict[str, Tensor]:
    """The reduction by vmap over per-sample gradients; by a loop where vmap cannot follow the network."""
    if not wanted:
        return {}
    size = max(1, _chunk(columns) // (columns.shape[1] * sum(p.numel() for p in wanted.values())))
    gradients = _vmapped if _vmap_follows(net, images[:2], columns[:2], wanted) else _looped  # errors may hide in one sample
    total: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for rows in slices(len(images), size):
        for name, g in gradients(net, images[rows], columns[rows], wanted).items():
            squares = g.square()
            total[name].append(squares.sum((0, 1)) if reduction == "squares" else squares.flatten(1).sum(1))
    return {name: sum(parts) if reduction == "squares" else torch.cat(parts) for name, parts in total.items()}


def _vmap_follows(net: nn.Module, images: Tensor, columns: Tensor, wanted: dict[str, Tensor]) -> bool:
    expected = _looped(net, images, columns, wanted)
    try:
        found = _vmapped(net, images, columns, wanted)
    except (RuntimeError, NotImplementedError):
        return False
    return all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
               for name in wanted)


@torch.no_grad()
def _vmapped(net: nn.Module, images: Tensor, columns: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: (n, K, *shape)} per-sample gradients of the columns' products with the outputs."""
    detached = {name: p.detach() for name, p in wanted.items()}

    def one(image: Tensor, column: Tensor) -> dict[str, Tensor]:
        _, pull = torch.func.vjp(lambda values: outputs_at(net, values, image[None])[0], detached)
        return torch.vmap(pull)(column)[0]

    with buffers_kept(net):
        return torch.vmap(one)(images, columns)


def _looped(net: nn.Module, images: Tensor, columns: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with asking(wanted.values()), torch.enable_grad():
        for image, column in zip(images, columns, strict=True):
            with buffers_kept(net):
                output = net(image[None])[0]
            for c in column:
                gradients = torch.autograd.grad(output, list(wanted.values()), c, retain_graph=True, allow_unused=True,
                                                materialize_grads=True)
                for name, g in zip(wanted, gradients, strict=True):
                    found[name].append(g)
    return {name: torch.stack(parts).view(*columns.shape[:2], *wanted[name].shape) for name, parts in found.items()}


@contextmanager
def asking(parameters: Iterable[Tensor]) -> Iterator[None]:
    still = [p for p in parameters if not p.requires_grad]
    try:
        for p in still:
            p.requires_grad_(True)
        yield
    finally:
        for p in still:
            p.requires_grad_(False)


@contextmanager
def checkpoints_refused() -> Iterator[None]:
    """For forward passes under conditions that no longer hold in the backward pass, such as other weights."""
    # Not by catching CheckpointError: where the shapes of other activations fit, gradients come out wrong without any error.
    try:
        with ExitStack() as stack:
            # torch refuses inside hooks that the caller has put around this call; those are no checkpoints of the network.
            with suppress(RuntimeError):
                stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED))
            yield
    except RuntimeError as error:
        if CHECKPOINTED not in str(error):
            raise
        raise ValueError(CHECKPOINTED) from error


def outputs_at(net: nn.Module, values: dict[str, Tensor], images: Tensor) -> Tensor:
    """Outputs of `net` for `images` with other `values` of its parameters and buffers, by name; the network stays as it is.

    A tensor that is used in several places is replaced in all of them.

    Raises
    ------
    ValueError
        a name that the network does not have, or two values for one tensor
    """
    # A module that is registered under two names has one slot for each tensor. torch would swap it twice, and put back the
    # new value in the end; `named_modules` has each module once.
    slots = {f"{prefix}.{name}" if prefix else name: tensor for prefix, module in net.named_modules()
             for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    meant: dict[int, Tensor] = {}
    for name, value in values.items():
        place = id(slots[name] if name in slots else _named(net, name))
        if meant.setdefault(place, value) is not value:
            raise ValueError(f"{name!r} is one tensor with another of the names given, and has another value there: give one")
    swapped = {name: meant[id(tensor)] for name, tensor in slots.items() if id(tensor) in meant}
    return functional_call(net, swapped, (images,), tie_weights=False)


def _named(net: nn.Module, name: str) -> Tensor:
    named = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    if name not in named:
        raise ValueError(f"{name!r} is no parameter and no buffer of the network: use one of {', '.join(named)}")
    return named[name]


def _chunk(g: Tensor) -> int:
    return CHUNK * ON_GPU if g.is_cuda else CHUNK


def slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
