"""Rendering: what it refuses, what it hides, and that a failing build leaves the former site alone."""

import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fishlib.rerun import assets
from fishlib.rerun.docstrings import escape
from fishlib.rerun.pages import corrected
from fishlib.rerun.render import DEFAULTS_PROMPT, RenderError, find, pages, presentable, render, stage, swap

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def without_mathjax(monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda root: None)


def chapter() -> nbformat.NotebookNode:
    return new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[new_markdown_cell("# Tiny chapter\n\nThe formula $a^2$ and {cite:p}`fisher1922`."),
               new_code_cell("epochs = 8  # passes over the data [1 .. 100]", metadata={"tags": ["parameters"]}),
               new_code_cell("print(epochs)")])


def execution(injected: bool = True) -> nbformat.NotebookNode:
    notebook = chapter()
    for cell in notebook.cells[1:]:
        cell.execution_count = 1
        cell.metadata["papermill"] = {"duration": 1.0}
    notebook.cells[2].outputs = [new_output("stream", name="stdout", text="three epochs\n")]
    notebook.metadata["papermill"] = {"input_path": "/somewhere/secret.ipynb"}
    if injected:
        notebook.cells.insert(2, new_code_cell("epochs = 3", metadata={"tags": ["injected-parameters"]}))
    return notebook


@pytest.fixture
def book(tmp_path):
    """A book of a first page and one executed chapter, with the settings of the real one, in a folder with a space."""
    root = tmp_path / "a büok"
    (root / "chapters").mkdir(parents=True)
    (root / "_toc.yml").write_text("format: jb-book\nroot: chapters/index\nchapters:\n- file: chapters/tiny\n")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "chapters" / "site", root / "chapters" / "site")
    shutil.copy(ROOT / "chapters" / "references.bib", root / "chapters")
    (root / "chapters" / "index.md").write_text("# First page\n\n```{bibliography}\n:all:\n```\n")
    nbformat.write(chapter(), root / "chapters" / "tiny.ipynb")
    write_execution(root, execution())
    return root


def write_execution(root: Path, notebook: nbformat.NotebookNode) -> None:
    folder = root / "_build" / "executed" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "tiny.ipynb")


def test_builds_a_site_and_a_failing_build_leaves_it_in_place(book):
    out = render(root=book)
    page = (out / "chapters" / "tiny.html").read_text(encoding="utf-8")
    assert out == book / "_build" / "html"
    assert "three epochs" in page
    assert page.count(DEFAULTS_PROMPT) == 1
    assert assets.CDN in page
    assert "secret" not in page + (out / "_sources" / "chapters" / "tiny.ipynb").read_text(encoding="utf-8")

    (book / "chapters" / "index.md").write_text("# Broken page\n\n{ref}`nothing-of-this-name`\n")
    with pytest.raises(RenderError, match=r"former site is unchanged\n.*index\.md:3: WARNING: .*nothing-of-this-name"):
        render(root=book)
    assert "First page" in (out / "chapters" / "index.html").read_text(encoding="utf-8")
    assert sorted(entry.name for entry in (book / "_build").iterdir()) == ["executed", "html", "source"]


def test_chapter_without_an_execution_is_named_with_the_command_that_makes_it(book):
    (book / "_build" / "executed" / "tiny" / "tiny.ipynb").unlink()
    with pytest.raises(RenderError, match=r"chapters/tiny.ipynb was not executed.*`fishlib run chapters/tiny.ipynb`"):
        render(root=book)


def test_failed_execution_is_refused_and_the_cell_named(book):
    failed = execution()
    failed.cells[3].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    write_execution(book, failed)
    with pytest.raises(RenderError, match="failed when it was executed, in cell 4"):
        render(root=book)


def test_execution_of_other_code_is_refused_but_new_text_is_taken(book):
    changed = chapter()
    changed.cells[0].source = "# A better title"
    nbformat.write(changed, book / "chapters" / "tiny.ipynb")
    assert find(Path("chapters/tiny.ipynb"), book / "_build" / "executed", book).cells[0].source == "# A better title"
    changed.cells[2].source = "print(epochs + 1)"
    nbformat.write(changed, book / "chapters" / "tiny.ipynb")
    with pytest.raises(RenderError, match="has changed since it was executed"):
        render(root=book)


def test_page_of_the_contents_that_does_not_exist_is_named(book):
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    toc["chapters"].append({"file": "chapters/absent"})
    (book / "_toc.yml").write_text(yaml.safe_dump(toc))
    with pytest.raises(RenderError, match="lists chapters/absent"):
        pages(book)


def test_assignment_is_staged_as_it_is_and_its_master_is_not(book):
    notebook = new_notebook(cells=[new_markdown_cell("# Task"), new_code_cell("def f():\n    ...")])
    for folder in (book / "chapters" / "assignments", book / "chapters" / "assignments" / "masters"):
        folder.mkdir()
        nbformat.write(notebook, folder / "task.ipynb")
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    toc["chapters"].append({"file": "chapters/assignments/task"})
    (book / "_toc.yml").write_text(yaml.safe_dump(toc))
    source = stage(book / "_build" / "executed", book / "_build" / "source", book)
    (page,) = source.rglob("task.ipynb")
    assert page.parent == source / "chapters" / "assignments"
    assert nbformat.read(page, as_version=4).cells[1].source == notebook.cells[1].source


def test_folder_with_something_else_is_not_replaced(book, tmp_path):
    kept = tmp_path / "mine" / "diary.txt"
    kept.parent.mkdir()
    kept.write_text("dear diary")
    with pytest.raises(RenderError, match="something other than a site"):
        render(root=book, out=kept.parent)
    assert kept.read_text(encoding="utf-8") == "dear diary"


@pytest.mark.parametrize("injected", [True, False])
def test_exactly_one_parameters_cell_stays_open(injected):
    notebook = execution(injected)
    cells = [cell for cell in presentable(notebook).cells
             if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))]
    is_open = [cell.source for cell in cells if "hide-input" not in cell.metadata["tags"]]
    assert is_open == (["epochs = 3"] if injected else ["epochs = 8  # passes over the data [1 .. 100]"])
    assert "papermill" in notebook.metadata, "the caller's notebook was changed"


def test_former_site_returns_when_the_new_one_cannot_be_put_in_place(tmp_path):
    out = tmp_path / "html"
    out.mkdir()
    (out / "page.html").write_text("former")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(FileNotFoundError):
        swap(work / "never-built", out)
    assert (out / "page.html").read_text(encoding="utf-8") == "former"


def test_bars_and_lone_stars_of_docstrings_are_escaped_but_not_in_code():
    lines = ["|G|^2 / B and ``a | b`` and `c | d`::", "", "    x | *y", "", "|z| of *shape", "the *mean* of it", ">>> 1 | 2"]
    assert escape(lines) == [r"\|G\|^2 / B and ``a | b`` and `c | d`::", "", "    x | *y", "", r"\|z\| of \*shape",
                             "the *mean* of it", ">>> 1 | 2"]


def test_numbers_that_a_run_gives_to_the_text_are_bold_and_its_sentences_are_not():
    number, sentence = ('<span class="pasted-text">' + text for text in ("98.4 ± 0.1 %</span>", "Both lists end there. " * 3))
    assert corrected(number) == number
    assert corrected(sentence).startswith('<span class="pasted-text sentence">Both')
