"""Speed of scoring, pruning and coding weights, beside one plain epoch over the same images.

    FISHLIB_DATA=... OMP_NUM_THREADS=1 python benchmarks/weights.py [--images 10000] [--out benchmarks/results/weights.json]

Medians of interleaved repeats in one process. Without MNIST on disk, images of noise: the times do not depend on content.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from fishlib import codec, nets, notebook, weights

SCORED = ("magnitude", "fisher", "fisher_weight", "taylor", "hessian")


def plain_epoch(net: torch.nn.Module, batches: list) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def seconds(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.randn(options.images, 1, 28, 28), torch.randint(10, (options.images,))
    batches = list(zip(images.split(256), labels.split(256), strict=True))
    net = nets.lenet5()
    coded = codec.quantize(weights.prune(net, weights.score(net, [], "magnitude"), 0.99), 3)
    file = Path(tempfile.mkdtemp()) / "net.fish"

    def scored(by: str) -> None:
        weights.prune(net, weights.score(net, batches, by, samples=options.images), 0.9)

    actions = {"plain epoch": lambda: plain_epoch(nets.lenet5(), batches)}
    actions |= {f"score and prune: {by}": lambda by=by: scored(by) for by in SCORED}
    actions |= {"score and prune: woodfisher, 256 images": lambda: weights.prune(
        net, weights.score(net, batches, "woodfisher", samples=256), 0.9)}
    actions |= {"compress": lambda: codec.compress(coded, file), "load": lambda: codec.load(file, net)}
    times = {name: [] for name in actions}
    for _ in range(options.repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
    epoch = median(times["plain epoch"])
    rows = {name: {"seconds": round(median(t), 4), "epochs": round(median(t) / epoch, 3)} for name, t in times.items()}
    print(f"LeNet-5 (431,080 parameters), {options.images} images, {notebook.device_name()}, {options.repeats} repeats")
    for name, row in rows.items():
        print(f"{name:42} {row['seconds']:9.3f} s   {row['epochs']:7.2f} plain epochs")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": notebook.device_name(), "torch": torch.__version__, "images": options.images,
                 "repeats": options.repeats, "rows": rows}
        partial = options.out.with_suffix(".part")
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(partial, options.out)


if __name__ == "__main__":
    main()
