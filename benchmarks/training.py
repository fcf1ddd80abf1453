"""`fit` beside a bare PyTorch loop and a plain Lightning DataLoader loop: the same network, data and number of steps.

    python benchmarks/training.py [--depth 20] [--batch-size 128] [--steps 12] [--repeats 5]

Random images of CIFAR-10's shape, since time does not depend on what they show. The ways are timed in turn, `repeats`
times, and the medians of the pairwise ratios are printed. Bar: fit at most 1.10 times the bare loop.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fishlib import data as data_module
from fishlib import nets
from fishlib.data import ImageData
from fishlib.notebook import device_name, quiet
from fishlib.training import fit


def random_data(batch_size: int, steps: int, folder: Path) -> ImageData:
    """A data set of CIFAR-10's shape under the name svhn, whose content is not checked; crop and flip as for CIFAR-10."""
    generator = np.random.default_rng(0)
    train = int(batch_size * steps / 0.9) + 100
    arrays = {}
    for split, count in (("train", train), ("test", 100)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(folder / "svhn.npz", **arrays)
    data_module.CACHE = folder
    return ImageData("svhn", batch_size=batch_size, limit=None, augment=("crop", "flip"))


def bare(net: nn.Module, data: ImageData) -> None:
    net = copy.deepcopy(net).to(data.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    for images, labels in data.batches("train"):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        for images, labels in data.batches("validation"):
            F.cross_entropy(net(images), labels)
    if data.device.type == "cuda":
        torch.cuda.synchronize()


class Plain(L.LightningModule):
    """The module that a tutorial would write."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True)


def data_loader(net: nn.Module, data: ImageData) -> None:
    import torchvision.transforms.v2 as transforms

    images, labels = data.split("train")
    augmentation = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return augmentation(image), label

    loader = DataLoader(Augmented(images.cpu(), labels.cpu()), data.batch_size, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="gpu" if data.device.type == "cuda" else "cpu", devices=1)
    trainer.fit(Plain(copy.deepcopy(net)), loader)


def main(depth: int, batch_size: int, steps: int, repeats: int) -> None:
    import warnings

    quiet()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        data = random_data(batch_size, steps, Path(folder))
    net = nets.resnet(depth)
    ways = {
        "bare PyTorch loop": lambda: bare(net, data),
        "fit": lambda: fit(net, data, epochs=1, optimizer="sgd", lr=0.1, schedule="constant", progress=False),
        "Lightning with a DataLoader": lambda: data_loader(net, data),
    }
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    images = len(data.batches("train")) * batch_size
    print(f"{device_name()}; ResNet-{depth}, batch {batch_size}, {len(data.batches('train'))} steps, {repeats} repeats")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["bare PyTorch loop"], strict=True))
        print(f"{name:30s} {images / statistics.median(values):9.0f} images/s   {ratio:5.2f} x the bare loop")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    main(**vars(parser.parse_args()))
