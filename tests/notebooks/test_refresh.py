"""Chapters re-executed in place."""

import json

import nbformat
from click.testing import CliRunner

from fishlib.rerun import refresh
from fishlib.rerun.cli import main


def test_a_refreshed_chapter_has_new_outputs_and_nothing_that_changes_from_run_to_run(chapter, build):
    source = chapter("print('a'); print('b')", "from fishlib.notebook import _publish\n"
                     "_publish({'text/plain': 'now'}, {'fishlib': {'provenance': {'seed': 1}}})", "print('x' * 500_000)")
    first = CliRunner().invoke(main, ["refresh", str(source)])
    assert first.exit_code == 0, first.output
    assert list(build.glob("refresh-*")) == []
    text = source.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    assert [len(cell.outputs) for cell in notebook.cells[1:]] == [0, 1, 1, 0, 0]
    assert notebook.cells[3].outputs[0].text == "a\nb\n"
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "papermill" not in json.dumps(notebook.metadata)
    assert "start_time" not in text

    second = CliRunner().invoke(main, ["refresh", str(source)])
    assert "unchanged" in second.output
    assert source.read_text(encoding="utf-8") == text


def test_a_failing_chapter_is_left_as_it_was_and_the_message_names_what_was_executed_of_it(chapter, build):
    source = chapter("1 / 0")
    before = source.read_text(encoding="utf-8")
    result = CliRunner().invoke(main, ["refresh", str(source)])
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output
    assert source.read_text(encoding="utf-8") == before
    (partial,) = build.glob("refresh-*/**/*.failed.ipynb")
    assert str(partial) in result.output


def test_measured_times_are_not_kept():
    cell = nbformat.v4.new_code_cell("time()", outputs=[nbformat.v4.new_output("stream", text="1.234 s")])
    cell.metadata["tags"] = ["nbval-ignore-output"]
    assert refresh.strip(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs == []


def test_a_chapter_that_judges_the_others_runs_after_them_and_reads_the_book_only_in_its_own_run(chapter, build):
    judge = chapter("import os\nfrom fishlib.rerun import claims",
                    "print('reads', os.environ['FISHLIB_SHOWN'] or 'the chapters')", name="09_judge")
    other = chapter("print('other')", name="10_other")
    for command, words in (("refresh", "10_other.ipynb: renewed"), ("run", "10_other: finished in")):
        result = CliRunner().invoke(main, [command, str(judge), str(other)])
        assert result.exit_code == 0, result.output
        assert result.output.index(words) < result.output.index("running 09_judge")
    assert "reads the chapters" in judge.read_text(encoding="utf-8")
    assert f"reads {build / 'executed'}" in (build / "executed" / "09_judge" / "09_judge.ipynb").read_text(encoding="utf-8")
    assert CliRunner().invoke(main, ["run", str(judge), str(other)]).output.count("finished before") == 2
