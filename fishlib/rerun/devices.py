"""One device a run: each run on a machine holds a GPU of its own, whoever started it and through whichever worker."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def available() -> list[str]:
    """The GPUs of this machine that CUDA may use, as CUDA_VISIBLE_DEVICES names them; found without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(gpus))] if listing.returncode == 0 else []


@contextmanager
def held(names: list[str] | None = None, folder: Path | None = None) -> Iterator[str]:
    """Wait for a free device and hold it; other processes of this machine that ask here get another one.

    The operating system gives the device back when the process ends, however it ends.

    Raises
    ------
    ValueError
        there is no device to hold
    """
    names = available() if names is None else names
    if not names:
        raise ValueError("a device for each run was asked for, but this machine shows no GPU: "
                         "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    while True:
        for name in names:
            handle = _open(folder / f"fishlib-device-{name.replace('/', '-')}.lock")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            try:
                yield name
            finally:
                os.close(handle)
            return
        time.sleep(0.2)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)  # another user made it; a lock needs no more than reading
