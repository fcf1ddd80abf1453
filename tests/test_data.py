import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fishlib import data as module
from fishlib.data import ImageData, augment, fingerprint, from_torchvision, load_arrays


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data on disk, no network: torchvision's download fails as it does without a connection."""
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path / "mine"))

    def offline(*args, **kwargs):
        raise RuntimeError("no connection")

    monkeypatch.setattr(module, "from_torchvision", offline)
    return tmp_path


def small_arrays(side=4, classes=2, per_class=10):
    labels = np.repeat(np.arange(classes, dtype=np.uint8), per_class)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), side, side), dtype=np.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images[::2], "test_labels": labels[::2]}


def test_fingerprint_does_not_depend_on_the_order_but_on_every_byte_and_label():
    arrays = small_arrays()
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.random.default_rng(1).permutation(len(labels))
    assert fingerprint(images, labels) == fingerprint(images[order], labels[order])
    altered = images.copy()
    altered[3, 1, 1] ^= 1
    assert fingerprint(images, labels) != fingerprint(altered, labels)
    assert fingerprint(images, labels) != fingerprint(images, labels[order])


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_real_data_has_the_published_fingerprint(name, real_data):
    real_data(name)
    arrays = load_arrays(name)
    assert len(arrays["train_labels"]) in (50000, 60000)
    assert fingerprint(arrays["test_images"], arrays["test_labels"]) == module.FINGERPRINTS[name, "test"]


