"""Training and evaluating a classifier, on PyTorch Lightning."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import ImageData

OPTIMIZERS = {
    "sgd": lambda net, lr, decay: torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay),
    "adam": lambda net, lr, decay: torch.optim.Adam(net.parameters(), lr, weight_decay=decay),
    "adamw": lambda net, lr, decay: torch.optim.AdamW(net.parameters(), lr, weight_decay=decay),
}
LEARNING_RATES = {"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3}
SCHEDULES = ("onecycle", "step", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats, accuracy as a fraction with its binomial standard error, and the number of images."""

    loss: float
    accuracy: float
    samples: int

    @property
    def standard_error(self) -> float:
        """sqrt(a (1 - a) / n) of the accuracy a over n images."""
        return (self.accuracy * (1 - self.accuracy) / self.samples) ** 0.5


@torch.no_grad()
def evaluate(net: nn.Module, data: ImageData, split: str = "validation",
             batch_size: int | None = None) -> Evaluation:
    """Loss and accuracy of `net` in evaluation mode on a split of `data`; the network's modes are restored.

    Raises
    ------
    ValueError
        a network that gives no logits (images, classes), or fewer of them than there are classes
    """
    device = next((p.device for p in net.parameters()), data.device)
    loss, correct, samples = 0.0, 0, 0
    with evaluation_mode(net):
        for images, labels in data.batches(split, batch_size, shuffle=False):
            logits, labels = net(images.to(device)), labels.to(device)
            _check_outputs(logits, data)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            samples += len(labels)
    return Evaluation(loss / samples, correct / samples, samples)


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode; every module's own mode comes back at the end, also after an exception."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield net.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


