"""Chapters re-executed in place: outputs as they are now, without what changes from run to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fishlib.rerun import chapters
from fishlib.rerun.run import Run, with_outputs, write

LARGE = 400_000  # characters: an output beyond is left out of the repository
VOLATILE = ("papermill", "execution", "ExecuteTime", "widgets", "collapsed", "scrolled")


def renew(run: Run) -> bool:
    """Take the outputs of a finished run over into its chapter; whether the file changed."""
    import nbformat

    renewed = strip(with_outputs(chapters.read(run.chapter), chapters.read(run.notebook), injected=False))
    text = nbformat.writes(renewed)
    text = text if text.endswith("\n") else text + "\n"
    if text == Path(run.chapter).read_text(encoding="utf-8"):
        return False
    write(run.chapter, text)
    return True


def strip(notebook: Any) -> Any:
    """Remove, in place, what two runs of the same chapter do not share.

    Times, kernel versions, papermill's metadata and the provenance table go; so do the outputs of cells tagged
    `nbval-ignore-output` (measured times, for instance) and those that are too large for a repository.
    """
    for part in (notebook, *notebook.cells):
        for name in VOLATILE:
            part.metadata.pop(name, None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
            cell.outputs = [] if ignored else [output for output in _joined(cell.outputs) if _lasting(output)]
    return notebook


def _lasting(output: Any) -> bool:
    return "provenance" not in output.get("metadata", {}).get("fishlib", {}) and len(json.dumps(output)) <= LARGE


def _joined(outputs: list[Any]) -> list[Any]:
    """Printed text in one piece: where a kernel cuts it depends on the moment."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined
