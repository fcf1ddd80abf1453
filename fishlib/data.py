"""Image data sets as tensors on the training device.

``ImageData`` keeps a whole data set as one ``uint8`` tensor where the network trains, and draws shuffled, augmented
batches there: no worker processes, no copies. Images come from ``<name>.npz`` in ``FISHLIB_DATA`` or ``data/cache/``, or
once from torchvision, which writes that file.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as L
import torch
from torch import Tensor

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"
NAMES = ("digits", "mnist", "cifar10", "cifar100", "svhn")
SPLITS = ("train", "validation", "test")
AUGMENTATIONS = ("crop", "flip", "cutout")
DEFAULT_AUGMENTATION = {"cifar10": ("crop", "flip"), "cifar100": ("crop", "flip"), "svhn": ("crop",)}
FINGERPRINTS = {
    ("mnist", "train"): "54e1ab866c9484947dd4821c52bb7a43938f555d6b046be6af55247f8e6ffc64",
    ("mnist", "test"): "97b756d55950f1841ebd48df7379b9b2fc87a10d63e08d6213dad41d564e8508",
    ("cifar10", "train"): "6a3b2c04d0a79ce272dcdacaf0bc440275db5a8cbe3717521a28fada2ea0d2ed",
    ("cifar10", "test"): "65a6ffe079453e514083f99356b35e02cbfd581b4951e3937fae188974b79f39",
    ("cifar100", "train"): "640c97a4012a8aebfcaf57fd82a33dd43b37d2e397a02cb9b0a3d89e6d6d936d",
    ("cifar100", "test"): "a6a97df7b61bc7420bc44268696e8963d33129bc050978f2a63d8fe3420989fa",
}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """sha256 over the sorted sha256 digests of each image's bytes followed by its label byte.

    It does not depend on the order of the images.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W) or (N, H, W, C)
    labels : integer array, shape (N,), values below 256
    """
    rows = np.column_stack([images.reshape(len(images), -1), labels.astype(np.uint8)])
    digests = sorted(hashlib.sha256(row).digest() for row in np.ascontiguousarray(rows))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def find(name: str) -> Path | None:
    """The file ``<name>.npz`` in the folder ``FISHLIB_DATA``, else in ``data/cache/``; None when neither has it."""
    folders = [Path(os.environ["FISHLIB_DATA"])] if os.environ.get("FISHLIB_DATA") else []
    return next((folder / f"{name}.npz" for folder in [*folders, CACHE] if (folder / f"{name}.npz").is_file()), None)


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """``train_images``, ``train_labels``, ``test_images``, ``test_labels``, ``classes`` and ``fingerprint``.

    Images are uint8 (N, H, W) or (N, H, W, C), as in torchvision, labels integers from 0 on (N,). ``digits`` is bundled with
    scikit-learn; ``mnist``, ``cifar10``, ``cifar100`` and ``svhn`` are looked for on disk and else downloaded once; any other
    name is a folder of images with one folder a class, optionally below ``train`` and ``test``. Folders and files whose name
    begins with a dot are passed over; of 16-bit grey images the upper 8 bits are taken; where one image of a folder is
    coloured, grey ones get three equal channels.

    Raises
    ------
    ValueError
        unknown name; a damaged, incomplete or altered file; labels that are not integers from 0 to below the number of
        classes; images of several sizes, or of other numbers than 8 or 16 bits; a folder with one class only, or with too
        few images to set a fifth of each class apart for testing
    FileNotFoundError
        a folder without class folders, or a class folder without images
    ConnectionError
        no file on disk, and no network
    """
    if name == "digits":
        return _checked(name, _digits(), "scikit-learn")
    if name in NAMES:
        path = find(name)
        return _download(name) if path is None else _checked(name, _read(path), path)
    if Path(name).is_dir():
        return _checked(name, _folder(Path(name)), name)
    raise ValueError(f"unknown data set {name!r}: use one of {', '.join(NAMES)}, or the path of a folder of images "
                     "with one folder a class (no such folder exists)")


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return _with_test_split(images, digits.target, np.array([str(c) for c in range(10)]))


def _with_test_split(images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """A fifth of each class for testing: always the same images, whatever the seed of an experiment."""
    rest, test = _stratified(labels, test_size=0.2, seed=0)
    return {"train_images": images[rest], "train_labels": labels[rest],
            "test_images": images[test], "test_labels": labels[test], "classes": classes}


def _read(path: Path) -> dict[str, np.ndarray]:
    remedy = f"delete {path} and load the data again, or put a whole file in its place"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise ValueError(f"{path} is damaged or not an npz file ({error}): {remedy}") from error
    if missing := [key for key in ARRAYS if key not in arrays]:
        raise ValueError(f"{path} lacks the arrays {', '.join(missing)}: {remedy}")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != (len(images),) or not len(images):
            raise ValueError(f"{path}: {split}_images has to be uint8 (N, H, W) or (N, H, W, C) with N labels, found "
                             f"{images.dtype} {images.shape} and labels {labels.shape}: {remedy}")
        whole = np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.min() < 0:
            raise ValueError(f"{path}: {split}_labels have to be integers that number the classes from 0 on, found "
                             f"{labels.min() if whole else labels.dtype}: {remedy}")
    arrays.setdefault("classes", np.array([str(c) for c in range(int(arrays["train_labels"].max()) + 1)]))
    return arrays


def _checked(name: str, arrays: dict[str, np.ndarray], origin: Path | str) -> dict[str, np.ndarray]:
    _check_splits(arrays, origin)
    found = {split: fingerprint(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")}
    for split, value in found.items():
        expected = FINGERPRINTS.get((name, split), value)
        if expected != value:
            raise ValueError(f"{origin} is not the {split} split of {name}: fingerprint {value[:12]}..., expected "
                             f"{expected[:12]}...; the file was altered or holds other data: delete it and load again")
    return arrays | {"fingerprint": hashlib.sha256("".join(found.values()).encode()).hexdigest()}


def _check_splits(arrays: dict[str, np.ndarray], origin: Path | str) -> None:
    """Refuse splits whose images differ in shape, and labels beyond the classes."""
    train, test = ((*arrays[f"{split}_images"].shape[1:], 1)[:3] for split in ("train", "test"))
    if train != test:
        raise ValueError(f"{origin}: training images are {train} (height, width, channels), but test images {test}: bring all "
                         "images to one size and number of channels")
    for split in ("train", "test"):
        largest, last = arrays[f"{split}_labels"].max(), len(arrays["classes"]) - 1
        if largest > last:
            raise ValueError(f"{origin}: {split}_labels go up to {largest}, but the classes are 0 to {last}: leave images of "
                             "other classes out, or have training images and a name for each class")


def _download(name: str) -> dict[str, np.ndarray]:
    target = CACHE / f"{name}.npz"
    try:
        with _archives_stay_inside():
            arrays = from_torchvision(name, CACHE / "torchvision", download=True)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        looked = [os.environ["FISHLIB_DATA"]] if os.environ.get("FISHLIB_DATA") else []
        raise ConnectionError(
            f"{name}.npz is not in {' or '.join([*looked, str(CACHE)])} and could not be downloaded "
            f"({' '.join(str(error).split())}): connect to the network once, or put {name}.npz into a folder and set "
            "FISHLIB_DATA to it"
        ) from error
    arrays = _checked(name, arrays, f"the download of {name}")
    _write(target, {key: arrays[key] for key in (*ARRAYS, "classes")})
    return arrays


@contextmanager
def _archives_stay_inside() -> Iterator[None]:
    """Refuse members that lead outside the folder into which torchvision unpacks a download, which it does unasked."""
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _write(target: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = target.with_name(f"{target.stem}.{os.getpid()}.part.npz")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.savez(partial, **arrays)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def from_torchvision(name: str, root: Path, download: bool = False) -> dict[str, np.ndarray]:
    """The arrays of `load_arrays` from torchvision's own files below `root`."""
    from torchvision import datasets

    if name == "svhn":
        parts = {split: datasets.SVHN(root / name, split=split, download=download) for split in ("train", "test")}
        arrays = {f"{split}_images": part.data.transpose(0, 2, 3, 1) for split, part in parts.items()}
        arrays |= {f"{split}_labels": part.labels for split, part in parts.items()}
        classes = [str(c) for c in range(10)]
    else:
        kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        parts = {split: kind(root, train=split == "train", download=download) for split in ("train", "test")}
        arrays = {f"{split}_images": np.asarray(part.data) for split, part in parts.items()}
        arrays |= {f"{split}_labels": np.asarray(part.targets) for split, part in parts.items()}
        classes = parts["train"].classes
    return {key: np.ascontiguousarray(value, dtype=np.uint8) for key, value in arrays.items()} | {
        "classes": np.array(classes)}


