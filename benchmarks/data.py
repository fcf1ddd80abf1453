"""What data cost beside training: loading MNIST, and an epoch of augmented CIFAR-10 batches, over a ResNet-20 epoch.

    FISHLIB_DATA=DIR python benchmarks/data.py

The training epoch is estimated from some steps (all steps are alike); the batches are drawn for the whole epoch.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from fishlib import nets
from fishlib.data import ImageData, find
from fishlib.notebook import device_name


def seconds(function, repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(steps: int) -> None:
    loading = seconds(lambda: ImageData("mnist", device="cpu"), 3)
    data = ImageData("cifar10", batch_size=128, device="cpu")
    drawing = seconds(lambda: [None for _ in data.batches("train")], 3)

    net, batches = nets.resnet(20), data.batches("train")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    images, labels = next(iter(batches))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    step()
    epoch = seconds(step, steps) * len(batches)
    print(f"{device_name()}; augmentation {', '.join(data.augment)}; medians of 3 and of {steps} steps")
    print(f"load mnist.npz                     {loading:8.2f} s")
    print(f"an epoch of CIFAR-10 batches       {drawing:8.2f} s")
    print(f"a ResNet-20 epoch, batch 128       {epoch:8.2f} s")
    print(f"ratio (load + batches) / training  {(loading + drawing) / epoch:8.3f}   (bar 0.10)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="training steps that are timed")
    arguments = parser.parse_args()
    for name in ("mnist", "cifar10"):
        if find(name) is None:
            parser.error(f"{name}.npz is neither in FISHLIB_DATA nor in data/cache")
    main(arguments.steps)
