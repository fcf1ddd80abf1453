"""What each penalty costs: time and peak memory of a training step over those of a plain Adam step, in one run.

    OMP_NUM_THREADS=1 python benchmarks/penalty.py --out benchmarks/results/penalty.json

Networks: MLP 784-300-100-10 with batches of 256, ResNet-20 with batches of 128 (BatchNorm in training mode). Times are
medians over interleaved repeats; the relative deviation of a trace is over repeated draws of its signs on one batch at
the starting weights. Memory is the growth of the process over three steps, in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from fishlib import nets, penalty
from fishlib.notebook import device_name

NETWORKS = {"mlp": (lambda: nets.mlp((1, 28, 28), 10), (256, 1, 28, 28)),
            "resnet20": (lambda: nets.resnet(20), (128, 3, 32, 32))}
VARIANTS: dict[str, Callable[[], penalty.Penalty | None]] = {
    "plain": lambda: None,
    "FisherWeighted, adam": lambda: penalty.FisherWeighted(1e-3),
    "FisherTrace, range": lambda: penalty.FisherTrace(1e-3),
    "FisherTrace, range, an eighth": lambda: penalty.FisherTrace(1e-3, share=0.125),
    "FisherTrace, relative": lambda: penalty.FisherTrace(1e-3, "relative_noise"),
    "FisherTrace, both": lambda: penalty.named("fisher_held_sum", 1e-3),
    "FisherTrace, range, whole batch": lambda: penalty.FisherTrace(1e-3, share=1.0),
    "FisherTrace, range, every 8th": lambda: penalty.FisherTrace(1e-3, every=8),
    "FisherQuantization": lambda: penalty.FisherQuantization(),
    "KLNoise": lambda: penalty.KLNoise(1e-3),
    "KLNoise, both": lambda: penalty.named("kl_sum", 1e-3),
    "GradientNorm": lambda: penalty.GradientNorm(1e-3),
    "L2": lambda: penalty.L2(1e-4),
    "SAM": lambda: penalty.SAM(),
    "NoisyWeights": lambda: penalty.NoisyWeights(0.05),
    "QuantizationAware": lambda: penalty.QuantizationAware(4),
}
BARS = {"FisherWeighted, adam": (1.10, 1.10), "FisherTrace, range": (1.8, 2.2),
        "FisherTrace, range, an eighth": (1.8, 2.2), "FisherTrace, relative": (1.8, 2.2),
        "FisherTrace, both": (1.8, 2.2), "FisherTrace, range, every 8th": (1.3, 1.3)}


class Steps:
    """Training steps of one network under one penalty, as `fit` takes them, without the trainer around them."""

    def __init__(self, network: str, variant: str, device: str):
        torch.manual_seed(0)
        make, shape = NETWORKS[network]
        self.net, self.term = make().to(device).train(), VARIANTS[variant]()
        self.images, self.labels = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-4)

    def __call__(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            if isinstance(self.term, penalty.FisherWeighted):
                self.term.shrink(self.optimizer, self.net, self.term.strength, len(self.labels))
            elif isinstance(self.term, penalty.FisherQuantization):
                self.term.pull(self.optimizer, self.net, self.term.strength)
            if self.term:
                self.term.step += 1

    def loss(self) -> Tensor:
        logits = self.net(self.images)
        if hasattr(self.term, "objective"):
            return self.term.objective(self.net, self.images, self.labels, logits, F.cross_entropy)
        loss = F.cross_entropy(logits, self.labels)
        return loss if self.term is None else loss + self.term(self.net, self.images, self.labels, logits)


def seconds(steps: Steps, count: int) -> float:
    begin = time.perf_counter()
    steps(count)
    if steps.images.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def peak(network: str, variant: str, device: str) -> float:
    """MiB that three steps add at their peak."""
    if device == "cuda":
        steps = Steps(network, variant, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps(3)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = Steps(network, variant, device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps(3)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return int(answer.read()) / 1024


def deviation(network: str, share: float, draws: int, device: str) -> float:
    """Standard deviation over mean of single estimates of sum range^2 tr F."""
    steps = Steps(network, "plain", device)
    images = steps.images[: round(share * len(steps.images))]
    values = torch.stack([sum(penalty.fisher_trace(steps.net, images, "range_noise").values()).detach()
                          for _ in range(draws)])
    return (values.std() / values.mean()).item()


def measure(network: str, variants: list[str], repeats: int, device: str) -> pd.DataFrame:
    memory = {name: peak(network, name, device) for name in variants}
    runs = {name: Steps(network, name, device) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for steps in runs.values():
        steps(1)
    for _ in range(repeats):
        for name, steps in runs.items():
            whole_cycle = network == "mlp" or (steps.term and steps.term.every > 1)
            times[name].append(seconds(steps, 8 if whole_cycle else 1))
    table = pd.DataFrame({"network": network, "penalty": variants,
                          "milliseconds": [1e3 * statistics.median(t) for t in times.values()],
                          "memory_mib": list(memory.values())})
    # Each repeat's own plain step is the reference, so that slow spells of the machine cancel.
    table["time_ratio"] = [statistics.median(a / b for a, b in zip(t, times["plain"], strict=True)) for t in times.values()]
    table["memory_ratio"] = table.memory_mib / table.memory_mib[0]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--penalties", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="file for the numbers; those of other networks in it stay")
    arguments = parser.parse_args()
    print(f"{device_name()}, torch {torch.__version__}")
    variants = ["plain", *(name for name in arguments.penalties if name != "plain")]
    for network in arguments.networks:
        table = measure(network, variants, arguments.repeats, arguments.device)
        deviations = {str(share): deviation(network, share, 16, arguments.device) for share in (1.0, 0.25, 0.125)}
        print(table.round(3).to_string(index=False))
        for name, bars in BARS.items():
            for row in table[table.penalty == name].itertuples():
                bar = bars[list(NETWORKS).index(network)]
                print(f"{name}: time {row.time_ratio:.2f} (bar {bar}), memory {row.memory_ratio:.2f} (bar 2.5)")
        print("relative deviation of a trace: " + ", ".join(f"share {s}: {d:.3f}" for s, d in deviations.items()), flush=True)
        if arguments.out:
            keep(arguments.out, network, {
                "device": device_name(), "torch": torch.__version__, "repeats": arguments.repeats,
                "relative_deviation": deviations, "rows": table.round(4).to_dict("records")})


def keep(file: Path, network: str, content: dict) -> None:
    """Put the numbers of one network into the file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text()) if file.exists() else {}
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(kept | {network: content}, indent=1) + "\n")
    os.replace(partial, file)


if __name__ == "__main__":
    main()
