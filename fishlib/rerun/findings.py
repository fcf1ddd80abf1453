"""What the book found, in one picture and a line a finding, for its first page: drawn from the records of runs.

Numbers come from the records that chapters left, of the run that the site shows or of one that the repository keeps, and
nothing is stated that holds for one outcome only. A finding whose records do not exist is left out.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fishlib.rerun.collect import STORED

Records = dict[str, Any]
PUBLISHED = STORED.parent / "published.csv"
# Rows of published.csv that a run under the same conditions is held against.
SIZES = {("mnist", "lenet300"): ("han-300", "sws-300"), ("mnist", "lenet5"): ("han-lenet5", "sws-lenet5")}
DATASETS = ("digits", "mnist", "cifar10", "cifar100", "svhn")  # from small to large
RIVALS = {"weight_noise": "training under noise", "kl_noise": "divergence to a noisy copy"}
OURS, PLAIN, CONTROL = "#0173b2", "#949494", "#de8f05"


@dataclass(frozen=True)
class Bar:
    """One number of a finding, with its standard deviation over seeds where there is one."""

    label: str
    value: float
    colour: str = PLAIN
    spread: float | None = None


@dataclass(frozen=True)
class Finding:
    """A question that a chapter answers, its numbers, and the sentence that states them."""

    chapter: str
    question: str
    unit: str
    bars: list[Bar]
    sentence: str
    conditions: str = ""


def noise(records: Records) -> Finding:
    """Chapter 2: accuracy under weight noise with and without the penalty, and by its rivals where they were run."""
    penalty, spread = records["penalty"], records["accuracy_std"]
    with_it, without = 100 * records["ours_noise_20"], 100 * records["bare_noise_20"]
    label = f"{penalty.replace('_', ' ').replace('fisher', 'Fisher')} penalty"
    rivals = {name: Bar(words, 100 * records["accuracy"][name]["noise_20"], CONTROL, 100 * spread[name]["noise_20"])
              for name, words in RIVALS.items() if name in records["accuracy"]}
    beside = "".join(f"; {bar.label} {bar.value:.1f} %" for bar in rivals.values())
    return Finding(
        "02_fisher_regularized_training", "Can training make a network bear noise in its weights?",
        "test accuracy under noise of 0.2 of the range (%)",
        [Bar("no penalty", without, PLAIN, 100 * spread["none"]["noise_20"]),
         Bar(label, with_it, OURS, 100 * spread[penalty]["noise_20"]), *rivals.values()],
        f"Under noise of a fifth of each tensor's range, a network trained with the {label} keeps {with_it:.1f} % "
        f"test accuracy, one without {without:.1f} %{beside}."
        + " The divergence does without the Fisher information." * ("kl_noise" in rivals))


def size(records: Records) -> Finding:
    """Chapter 3: how many times smaller the file is."""
    ratio, fewer, lost = records["file_ratio"], records["file_fewer"], 100 * records["file_error"]
    dense = 100 - 100 * statistics.mean(records["dense_test"])
    others = [Bar(f"{row['method']}\n(published, {100 - 100 * float(row['accuracy']):.2f} % error)",
                  float(row["file_compression"]), CONTROL) for row in published()
              if row["id"] in SIZES.get((records["dataset"], records["network"]), ())]
    return Finding(
        "03_pruning_and_quantization", "How few bytes hold a network?", "times smaller than the float32 network",
        [Bar("fewer weights", fewer), Bar(f"fewer bytes in the file\n({lost:.2f} % error)", ratio, OURS), *others],
        f"The file that decodes to the pruned and quantised network is {ratio:.0f} times smaller than uncompressed, at a "
        f"test error of {lost:.1f} % after {records['file_passes']} passes over the training images (the uncompressed "
        f"network, after {records['epochs']}: {dense:.1f} %).")


def channels(records: Records) -> Finding:
    """Chapter 5: removal of channels by divergence beside the best other criterion, chance and the small network alone."""
    share = 100 * records["half_share"]
    kl, random, scratch = (100 * records[f"half_{name}"] for name in ("kl", "random", "scratch"))
    criteria = ("correlation", "cosine", "l1", "fpgm", "taylor", "rank", "chip", "group")
    rival = max((name for name in criteria if f"half_{name}" in records), key=lambda name: records[f"half_{name}"])
    best = 100 * records[f"half_{rival}"]
    return Finding(
        "05_channel_divergence", "Does KL divergence tell which channels can go?",
        f"validation accuracy without {share:.0f} % of the channels (%)",
        [Bar("at random", random), Bar("by KL divergence", kl, OURS), Bar(f"by {rival}", best, CONTROL),
         Bar("from scratch", scratch, CONTROL)],
        f"Without {share:.0f} % of its channels, fine-tuned briefly, a network is at {kl:.1f} % where KL divergence chose "
        f"them, at {random:.1f} % where chance did and at {best:.1f} % by {rival}, the best of the others; a network of that "
        f"size from scratch is at {scratch:.1f} %. This is one of several shares: the chapter ranks the criteria over all.")


def lesions(records: Records) -> Finding:
    """Chapter 7: what the loss of one unit costs with and without skip connections."""
    networks = re.findall(r"([a-z]+)(\d+)", records["networks"])
    first = dict(reversed(networks))  # of each family, whose records carry its name
    known = {family + depth: records[f"lesion_{family}"] for family, depth in first.items()}
    known |= records.get("lesion_by_network", {})
    lost = {pair: known["".join(pair)] for pair in networks if "".join(pair) in known}
    plain = first["plain"]
    skip = plain if ("resnet", plain) in lost else first["resnet"]
    deeper = int(plain) - int(skip)
    twin = f"a {'deeper' if deeper > 0 else 'shallower'} plain network" if deeper else "its plain twin"
    labels = {"resnet": "with skips (ResNet-{})", "plain": "without (plain, {} layers)", "vgg": "without (VGG-{})"}
    bars = [Bar(labels[family].format(depth), points, OURS if family == "resnet" else PLAIN)
            for (family, depth), points in lost.items() if family in labels]
    return Finding(
        "07_skip_units", "What does a network lose with one of its layers?",
        "accuracy lost with one unit (points, median)", bars,
        f"One unit removed from a network with skip connections costs {lost['resnet', skip]:.1f} points of accuracy "
        f"(the median over units), a pair of layers removed from {twin} {lost['plain', plain]:.1f}."
        + "".join(f" With more units each counts for less: {points:.1f} points in ResNet-{depth}."
                  for (family, depth), points in lost.items() if family == "resnet" and int(depth) > int(skip)
                  and points < lost["resnet", skip]))


def units(records: Records) -> Finding:
    """Chapter 8: pruning of units by Fisher score beside the small network from scratch."""
    bars = [Bar(label, 100 * records[f"test_{name}"], colour, _spread(records.get(f"test_{name}_by_seed")))
            for name, label, colour in (("full_trained_on", "full network, trained as long", PLAIN),
                                        ("pruned", "pruned in stages", OURS),
                                        ("cut_at_once", "cut at once, first rate", CONTROL),
                                        ("from_scratch", "as small, from scratch", CONTROL))]
    full, pruned, at_once, scratch = (bar.value for bar in bars)
    return Finding(
        "08_unit_pruning", "Which units of a deep network can go?", "test accuracy (%)", bars,
        f"Pruned by the Fisher score of its units and retrained, {100 * records['removed']:.0f} % of its parameters fewer, "
        f"a network is at {pruned:.1f} % (full, trained for as long: {full:.1f} %), the same small network from scratch at "
        f"{scratch:.1f} %. Cut at once and retrained at the learning rate of a first training, it is at "
        f"{at_once:.1f} %.")


def published() -> list[dict[str, str]]:
    """The rows of `data/published.csv`."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


