"""Whether notebooks can be committed: outputs that last, and nothing that changes from run to run.

``python -m fishlib.rerun.check chapters/*.ipynb`` names what is wrong and ends with status 1; it changes no file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fishlib.rerun import chapters
from fishlib.rerun.refresh import LARGE, VOLATILE

SIZE = 2_000_000  # bytes of a notebook
LASTING = {"kernelspec", "language_info"}


def complaints(file: Path) -> list[str]:
    """What keeps a notebook from being committed, one sentence each; empty for one that can be.

    Outputs stay in the repository, for readers see them and tests compare with them, but not their by-products: errors, logs
    and progress bars on standard error, metadata of an execution, outputs and files that are too large, and what a cell tagged
    `nbval-ignore-output` measured. A figure with a caption has its picture, and a cell with outputs has run as it stands.
    """
    notebook = chapters.read(file)
    found = [f"the notebook's metadata hold {name!r}" for name in sorted(set(notebook.metadata) - LASTING)]
    if file.stat().st_size > SIZE:
        found.append(f"it has more than {SIZE:,} bytes")
    for number, cell in enumerate(notebook.cells, 1):
        found += [f"cell {number} has metadata of an execution, {name!r}" for name in VOLATILE if name in cell.metadata]
        found += [f"cell {number} {fault}" for output in cell.get("outputs", []) for fault in _faults(cell, output)]
        if cell.get("outputs") and cell.execution_count is None:
            found.append(f"cell {number} stores outputs without a run number: it was edited after it ran")
        if _lacks_figure(cell):
            found.append(f"cell {number} has the caption of a figure and stores no picture")
    return found


def _faults(cell: dict, output: dict) -> list[str]:
    faults = {
        "ended in an error": output["output_type"] == "error",
        "stores a log: standard error stays out of chapters": output.get("name") == "stderr",
        "stores a progress bar": "\r" in str(output.get("text", "")),
        f"has an output of more than {LARGE:,} characters": len(json.dumps(output)) > LARGE,
        "stores its provenance, which changes from run to run": "provenance" in output.get("metadata", {}).get("fishlib", {}),
        "is tagged nbval-ignore-output and stores an output": "nbval-ignore-output" in cell.metadata.get("tags", [])}
    return [fault for fault, present in faults.items() if present]


def _lacks_figure(cell: dict) -> bool:
    """Whether a reader of the notebook misses a figure, for it did not run or its picture was too large to be kept."""
    captioned = "figure" in cell.metadata.get("mystnb", {}) and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    return captioned and not any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def main(names: list[str]) -> int:
    """Print the complaints of all notebooks; the exit status."""
    found = [f"{name}: {complaint}" for name in names for complaint in complaints(Path(name))]
    if found:
        print(*found, "`fishlib refresh CHAPTER` stores outputs as they should be.", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
