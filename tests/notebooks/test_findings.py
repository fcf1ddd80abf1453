"""The findings on the first page: from records alone, of the run that weighs most, and right whichever way they fall."""

import json
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from fishlib.rerun import chapters, findings


def committed(chapter):
    """The records in a chapter's committed outputs."""
    outputs = (output for cell in nbformat.read(chapters.CHAPTERS / f"{chapter}.ipynb", 4).cells
               for output in cell.get("outputs", []))
    about = [output.get("metadata", {}) for output in outputs]
    return {meta["scrapbook"]["name"]: meta["fishlib"]["value"] for meta in about if "scrapbook" in meta}


NAMES = [path.stem for path in sorted(chapters.CHAPTERS.glob("[0-9]*.ipynb"))]


def chapter_of(make):
    return next(name for name in NAMES if name.startswith(f"0{re.search(r'Chapter (.)', make.__doc__)[1]}"))


def keep(folder, chapter, records, **parameters):
    content = {"chapter": chapter, "parameters": {"dataset": "digits", "seeds": 3} | parameters, "records": records,
               "provenance": {}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.mark.parametrize("make", findings.FINDINGS, ids=lambda make: make.__name__)
def test_each_finding_can_be_made_from_what_its_chapter_records(make):
    finding = make(committed(chapter_of(make)))
    assert finding.chapter == chapter_of(make)
    assert finding.question.endswith("?")
    assert finding.sentence.endswith(".")
    assert sum(bar.colour == findings.OURS for bar in finding.bars) == 1


@pytest.mark.parametrize("make", findings.FINDINGS, ids=lambda make: make.__name__)
def test_every_number_in_a_sentence_and_a_bar_follows_the_records(make):
    """With all records nearly doubled no number but those of the conditions stays."""
    def changed(value):
        if isinstance(value, float):
            return value * 1.83
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        return list(map(changed, value)) if isinstance(value, list) else value

    records = committed(chapter_of(make))
    before, after = make(records), make(changed(records))
    for one, other in zip(before.bars, after.bars, strict=True):
        assert one.value != other.value
    number = r"\d+(?:\.\d+)?"
    conditions = {str(records[name]) for name in ("epochs", "file_passes") if name in records}
    assert not (set(re.findall(number, before.sentence)) & set(re.findall(number, after.sentence))) - conditions


def test_three_seeds_weigh_more_than_large_data_and_a_whole_real_set_more_than_a_part_of_a_larger_one(tmp_path):
    records = committed("07_skip_units")

    def lost(value):
        return records | {"lesion_resnet": value, "lesion_by_network": {}}

    shown, stored = tmp_path / "executed", tmp_path / "runs"
    keep(shown / "07_skip_units", "07_skip_units", lost(1.0))
    keep(stored / "one", "07_skip_units", lost(2.0), dataset="cifar10", seeds=1)
    (found,) = findings.findings(shown, stored)
    assert found.bars[0].value == 1.0
    assert "the quick run of this site" in found.conditions
    keep(stored / "three", "07_skip_units", lost(3.0), dataset="cifar10", seeds=3, limit=8000)
    (found,) = findings.findings(shown, stored)
    assert found.bars[0].value == 3.0
    assert "8,000 images of cifar10, 3 seeds, a stored run" in found.conditions
    keep(stored / "mnist", "07_skip_units", lost(4.0), dataset="mnist", seeds=3)
    (found,) = findings.findings(shown, stored)
    assert found.bars[0].value == 4.0
    keep(stored / "whole", "07_skip_units", lost(5.0), dataset="cifar10", seeds=3)
    (found,) = findings.findings(shown, stored)
    assert found.bars[0].value == 5.0


def test_run_that_lacks_the_records_gives_way_to_one_that_has_them(tmp_path):
    keep(tmp_path / "runs" / "old", "07_skip_units", {"lesion_resnet": 9.0}, dataset="cifar10")
    keep(tmp_path / "executed" / "new", "07_skip_units", committed("07_skip_units"))
    (found,) = findings.findings(tmp_path / "executed", tmp_path / "runs")
    assert "digits" in found.conditions


def test_a_plain_network_is_called_a_twin_at_equal_depth_only():
    records = committed("07_skip_units") | {"lesion_by_network": {}}
    said = {depth: findings.lesions(records | {"networks": f"resnet56, plain{depth}, vgg11"}) for depth in (20, 56, 110)}
    assert [words in said[depth].sentence for depth, words in
            ((20, "a shallower plain network"), (56, "its plain twin"), (110, "a deeper plain network"))] == [True] * 3
    assert [bar.label for bar in said[20].bars] == ["with skips (ResNet-56)", "without (plain, 20 layers)", "without (VGG-11)"]


def test_of_several_residual_networks_the_plain_ones_twin_is_set_beside_it():
    lost = {"resnet110": 2.0, "resnet20": 10.0, "plain20": 50.0, "vgg11": 60.0}
    of_family = {"lesion_resnet": 2.0, "lesion_plain": 50.0, "lesion_vgg": 60.0}
    found = findings.lesions(of_family | {"networks": ", ".join(lost), "lesion_by_network": lost})
    assert [(bar.label, bar.value) for bar in found.bars] == [
        ("with skips (ResNet-110)", 2.0), ("with skips (ResNet-20)", 10.0), ("without (plain, 20 layers)", 50.0),
        ("without (VGG-11)", 60.0)]
    assert "costs 10.0 points" in found.sentence
    assert "its plain twin 50.0" in found.sentence
    assert "in ResNet-110." in found.sentence


def test_published_sizes_stand_beside_a_run_under_the_same_conditions_only():
    records = committed("03_pruning_and_quantization")
    assert not [bar for bar in findings.size(records).bars if "published" in bar.label]
    bars = findings.size(records | {"dataset": "mnist", "network": "lenet300"}).bars
    assert {bar.label: bar.value for bar in bars if "published" in bar.label} == {
        "deep compression\n(published, 1.58 % error)": 40, "soft weight sharing\n(published, 1.94 % error)": 64}


def test_shifted_training_images_are_told_beside_the_bytes(tmp_path):
    records = committed("03_pruning_and_quantization")
    for shift, told in ((0, ""), (1, "by up to 1 pixel,"), (2, "by up to 2 pixels,")):
        keep(tmp_path / str(shift) / "one", "03_pruning_and_quantization", records, shift=shift)
        (found,) = findings.findings(tmp_path / "none", tmp_path / str(shift))
        assert told in found.conditions
        assert ("shifted" in found.conditions) == bool(shift)


def test_picture_is_opaque_and_described_and_each_finding_has_its_line(tmp_path):
    for name in ("05_channel_divergence", "07_skip_units"):
        keep(tmp_path / "executed" / name, name, committed(name))
    findings.write(tmp_path / "executed", tmp_path, tmp_path / "none")
    pixels = np.asarray(Image.open(tmp_path / "findings.png").convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    page = (tmp_path / "findings.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^- ", page, re.MULTILINE)) == 2
    assert "accuracy lost with one unit" in re.search(r":alt: (.*)", page)[1]


def test_run_that_is_said_to_be_at_fault_is_left_out(tmp_path):
    keep(tmp_path / "one", "07_skip_units", committed("07_skip_units"))
    file = tmp_path / "one" / "results.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert findings.findings(tmp_path / "none", tmp_path)
    file.write_text(json.dumps(content | {"provenance": {"stale": True, "caveat": "images of one class"}}))
    assert not findings.findings(tmp_path / "none", tmp_path)


def test_without_any_run_the_page_says_so(tmp_path):
    findings.write(tmp_path / "executed", tmp_path, tmp_path / "none")
    assert not (tmp_path / "findings.png").exists()
    assert "once the chapters have run" in (tmp_path / "findings.md").read_text(encoding="utf-8")
