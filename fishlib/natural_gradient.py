"""Natural gradients (F + damping I)^-1 g: by conjugate gradients on exact products, or by Kronecker factors.

K-FAC [Martens and Grosse 2015, arXiv:1503.05671; for convolutions Grosse and Martens 2016, arXiv:1602.01407] takes the block
of a layer as S (x) A: A the second moment of the layer's inputs (with a one for the bias), S that of its output gradients. It
is exact for a linear layer whose inputs and output gradients are independent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishlib.fisher import (
    SOFTMAX,
    Batches,
    Softmax,
    _distributed,
    _kind,
    all_sum,
    diagonal,
    fresh_generator,
    select,
    stream,
    vector_product,
)
from fishlib.per_sample import Linear, Rule, as_parameter, logits, propagate, record, slices


def natural_gradient(net: nn.Module, batches: Batches, gradient: dict[str, Tensor], damping: float = 1e-3,
                     method: str = "cg", kind: str = "exact", samples: int = 1, generator: torch.Generator | None = None,
                     likelihood: Softmax = SOFTMAX, iterations: int = 100, tolerance: float = 1e-5) -> dict[str, Tensor]:
    """(F + damping I)^-1 gradient; F the mean over images, of the kinds that `fishlib.fisher.diagonal` has.

    Parameters
    ----------
    gradient : name of parameter -> tensor of its shape; F is restricted to these parameters
    damping : positive
    method : "cg": conjugate gradients with products F v, until the residual falls below `tolerance` times the gradient's
        norm, or `iterations` products. "kfac": one inverse Kronecker product a Linear or Conv2d layer; the diagonal
        of F elsewhere.
    batches : kept as a list while conjugate gradients run; drawn labels stay the same from product to product

    Raises
    ------
    ValueError
        damping that is not positive, an unknown method, and what `fishlib.fisher.diagonal` refuses
    """
    if not damping > 0:
        raise ValueError(f"damping={damping}: give a positive number, F alone may be singular")
    if method not in ("cg", "kfac"):
        raise ValueError(f'unknown method {method!r}: use "cg" or "kfac"')
    batches = list(stream(batches))
    options = {"kind": kind, "samples": samples, "likelihood": likelihood}
    if method == "kfac":
        return _by_blocks(net, batches, gradient, damping, options | {"generator": generator})
    source = generator or fresh_generator()
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        found = vector_product(net, batches, vector, generator=torch.Generator(source.device).manual_seed(seed), **options)
        return {name: found[name] + damping * v for name, v in vector.items()}

    return _conjugate_gradients(product, gradient, iterations, tolerance)


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def _conjugate_gradients(product: Callable, target: dict[str, Tensor], iterations: int,
                         tolerance: float) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(t) for name, t in target.items()}
    residual = {name: t.detach().clone() for name, t in target.items()}
    direction, square = residual, _dot(residual, residual)
    enough = tolerance**2 * square
    for _ in range(iterations):
        if square <= enough:
            break
        image = product(direction)
        step = square / _dot(direction, image)
        found = {name: x + step * direction[name] for name, x in found.items()}
        residual = {name: r - step * image[name] for name, r in residual.items()}
        before, square = square, _dot(residual, residual)
        direction = {name: r + square / before * direction[name] for name, r in residual.items()}
    return found


class Block:
    """One layer's Kronecker factors A (inputs) and S (output gradients), and the inverse of S (x) A + damping I."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.a = self.s = None
        self.eigen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def decompose(self) -> None:
        """Eigenvalues and vectors of both factors, once for many solves."""
        (a, a_vectors), (s, s_vectors) = torch.linalg.eigh(self.a), torch.linalg.eigh(self.s)
        self.eigen = a.clamp_min(0), a_vectors, s.clamp_min(0), s_vectors

    def solve(self, weight: Tensor, bias: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
        """(S (x) A + damping I)^-1 of the gradients of weight and bias, exactly, in the factors' eigenbasis."""
        a, a_vectors, s, s_vectors = self.eigen
        g = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        g = s_vectors.T @ g @ a_vectors / (torch.outer(s, a) + damping)
        g = s_vectors @ g @ a_vectors.T
        if bias is None:
            return g.view_as(weight), None
        return g[:, :-1].reshape(weight.shape), g[:, -1]


def input_moment(rule: Rule, with_bias: bool) -> Tensor:
    """Sum over samples and positions of a a^T, a a patch of the layer's input."""
    input = rule.input.detach()
    if isinstance(rule, Linear):
        rows = input.flatten(0, -2)
    else:
        input = F.pad(input, [side for p in reversed(rule.padding) for side in (p, p)])
        patches = F.unfold(input, rule.weight.shape[2:], rule.dilation, 0, rule.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
    if with_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows


def gradient_moment(rule: Rule, g: Tensor) -> Tensor:
    """Sum over samples and columns, mean over positions, of output gradients g (N, K, *output shape)."""
    g = g if isinstance(rule, Linear) else g.movedim(2, -1)
    rows = g.reshape(-1, g.shape[-1])
    return rows.T @ rows * (g.shape[0] * g.shape[1] / len(rows))


def _blockable(rule: Rule) -> bool:
    return isinstance(rule, Linear) or (getattr(rule, "dims", 0) == 2 and rule.groups == 1)


def _by_blocks(net: nn.Module, batches: list, gradient: dict[str, Tensor], damping: float,
               options: dict) -> dict[str, Tensor]:
    wanted = select(net, gradient)
    blocks, count = _blocks(net, batches, wanted, **options)
    blocks = _everywhere(blocks, wanted)
    factors = [factor for block in blocks.values() for factor in (block.a, block.s)]
    count = all_sum(factors, count)
    names = {id(p): name for name, p in wanted.items()}
    found: dict[str, Tensor] = {}
    for block in blocks.values():
        block.a, block.s = block.a / count, block.s / count
        block.decompose()
        weight, bias = names[id(block.weight)], names.get(id(block.bias))
        solved = block.solve(gradient[weight], None if bias is None else gradient[bias], damping)
        found |= {name: value for name, value in zip((weight, bias), solved, strict=True) if name is not None}
    rest = [name for name in wanted if name not in found]
    if rest:
        f = diagonal(net, batches, parameters=rest, **options)
        found |= {name: gradient[name] / (f[name] + damping) for name in rest}
    return {name: found[name] for name in gradient}


def _blocks(net: nn.Module, batches: list, wanted: dict[str, Tensor], kind: str, samples: int,
            generator: torch.Generator | None, likelihood: Softmax) -> tuple[dict[int, Block], int]:
    """Blocks of the layers used once, their factors summed over images."""
    kind, blocks, count = _kind(kind, samples, generator, likelihood), {}, 0
    for images, labels in batches:
        for rows in slices(len(images), 64):
            outputs, recorder = record(net, images[rows], wanted)
            columns = kind.columns(logits(outputs, len(images[rows])), None if labels is None else labels[rows])
            uses = [id(use.weight) for use in recorder.uses]

            def consume(use: Rule, g: Tensor, uses: list[int] = uses, recorder=recorder) -> None:
                known = recorder.wanted.get(id(use.weight))
                if not _blockable(use) or known is None or known in recorder.foreign or uses.count(id(use.weight)) > 1:
                    return
                bias = use.bias if use.bias is not None and id(use.bias) in recorder.wanted else None
                block = blocks.setdefault(id(use.weight), Block(use.weight, bias))
                a, s = input_moment(use, bias is not None), gradient_moment(use, g)
                block.a = a if block.a is None else block.a + a
                block.s = s if block.s is None else block.s + s

            propagate(outputs, columns, recorder, consume)
        count += len(images)
    return blocks, count


def _everywhere(blocks: dict[int, Block], wanted: dict[str, Tensor]) -> dict[int, Block]:
    """The blocks that any process has, in one order; factors of zeros for a process that had no images."""
    if not _distributed():
        return blocks
    names = {id(p): name for name, p in wanted.items()}
    own = {names[key]: (names.get(id(block.bias)), len(block.a), len(block.s)) for key, block in blocks.items()}
    shapes: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shapes, own)
    found: dict[int, Block] = {}
    for name, (bias, inputs, outputs) in sorted({k: v for shape in shapes for k, v in shape.items()}.items()):
        weight = wanted[name]
        block = blocks.get(id(weight))
        if block is None:
            block = Block(weight, wanted.get(bias))
            block.a, block.s = weight.new_zeros(inputs, inputs), weight.new_zeros(outputs, outputs)
        found[id(weight)] = block
    return found


class NaturalGradient(torch.optim.Optimizer):
    """Natural gradient descent with K-FAC blocks: theta <- theta - lr m, m the momentum of (F + damping I)^-1 grad.

    Trains like any optimizer: ``loss.backward(); optimizer.step()`` with a loss averaged over the batch. Hooks on the network
    see each forward pass in training; on every `every`-th one, labels are drawn from the prediction and one more backward pass
    updates the moving averages of the factors (sampled Fisher information, mean over images). Passes with other tensors in
    the parameters' place, such as those of a penalty at perturbed weights, do not count. Linear and Conv2d modules used once a
    pass and not parametrized get blocks; every other parameter the diagonal, from the squared batch gradient of the drawn
    labels over the batch size. A step is shortened where 1/2 (lr / (1 - momentum))^2 d^T (F + damping I) d exceeds `max_kl`, d
    the preconditioned gradient and F that of the blocks: to second order, as far as the blocks stand for F and earlier steps
    were like this one, a bound on the KL that it causes with its momentum.

    The hooks hold no reference to the optimizer: they vanish with it, at `remove()`, and in copies and files of the network.

    Parameters
    ----------
    net : the network to train; its parameters that require gradients are updated
    lr : length of a step
    damping : added to the eigenvalues of F
    momentum : of the preconditioned gradient
    decay : of the moving averages of factors
    every : forward passes between updates of the factors
    weight_decay : decoupled, theta <- theta (1 - lr weight_decay)
    max_kl : nats a step may change predictions by, as bounded above; None for no limit
    generator : of the drawn labels; None draws from fresh entropy
    """

    resumable = False  # factors and passes are not in its state_dict

    def __init__(self, net: nn.Module, lr: float = 0.1, damping: float = 1e-2, momentum: float = 0.9, decay: float = 0.95,
                 every: int = 10, weight_decay: float = 0.0, max_kl: float | None = 1e-2,
                 generator: torch.Generator | None = None, likelihood: Softmax = SOFTMAX):
        for name, value in (("lr", lr), ("damping", damping)):
            if not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        if not 0 <= momentum < 1 or not 0 <= decay < 1:
            raise ValueError(f"momentum={momentum} and decay={decay} have to be in [0, 1)")
        if every < 1:
            raise ValueError(f"every={every}: update the factors every 1 or more passes")
        wanted = select(net)
        super().__init__(list(wanted.values()),
                         {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay, "max_kl": max_kl})
        self.decay, self.every = decay, every
        self.kind = _kind("sampled", 1, generator, likelihood)
        self.passes = 0
        self.blocks: dict[int, Block] = {}
        self.squares: dict[int, Tensor] = {}
        self._uses: list[tuple[Rule, Tensor]] | None = None
        self._handles = self._hook(net)
        weakref.finalize(self, _remove, self._handles)

    def _hook(self, net: nn.Module) -> list:
        handles = [net.register_forward_pre_hook(_Hook(self, "_begin"))]
        handles += [m.register_forward_hook(_Hook(self, "_note")) for m in net.modules() if _has_block(m)]
        return [*handles, net.register_forward_hook(_Hook(self, "_end"))]  # last, for the network may be a single layer

    def remove(self) -> None:
        """Take the hooks off the network; the factors are updated no more."""
        _remove(self._handles)

    def _own(self) -> set[int]:
        return {id(p) for group in self.param_groups for p in group["params"]}

    def _begin(self, net: nn.Module, inputs: tuple) -> None:
        due = net.training and torch.is_grad_enabled() and self._own() <= {id(p) for p in net.parameters()}
        self._uses = [] if due and self.passes % self.every == 0 else None
        self.passes += due

    def _note(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # A parametrized layer computes its weight anew for each use: no tensor that a block could be known by.
        plain = {"weight", "bias"} <= module._parameters.keys()
        if self._uses is not None and output.requires_grad and plain and id(module.weight) in self._own():
            self._uses.append((_rule(module, inputs[0].detach()), torch.autograd.graph.get_gradient_edge(output)))

    def _end(self, net: nn.Module, inputs: tuple, outputs: Tensor) -> None:
        uses, self._uses = self._uses, None
        if uses is None:
            return
        columns = self.kind.columns(logits(outputs, len(inputs[0])), None)
        counts = [id(rule.weight) for rule, _ in uses]
        uses = [(rule, edge) for rule, edge in uses if counts.count(id(rule.weight)) == 1]
        blocked = {id(t) for rule, _ in uses for t in rule.tensors().values()}
        others = [p for group in self.param_groups for p in group["params"] if id(p) not in blocked]
        gradients = torch.autograd.grad(outputs, [edge for _, edge in uses] + others, columns[:, 0], retain_graph=True,
                                        allow_unused=True)
        # Eigenvalues of moments in bfloat16 would be noise, and CUDA refuses them.
        with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
            for (rule, _), g in zip(uses, gradients, strict=False):
                if g is not None:
                    self._update_block(rule, as_parameter(rule, g).unsqueeze(1), len(columns))
            for p, g in zip(others, gradients[len(uses):], strict=True):
                if g is not None:
                    self.squares[id(p)] = self._average(self.squares.get(id(p)), g.square() / len(columns))

    def _update_block(self, rule: Rule, g: Tensor, count: int) -> None:
        block = self.blocks.setdefault(id(rule.weight), Block(rule.weight, rule.bias))
        block.a = self._average(block.a, input_moment(rule, rule.bias is not None) / count)
        block.s = self._average(block.s, gradient_moment(rule, g) / count)
        block.decompose()

    def _average(self, old: Tensor | None, new: Tensor) -> Tensor:
        return new if old is None else old.lerp_(new, 1 - self.decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update from the gradients in ``.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            directions = self._directions(parameters, group["damping"])
            length = self._length(parameters, directions, group)
            for p in parameters:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(directions[id(p)], alpha=length)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(m, alpha=group["lr"])
        return loss

    def _directions(self, parameters: list[Tensor], damping: float) -> dict[int, Tensor]:
        given = {id(p): p.grad for p in parameters}
        found: dict[int, Tensor] = {}
        for block in self.blocks.values():
            weight, bias = id(block.weight), id(block.bias)
            if weight in given and (block.bias is None or bias in given):
                found[weight], found[bias] = block.solve(given[weight], given.get(bias), damping)
        for p in parameters:
            if id(p) not in found:
                found[id(p)] = p.grad / (self.squares.get(id(p), 0.0) + damping)
        return found

    def _length(self, parameters: list[Tensor], directions: dict[int, Tensor], group: dict) -> float:
        if group["max_kl"] is None:
            return 1.0
        # d^T (F + damping I) d = d^T grad bounds d^T F d
        square = float(sum((directions[id(p)] * p.grad).sum() for p in parameters))
        change = 0.5 * (group["lr"] / (1 - group["momentum"])) ** 2 * square  # momentum adds up this many steps
        return min(1.0, (group["max_kl"] / change) ** 0.5) if change > 0 else 1.0


def _has_block(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and _asks(module)
    return isinstance(module, nn.Linear) and _asks(module)


def _asks(module: nn.Module) -> bool:
    return all(p.requires_grad for p in module.parameters(recurse=False))


def _rule(module: nn.Module, input: Tensor) -> Rule:
    from fishlib.per_sample import Convolution

    if isinstance(module, nn.Linear):
        return Linear(input, module.weight, module.bias)
    return Convolution(input, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def _remove(handles: Iterable) -> None:
    for handle in handles:
        handle.remove()


def _nothing(*_) -> None:
    """What a hook is in a copy of the network."""


class _Hook:
    """Calls a method of the optimizer while that is alive; a copy or a file of the network gets an empty hook."""

    def __init__(self, optimizer: NaturalGradient, method: str):
        self.optimizer, self.method = weakref.ref(optimizer), method

    def __call__(self, *args) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            getattr(optimizer, self.method)(*args)

    def __reduce__(self):
        return _inert, ()


def _inert() -> Callable:
    return _nothing
