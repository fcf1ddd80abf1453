"""Small chapters that do without torch, so that what runs chapters can be tested in seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_chapters import write_chapter

from fishlib.rerun import chapters


@pytest.fixture
def chapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a chapter of the given cells into a folder of its own."""
    return lambda *cells, name="10_small", **more: write_chapter(tmp_path / "book" / f"{name}.ipynb", *cells, **more)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of `_build`."""
    monkeypatch.setattr(chapters, "BUILD", tmp_path / "_build")
    return tmp_path / "_build"


@pytest.fixture
def command() -> Callable[..., subprocess.Popen]:
    """Starts `fishlib` in a process of its own, which is ended with the test."""
    started: list[subprocess.Popen] = []

    def start(*words: Any, **options: Any) -> subprocess.Popen:
        # A shell starts what it runs in the background with Ctrl-C ignored, which the command would inherit.
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
                   "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)} | options
        process = subprocess.Popen([sys.executable, "-m", "fishlib.rerun.cli", *map(str, words)], **options,
                                   env=os.environ | {"PYTHONPATH": str(chapters.PACKAGE.parent)})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
