"""Time and memory of the Fisher diagonal beside a plain training step and other libraries.

    python benchmarks/fisher.py [--threads 1 2] [--repeats 9] [--nets mlp lenet resnet] [--peers NAMES]
        [--limit SECONDS] [--memory GIB] [--output FILE]

Every method of one network takes its turn in every round, in random order; a ratio is the median over rounds of a method's
time over that of the plain forward + backward in the same round. Wall-clock ratios come with those of the process's CPU
time, which other programs on the machine disturb less. Each result is compared with ours before it is timed. The peers
come with ``pip install -e .[peers]``; one that is missing, fails or outruns a limit prints its error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fishlib import fisher, nets

KINDS = ("empirical", "sampled", "exact")
NETS = {"mlp": (lambda: nets.mlp((1, 28, 28), 10, (300, 100)), 256, (1, 28, 28)),
        "lenet": (lambda: nets.classic_lenet5(10, (1, 28, 28)), 256, (1, 28, 28)),
        "resnet": (lambda: nets.resnet(20), 128, (3, 32, 32))}
BARS = {"mlp": (1.35, 1.35, 2.6), "lenet": (1.35, 1.35, 6.5), "resnet": (1.35, 1.35, 8.5)}
TRANSIENT = (RuntimeError, NotImplementedError, AttributeError, ValueError, TypeError, KeyError, AssertionError, ImportError,
             IndexError, MemoryError, TimeoutError)


def sampled_labels(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.multinomial(net(x).softmax(1), 1)[:, 0]


def own(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> Callable[[], Tensor]:
    return lambda: fisher.diagonal(net, (x, y), kind)


def vmap(net: nn.Module, x: Tensor, y: Tensor, kind: str, chunk: int | None = None) -> Callable[[], Tensor]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values, image, label):
        return F.cross_entropy(functional_call(net, values, (image[None],)), label[None])

    def per_sample(image, label):
        return torch.func.grad(loss)(parameters, image, label)

    def squares(labels: Tensor, weights: Tensor | None = None) -> Tensor:
        total = 0
        for rows in range(0, len(x), chunk or len(x)):
            part = slice(rows, rows + (chunk or len(x)))
            found = torch.vmap(per_sample)(x[part], labels[part])
            w = None if weights is None else weights[part]
            total = total + torch.cat([(g.square().flatten(1).sum(0) if w is None else w @ g.square().flatten(1))
                                       for g in found.values()])
        return total / len(x)

    def run() -> Tensor:
        if kind == "empirical":
            return squares(y)
        if kind == "sampled":
            return squares(sampled_labels(net, x))
        with torch.no_grad():
            p = net(x).softmax(1)
        return sum(squares(torch.full_like(y, c), p[:, c]) for c in range(p.shape[1]))

    return run


def backpack(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> Callable[[], Tensor]:
    from backpack import backpack, extend, extensions

    residual = any(type(m).__name__ == "ResNet" for m in net.modules())
    net = extend(net, use_converter=residual)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    extension, name = {"empirical": (extensions.SumGradSquared, "sum_grad_squared"),
                       "sampled": (extensions.DiagGGNMC, "diag_ggn_mc"),
                       "exact": (extensions.DiagGGNExact, "diag_ggn_exact")}[kind]

    def run() -> Tensor:
        with backpack(extension()):
            loss(net(x), y).backward()
        found = torch.cat([getattr(p, name).flatten() for p in net.parameters()]) / len(x)
        for p in net.parameters():
            p.grad = None
        return found

    return run


def nngeometry(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> Callable[[], Tensor]:
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag

    if kind == "empirical":
        raise NotImplementedError("offers exact and sampled only")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    make = FIM if kind == "exact" else FIM_MonteCarlo
    return lambda: make(model=net, loader=loader, representation=PMatDiag, variant="classif_logits").get_diag()


def laplace(backend: str) -> Callable:
    def build(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> Callable[[], Tensor]:
        from laplace.curvature import asdl, curvlinops
        from laplace.curvature import backpack as backpack_backend

        module = {"Asdl": asdl, "BackPack": backpack_backend, "Curvlinops": curvlinops}[backend]
        options = {} if kind == "empirical" else {"stochastic": kind == "sampled"}
        net.output_size = 10
        curvature = getattr(module, backend + ("EF" if kind == "empirical" else "GGN"))(net, "classification", **options)
        return lambda: curvature.diag(x, y)[1] / len(x)

    return build


def opacus(net: nn.Module, x: Tensor, y: Tensor, kind: str) -> Callable[[], Tensor]:
    from opacus.grad_sample import GradSampleModule

    if kind == "exact":
        raise NotImplementedError("offers per-sample gradients of one label")
    module = GradSampleModule(net.train(), loss_reduction="sum")  # its hooks work in training mode only

    def run() -> Tensor:
        labels = y if kind == "empirical" else sampled_labels(module, x)
        F.cross_entropy(module(x), labels, reduction="sum").backward()
        found = torch.cat([p.grad_sample.square().flatten(1).sum(0) for p in module.parameters()]) / len(x)
        module.zero_grad()
        return found

    return run


PEERS = {"backpack": backpack, "nngeometry": nngeometry, "laplace (asdl)": laplace("Asdl"),
         "laplace (backpack)": laplace("BackPack"), "laplace (curvlinops)": laplace("Curvlinops"), "opacus": opacus,
         "vmap": vmap, "vmap, chunks of 32": lambda *args: vmap(*args, chunk=32)}


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def run() -> None:
        F.cross_entropy(net(x), y).backward()
        for p in net.parameters():
            p.grad = None

    return run


def error_of(found: Tensor, expected: Tensor, kind: str) -> float | None:
    """Relative error against ours; labels drawn differ, so "sampled" compares traces only."""
    if found.shape != expected.shape:
        raise ValueError(f"gives {found.numel()} of {expected.numel()} entries")
    if kind == "sampled":
        return abs(float(found.sum() / expected.sum()) - 1)
    return float((found - expected).norm() / expected.norm())


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError as soon as Python runs again after so many seconds of the process's CPU time."""
    def stop(*_) -> None:
        raise TimeoutError(f"took more than {seconds:g} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def timed(run: Callable, calls: int = 1) -> tuple[float, float]:
    """Wall and CPU seconds of one call; of several, the first is left out, so that what ran before does not count."""
    if calls > 1:
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def peak_bytes(run: Callable) -> int:
    """Most bytes held at a time beyond those held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def floors(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Least ratio by multiply-adds: per-sample weight gradients cost what the batch's do. The nine columns of exact each cost
    an activation gradient and, for a convolution, a weight gradient; a linear layer takes one for all of them."""
    layers: list[tuple[nn.Module, int]] = []

    def count(module, inputs, output):
        layers.append((module, output.numel() * module.weight[0].numel()))

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        net(x[:1])
    for handle in handles:
        handle.remove()
    forward = sum(macs for _, macs in layers)
    activations = forward - layers[0][1]  # no gradient reaches the images
    weights = sum(macs * (9 if isinstance(module, nn.Conv2d) else 1) for module, macs in layers)
    return {"empirical": 1.0, "sampled": 1.0, "exact": (forward + 9 * activations + weights) / (2 * forward + activations)}


def measure(name: str, device: torch.device, repeats: int, peers: dict[str, Callable], limit: float) -> Iterator[dict]:
    make, batch, shape = NETS[name]
    torch.manual_seed(0)
    net, x = make().eval().to(device), torch.randn(batch, *shape, device=device)
    y = torch.randint(10, (batch,), device=device)
    methods: dict[tuple[str, str], Callable] = {("plain step", ""): plain(net, x, y)}
    errors: dict[tuple[str, str], str] = {}
    agreement: dict[tuple[str, str], float] = {}
    spent: dict[tuple[str, str], float] = {("plain step", ""): 0.0}
    for kind in KINDS:
        methods["fishlib", kind] = own(net, x, y, kind)
        expected = torch.cat([f.flatten() for f in methods["fishlib", kind]().values()])
        spent["fishlib", kind] = 0.0
        for peer, build in peers.items():
            try:
                run = build(deepcopy(net), x, y, kind)  # one that is stopped may leave its network in any mode
                start = time.process_time()
                with at_most(limit):
                    agreement[peer, kind] = error_of(run().detach(), expected, kind)
                methods[peer, kind], spent[peer, kind] = run, time.process_time() - start
            except TRANSIENT as error:
                message = (str(error).strip().splitlines() or [""])[0]
                errors[peer, kind] = f"{type(error).__name__}: {message[:90]}"
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in methods}
    references: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in methods}
    plain_step = ("plain step", "")
    calls = {key: min(10, 1 + int(0.04 / timed(methods[key])[0])) for key in methods}
    for _ in range(repeats):
        # In a new order each round: what runs before leaves the memory in another state.
        order = random.sample(list(methods), len(methods))
        found = {key: timed(methods[key], calls[key]) for key in order
                 if key == plain_step or not times[key] or spent[key] <= limit}
        for key, seconds in found.items():
            times[key].append(seconds)
            spent[key] += calls[key] * seconds[1]
            references[key].append(found[plain_step])
    memory = {("plain step", ""): peak_bytes(methods["plain step", ""])}
    memory |= {("fishlib", kind): peak_bytes(methods["fishlib", kind]) for kind in KINDS}
    least = floors(net, x)
    for key in [*methods, *errors]:
        method, kind = key
        row = {"net": name, "batch": batch, "threads": torch.get_num_threads(), "method": method, "kind": kind}
        if key in errors:
            yield row | {"error": errors[key]}
            continue
        pairs = list(zip(times[key], references[key], strict=True))
        yield row | {"milliseconds": 1e3 * statistics.median(t[0] for t in times[key]),
                     "ratio": statistics.median(t[0] / r[0] for t, r in pairs),
                     "cpu_ratio": statistics.median(t[1] / r[1] for t, r in pairs), "repeats": len(pairs),
                     "bar": BARS[name][KINDS.index(kind)] if method == "fishlib" else None,
                     "floor": least.get(kind) if method == "fishlib" else None,
                     "difference": agreement.get(key), "peak_megabytes": memory[key] / 2**20 if key in memory else None}


def show(row: dict) -> None:
    head = f"{row['net']:7} {row['threads']} thr  {row['kind']:9} {row['method']:22}"
    if "error" in row:
        print(f"{head} {row['error']}", flush=True)
        return
    notes = [f"{row['milliseconds']:9.1f} ms   ratio {row['ratio']:6.2f}   cpu ratio {row['cpu_ratio']:6.2f}"]
    if row["bar"]:
        verdict = "holds" if row["cpu_ratio"] <= row["bar"] else "MISSED"
        notes.append(f"bar {row['bar']:.2f} {verdict} in CPU time   floor {row['floor']:.2f}")
    if row["peak_megabytes"] is not None:
        notes.append(f"peak {row['peak_megabytes']:.1f} MB")
    if row["difference"] is not None:
        notes.append(f"differs {row['difference']:.0e}")
    print(head, "   ".join(notes), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="by default all")
    parser.add_argument("--limit", type=float, default=60, help="CPU seconds after which a method is stopped or not repeated")
    parser.add_argument("--memory", type=int, default=10, help="GiB of data beyond which a method fails")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the table to this JSON file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory << 30, resource.RLIM_INFINITY))
    peers = {name: PEERS[name] for name in arguments.peers}
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for net in arguments.nets:
            for row in measure(net, torch.device(arguments.device), arguments.repeats, peers, arguments.limit):
                rows.append({key: round(value, 4 if value > 1e-3 else 10) if isinstance(value, float) and math.isfinite(value)
                             else value for key, value in row.items()})
                show(row)
            if arguments.output:
                keep(arguments.output, rows, arguments.device)


def keep(output: Path, rows: list[dict], device: str) -> None:
    """Write the rows so far, whole or not at all."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    record = {"torch": torch.__version__, "cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "device": device,
              "rows": rows}
    partial = output.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, output)


if __name__ == "__main__":
    main()