FINDINGS: tuple[Callable[[Records], Finding], ...] = (noise, size, channels, lesions, units)


def _spread(values: Sequence[float] | None) -> float | None:
    return 100 * statistics.stdev(values) if values and len(values) > 1 else None


def findings(executed: Path, stored: Path = STORED) -> list[Finding]:
    """The findings that the runs below two folders give, each from the run that weighs most.

    Parameters
    ----------
    executed : folder of the runs that the site shows
    stored : folder of the runs that the repository keeps
    """
    runs = [json.loads(file.read_text(encoding="utf-8")) | {"stored": folder == stored} for folder in (stored, executed)
            for file in sorted(folder.rglob("results.json"))]
    sound = [run for run in runs if not run["provenance"].get("stale")]  # said by hand: the run itself was at fault
    found = (_finding(make, sound) for make in FINDINGS)
    return [finding for finding in found if finding]


def _finding(make: Callable[[Records], Finding], runs: Iterable[dict]) -> Finding | None:
    for run in sorted(runs, key=_weight, reverse=True):
        try:
            finding = make(run["records"])
        except KeyError:
            continue  # the run of another chapter, or of one that recorded other things then
        if finding.chapter == run["chapter"]:
            return Finding(**{**vars(finding), "conditions": _conditions(run)})
    return None


