"""What the tests of this folder share beside their fixtures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import nbformat.v4 as v4

PARAMETERS = '''seed = 0  # of every generator [0 .. 1000]
strength = 0.5  # weight of the penalty [0 .. 10]
dataset = "digits"  # data set [digits | mnist | a folder]
sizes = [30, 10]  # units of the hidden layers
'''
RECORD = '''from fishlib.notebook import record

record("accuracy", 0.9 + strength / 100 + seed / 1000)
'''


def write_chapter(path: Path, *cells: str, text: str = "# A chapter") -> Path:
    """A chapter that records `accuracy` and then runs `cells`."""
    parameters = v4.new_code_cell(PARAMETERS)
    parameters.metadata["tags"] = ["parameters"]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(text), parameters, v4.new_code_cell(RECORD),
                                      *map(v4.new_code_cell, cells)])
    # The same file for the same content: cell identifiers are random otherwise.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The condition's value as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds} s")


def raising(trouble: BaseException) -> Callable[..., Any]:
    """A function that raises it, whatever it is called with."""
    def fail(*args: Any, **options: Any) -> Any:
        raise trouble
    return fail


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
