"""What a prediction costs: parameters, operations, memory, energy, latency.

Operations are counted as they run, on the operators that torch dispatches, so functional code counts like modules.
Energies are those of a 45 nm chip [Horowitz 2014; Han et al. 2015, arXiv:1506.02626]; they rank networks and show where
energy goes, and are no measurement of a particular device.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

# pJ at 45 nm; an access is of 32 bits. Arithmetic as in [Horowitz 2014], and of his accesses to SRAM, which are of 64 bits
# (10, 20 and 100 pJ), the half. Register and DRAM as [Han et al. 2015] print them after him for 32 bits; his DRAM takes 1300
# to 2600 pJ for 64.
ENERGY_PJ = {
    "fp32 add": 0.9, "fp32 multiply": 3.7, "fp16 add": 0.4, "fp16 multiply": 1.1,
    "int8 add": 0.03, "int8 multiply": 0.2, "int16 add": 0.05, "int32 add": 0.1, "int32 multiply": 3.1,
    "register": 1.0, "sram 8 KB": 5.0, "sram 32 KB": 10.0, "sram 1 MB": 50.0, "dram": 640.0,
}
aten = torch.ops.aten
WORK = ("macs", "norm_outputs", "relu_outputs", "activations")


def power(connections: float, rate: float, access: str = "dram") -> float:
    """Power in watts to fetch every connection's weight once a prediction: connections x rate x energy of an access.

    ``power(1e9, 20)`` is the 12.8 W of a network with 10^9 connections at 20 frames a second.

    Parameters
    ----------
    connections : weights fetched a prediction
    rate : predictions a second
    access : key of `ENERGY_PJ`
    """
    return connections * rate * ENERGY_PJ[access] * 1e-12


@dataclass(frozen=True)
class Cost:
    """The cost of one prediction of a network.

    Attributes
    ----------
    parameters : number of trained numbers
    macs : multiply-accumulates of convolutions and matrix products (biases not counted)
    norm_outputs, relu_outputs : numbers that BatchNorm and ReLU write
    activations : numbers that convolutions, matrix products, BatchNorm and ReLU write
    layers : table with one row a module that has work of its own (columns `layer`, `kind`, `parameters`, `macs`,
        `norm_outputs`, `relu_outputs`, `activations`)
    bits : bits of a weight and of an activation
    """

    parameters: int
    macs: int
    norm_outputs: int
    relu_outputs: int
    activations: int
    layers: pd.DataFrame
    bits: int = 32

    @property
    def flops(self) -> int:
        """MACs + BatchNorm outputs + ReLU outputs, the convention behind the published tables of skip-unit pruning."""
        return self.macs + self.norm_outputs + self.relu_outputs

    @property
    def weight_bytes(self) -> float:
        """Bytes of all parameters at `bits` each."""
        return self.parameters * self.bits / 8

    def energy(self, sram: str = "sram 8 KB") -> pd.Series:
        """Energy of one prediction in microjoules, by cause.

        Arithmetic: one multiply and one add a MAC, one add an output of BatchNorm and ReLU. Weights: each fetched once
        from DRAM. Activations: each written to and read from SRAM once. Fetching in units of 32 bits.

        Parameters
        ----------
        sram : key of `ENERGY_PJ`, the memory of the activations

        Raises
        ------
        ValueError
            a memory or a number of bits that the table does not have
        """
        if sram not in ENERGY_PJ:
            raise ValueError(f"sram={sram!r}: the energy table has "
                             f"{', '.join(repr(name) for name in ENERGY_PJ if name.startswith('sram'))}")
        add, multiply = _arithmetic(self.bits)
        words = self.bits / 32
        picojoules = {
            "arithmetic": self.macs * (add + multiply) + (self.norm_outputs + self.relu_outputs) * add,
            "weights from DRAM": self.parameters * words * ENERGY_PJ["dram"],
            "activations in SRAM": 2 * self.activations * words * ENERGY_PJ[sram],
        }
        return pd.Series(picojoules, name="energy_uJ") * 1e-6


def _arithmetic(bits: int) -> tuple[float, float]:
    kind = {32: "fp32", 16: "fp16", 8: "int8"}.get(bits)
    if kind is None:
        raise ValueError(f"bits={bits}: the energy table has 32 (floating point), 16 (floating point) and 8 (integer)")
    return ENERGY_PJ[f"{kind} add"], ENERGY_PJ[f"{kind} multiply"]


class _Counter(TorchDispatchMode):
    """Counts operations of each module while a network runs."""

    def __init__(self, tracker: ModuleTracker):
        super().__init__()
        self.tracker, self.rows = tracker, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in _MACS:
            self._add(output, "macs", _MACS[packet](args, output))
        elif packet in _NORMS:
            self._add(output[0], "norm_outputs", output[0].numel())
        elif packet in _RELUS:
            self._add(output, "relu_outputs", output.numel())
        return output

    def _add(self, output: Tensor, kind: str, amount: int) -> None:
        name = max(self.tracker.parents - {"Global"}, key=len, default="Global")
        row = self.rows.setdefault(name, dict.fromkeys(WORK, 0))
        row[kind] += amount
        row["activations"] += output.numel()


def _convolution_macs(args: tuple, output: Tensor) -> int:
    weight, transposed = args[1], args[6]
    outputs = args[0].numel() if transposed else output.numel()
    return outputs * prod(weight.shape[1:])


_MACS = {
    aten.convolution: _convolution_macs,
    aten.mm: lambda args, output: output.numel() * args[0].shape[-1],
    aten.bmm: lambda args, output: output.numel() * args[0].shape[-1],
    aten.addmm: lambda args, output: output.numel() * args[1].shape[-1],
    aten.baddbmm: lambda args, output: output.numel() * args[1].shape[-1],
}
_NORMS = {aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm,
          aten._native_batch_norm_legit, aten._batch_norm_no_update, aten._batch_norm_with_update}
_RELUS = {aten.relu, aten.relu_}


@torch.inference_mode(False)  # there operations would reach the counter in one piece
def count(net: nn.Module, shape: Sequence[int], bits: int = 32) -> Cost:
    """The cost of one prediction for an input of `shape` (C, H, W).

    MACs of convolutions and matrix products are counted as the network runs; biases, pooling and additions are not. The
    network itself is left as it is: a copy runs in evaluation mode.

    Examples
    --------
    >>> from fishlib import nets
    >>> count(nets.resnet(56), (3, 32, 32)).parameters
    853018
    """
    net = copy.deepcopy(net).eval()
    parameter = next(net.parameters(), torch.empty(0))
    image = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), _unfused_attention(), ModuleTracker() as tracker, _Counter(tracker) as counter:
        net(image)
    layers = _layers(net, counter.rows)
    total = layers[list(WORK)].sum()
    return Cost(sum(p.numel() for p in net.parameters()), *(int(v) for v in total), layers=layers, bits=bits)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Attention as matrix products, which are counted; a fused kernel hides them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _layers(net: nn.Module, rows: dict[str, dict[str, int]]) -> pd.DataFrame:
    """A row a module; work of one with several names is in its first, that of one without a name in the network's own."""
    prefix, first = type(net).__name__, {}
    names = {f"{prefix}.{name}" if name else prefix: first.setdefault(module, name)
             for name, module in net.named_modules(remove_duplicate=False)}
    done: dict[str, Counter] = defaultdict(Counter)
    for name, row in rows.items():
        done[names.get(name, "")].update(row)
    table = []
    for module, name in first.items():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own or name in done:
            table.append({"layer": name or "(network)", "kind": type(module).__name__, "parameters": own,
                          **{kind: done[name][kind] for kind in WORK}})
    return pd.DataFrame(table, columns=["layer", "kind", "parameters", *WORK])


def latency(net: nn.Module, shape: Sequence[int], batch: int = 1, repeats: int = 20) -> float:
    """Median wall-clock seconds of one forward pass of `batch` inputs of `shape` (C, H, W), after three warm-up passes.

    Runs on the device of the network's parameters, with the number of threads that torch has; the network's mode is
    restored.
    """
    parameter = next(net.parameters())
    images = torch.zeros(batch, *shape, device=parameter.device, dtype=parameter.dtype)
    was_training = {module: module.training for module in net.modules()}
    seconds = []
    try:
        net.eval()
        with torch.inference_mode():
            for _ in range(repeats + 3):
                begin = time.perf_counter()
                net(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                seconds.append(time.perf_counter() - begin)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return float(pd.Series(seconds[3:]).median())
