"""The hook before a commit: it passes chapters as they are stored and names each by-product of an execution."""

import nbformat
import pytest
import yaml
from nbformat.v4 import new_output

from fishlib.rerun import chapters, check

CHAPTERS = sorted(chapters.CHAPTERS.glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_as_stored_pass(path):
    assert check.complaints(path) == []


@pytest.mark.parametrize(("output", "named"), [
    (new_output("stream", name="stderr", text="GPU available: False\n"), "stores a log"),
    (new_output("stream", name="stdout", text="10 %\r20 %\n"), "progress bar"),
    (new_output("stream", name="stdout", text="x" * 500_000), "more than 400,000 characters"),
    (new_output("error", ename="ValueError", evalue="no", traceback=[]), "ended in an error"),
    (new_output("display_data", {"text/plain": ""}, metadata={"fishlib": {"provenance": {}}}), "stores its provenance")])
def test_by_products_of_an_execution_are_named_with_their_cell(chapter, output, named, capsys):
    source = chapter("print(1)")
    notebook = nbformat.read(source, 4)
    notebook.cells[-1].outputs = [output]
    nbformat.write(notebook, source)
    assert check.main([str(source)]) == 1
    told = capsys.readouterr().out
    assert f"cell {len(notebook.cells)}" in told
    assert named in told
    assert "fishlib refresh" in told


def test_metadata_of_an_execution_and_measured_outputs_are_named(chapter):
    source = chapter("print(1)")
    notebook = nbformat.read(source, 4)
    notebook.metadata["papermill"] = {}
    notebook.cells[-1].metadata |= {"execution": {}, "tags": ["nbval-ignore-output"]}
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text="3.1 s\n")]
    nbformat.write(notebook, source)
    found = "\n".join(check.complaints(source))
    assert "metadata hold 'papermill'" in found
    assert "metadata of an execution, 'execution'" in found
    assert "is tagged nbval-ignore-output and stores an output" in found


def test_a_captioned_figure_without_its_picture_is_named(chapter):
    source = chapter("print(1)")
    notebook = nbformat.read(source, 4)
    notebook.cells[-1].metadata["mystnb"] = {"figure": {"caption": "Lost."}}
    nbformat.write(notebook, source)
    assert check.complaints(source) == [f"cell {len(notebook.cells)} has the caption of a figure and stores no picture"]


def test_outputs_of_a_cell_that_did_not_run_are_named(chapter):
    source = chapter("print(1)")
    notebook = nbformat.read(source, 4)
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text="1\n")]
    notebook.cells[-1].execution_count = None
    nbformat.write(notebook, source)
    assert check.complaints(source) == [f"cell {len(notebook.cells)} stores outputs without a run number: it was "
                                        "edited after it ran"]


def test_clean_notebooks_pass_in_silence(chapter, capsys):
    assert check.main([str(chapter("print(1)"))]) == 0
    assert capsys.readouterr().out == ""


def test_hooks_need_no_network():
    hooks = yaml.safe_load((chapters.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"system"}
