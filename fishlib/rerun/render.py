"""Rendering the book: executed notebooks and pages become the site, by Jupyter Book with execution off.

The site shows what ran: a chapter without a finished, current execution is an error, never an old or empty page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml

from fishlib.rerun import assets, findings
from fishlib.rerun.run import check_writable, swap, with_outputs

ROOT = Path(__file__).resolve().parents[2]
ASSIGNMENTS = Path("chapters/assignments")  # shown as they are: the blanks in them are the reader's to fill
DEFAULTS_PROMPT = "Show the defaults, their meaning and their ranges"


class RenderError(Exception):
    """The site could not be rendered; the message says why and what to do. The former site stays in place."""


def render(executed: Path | None = None, out: Path | None = None, root: Path = ROOT) -> Path:
    """Render the book of `root` and put it at `out`, replacing the former site only when the new one is whole.

    Parameters
    ----------
    executed : folder of executed notebooks, `<chapter>/<chapter>.ipynb` or `<chapter>.ipynb`; default `_build/executed`
    out : folder of the site; default `_build/html`
    root : folder with `_config.yml`, `_toc.yml` and the pages these name

    Returns
    -------
    Path
        `out`

    Raises
    ------
    RenderError
        a chapter that was not executed, failed or changed since; a warning of the build (warnings count as errors);
        an `out` that holds something other than a site
    """
    root = Path(root).resolve()
    executed = Path(executed or root / "_build" / "executed").resolve()
    out = Path(out or root / "_build" / "html").resolve()
    if out.is_dir() and any(out.iterdir()) and not (out / "searchindex.js").is_file():
        raise RenderError(f"{out} holds something other than a site: name another folder, or an empty one")
    check_writable(out.parent)
    source = stage(executed, root / "_build" / "source", root)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".render-") as work:
        swap(build(source, Path(work)), out)
    return out


def pages(root: Path = ROOT) -> list[Path]:
    """The sources of the pages that `_toc.yml` lists, in order, relative to `root`: `.md` or `.ipynb`."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    return [_source(root, name) for name in parse_toc_yaml(root / "_toc.yml")]


def outdated(site: Path, root: Path = ROOT) -> list[Path]:
    """The pages of the book, executions of its chapters and settings that are newer than the site, relative to `root`."""
    rendered = (site / "searchindex.js").stat().st_mtime
    listed, executed = pages(root), Path("_build") / "executed"
    made = [place / page.name for page in listed for place in (executed / page.stem, executed)]
    files = [file for file in (Path("_toc.yml"), Path("_config.yml"), *listed, *made) if (root / file).is_file()]
    return [file for file in files if (root / file).stat().st_mtime > rendered]


def _source(root: Path, name: str) -> Path:
    for suffix in (".md", ".ipynb"):
        if (root / (name + suffix)).is_file():
            return Path(name + suffix)
    raise RenderError(f"_toc.yml lists {name}, but there is neither {name}.md nor {name}.ipynb")


def stage(executed: Path, source: Path, root: Path = ROOT) -> Path:
    """Write to `source` the tree that Jupyter Book builds: pages, executed chapters, findings, settings, formulas' fonts."""
    notebooks = [page for page in pages(root) if page.suffix == ".ipynb"]
    chapters = {page: nbformat.read(root / page, as_version=4) if page.parent == ASSIGNMENTS else find(page, executed, root)
                for page in notebooks}
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "chapters", source / "chapters",
                    ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__", "profiles"))
    for page, notebook in chapters.items():
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(presentable(notebook), source / page)
    findings.write(executed, source / "chapters", root / "data" / "runs")
    shutil.copy(root / "_toc.yml", source)
    config = configure(yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")), assets.fetch(root), source)
    (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return source


def find(page: Path, executed: Path, root: Path = ROOT) -> nbformat.NotebookNode:
    """The chapter `page` with the outputs of its execution, which was whole, without an error, and of the same code."""
    places = [executed / page.stem / page.name, executed / page.name]
    place = next((place for place in places if place.is_file()), None)
    again = f"run `fishlib run {page.as_posix()}`"
    if place is None:
        raise RenderError(f"{page} was not executed: there is no {places[0]}; {again}")
    notebook = nbformat.read(place, as_version=4)
    for number, cell in enumerate(notebook.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise RenderError(f"{page} failed when it was executed, in cell {number}; correct it and {again}")
    chapter = nbformat.read(root / page, as_version=4)
    if _code(notebook) != _code(chapter):
        raise RenderError(f"the code of {page} has changed since it was executed; {again}")
    return with_outputs(chapter, notebook)


def _code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells
            if cell.cell_type == "code" and "injected-parameters" not in _tags(cell)]


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def presentable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy for readers: one open parameters cell (the values that ran), no traces of the run's machinery."""
    notebook = nbformat.from_dict(notebook)
    injected = any("injected-parameters" in _tags(cell) for cell in notebook.cells)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if injected and "parameters" in _tags(cell):
            # Folded rather than dropped: its comments tell what the injected values mean.
            cell.metadata["tags"] = [*_tags(cell), "hide-input"]
            cell.metadata["mystnb"] = {"code_prompt_show": DEFAULTS_PROMPT}
    return notebook


def configure(config: dict, mathjax: Path | None, source: Path) -> dict:
    """`_config.yml` completed: where formulas' scripts are, and the repository's address for use in pages."""
    sphinx = config.setdefault("sphinx", {}).setdefault("config", {})
    sphinx["mathjax_path"] = assets.CDN
    if mathjax:
        # In a static folder of its own: scripts in `_static` would be loaded a second time by Jupyter Book.
        shutil.copytree(mathjax, source / "vendor" / "mathjax")
        sphinx["html_static_path"] = [*sphinx.get("html_static_path", []), "vendor"]
        sphinx["mathjax_path"] = f"mathjax/{assets.ENTRY}"
    url = config.get("repository", {}).get("url")
    if url:
        config.setdefault("parse", {}).setdefault("myst_substitutions", {})["repository"] = url.rstrip("/")
    return config


def build(source: Path, work: Path) -> Path:
    """The site of `source`, built below `work` from nothing; RenderError with the warnings if there are any."""
    # The module rather than the script: a script's first line breaks in a folder whose path has spaces.
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source),
               "--path-output", str(work), "--all", "-W", "-n", "--keep-going"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "agg"})
    if result.returncode:
        complaints = _complaints(result.stderr) or result.stderr[-4000:] or result.stdout[-4000:]
        raise RenderError("the book did not build; the former site is unchanged\n"
                          + complaints.replace(f"{source}{os.sep}", ""))
    return work / "_build" / "html"


def _complaints(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(line for line in plain.splitlines() if "WARNING" in line or "ERROR" in line)