def _folder(root: Path) -> dict[str, np.ndarray]:
    if not (root / "train").is_dir():
        images, labels, classes = _class_folders(root)
        _refuse_one_class(root, classes)
        return _folder_with_test_split(root, images, labels, classes)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        images, labels, classes = _class_folders(root / split)
        if list(classes) != list(arrays.setdefault("classes", classes)):
            raise FileNotFoundError(f"{root / split} has the class folders {', '.join(classes)}, but {root / 'train'} "
                                    f"has {', '.join(arrays['classes'])}: both need the same")
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    arrays["train_images"], arrays["test_images"] = _of_one_kind([arrays["train_images"], arrays["test_images"]])
    _refuse_one_class(root / "train", arrays["classes"])
    return arrays


def _of_one_kind(images: list[np.ndarray]) -> list[np.ndarray]:
    """Grey images, or arrays of them, with three equal channels where any of the others are coloured."""
    coloured = max(one.ndim for one in images)
    return [one if one.ndim == coloured else np.repeat(one[..., None], 3, axis=-1) for one in images]


def _refuse_one_class(root: Path, classes: np.ndarray) -> None:
    if len(classes) == 1:
        raise ValueError(f"{root} has one class only ({classes[0]}): two folders or more are needed, one a class")


def _folder_with_test_split(root: Path, images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    try:
        return _with_test_split(images, labels, classes)
    except ValueError as error:
        counts = np.bincount(labels, minlength=len(classes))
        few = [f"{name} {count}" for name, count in zip(classes, counts, strict=True) if count < 5]
        raise ValueError(f"{root}: a fifth of each class cannot be set apart for testing (images: {', '.join(few[:10])}"
                         f"{', ...' if len(few) > 10 else ''}): have five images or more a class, or put class folders below "
                         "train and test") from error


def _class_folders(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    try:
        listing = _listing(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} has to hold one folder a class with images in each: {error}") from error
    arrays: list[np.ndarray] = []
    for path, _ in listing.samples:
        try:
            with Image.open(path) as image:
                mode = "L" if image.mode in ("1", "L") or image.mode.startswith("I;16") else "RGB"
                arrays.append(np.asarray(_of_8_bits(image, path).convert(mode)))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is not a readable image ({error}): replace or remove it") from error
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            raise ValueError(f"{path} is {arrays[-1].shape[:2]} pixels (height, width), but {listing.samples[0][0]} is "
                             f"{arrays[0].shape[:2]}: bring all images to one size")
    return np.stack(_of_one_kind(arrays)), np.array(listing.targets), np.array(listing.classes)


def _listing(root: Path) -> Any:
    """torchvision's list of the images below `root`, without what programs leave there under names that begin with a dot."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

    class Listing(ImageFolder):
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            classes = [name for name in find_classes(directory)[0] if not name.startswith(".")]
            if not classes:
                raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
            return classes, {name: number for number, name in enumerate(classes)}

    def shown(path: str) -> bool:
        inside = Path(path).relative_to(root).parts
        return path.lower().endswith(IMG_EXTENSIONS) and not any(part.startswith(".") for part in inside)

    return Listing(str(root), is_valid_file=shown)


def _of_8_bits(image: Any, path: str) -> Any:
    """The image, a 16-bit grey one as the upper 8 bits: Pillow would clip it at 255, so that nearly all of it is white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"{path} holds {kind}, whose black and white nobody has said: save it with 8 or 16 bits, as PNG")
    return image


def _stratified(labels: np.ndarray, test_size: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(labels)), test_size=test_size, random_state=seed, stratify=labels)