def _weight(run: dict) -> tuple[bool, bool, bool, int, int, bool]:
    """Three seeds or more before fewer, real images before digits, all of them before a part, then large data, then seeds, and
    of files the way of the chapter before others."""
    given = run["parameters"]
    seeds, dataset = given.get("seeds", 1), given.get("dataset")
    size = DATASETS.index(dataset) if dataset in DATASETS else -1
    usual = given.get("path_score", "magnitude") == "magnitude"
    return seeds >= 3, size > DATASETS.index("digits"), not given.get("limit"), size, seeds, usual


def _conditions(run: dict) -> str:
    given, records = run["parameters"], run["records"]
    network = records.get("networks") or records.get("network") or given.get("network", "")
    seeds, limit = given.get("seeds", 1), given.get("limit")
    some = f"{limit:,} images of " if limit and run["stored"] else ""
    shift = given.get("shift")
    shifted = f", training images shifted by up to {shift} {'pixel' if shift == 1 else 'pixels'}" if shift else ""
    origin = "a stored run" if run["stored"] else "the quick run of this site"
    return f"{network} on {some}{given.get('dataset')}{shifted}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {origin}"


def write(executed: Path, folder: Path, stored: Path = STORED) -> None:
    """Write `findings.md`, which the first page includes, and the picture in it, `findings.png`, to a folder."""
    found = findings(executed, stored)
    if found:
        draw(found, folder / "findings.png")
    (folder / "findings.md").write_text(page(found), encoding="utf-8")


def page(found: Sequence[Finding]) -> str:
    """The picture and a line for each finding, in MyST."""
    if not found:
        return "The findings stand here once the chapters have run.\n"
    spoken = " ".join(f"{finding.question} {_spoken(finding)}." for finding in found)
    lines = [f"- **{finding.question}** {finding.sentence} *[Chapter {int(finding.chapter[:2])}]({finding.chapter}.ipynb); "
             f"{finding.conditions}.*" for finding in found]
    picture = [":::{figure} findings.png", ":name: fig-findings", f":alt: {spoken}", "",
               "What was found, each beside what it has to be compared with. Blue: what the chapter studies; grey: without it; "
               "orange: rivals and controls. Lines on bars: standard deviation over seeds, where the run has it.",
               ":::", ""]
    return "\n".join([*picture, *lines, ""])


def _spoken(finding: Finding) -> str:
    return f"{finding.unit}: " + ", ".join(f"{bar.label} {bar.value:.1f}".replace("\n", " ") for bar in finding.bars)


def draw(found: Sequence[Finding], file: Path) -> None:
    """Horizontal bars, a panel for each finding."""
    from matplotlib.figure import Figure

    from fishlib.notebook import plot_style

    plot_style()
    rows = [sum(1 + 0.3 * bar.label.count("\n") for bar in finding.bars) for finding in found]  # a second line needs room
    figure = Figure(figsize=(7.0, 0.35 * sum(rows) + 0.95 * len(found)), layout="constrained", dpi=160)
    figure.get_layout_engine().set(h_pad=0.1)
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=[row + 0.6 for row in rows])[:, 0]
    for finding, panel in zip(found, panels, strict=True):
        labels = [bar.label for bar in finding.bars]
        values = [bar.value for bar in finding.bars]
        panel.barh(labels, values, color=[bar.colour for bar in finding.bars],
                   xerr=[bar.spread or 0 for bar in finding.bars], height=0.7)
        for place, bar in enumerate(finding.bars):
            panel.text(bar.value + (bar.spread or 0), place, f" {bar.value:.1f}", va="center")
        panel.set(xlim=(0, 1.15 * max(values)), xlabel=finding.unit)
        panel.locator_params(axis="x", nbins=6)
        panel.set_title(finding.question, loc="left", x=0)
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")
    figure.savefig(file, facecolor="white")
