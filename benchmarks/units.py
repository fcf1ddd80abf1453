"""Time and memory of scoring all 27 units of ResNet-56 on 5,000 images of 32 x 32, beside other ways to do it.

    python benchmarks/units.py [--images 5000] [--repeats 3] [--output benchmarks/results/units.json]

Images and weights are random: time does not depend on them. Each way runs in a process of its own, so that its peak
memory (resident, with Python, torch and the images) is its own. The ways take turns; a ratio is that of the least times.
CPU seconds are disturbed less by other programs than wall-clock seconds.

Then what `units.keep` saves: parameters, MACs and latency of ResNet-56 and of the published choice of its units, and of
DenseNet-BC-100 and of every other of its units.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from fishlib import cost, divergence, nets, notebook, units
from fishlib.data import Batches


class RandomImages:
    """Stands in for a data module: random images of ten classes."""

    def __init__(self, images: int):
        g = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (images, 32, 32, 3), generator=g, dtype=torch.uint8)
        self.labels = torch.arange(images) % 10

    def batches(self, split: str, batch_size: int = 512, shuffle: bool | None = None) -> Batches:
        return Batches(self.images, self.labels, torch.full((3,), 0.5), torch.full((3,), 0.25), batch_size)


@torch.no_grad()
def forward(net, data):
    """One forward pass and nothing else."""
    for images, _ in data.batches("train", 250):
        net(images)


def score(net, data):
    """`units.fisher_score`: diagonal, all pairs, every number of every map."""
    units.fisher_score(net, data, images=len(data.labels))


@torch.no_grad()
def direct(net, data):
    """Class by class: the maps of all its images are kept, then mean and variance taken; then pair by pair."""
    moments = {}
    for label in range(10):
        images = data.images[data.labels == label]
        batches = Batches(images, torch.full((len(images),), label), torch.full((3,), 0.5), torch.full((3,), 0.25), 250)
        maps = [[] for _ in net.units]
        hooks = [unit.writer.register_forward_hook(lambda m, i, output, kept=kept: kept.append(output.flatten(1)))
                 for unit, kept in zip(net.units, maps, strict=True)]
        for batch, _ in batches:
            net(batch)
        for hook in hooks:
            hook.remove()
        for place, kept in enumerate(maps):
            x = torch.cat(kept)
            moments[place, label] = x.mean(0).double(), x.var(0).double().clamp_min(1e-2)
    for place in range(len(net.units)):
        of = [moments[place, label] for label in range(10)]
        max(float(divergence.fisher_divergence(*p, *q)) for p in of for q in of if p is not q)


def distance_correlation(net, data):
    """`units.energy_score`: distance correlation of the maps' means over pixels."""
    units.energy_score(net, data, images=len(data.labels))


WAYS = {"forward pass": forward, "fisher_score": score, "direct per-class loop": direct,
        "distance correlation": distance_correlation}


def sizes(repeats: int, batch: int = 16) -> list[dict[str, float]]:
    """Full networks and kept units; full and smaller take turns, a latency is the least of the turns' medians."""
    rows = []
    for name, net, kept in (("ResNet-56", nets.resnet(56), [*range(6), 10, 11, 19, 20]),  # 6, 2, 2 units of each stage
                            ("DenseNet-BC-100, k = 12", nets.densenet(100, 12), range(0, 48, 2))):
        pair = net.eval(), units.keep(net, kept).eval()
        turns = [[cost.latency(one, (3, 32, 32), batch, repeats=5) for one in pair] for _ in range(repeats)]
        for one, seconds in zip(pair, map(min, zip(*turns, strict=True)), strict=True):
            counted = cost.count(one, (3, 32, 32))
            rows.append({"network": name, "units": len(one.units), "parameters": counted.parameters, "macs": counted.macs,
                         "milliseconds": 1000 * seconds})
            print(f"{name:24} {len(one.units):3} units  {counted.parameters:9,} parameters  {counted.macs / 1e6:6.1f} M MACs  "
                  f"{1000 * seconds:7.1f} ms for {batch} images")
    return rows


def measure(way: str, images: int) -> dict[str, float]:
    net, data = nets.resnet(56).eval(), RandomImages(images)
    with torch.no_grad():
        net(torch.zeros(2, 3, 32, 32))
    wall, cpu = time.perf_counter(), time.process_time()
    WAYS[way](net, data)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.images)))
        return
    runs = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--images", str(options.images)]
            runs[way].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    found = {way: {key: min(run[key] for run in of) for key in ("seconds", "cpu_seconds")}
             | {"peak_MB": max(run["peak_MB"] for run in of)} for way, of in runs.items()}
    for way, one in found.items():
        one["forward_passes"] = one["seconds"] / found["forward pass"]["seconds"]
        one["forward_passes_cpu"] = one["cpu_seconds"] / found["forward pass"]["cpu_seconds"]
        print(f"{way:22}  {one['seconds']:7.1f} s wall  {one['cpu_seconds']:7.1f} s CPU  "
              f"{one['forward_passes']:5.2f} / {one['forward_passes_cpu']:5.2f} forward passes  {one['peak_MB']:6.0f} MB")
    print(f"bar: fisher_score at most 1.5 forward passes and 1,500 MB: "
          f"{found['fisher_score']['forward_passes_cpu']:.2f} and {found['fisher_score']['peak_MB']:.0f}")
    smaller = sizes(options.repeats)
    if options.output:
        conditions = {"images": options.images, "repeats": options.repeats, "device": notebook.device_name(),
                      "torch": torch.__version__, "python": platform.python_version()}
        partial = options.output.with_suffix(".part")
        partial.write_text(json.dumps({"conditions": conditions, "ways": found, "sizes": smaller}, indent=1) + "\n")
        os.replace(partial, options.output)


if __name__ == "__main__":
    main()
