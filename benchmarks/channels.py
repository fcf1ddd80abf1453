"""KL matrices of every layer of VGG-16 beside forward passes, ChannelConv3d beside Conv3d, latency after channel removal.

    python benchmarks/channels.py [--images 10000] [--part relations|pairs|layer|latency] [--output FILE]

Images and weights are random: time hardly depends on them. CPU seconds are disturbed less by other programs than
wall-clock seconds; a ratio is that of the least times. Latency is wall-clock time; a file keeps its other parts.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

import torch
from scipy.stats import entropy

from fishlib import channels, cost, nets, notebook, relations
from fishlib.data import Batches


class RandomImages:
    """Stands in for a data module: random images of ten classes."""

    def __init__(self, images: int):
        g = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (images, 32, 32, 3), generator=g, dtype=torch.uint8)
        self.labels = torch.arange(images) % 10

    def batches(self, split: str, batch_size: int = 512, shuffle: bool | None = None) -> Batches:
        return Batches(self.images, self.labels, torch.full((3,), 0.5), torch.full((3,), 0.25), batch_size)


def timed(function, repeats: int = 1) -> float:
    """Least CPU seconds of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def of_relations(images: int) -> dict:
    """All KL matrices of VGG-16 over `images` images, and one forward pass over them; memory with images and network."""
    imports = peak_mb()
    torch.manual_seed(0)
    net, data = nets.vgg(16).eval(), RandomImages(images)

    @torch.no_grad()
    def one_pass():
        for batch, _ in data.batches("train", 250):
            net(batch)

    # The matrices first: a pass in larger batches needs more memory than they do.
    matrices = timed(lambda: channels.relations(net, data, "kl", images=images))
    peak = peak_mb()
    base = timed(one_pass)
    return {"images": images, "forward_s": base, "kl_matrices_s": matrices, "in_forward_passes": matrices / base,
            "imports_mb": imports, "peak_mb": peak, "added_mb": peak - imports}


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_pairs(images: int) -> dict:
    """The KL matrix of one layer of 64 channels from its histograms, at once and by a loop over pairs."""
    net = nets.vgg(16).eval()
    layer = channels.activations(net, RandomImages(500), ["conv"], images=500).layers["conv"]
    counts = layer.histogram.double().numpy() + 0.5
    at_once = timed(lambda: channels.divergence.kl_histogram_pairs(layer.histogram), 20)
    loop = timed(lambda: [[entropy(p, q) for q in counts] for p in counts])
    return {"channels": len(counts), "at_once_s": at_once, "loop_s": loop, "times_faster": loop / at_once}


def of_layer(images: int) -> dict:
    """ChannelConv3d on 64 images of 16 x 16 beside torch's Conv3d with the same weights and Conv2d: a forward pass without
    gradients, and forward with backward."""
    rows = {}
    for width, groups in ((32, 8), (32, 4), (64, 8), (64, 4)):
        layer, x = relations.ChannelConv3d(width, groups), torch.randn(64, width, 16, 16, requires_grad=True)
        forms = {"ChannelConv3d": layer, "Conv2d": torch.nn.Conv2d(width, width, 3, padding=1),
                 "Conv3d": torch.nn.Sequential(torch.nn.Unflatten(1, (groups, -1)), layer.conv)}
        rows[f"{width} channels in {groups} groups"] = {
            name: [round(1000 * timed(lambda form=form, run=run, x=x: run(form, x), 7), 2) for run in (forward, train)]
            for name, form in forms.items()}
    return {"milliseconds forward, training": rows}


@torch.no_grad()
def forward(form, x):
    form(x)


def train(form, x):
    form(x).sum().backward()


def of_latency(images: int) -> dict:
    """What the time of 64 images falls by over what the MACs fall by, for shares of every layer's channels removed."""
    shape, rows = (3, 32, 32), {}
    networks = {"VGG-16": nets.vgg(16), "ResNet-56": nets.resnet(56), "VGG-11 of width 16": nets.vgg(11, width=16)}
    for label, net in networks.items():
        shares = (0.0, 0.3, 0.5, 0.7)
        smaller = [channels.remove(net, shape, {name: range(int(share * net.get_submodule(name).out_channels))
                                                for name in channels.removable(net, shape)}) for share in shares]
        times = [[cost.latency(one, shape, 64, repeats=3) for one in smaller] for _ in range(5)]  # in turn
        least, macs = [min(row) for row in zip(*times, strict=True)], [cost.count(one, shape).macs for one in smaller]
        rows[label] = [{"share removed": share, "MACs left": m / macs[0], "time left": t / least[0],
                        "part of the fall": (1 - t / least[0]) / (1 - m / macs[0])}
                       for share, t, m in list(zip(shares, least, macs, strict=True))[1:]]
    return rows


PARTS = {"relations": of_relations, "pairs": of_pairs, "layer": of_layer, "latency": of_latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--part", choices=PARTS, help="one part only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {"device": notebook.device_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "python": platform.python_version()}
    for name in [arguments.part] if arguments.part else PARTS:
        result[name] = PARTS[name](arguments.images)
    print(json.dumps(result, indent=1))
    if arguments.output:
        kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        partial = arguments.output.with_suffix(".part")
        partial.write_text(json.dumps(kept | result, indent=1) + "\n")
        os.replace(partial, arguments.output)


if __name__ == "__main__":
    main()
