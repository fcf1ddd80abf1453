"""Images a second of `fit`, beside a plain Lightning DataLoader loop, bare PyTorch loops and the limit of the device.

    python benchmarks/training.py [--depth 56] [--batch-size 128] [--steps STEPS] [--repeats 3] [--output FILE]

ResNet-56 on random images of CIFAR-10's shape with its augmentation, since time does not depend on what they show. Every
way trains the same network for the same steps (by default 4 on a CPU, 200 on a GPU, where few would time the start) and
validates once. The ways take turns, and the medians of the pairwise ratios are printed; on a CPU of the process's CPU
seconds, which other programs disturb less than wall-clock seconds. The DataLoader loop computes in single precision, as a
tutorial would; what `fit` gains in single precision is given beside. The limit is what one large product of matrices
reaches in `fit`'s precision, over the operations of forward and backward pass (three times two a multiply-accumulate).
Bars: fit at least 1.2 times the DataLoader loop on a CPU, 8 times on a GPU, there 200 epochs of CIFAR-10 within ten
minutes; at most 1.10 times the time of the bare loop of the same precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
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

from fishlib import cost, nets
from fishlib import data as data_module
from fishlib.data import ImageData
from fishlib.notebook import device_name, quiet
from fishlib.training import _gains_from_bfloat16, fit

IMAGES = 45_000  # of CIFAR-10 in the training split


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


def bare(net: nn.Module, data: ImageData, reduced: bool = False) -> None:
    """A loop over batches on the device; `reduced` as `fit` does it, bfloat16 and channels_last."""
    layout = torch.channels_last if reduced else torch.contiguous_format
    net = copy.deepcopy(net).to(data.device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    for images, labels in data.batches("train"):
        optimizer.zero_grad()
        with torch.autocast(data.device.type, torch.bfloat16, enabled=reduced):
            loss = F.cross_entropy(net(images.contiguous(memory_format=layout)), labels)
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad(), torch.autocast(data.device.type, torch.bfloat16, enabled=reduced):
        for images, labels in data.batches("validation"):
            F.cross_entropy(net(images), labels)
    synchronize(data.device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
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

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("validation_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True)


def data_loader(net: nn.Module, data: ImageData, workers: int) -> None:
    import torchvision.transforms.v2 as transforms

    augmentation = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return augmentation(image), label

    train, validation = ([part.cpu() for part in data.split(split)] for split in ("train", "validation"))
    loaders = (DataLoader(Augmented(*train), data.batch_size, shuffle=True, drop_last=True, num_workers=workers),
               DataLoader(TensorDataset(*validation), 512, num_workers=workers))
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="gpu" if data.device.type == "cuda" else "cpu", devices=1)
    trainer.fit(Plain(copy.deepcopy(net)), *loaders)
    synchronize(data.device)


def limit(macs: int, device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Images a second if all arithmetic ran at the speed of one product of two size x size matrices."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        begin = clock(device)
        a @ b
        synchronize(device)
        seconds.append(clock(device) - begin)
    return 2 * size**3 / min(seconds) / (3 * 2 * macs)


def clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def measure(depth: int, batch_size: int, steps: int, repeats: int, workers: int) -> dict:
    """Images a second of each way, and how many times faster `fit` is."""
    with tempfile.TemporaryDirectory() as folder:
        data = random_data(batch_size, steps, Path(folder))
    net, device = nets.resnet(depth), data.device
    reduced = _gains_from_bfloat16(device)
    recipe = {"epochs": 1, "optimizer": "sgd", "lr": 0.1, "schedule": "constant", "progress": False,
              "compiled": device.type == "cuda"}
    ways = {
        "bare loop, float32": lambda: bare(net, data),
        "bare loop, precision of fit": lambda: bare(net, data, reduced),
        "fit, float32": lambda: fit(net, data, precision="float32", **recipe),
        "fit": lambda: fit(net, data, **recipe),
        "Lightning with a DataLoader": lambda: data_loader(net, data, workers),
    }
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begin = clock(device)
            way()
            if repeat:  # the first round warms up
                times[name].append(clock(device) - begin)
    images = len(data.batches("train")) * batch_size
    rates = {name: images / statistics.median(values) for name, values in times.items()}
    dtype = torch.bfloat16 if reduced else torch.float32
    rates["limit of the device"] = limit(cost.count(net, (3, 32, 32)).macs, device, dtype)
    gains = {name: statistics.median(a / b for a, b in zip(values, times["fit"], strict=True))
             for name, values in times.items()}
    conditions = {"depth": depth, "batch_size": batch_size, "steps": len(data.batches("train")), "repeats": repeats,
                  "workers": workers, "device": device_name(), "precision": str(dtype).removeprefix("torch."),
                  "clock": "wall" if device.type == "cuda" else "CPU", "torch": torch.__version__,
                  "python": platform.python_version()}
    equal = statistics.median(a / b for a, b in zip(times["Lightning with a DataLoader"], times["fit, float32"], strict=True))
    return {"conditions": conditions, "images_per_second": rates, "fit_times_faster": gains,
            "float32_times_faster_than_data_loader": equal,
            "minutes_200_epochs": 200 * IMAGES / rates["fit"] / 60}


def main() -> None:
    import warnings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = 200 if torch.cuda.is_available() else 4
    for name, default in {"depth": 56, "batch-size": 128, "steps": steps, "repeats": 3, "workers": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    given = vars(parser.parse_args())
    output = given.pop("output")
    quiet()
    warnings.filterwarnings("ignore")
    result = measure(**given)
    print(", ".join(f"{name} {value}" for name, value in result["conditions"].items()))
    for name, rate in result["images_per_second"].items():
        gain = result["fit_times_faster"].get(name)
        print(f"{name:30s} {rate:9.0f} images/s" + (f"   fit is {gain:5.2f} times as fast" if gain else ""))
    equal = result["float32_times_faster_than_data_loader"]
    print(f"In single precision fit is {equal:.2f} times as fast as the DataLoader loop.")
    print(f"200 epochs of CIFAR-10 at this speed: {result['minutes_200_epochs']:.0f} min")
    if output:
        partial = output.with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, output)


if __name__ == "__main__":
    main()