@pytest.mark.real_data
def test_mnist_in_its_original_files_gives_the_same_arrays(tmp_path, real_data):
    real_data("mnist")
    arrays = load_arrays("mnist")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        head = struct.pack(">IIII", 0x803, len(images), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())
    ours = from_torchvision("mnist", tmp_path)
    for split in ("train", "test"):
        found = fingerprint(ours[f"{split}_images"], ours[f"{split}_labels"])
        assert found == module.FINGERPRINTS["mnist", split]


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_its_original_files_gives_the_published_fingerprint(name, tmp_path, monkeypatch, real_data):
    """The pickled batches are rebuilt from the pixels; torchvision's check of their md5 has to be left out."""
    from torchvision import datasets

    real_data(name)
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    arrays = load_arrays(name)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        images = arrays[f"{split}_images"].transpose(0, 3, 1, 2).reshape(len(arrays[f"{split}_labels"]), -1)
        pieces = zip(np.array_split(images, len(files)), np.array_split(arrays[f"{split}_labels"], len(files)), files,
                     strict=True)
        for pixels, labels, (file, _) in pieces:
            (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels.tolist()}))
    names = {kind.meta["key"]: [str(c) for c in arrays["classes"]]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    ours = from_torchvision(name, tmp_path)
    assert fingerprint(ours["test_images"], ours["test_labels"]) == module.FINGERPRINTS[name, "test"]
    assert list(ours["classes"]) == sorted(ours["classes"])


def test_a_download_is_converted_checked_and_written_once(nowhere, monkeypatch):
    calls = []

    def download(name, root, download):
        calls.append(name)
        return small_arrays() | {"classes": np.array(["a", "b"])}

    monkeypatch.setattr(module, "from_torchvision", download)
    first, second = ImageData("svhn"), ImageData("svhn")
    assert calls == ["svhn"]
    assert first.fingerprint == second.fingerprint
    assert [file.name for file in (nowhere / "cache").iterdir()] == ["svhn.npz"]


def test_a_download_with_altered_content_is_refused_and_leaves_nothing_behind(nowhere, monkeypatch):
    monkeypatch.setattr(module, "from_torchvision", lambda *a, **k: small_arrays() | {"classes": np.array(["a", "b"])})
    with pytest.raises(ValueError, match=r"download of mnist is not the train split of mnist.*delete it"):
        ImageData("mnist")
    assert not list(nowhere.rglob("*.npz"))


def test_without_file_and_network_one_error_names_what_was_looked_for_and_what_to_do(nowhere):
    with pytest.raises(ConnectionError, match=r"cifar10\.npz is not in .*mine or .*cache.*FISHLIB_DATA"):
        ImageData("cifar10")
    assert not list(nowhere.rglob("*.npz"))


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'mnits': use one of digits, mnist"):
        ImageData("mnits")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_file_is_refused_by_name(share, nowhere):
    (nowhere / "mine").mkdir()
    path = nowhere / "mine" / "mnist.npz"
    np.savez(path, **small_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"mnist\.npz is damaged or not an npz file"):
        ImageData("mnist")


def test_file_of_other_content_is_refused_by_fingerprint(nowhere):
    (nowhere / "mine").mkdir()
    np.savez(nowhere / "mine" / "mnist.npz", **small_arrays())
    with pytest.raises(ValueError, match="is not the train split of mnist: fingerprint"):
        ImageData("mnist")


def test_file_without_labels_is_refused_by_the_missing_array(nowhere):
    (nowhere / "mine").mkdir()
    np.savez(nowhere / "mine" / "svhn.npz", train_images=small_arrays()["train_images"])
    with pytest.raises(ValueError, match="lacks the arrays train_labels, test_images, test_labels"):
        ImageData("svhn")


def test_file_of_pickled_objects_is_never_unpickled(nowhere):
    (nowhere / "mine").mkdir()
    arrays = small_arrays() | {"train_labels": np.array([{"no": "labels"}], dtype=object)}
    np.savez(nowhere / "mine" / "svhn.npz", **arrays)
    with pytest.raises(ValueError, match="is damaged or not an npz file"):
        ImageData("svhn")


def write_folder(root, classes=("cat", "dög"), count=12, side=6):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.full((side, side, 3), 40 * c + k, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")


def test_a_folder_of_class_folders_is_a_data_set(tmp_path):
    write_folder(tmp_path / "my images")
    data = ImageData(str(tmp_path / "my images"), batch_size=4)
    assert data.classes == ("cat", "dög")
    assert data.shape == (3, 6, 6)
    assert sum(data.size(split) for split in module.SPLITS) == 24


def test_train_and_test_folders_are_kept_apart(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", count=3)
    assert ImageData(str(tmp_path)).size("test") == 6


def test_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"one folder a class with images in each.*empty"):
        ImageData(str(tmp_path))


def test_a_class_that_the_test_folder_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", classes=("cat",), count=3)
    with pytest.raises(FileNotFoundError, match=r"test has the class folders cat, but .* has cat, dög"):
        ImageData(str(tmp_path))


def test_images_of_two_sizes_and_broken_images_are_named(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "99.png")
    with pytest.raises(ValueError, match=r"99\.png is \(9, 9\) pixels"):
        ImageData(str(tmp_path))
    (tmp_path / "cat" / "99.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"99\.png is not a readable image"):
        ImageData(str(tmp_path))


@pytest.mark.parametrize("names", [("cat", "dog"), ("dog", "cat")])
def test_grey_images_count_as_coloured_where_others_are_coloured_whatever_comes_first(tmp_path, names):
    for name, shape in zip(names, [(6, 6), (6, 6, 3)], strict=True):
        (tmp_path / name).mkdir()
        for k in range(5):
            pixels = np.full(shape, [10, 20, 30] if len(shape) == 3 else 90, dtype=np.uint8) + np.uint8(k)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    arrays = load_arrays(str(tmp_path))
    grey = arrays["train_labels"] == arrays["classes"].tolist().index(names[0])
    assert arrays["train_images"].shape == (8, 6, 6, 3)
    above_red = arrays["train_images"] - arrays["train_images"][..., :1]
    assert not above_red[grey].any()
    assert (above_red[~grey] == [0, 10, 20]).all()


@pytest.mark.parametrize("coloured", ["train", "test"])
def test_grey_images_count_as_coloured_where_the_other_split_is_coloured(tmp_path, coloured):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", count=3)
    for path in (tmp_path / ("test" if coloured == "train" else "train")).rglob("*.png"):
        Image.open(path).convert("L").save(path)
    data = ImageData(str(tmp_path))
    assert {data.split(split)[0].shape[1:] for split in module.SPLITS} == {(3, 6, 6)}
    assert set(data._tensors["test"][0].flatten().tolist()) == {0, 1, 2, 40, 41, 42}


def test_splits_of_two_sizes_are_refused(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", side=9)
    with pytest.raises(ValueError, match=r"training images are \(6, 6, 3\).*test images \(9, 9, 3\): bring all"):
        ImageData(str(tmp_path))


@pytest.mark.parametrize(("altered", "message"), [
    ({"train_labels": np.repeat([0.5, 1.5], 10)}, r"train_labels have to be integers.*found float64: delete"),
    ({"test_labels": np.repeat(["a", "b"], 5)}, r"test_labels have to be integers.*found <U1: delete"),
    ({"train_labels": np.repeat([-1, 0], 10)}, r"train_labels have to be integers.*from 0 on, found -1: delete"),
    ({"test_labels": np.repeat([0, 2], 5)}, r"test_labels go up to 2, but the classes are 0 to 1: leave"),
    ({"classes": np.array(["a"])}, r"train_labels go up to 1, but the classes are 0 to 0: leave"),
    ({"test_images": np.zeros((10, 4, 4, 3), np.uint8)}, r"training images are \(4, 4, 1\).*test images \(4, 4, 3\)"),
])
def test_splits_and_labels_that_do_not_go_together_are_refused(nowhere, altered, message):
    (nowhere / "mine").mkdir()
    np.savez(nowhere / "mine" / "svhn.npz", **small_arrays() | altered)
    with pytest.raises(ValueError, match=message):
        ImageData("svhn")


@pytest.mark.parametrize(("dtype", "ending"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif")])
def test_16_bit_grey_images_of_a_folder_keep_their_upper_8_bits(tmp_path, dtype, ending):
    grey = (np.arange(16) * 4368).reshape(4, 4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(5):
            Image.fromarray(grey.astype(dtype)).save(tmp_path / name / f"{k}.{ending}")
    assert np.array_equal(load_arrays(str(tmp_path))["train_images"], np.broadcast_to(grey >> 8, (8, 4, 4)))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_images_whose_white_is_unknown_are_refused(tmp_path, dtype, kind):
    write_folder(tmp_path)
    Image.fromarray(np.full((6, 6), 40, dtype=dtype)).save(tmp_path / "cat" / "99.tif")
    with pytest.raises(ValueError, match=rf"99\.tif holds {kind}.*8 or 16 bits"):
        load_arrays(str(tmp_path))


def test_folders_and_files_that_begin_with_a_dot_are_passed_over_wherever_the_images_are(tmp_path):
    root = tmp_path / ".cache" / "pets"
    write_folder(root)
    write_folder(root / ".ipynb_checkpoints", classes=("cat",), count=1)
    write_folder(root / "cat", classes=(".thumbnails",), count=1)
    (root / "cat" / "._0.png").write_bytes(b"no image")
    data = load_arrays(str(root))
    assert data["classes"].tolist() == ["cat", "dög"]
    assert len(data["train_labels"]) + len(data["test_labels"]) == 24


def test_a_folder_with_hidden_folders_alone_or_one_class_is_refused(tmp_path):
    write_folder(tmp_path, classes=(".cat",))
    with pytest.raises(FileNotFoundError, match="one folder a class with images in each"):
        load_arrays(str(tmp_path))
    write_folder(tmp_path, classes=("dog",))
    with pytest.raises(ValueError, match=r"one class only \(dog\): two folders or more"):
        load_arrays(str(tmp_path))
    for split in ("train", "test"):
        write_folder(tmp_path / split, classes=("dog",))
    with pytest.raises(ValueError, match=r"train has one class only \(dog\)"):
        load_arrays(str(tmp_path))


@pytest.mark.parametrize("counts", [(1, 12), (2, 3)])
def test_classes_with_too_few_images_for_a_test_split_are_named_with_what_to_do(tmp_path, counts):
    for name, count in zip(("cat", "dog"), counts, strict=True):
        write_folder(tmp_path, classes=(name,), count=count)
    few = ", ".join(f"{name} {count}" for name, count in zip(("cat", "dog"), counts, strict=True) if count < 5)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: .* \(images: {few}\): have five images or more a class, or put"):
        load_arrays(str(tmp_path))


def test_five_images_a_class_can_be_read(tmp_path):
    write_folder(tmp_path, classes=tuple("abcdef"), count=5)
    assert np.bincount(load_arrays(str(tmp_path))["test_labels"]).tolist() == [1] * 6


def test_a_single_augmentation_needs_no_tuple():
    assert ImageData(augment="flip").augment == ("flip",)
    with pytest.raises(ValueError, match="unknown augmentation rotate: use"):
        ImageData(augment="rotate")


def test_splits_are_disjoint_stratified_and_seeded():
    data, same, other = ImageData(validation=0.25), ImageData(validation=0.25), ImageData(validation=0.25, seed=1)
    images = {split: {x.numpy().tobytes() for x in data._tensors[split][0]} for split in ("train", "validation")}
    assert not images["train"] & images["validation"]
    share = torch.bincount(data.split("validation")[1]) / torch.bincount(torch.cat(
        [data.split("train")[1], data.split("validation")[1]]))
    assert torch.allclose(share, torch.full((10,), 0.25), atol=0.02)
    assert torch.equal(data.split("validation")[0], same.split("validation")[0])
    assert not torch.equal(data.split("validation")[0], other.split("validation")[0])
    assert torch.equal(data.split("test")[1], other.split("test")[1])


def test_limit_takes_a_stratified_subset_and_leaves_the_test_split():
    data = ImageData(limit=200, validation=0.2)
    assert data.size("train") + data.size("validation") == 200
    assert data.size("test") == ImageData().size("test")
    counts = torch.bincount(torch.cat([data.split("train")[1], data.split("validation")[1]]))
    assert counts.max() - counts.min() <= 2
    with pytest.raises(ValueError, match="limit=5 is below the number of classes"):
        ImageData(limit=5)


def test_a_limited_test_split_is_the_same_for_every_seed():
    first, second = (ImageData(limit=200, test_limit=50, seed=seed) for seed in (0, 1))
    assert first.size("test") == 50
    assert torch.equal(first.split("test")[1], second.split("test")[1])
    assert not torch.equal(first.split("train")[1], second.split("train")[1])


@pytest.mark.parametrize("name", ["limit", "test_limit"])
def test_a_limit_where_a_class_has_a_single_image_is_refused_by_name(nowhere, name):
    (nowhere / "mine").mkdir()
    split = "test_labels" if name == "test_limit" else "train_labels"
    arrays = small_arrays(classes=3)
    arrays[split] = np.minimum(np.arange(len(arrays[split])), 1) + np.uint8(np.arange(len(arrays[split])) > 9)
    np.savez(nowhere / "mine" / "svhn.npz", **arrays)
    with pytest.raises(ValueError, match=rf"svhn: {name}=5 .* class 0 has a single image: have two"):
        ImageData("svhn", **{name: 5})


def test_a_limit_below_the_number_of_classes_is_refused_by_name():
    with pytest.raises(ValueError, match="digits: test_limit=3 is below the number of classes: use at least 10"):
        ImageData("digits", test_limit=3)


@pytest.mark.parametrize("limits", [{}, {"limit": 600, "test_limit": 300}])
def test_the_first_images_of_a_split_are_of_all_classes_where_the_file_is_sorted_by_class(tmp_path, monkeypatch, limits):
    labels = np.repeat(np.arange(10), 100)
    images = np.random.default_rng(0).integers(0, 256, (1000, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "svhn.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
             classes=np.arange(10).astype(str))
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path))
    data = ImageData("svhn", validation=0.2, **limits)
    for split in ("train", "validation", "test"):
        counts = torch.bincount(data.split(split)[1][:100], minlength=10)
        assert counts.min() >= 2, (split, counts)


def test_the_first_training_images_keep_validation_and_test_split_and_standardisation(digits):
    fewer = digits.first(100)
    assert fewer.size("train") == 100 < digits.size("train")
    for split in ("validation", "test"):
        assert torch.equal(fewer.split(split)[0], digits.split(split)[0])
    assert torch.equal(fewer.split("train")[0], digits.split("train")[0][:100])
    for count in (0, digits.size("train") + 1):
        with pytest.raises(ValueError, match="training images"):
            digits.first(count)


def test_standardisation_uses_the_training_pixels_alone(digits):
    pixels = digits._tensors["train"][0].double() / 255
    assert torch.allclose(digits.mean.double(), pixels.mean().view(1), atol=1e-6)
    assert torch.allclose(digits.std.double(), pixels.std(correction=0).view(1), atol=1e-6)
    images, _ = digits.split("train")
    assert abs(float(images.mean())) < 1e-4
    assert abs(float(images.std()) - 1) < 1e-3

def test_each_colour_has_its_own_mean_and_deviation():
    images = torch.randint(256, (7, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[..., 1] //= 2
    mean, std = module._moments(images)
    pixels = images.double().flatten(0, 2) / 255
    assert torch.allclose(mean.double(), pixels.mean(0), atol=1e-6)
    assert torch.allclose(std.double(), pixels.std(0, correction=0), atol=1e-6)


def test_an_epoch_visits_every_image_once_in_another_order_each_time(digits):
    batches = ImageData(batch_size=64, device="cpu").batches("train")
    first = [labels for _, labels in batches]
    second = [labels for _, labels in batches]
    assert len(first) == len(batches)
    assert all(len(labels) == 64 for labels in first)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    batches.set_epoch(0)
    assert torch.equal(torch.cat(first), torch.cat([labels for _, labels in batches]))

def test_batches_of_another_seed_come_in_another_order(digits):
    orders = [torch.cat([labels for _, labels in module.Batches(*digits._tensors["train"], digits.mean, digits.std, 64, True,
                                                                seed=seed)]) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_a_shuffled_epoch_of_fewer_images_than_a_batch_is_one_batch(digits):
    batches = digits.first(10).batches("train")
    assert [len(labels) for _, labels in batches] == [10]
    assert len(batches) == 1


def test_ordered_training_images_are_not_augmented():
    data = ImageData(augment=module.AUGMENTATIONS, device="cpu")
    images = torch.cat([x for x, _ in data.batches("train", shuffle=False)])
    assert torch.equal(images, data.split("train")[0])


def test_loaders_of_a_trainer_are_those_of_their_splits(digits):
    for loader, split in ((digits.train_dataloader, "train"), (digits.val_dataloader, "validation"),
                          (digits.test_dataloader, "test")):
        assert torch.equal(loader().images, digits._tensors[split][0])
        assert loader().shuffle == (split == "train")


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch_without_an_image_twice(monkeypatch, shuffle):
    images, labels, one = torch.zeros(11, 2, 2, 1, dtype=torch.uint8), torch.arange(11), torch.ones(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        batches = module.Batches(images, labels, one, one, 2, shuffle)
        drawn.append([some.tolist() for _, some in batches])
        assert len(drawn[-1]) == len(batches)
    seen = [label for share in drawn for batch in share for label in batch]
    assert len(set(seen)) == len(seen)
    if shuffle:  # as many batches for each, so that none waits for the others
        assert {len(share) for share in drawn} == {1}
    else:
        assert sorted(seen) == list(range(11))


def test_ordered_batches_hold_the_whole_split_unaugmented(digits):
    images = torch.cat([x for x, _ in digits.batches("validation", batch_size=50)])
    assert torch.equal(images, digits.split("validation")[0])


@settings(max_examples=20, deadline=None)
@given(side=st.integers(6, 16), channels=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
def test_every_augmented_image_is_a_shifted_perhaps_mirrored_original(side, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (3, side, side, channels), generator=generator, dtype=torch.uint8)
    pad = max(1, side // 8)
    for original, result in zip(images, augment(images, ("crop", "flip"), generator), strict=True):
        candidates = []
        for version in (original, original.flip(1)):
            padded = torch.nn.functional.pad(version, (0, 0, pad, pad, pad, pad))
            candidates += [padded[i : i + side, j : j + side] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        assert any(torch.equal(result, candidate) for candidate in candidates)

def test_crops_and_flips_are_drawn_evenly_and_for_each_image_alone():
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), -1).to(torch.uint8)
    images = places.expand(4000, -1, -1, -1)
    shifts = augment(images, ("crop",), generator)[:, 8, 8].long() - 8
    rows, columns = shifts.unbind(1)
    counts = torch.bincount(5 * (rows + 2) + columns + 2, minlength=25)  # two pixels either way
    assert int((counts - 160).abs().max()) < 4 * 160**0.5
    mirrored = augment(images, ("flip",), generator)[:, 0, 0, 1] == 15
    assert abs(int(mirrored.sum()) - 2000) < 4 * 1000**0.5


def test_cutout_hides_one_square_of_half_the_side():
    generator = torch.Generator().manual_seed(0)
    images = torch.full((200, 32, 32, 3), 7, dtype=torch.uint8)
    hidden = (augment(images, ("cutout",), generator) == 0)[..., 0]
    assert int(hidden.sum((1, 2)).max()) == 16 * 16
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), rows * columns)
    assert int(rows.min()) >= 8


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 0}, "batch_size=0"), ({"validation": 1.0}, "validation=1.0"),
    ({"augment": ("rotate",)}, "unknown augmentation rotate: use crop, flip, cutout")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**options)


def test_unknown_split_is_refused(digits):
    with pytest.raises(ValueError, match="unknown split 'valid': use one of train, validation, test"):
        digits.batches("valid")


def test_gzip_is_not_mistaken_for_npz(nowhere):
    (nowhere / "mine").mkdir()
    (nowhere / "mine" / "mnist.npz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="is damaged or not an npz file"):
        ImageData("mnist")
