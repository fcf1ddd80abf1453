"""Claims beside the runs that decide them: what is read, what counts as the same run, which verdict follows."""

import ast
import json
import shutil
import subprocess

import nbformat
import pytest
from small_chapters import write_chapter

from fishlib.rerun import chapters, claims

RUN = {"chapter": "10_small", "profile": "full", "gpu": 1, "cpu": 2}
CLAIM = {"id": "better", "proposal": "S1", "item": 1, "claim": "It is better.", "bar": "above a half", "run": "small",
         "holds": "accuracy > 0.5", "in_part": "accuracy > 0.3", "decides": "accuracy"}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter with a profile `full` (strength 2), and a function that makes claims about it."""
    source = write_chapter(tmp_path / "chapters" / "10_small.ipynb")
    (source.parent / "profiles").mkdir()
    (source.parent / "profiles" / "10_small.yml").write_text("full: {strength: 2, dataset: mnist}\n")
    monkeypatch.setattr(chapters, "CHAPTERS", source.parent)
    monkeypatch.setattr(chapters, "data_content", lambda dataset: None)

    def load(runs=None, **changes):
        file = tmp_path / "claims.yml"
        file.write_text(json.dumps({"runs": runs or {"small": RUN}, "claims": [CLAIM | changes]}))
        return claims.load(file)

    return load


def results(accuracy=0.9, provenance=None, **parameters):
    given = {"seed": 0, "strength": 2.0, "dataset": "mnist", "sizes": [30, 10]} | parameters
    return {"chapter": "10_small", "parameters": given, "records": {"accuracy": accuracy}, "provenance": provenance or {}}


def test_the_books_own_claims_name_existing_rows_profiles_and_parameters():
    book = claims.load()
    assert {claim.item for claim in book.claims.values()} == set(range(1, 13))
    published = {claim.published for claim in book.claims.values()}
    assert {name for name, row in book.published.items() if row["claim_of"] == "proposal-2"} <= published
    for experiment in book.experiments.values():
        claims.planned(experiment)
        assert experiment.gpu > 0
        assert experiment.cpu > 0


def test_the_books_own_conditions_read_records_that_their_chapters_make():
    book = claims.load()
    for claim in (claim for claim in book.claims.values() if claim.holds):
        quick = claims.in_chapter(book.experiments[claim.run].chapter)
        made = quick["records"] if quick else {}
        for text in filter(None, (claim.holds, claim.in_part, *claim.decides.split(", "))):
            names = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
            assert not quick or names <= {*made, *claims.FUNCTIONS, "published"}, claim.id


def test_a_number_is_read_after_its_name():
    assert claims.number("maxout -1.2, tri-planar +0.5", "tri-planar") == 0.5
    with pytest.raises(LookupError, match="separable"):
        claims.number("maxout -1.2", "separable")


@pytest.mark.parametrize(("change", "message"), [
    ({"run": "other"}, "no run 'other'"), ({"published": "nobody"}, "no row 'nobody'"), ({"holds": ""}, "say `why`"),
    ({"holds": "accuracy >"}, "not a condition"), ({"holds": "open('x')"}, "only functions"),
    ({"holds": "accuracy.real > 0"}, "Attribute"), ({"colour": "red"}, "colour")])
def test_a_wrong_entry_is_refused_and_named(book, change, message):
    with pytest.raises(ValueError, match=message):
        book(**change)


@pytest.mark.parametrize(("accuracy", "word"), [(0.9, "holds"), (0.4, "holds in part"), (0.1, "does not hold")])
def test_a_run_of_full_size_decides_by_the_bar(book, accuracy, word):
    one = book()
    said = claims.verdict(one.claims["better"], one, [results(accuracy)])
    assert (said.word, said.confidence, said.provisional) == (word, "medium", "")
    assert claims.verdict(one.claims["better"], one, [results(accuracy, seeds=3)]).confidence == "high"


def test_a_smaller_run_never_decides_and_says_what_it_was(book):
    one = book()
    said = claims.verdict(one.claims["better"], one, [results(strength=1.0)])
    assert (said.word, said.confidence, said.provisional) == ("not yet run", "low", "holds")
    assert said.conditions == "with strength 1.0"
    assert claims.verdict(one.claims["better"], one, [results(dataset="digits")]).provisional == ""


def test_a_smaller_run_says_nothing_about_a_published_number(book):
    one = book(published="he-r20", holds="accuracy > published['accuracy']")
    said = claims.verdict(one.claims["better"], one, [results(0.95, strength=1.0)])
    assert (said.word, said.provisional) == ("not yet run", "")
    assert claims.verdict(one.claims["better"], one, [results(0.95)]).word == "holds"


def test_the_full_run_decides_where_both_are_stored_and_a_missing_record_leaves_it_open(book):
    one = book()
    assert claims.verdict(one.claims["better"], one, [results(0.1, strength=1.0), results(0.9)]).word == "holds"
    other = book(holds="lost > 1", decides="lost")
    said = claims.verdict(other.claims["better"], other, [results(0.9)])
    assert said.word == "not yet run"
    assert "lost" in said.conditions


def test_a_chapter_that_is_not_there_yet_is_no_error(book):
    one = book(runs={"small": RUN | {"chapter": "11_later"}})
    assert claims.state(one.experiments["small"], [results()]) == "no chapter"
    assert claims.verdict(one.claims["better"], one, [results()]).word == "not yet run"


def with_quick_result(notebook, value):
    meta = {"scrapbook": {"name": "accuracy"}, "fishlib": {"value": value}}
    notebook.cells[2].outputs = [nbformat.v4.new_output("display_data", {"text/plain": ""}, metadata=meta)]
    return notebook


def test_a_record_is_stale_when_both_code_and_quick_results_have_changed(book):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"

    def rewrite(code=None, quick=None):
        notebook = nbformat.read(path, 4)
        if code:
            notebook.cells[2].source = code
        if quick:
            with_quick_result(notebook, quick)
        nbformat.write(notebook, path)

    rewrite(quick=0.9)
    made = [results(provenance=vars(claims.mark(path)))]
    assert claims.state(one, made) == "current"
    rewrite(quick=0.90001)  # another machine
    assert claims.state(one, made) == "current"
    rewrite(code="changed = 1")
    assert claims.state(one, made) == "current"
    rewrite(quick=0.8)
    assert claims.state(one, made) == "stale"
    rewrite(quick=0.9)
    assert claims.state(one, made) == "current"
    assert claims.state(one, []) == "missing"


def test_the_code_of_a_chapter_is_what_it_imports_and_no_more(tmp_path):
    package = tmp_path / "fishlib"
    package.mkdir()
    sources = {"one.py": "from . import two\n", "two.py": "x = 1\n", "three.py": "from fishlib.one import y\n", "four.py": ""}
    for name, text in sources.items():
        (package / name).write_text(text)

    def found(source):
        return [line.split()[0] for line in chapters.imported([source], package)]

    assert found("from fishlib import one") == ["one.py", "two.py"]
    assert found("import fishlib.three as t") == ["one.py", "three.py", "two.py"]
    assert found("import numpy") == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_without_marks_is_compared_with_the_commit_that_made_it(book, tmp_path, monkeypatch):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    nbformat.write(with_quick_result(nbformat.read(path, 4), 0.9), path)
    package = tmp_path / "fishlib"
    package.mkdir()
    (package / "one.py").write_text("")
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "fishlib", "chapters", "constraints.txt"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    known = {"commit": commit, "library": chapters.library(package)}
    notebook = nbformat.read(path, 4)
    notebook.cells[2].source += "\nmore = 1"
    nbformat.write(notebook, path)
    assert claims.state(one, [results(provenance=known)]) == "current"  # the quick results are those of the commit
    assert claims.state(one, [results(provenance=known | {"library": "uncommitted"})]) == "stale"
    assert claims.state(one, [results(provenance=known | {"commit": "0" * 40})]) == "stale"
