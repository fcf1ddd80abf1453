"""What the pages tell a reader to type: Python blocks run from top to bottom, commands and their parameters exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fishlib.rerun import chapters, cli, sweep

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "chapters").glob("*.md")), *sorted(ROOT.glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The blocks of code in these languages, each with its first line's number."""
    text = page.read_text(encoding="utf-8")
    return [(text[:found.start()].count("\n") + 1, found[2])
            for found in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if found[1] in languages]


def commands() -> list[str]:
    """Every line that calls fishlib in a block of commands, with the lines that continue it."""
    lines = [line.split("  #")[0].strip().removeprefix("$ ") for page in PAGES
             for _, block in blocks(page, "console", "bash", "sh") for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.sub(r"^(?:srun\b.*? )?(?:\.venv/bin/)?fishlib ", "fishlib ", line) for line in lines]
    return sorted({call for call in calls if call.startswith("fishlib ")})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__page__"}
    with torch.random.fork_rng():
        for line, block in blocks(page, "python"):
            exec(compile("\n" * line + block, str(page), "exec"), names)
    assert not list(tmp_path.iterdir()), "a page leaves files behind"


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_exist_and_so_do_their_parameters(command):
    words = shlex.split(command)[1:]
    # Places and files of the example, and its chapter of no name, are the reader's.
    words = [str(ROOT / "_config.yml") if word == "slurm.yml" else word for word in words]
    words = ["00_why_compact" if word in ("CHAPTER", "NAME") else word for word in words]
    context = cli.main.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False)
    names = context.params.get("names") or [context.params.get("name")]
    if words[0] == "assign":
        assert all((ROOT / "chapters" / "assignments" / "masters" / f"{name}.ipynb").is_file() for name in names if name)
        return
    for name in filter(None, names):
        chapter = chapters.load(name)
        given = {one: value for one, value in context.params.get("given", ())
                 if not value.startswith("path/") and value != "00_why_compact"}
        assert chapter.settle(context.params.get("profile", "quick"), given)
        sweep.grid(chapter, context.params.get("words", ()))


def test_a_launched_book_has_its_data_and_is_cited_where_it_lives():
    """The chapters read data/ beside the library's source: an installation that copies the library away has none."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["url"], citation["repository-code"], citation["license"]) == (url, url, "MIT")
    post_build = ROOT / "binder" / "postBuild"
    assert post_build.stat().st_mode & 0o111
    assert "--editable" in post_build.read_text(encoding="utf-8")
    first = (ROOT / "chapters" / "index.md").read_text(encoding="utf-8")
    assert "git clone" in first
    assert "pip install -e" in first
    assert "pip install git+" not in first


def test_commands_are_found_in_the_pages():
    assert len(commands()) > 15


def test_printing_the_book_renders_it_first_also_where_there_is_a_site():
    assert "\npdf: book\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_reasons_of_skipped_tests_are_told(pytestconfig):
    assert "-rs" in pytestconfig.getini("addopts")


def test_every_page_of_a_reader_is_in_the_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = {toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])}
    assert {f"chapters/{page.stem}" for page in (ROOT / "chapters").glob("*.md")} <= listed