class Classifier(L.LightningModule):
    """A network with its loss, optimizer and schedule; `history` gains one row an epoch."""

    def __init__(self, net: nn.Module, optimizer: str | Callable, lr: float | None, schedule: str, weight_decay: float,
                 label_smoothing: float, penalty: Any, seed: int, channels_last: bool, compiled: bool):
        super().__init__()
        self.net = _channels_last(net) if channels_last else net
        # Kept out of the module tree: a compiled network's parameters are the same ones under other names.
        object.__setattr__(self, "run_net", torch.compile(self.net) if compiled else self.net)
        self.optimizer, self.lr, self.schedule, self.weight_decay = optimizer, lr, schedule, weight_decay
        self.label_smoothing, self.penalty, self.seed, self.channels_last = label_smoothing, penalty, seed, channels_last
        self.history: list[dict[str, float]] = []

    def on_train_epoch_start(self) -> None:
        # Here and not before: callbacks may freeze and thaw layers when the training starts.
        if not any(parameter.requires_grad for parameter in self.net.parameters()):
            raise ValueError("all parameters of the network are frozen: call net.requires_grad_(True), or that of the layers "
                             "that should be trained")
        # Dropout and penalties draw from the global generators: the epoch sets them, so a resumed run draws the same.
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)
        self.trainer.train_dataloader.set_epoch(self.current_epoch)
        self.began = time.perf_counter()
        self.sums = torch.zeros(3, device=self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self._logits(images)
        if not index:
            _check_outputs(logits, self.trainer.datamodule)
        loss = self.criterion(logits, labels)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])
        if hasattr(self.penalty, "objective"):
            return self.penalty.objective(self.net, images, labels, logits, self.criterion)
        return loss if self.penalty is None else loss + self.penalty(self.net, images, labels, logits)

    def _logits(self, images: Tensor) -> Tensor:
        try:
            return self.run_net(images)
        except RuntimeError as error:
            # A float64 network that converts its images itself is none of a wrong type.
            if "type" in str(error) and any(p.dtype == torch.float64 for p in self.net.parameters()):
                raise ValueError(f"the network is float64: call .float(), the images are float32 ({error})") from error
            raise

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = torch.zeros(3, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self.net(images)
        loss, correct = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
        self.validation_sums += torch.stack([loss, correct, torch.full_like(loss, len(labels))])

    def on_validation_epoch_end(self) -> None:
        # Here and not at the end of the training epoch, where callbacks come first: a checkpoint holds this row.
        loss, accuracy = self._means(self.sums)
        if not torch.isfinite(torch.tensor(loss)):
            rate = self.trainer.optimizers[0].defaults["lr"] if self.lr is None else self.lr
            raise FloatingPointError(f"the training loss became {loss} in epoch {self.current_epoch + 1}: lower the "
                                     f"learning rate ({rate:g})")
        validation_loss, validation_accuracy = self._means(self.validation_sums)
        self.history.append({
            "epoch": self.current_epoch + 1, "train_loss": loss, "train_accuracy": accuracy,
            "validation_loss": validation_loss, "validation_accuracy": validation_accuracy,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"], "seconds": time.perf_counter() - self.began})

    def _means(self, sums: Tensor) -> tuple[float, float]:
        loss, correct, samples = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return loss / samples, correct / samples

    def configure_optimizers(self) -> dict[str, Any]:
        if callable(self.optimizer):
            optimizer = self.optimizer(self.net)
        else:
            optimizer = OPTIMIZERS[self.optimizer](self.net, self.lr, self.weight_decay)
        if self.schedule == "constant":
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches
        if self.schedule == "onecycle":
            momentum = any(name in optimizer.defaults for name in ("momentum", "betas"))
            highest = [group["lr"] for group in optimizer.param_groups] if self.lr is None else self.lr
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, steps, cycle_momentum=momentum)
        else:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]


class Checkpoint(L.Callback):
    """Writes the whole state of a run to `path` after every epoch, atomically."""

    def __init__(self, path: Path, conditions: dict[str, Any]):
        self.path, self.conditions = path, conditions

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["conditions"] = self.conditions

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def fit(net: nn.Module, data: ImageData, *, epochs: int = 10, optimizer: str | Callable = "adam",
        lr: float | None = None, schedule: str = "onecycle", weight_decay: float = 0.0, label_smoothing: float = 0.0,
        penalty: Any = None, callbacks: Sequence[L.Callback] = (), precision: str = "auto", compiled: bool = False,
        checkpoint: str | Path | None = None, devices: int | str = 1, seed: int = 0,
        progress: bool | None = None) -> tuple[nn.Module, pd.DataFrame]:
    """Train a copy of `net` on the training split of `data`.

    The given network, and every random generator, stay as they are; the copy is trained in training mode, whatever the
    mode of the network. The same seed on the same machine gives the same result to the last bit on a CPU.

    Parameters
    ----------
    net : maps images (N, C, H, W) to logits (N, classes)
    epochs : passes over the training split
    optimizer : "sgd" (Nesterov momentum 0.9), "adam", "adamw", or a function from the network to a torch optimizer
    lr : learning rate, the highest one under "onecycle"; by default 0.1 for SGD and 0.003 for Adam. Beside a function it is
        taken under "onecycle" alone, and by default each parameter group has its own
    schedule : "onecycle" [Smith 2018], "step" (a tenth after a half and again after three quarters), or "constant"
    weight_decay : coupled for "sgd" and "adam", decoupled for "adamw"; a function has its own
    label_smoothing : share of the target that is spread over all classes
    penalty : a term added to the loss, called as ``penalty(net, images, labels, logits)``; or, where it has a method
        ``objective(net, images, labels, logits, criterion)``, what takes the place of the loss
        ``criterion(logits, labels)``. A Lightning callback too if it has to see more of the training
    callbacks : Lightning callbacks
    precision : "auto" takes bfloat16 where the device gains from it (CUDA, CPUs with AMX or AVX512-BF16), else float32
    compiled : train through ``torch.compile``
    checkpoint : file that is rewritten after each epoch; where it exists, the run goes on from it to the same result. It
        belongs to one network with its weights, data, settings, penalty and this library's callbacks; functions
        are known by their names
    devices : number of devices, as for Lightning's trainer
    seed : of batches, augmentation and dropout
    progress : a progress bar; by default in terminals only

    Returns
    -------
    net : the trained copy, in evaluation mode, on the device of `data`
    history : one row an epoch: epoch, train_loss, train_accuracy, validation_loss, validation_accuracy, lr, seconds

    Raises
    ------
    ValueError
        an unknown name, fewer than one epoch, a penalty that is none, a rate or a decay that a function for the optimizer would
        not take, a network with fewer outputs than classes, of float64 or with all parameters frozen, a checkpoint of a run
        with other settings or of another network, or one for an optimizer that cannot be resumed (`NaturalGradient`)
    FloatingPointError
        the loss is no longer finite
    """
    _check(epochs, optimizer, schedule, precision, penalty)
    _check_function(optimizer, lr, schedule, weight_decay)
    net = copy.deepcopy(net).train()  # Lightning would keep the mode that it finds, and BatchNorm its old statistics
    made = optimizer(copy.deepcopy(net)) if callable(optimizer) else None
    if lr is None and not made:
        lr = LEARNING_RATES[optimizer]
    reduced = precision == "bfloat16" or (precision == "auto" and _gains_from_bfloat16(data.device))
    rate = made.param_groups[0]["lr"] if lr is None else lr
    conditions = {"epochs": epochs, "lr": rate, "schedule": schedule, "weight_decay": weight_decay, "seed": seed,
                  "label_smoothing": label_smoothing, "data": data.fingerprint, "batch_size": data.batch_size,
                  "split": data.seed, "images": data.size("train"), "augment": list(data.augment),
                  "optimizer": _chosen(made) if made else optimizer}
    path = Path(checkpoint) if checkpoint else None
    if path:
        if not getattr(made, "resumable", True):
            raise ValueError(f"{type(made).__name__} does not keep all of its state in a file: leave checkpoint out")
        conditions |= {"network": digest(net.state_dict()), "penalty": _identity(penalty, net),
                       "precision": "bfloat16" if reduced else "float32", "callbacks": _described(callbacks)}
        _check_resumable(path, conditions)
        path.parent.mkdir(parents=True, exist_ok=True)
    channels_last = reduced or data.device.type == "cpu"  # the layout in which convolutions are faster there
    if compiled:
        torch.compiler.reset()  # else torch leaves the ninth network of a class, with other layers than those before, as it is
    module = Classifier(net, optimizer, lr, schedule, weight_decay, label_smoothing, penalty, seed, channels_last, compiled)
    if devices == 1 and data.device.type == "cuda" and data.device.index is not None:
        devices = [data.device.index]  # else Lightning takes the first one
    extra = [penalty] if isinstance(penalty, L.Callback) else []
    saving = [Checkpoint(path, conditions)] if path else []
    with _own_randomness(seed), _quiet():
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="gpu" if data.device.type == "cuda" else "cpu", devices=devices,
            precision="bf16-mixed" if reduced else "32-true", callbacks=[*callbacks, *extra, *saving], logger=False,
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
            enable_progress_bar=_in_terminal() if progress is None else progress, inference_mode=False)
        try:
            trainer.fit(module, data, ckpt_path=path if path and path.exists() else None, weights_only=True)
        except SystemExit as stop:  # Lightning turns Ctrl-C into an exit, which would end a notebook's kernel
            raise KeyboardInterrupt from stop
    return net.to(data.device).eval(), pd.DataFrame(module.history)