def _limited(labels: np.ndarray, limit: int | None, seed: int, name: str) -> np.ndarray:
    # In random order: files may be sorted by class, and the first images of a split stand for all of it.
    if limit is None or limit >= len(labels):
        return np.random.default_rng(seed).permutation(len(labels))
    present, counts = np.unique(labels, return_counts=True)
    if limit < len(present):
        raise ValueError(f"{name}={limit} is below the number of classes: use at least {len(present)}")
    if len(labels) - limit < len(present):
        return np.random.default_rng(seed).permutation(len(labels))[:limit]
    if counts.min() < 2:
        raise ValueError(f"{name}={limit} takes a share of each class, but class {present[counts.argmin()]} has a single "
                         "image: have two or more, or leave the limit out")
    return _stratified(labels, test_size=limit, seed=seed)[1]


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in [0, 1], from the counts of the 256 values: exact, and no large copy."""
    counts = torch.stack([torch.bincount(channel.flatten().int(), minlength=256)
                          for channel in images.unbind(-1)]).double()
    values = torch.arange(256, device=images.device, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = share @ values.square() - mean.square()
    return mean.float(), variance.clamp_min(1e-6).sqrt().float()


class Batches:
    """Batches of a split, in order, or shuffled and augmented anew in every epoch.

    Epoch `e` of seed `s` is always the same sequence, also after a resume. With `torch.distributed` initialised each rank
    draws its own share of every shuffled epoch, and its own stretch of an ordered one.

    Parameters
    ----------
    images : uint8 tensor, shape (N, H, W, C)
    labels : int64 tensor, shape (N,)
    mean, std : float tensors, shape (C,), of pixel values in [0, 1]
    augment : names out of `AUGMENTATIONS`; applied only when shuffling
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, batch_size: int,
                 shuffle: bool = False, augment: tuple[str, ...] = (), seed: int = 0):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.batch_size, self.shuffle, self.augment, self.seed = batch_size, shuffle, augment, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; each iteration moves on by one."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = len(self._share(torch.arange(len(self.labels))))
        return size // self.batch_size if self._drops_last(size) else -(-size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self.images.device)
        generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        device, count = self.images.device, len(self.labels)
        self.epoch += self.shuffle
        order = torch.randperm(count, generator=generator, device=device) if self.shuffle else None
        order = self._share(torch.arange(count, device=device) if order is None else order)
        stop = len(self) * self.batch_size
        for chosen in order[:stop].split(self.batch_size):
            images = self.images[chosen]
            if self.shuffle and self.augment:
                images = augment(images, self.augment, generator)
            yield self._standardised(images), self.labels[chosen]

    def _standardised(self, images: Tensor) -> Tensor:
        scaled = images.to(torch.float32).sub_(255 * self.mean).div_(255 * self.std)
        return scaled.permute(0, 3, 1, 2).contiguous()

    def _drops_last(self, size: int) -> bool:
        # A last batch of another size would weigh its images more, and recompile a compiled network.
        return self.shuffle and size >= self.batch_size

    def _share(self, order: Tensor) -> Tensor:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return order
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # Ranks that draw batches together need the same number of them.
        return order[: len(order) // ranks * ranks][rank::ranks] if self.shuffle else order[rank::ranks]


def augment(images: Tensor, kinds: tuple[str, ...], generator: torch.Generator, padding: int | None = None) -> Tensor:
    """Random crop after zero padding, horizontal flip and Cutout, drawn for each image, as batched tensor operations.

    Parameters
    ----------
    images : tensor, shape (N, H, W, C)
    kinds : names out of `AUGMENTATIONS`
    generator : source of randomness on the images' device
    padding : int, optional
        pixels of the crop's shift at most; an eighth of the side by default (4 of 32)

    Notes
    -----
    Cutout's square has half the side (16 of 32) and is centred anywhere, so that it may hang over the edge [DeVries and
    Taylor 2017].
    """
    n, height, width, _ = images.shape
    device = images.device

    def integers(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    rows = torch.arange(height, device=device).expand(n, height)
    columns = torch.arange(width, device=device).expand(n, width)
    if "flip" in kinds:
        columns = torch.where(integers(2) == 1, width - 1 - columns, columns)
    if "crop" in kinds:
        pad = padding if padding is not None else max(1, height // 8)
        images = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
        rows, columns = rows + integers(2 * pad + 1), columns + integers(2 * pad + 1)
    images = images[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if "cutout" in kinds:
        top, left, half = integers(height), integers(width), max(1, height // 4)
        hidden_rows = (torch.arange(height, device=device) - top + half).floor_divide(2 * half) == 0
        hidden_columns = (torch.arange(width, device=device) - left + half).floor_divide(2 * half) == 0
        images = images.masked_fill((hidden_rows[:, :, None] & hidden_columns[:, None, :])[..., None], 0)
    return images


class ImageData(L.LightningDataModule):
    """A data set as tensors on the training device, with stratified, seeded splits.

    The images of each split are in random order, whatever their order in the file, so its first images stand for all.

    Parameters
    ----------
    name : one of `NAMES`, or the path of a folder of images with one folder a class
    batch_size : images a training batch
    validation : share of the training images that is set apart for validation
    limit : stratified subset of so many training images (validation included); None takes all
    test_limit : the same for the test images, whatever the seed
    seed : of the validation split, the subset and the batches; the test split never depends on it
    augment : names out of `AUGMENTATIONS`, or one of them; None takes the data set's usual ones (crop and flip for CIFAR)
    device : "auto" takes the GPU where there is one

    Attributes
    ----------
    shape : (C, H, W)
    classes : names of the classes
    fingerprint : content of train and test split, whatever their order

    Examples
    --------
    >>> data = ImageData("digits", batch_size=64)
    >>> images, labels = next(iter(data.batches("train")))
    >>> images.shape
    torch.Size([64, 1, 8, 8])
    """

    def __init__(self, name: str = "digits", batch_size: int = 128, validation: float = 0.1, limit: int | None = None,
                 test_limit: int | None = None, seed: int = 0, augment: str | tuple[str, ...] | None = None,
                 device: str | torch.device = "auto"):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use at least 1")
        if not 0 < validation < 1:
            raise ValueError(f"validation={validation}: use a share between 0 and 1, such as 0.1")
        self.name, self.batch_size, self.seed = str(name), batch_size, seed
        augment = DEFAULT_AUGMENTATION.get(self.name, ()) if augment is None else augment
        self.augment = (augment,) if isinstance(augment, str) else tuple(augment)
        if unknown := set(self.augment) - set(AUGMENTATIONS):
            raise ValueError(f"unknown augmentation {', '.join(sorted(unknown))}: use {', '.join(AUGMENTATIONS)}")
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        arrays = load_arrays(self.name)
        self.classes = tuple(str(c) for c in arrays["classes"])
        self.fingerprint = arrays["fingerprint"]
        self._tensors = self._split(arrays, validation, limit, test_limit)
        self.mean, self.std = _moments(self._tensors["train"][0])

    def _split(self, arrays: dict, validation: float, limit: int | None, test_limit: int | None) -> dict:
        train_labels, test_labels = arrays["train_labels"], arrays["test_labels"]
        subset = _limited(train_labels, limit, self.seed, f"{self.name}: limit")
        try:
            train, held_out = _stratified(train_labels[subset], test_size=validation, seed=self.seed)
        except ValueError as error:
            raise ValueError(f"{self.name}: {len(subset)} images cannot be split into training and validation "
                             f"({error}): have more images, or raise limit or validation") from error
        chosen = {"train": ("train", subset[train]), "validation": ("train", subset[held_out]),
                  "test": ("test", _limited(test_labels, test_limit, 0, f"{self.name}: test_limit"))}
        return {split: self._tensor(arrays[f"{source}_images"][index], arrays[f"{source}_labels"][index])
                for split, (source, index) in chosen.items()}

    def _tensor(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        images = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(images).to(self.device), torch.from_numpy(labels.astype(np.int64)).to(self.device)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self._tensors["train"][0].shape[1:]
        return channels, height, width

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return len(self._of(split)[1])

    def first(self, count: int) -> ImageData:
        """The same data with only the first `count` training images, which are in random order; the other splits stay."""
        if not 1 <= count <= self.size("train"):
            raise ValueError(f"first({count}): {self.name} has 1 to {self.size('train')} training images here")
        fewer = copy.copy(self)
        fewer._tensors = self._tensors | {"train": tuple(part[:count] for part in self._tensors["train"])}
        return fewer

    def split(self, split: str) -> tuple[Tensor, Tensor]:
        """A whole split: standardised float32 images (N, C, H, W) and int64 labels (N,)."""
        images, labels = self._of(split)
        return self.batches(split)._standardised(images), labels

    def batches(self, split: str, batch_size: int | None = None, shuffle: bool | None = None) -> Batches:
        """Batches of a split: "train" shuffled and augmented with this data's batch size, the others in order.

        With ``shuffle=False`` the training images, too, come in order and without augmentation. What comes in order comes
        `batch_size` at a time, by default 1,024 and on a CPU fewer.
        """
        images, labels = self._of(split)
        if batch_size is None:
            # The maps of a layer should stay in a CPU's caches: for ResNet-20 128 images at a time are faster than 1,024.
            batch_size = max(128, 2**18 // math.prod(images.shape[1:])) if images.device.type == "cpu" else 1024
        shuffle = split == "train" if shuffle is None else shuffle
        return Batches(images, labels, self.mean.to(images.device), self.std.to(images.device),
                       self.batch_size if shuffle else batch_size, shuffle, self.augment, self.seed)

    def _of(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        return self._tensors[split]

    def train_dataloader(self) -> Batches:
        return self.batches("train")

    def val_dataloader(self) -> Batches:
        return self.batches("validation")

    def test_dataloader(self) -> Batches:
        return self.batches("test")