def _check_outputs(logits: Any, data: ImageData) -> None:
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2:
        found = f"numbers of shape {shape}" if shape else f"a {type(logits).__name__}"
        raise ValueError(f"the network gives {found}, it has to give logits of shape (images, {data.num_classes})")
    if shape[1] < data.num_classes:
        raise ValueError(f"the network has {shape[1]} outputs, {data.name} has {data.num_classes} classes: use as many")


def _check(epochs: int, optimizer: str | Callable, schedule: str, precision: str, penalty: Any) -> None:
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: use at least 1")
    if penalty is not None and (isinstance(penalty, type) or not (callable(penalty) or hasattr(penalty, "objective"))):
        raise ValueError(f"penalty={penalty!r} is not a penalty: use an object, such as fishlib.penalty.FisherTrace(0.005) or "
                         "fishlib.penalty.named('fisher_trace', 0.005)")
    for name, value, choices in (("optimizer", optimizer, tuple(OPTIMIZERS)), ("schedule", schedule, SCHEDULES),
                                 ("precision", precision, PRECISIONS)):
        if not callable(value) and value not in choices:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")


def _check_function(optimizer: str | Callable, lr: float | None, schedule: str, weight_decay: float) -> None:
    if callable(optimizer) and weight_decay:
        raise ValueError(f"weight_decay={weight_decay} beside a function for the optimizer: give it in the function")
    if callable(optimizer) and lr is not None and schedule != "onecycle":
        raise ValueError(f"lr={lr} beside a function for the optimizer, under {schedule!r}: give it in the function")


def digest(tensors: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the sha256 of names, types, shapes and values: the same for the same weights only."""
    total = hashlib.sha256()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            total.update(f"{name} {value!r}".encode())
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _identity(penalty: Any, net: nn.Module) -> str:
    if hasattr(penalty, "identity"):
        return penalty.identity(net)
    return repr(penalty) if isinstance(penalty, L.Callback) else getattr(penalty, "__qualname__", type(penalty).__name__)


def _described(callbacks: Sequence[L.Callback]) -> list[str]:
    """Of this library's callbacks, which change the training: class and what each was made with, as its attributes tell."""
    own = [one for one in callbacks if type(one).__module__.partition(".")[0] == __package__]
    values = [{name: getattr(one, name, None) for name in inspect.signature(type(one)).parameters} for one in own]
    plain = [{name: value for name, value in of.items() if isinstance(value, bool | int | float | str)} for of in values]
    return [f"{type(one).__qualname__} {of}" for one, of in zip(own, plain, strict=True)]


def _chosen(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's class and its numbers, words and switches; other objects have no name that the next process knows."""
    plain = {name: value for name, value in optimizer.defaults.items() if isinstance(value, bool | int | float | str | tuple)}
    return f"{type(optimizer).__qualname__} {plain}"


def _check_resumable(path: Path, conditions: dict[str, Any]) -> None:
    if not path.exists():
        return
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")["conditions"]
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ValueError(f"{path} is not a checkpoint of this library ({error}): delete it to start anew") from error
    if changed := [f"{key} {found.get(key)} there, {value} here" for key, value in conditions.items()
                   if found.get(key) != value]:
        raise ValueError(f"{path} belongs to a run with other settings ({'; '.join(changed)}): choose another file, or "
                         "delete it to start anew")


def _channels_last(net: nn.Module) -> nn.Module:
    """`net` with its 2-D kernels in that order; ``net.to(memory_format=...)`` refuses networks with 3-D kernels as well."""
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def _gains_from_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _in_terminal() -> bool:
    return sys.stderr.isatty() and "ipykernel" not in sys.modules


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    # All of them: torch.manual_seed sets the generators of each GPU, used or not.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's banners and advice about data loaders do not apply to tensors on the device."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", module="lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
