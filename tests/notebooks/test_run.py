"""One run of a chapter: identity, execution in a process of its own, failures and interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from small_chapters import alive, eventually, lines, load

from fishlib.rerun import chapters, child, run
from fishlib.rerun.cli import main

MARK = "import os; from pathlib import Path; Path({file!r}).write_text(str(os.getpid()))"


def fishlib(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_run_leaves_notebook_and_results_and_is_not_repeated(tmp_path, chapter, monkeypatch):
    source = chapter("print('ran')", name="10_zwölf chapters {x}")
    out = tmp_path / "out of spâce"
    monkeypatch.chdir(tmp_path)
    first = fishlib("run", source, "-p", "strength", 2, "--out", out)
    assert first.exit_code == 0, first.output
    results = load(out)
    assert results["records"] == {"accuracy": pytest.approx(0.92)}
    assert results["parameters"] == {"seed": 0, "strength": 2.0, "dataset": "digits", "sizes": [30, 10]}
    expected = {"commit", "dirty", "versions", "seed", "device", "data", "profile", "duration_s", "identity"}
    assert expected <= set(results["provenance"])
    assert results["provenance"]["profile"] == "quick"
    executed = nbformat.read(out / source.name, as_version=4)
    assert executed.cells[-1].outputs[0].text == "ran\n"
    assert sorted(file.name for file in out.iterdir()) == [source.name, "results.json"]
    assert sorted(source.parent.iterdir()) == [source]

    monkeypatch.setattr(run, "execute", None)
    again = fishlib("run", source, "-p", "strength", "2.0", "--out", out)
    assert again.exit_code == 0, again.output
    assert "finished before" in again.output

    # New prose changes no number: the page is renewed without a run.
    notebook = nbformat.read(source, as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, source)
    assert fishlib("run", source, "-p", "strength", "2.0", "--out", out).exit_code == 0
    renewed = nbformat.read(out / source.name, as_version=4)
    assert renewed.cells[0].source == "# Another title"
    assert [cell.source for cell in renewed.cells[1:]] == [cell.source for cell in executed.cells[1:]]
    assert [cell.outputs for cell in renewed.cells[1:]] == [cell.outputs for cell in executed.cells[1:]]


def test_a_failing_cell_keeps_the_partial_notebook_and_shows_cell_and_error(tmp_path, chapter):
    source = chapter("first = 1", "ratio = first / 0", "print('never')")
    result = fishlib("run", source, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "ratio = first / 0" in result.output
    assert "ZeroDivisionError: division by zero" in result.output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["10_small.failed.ipynb"]
    assert str(tmp_path / "out" / "10_small.failed.ipynb") in result.output


def test_several_chapters_run_at_once_and_one_failure_does_not_stop_the_others(tmp_path, chapter, build):
    meet = ("import time; from pathlib import Path; me, other = Path({me!r}), Path({other!r}); me.touch()\n"
            "for _ in range(600):\n    if other.exists():\n        break\n    time.sleep(0.1)\nelse:\n    raise TimeoutError")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    one = chapter(meet.format(me=a, other=b), name="11_one")
    two = chapter(meet.format(me=b, other=a), "raise RuntimeError('on purpose')", name="12_two")
    result = fishlib("run", one, two, "--jobs", 2)
    assert result.exit_code == 1
    assert "on purpose" in result.output
    assert load(build / "executed" / "11_one")["chapter"] == "11_one"
    assert not (build / "executed" / "12_two" / "results.json").exists()


@pytest.mark.parametrize(("words", "named"), [
    (["-p", "strenght", "1"], "seed, strength, dataset, sizes"),
    (["-p", "strength", "much"], "float from 0 to 10"),
    (["-p", "strength", "11"], "float from 0 to 10"),
    (["-p", "seed", "0.5"], "int from 0 to 1000"),
    (["-p", "dataset", "cifar"], "digits, mnist, a folder (there is no folder /"),
    (["-p", "sizes", "300"], 'sizes is list, in quotes and as Python writes it: "['),
    (["-p", "seed=1", "-p", "strength", "1"], "-p seed=1: write name and value apart, -p seed 1"),
    (["-p", "seed=1"], "-p seed=1: write name and value apart, -p seed 1"),
    (["-p", "seed", "1", "-p", "seed", "2"], "twice"),
    (["--profile", "fast"], "quick"),
])
def test_what_cannot_be_run_ends_with_status_2_before_anything_runs(tmp_path, chapter, monkeypatch, words, named):
    monkeypatch.setattr(run, "execute", None)
    for subcommand in ("run", "sweep"):
        result = fishlib(subcommand, chapter(), *words, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert named in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["seed", "seed=1"])
def test_a_parameter_without_a_value_at_the_end_of_a_command_says_what_it_takes(chapter, monkeypatch, word):
    monkeypatch.setattr(run, "execute", None)
    for subcommand in ("run", "sweep"):
        result = fishlib(subcommand, chapter(), "-p", word)
        assert result.exit_code == 2
        assert "-p takes a name and a value" in result.output


def test_an_absent_chapter_is_answered_with_those_that_exist(tmp_path, monkeypatch):
    (tmp_path / "01_here.ipynb").touch()
    monkeypatch.setattr(chapters, "CHAPTERS", tmp_path)
    for word in ("run", "params", "sweep", "refresh"):
        result = fishlib(word, "02_not_here")
        assert result.exit_code == 2
        assert "01_here" in result.output


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "broken.ipynb").write_text('{"cells": 3')
    result = fishlib("run", tmp_path / "broken.ipynb")
    assert result.exit_code == 2
    assert "broken.ipynb is not a notebook" in result.output


def test_chapters_are_found_by_path_file_name_and_stem(chapter, monkeypatch, tmp_path):
    source = chapter()
    monkeypatch.setattr(chapters, "CHAPTERS", source.parent)
    monkeypatch.chdir(tmp_path)
    assert {chapters.find(name) for name in (source, "book/10_small.ipynb", "10_small.ipynb", "10_small")} == {source}


def test_a_folder_never_takes_the_runs_of_two_chapters(tmp_path, chapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / "09_other.ipynb").touch()
    (out / "results.json").write_text("{}")
    result = fishlib("run", chapter(), "--out", out)
    assert result.exit_code == 2
    assert "09_other" in result.output


def test_params_lists_type_default_valid_values_meaning_and_profiles(chapter):
    source = chapter()
    profiles = source.parent / "profiles"
    profiles.mkdir()
    (profiles / "10_small.yml").write_text("full:\n  dataset: mnist\n")
    result = fishlib("params", source)
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()}
    assert rows["name"][:4] == ["name", "type", "quick", "full"]
    assert rows["dataset"][:4] == ["dataset", "str", "'digits'", "'mnist'"]
    assert rows["strength"] == "strength float 0.5 0.5 0 .. 10 weight of the penalty".split()


def test_params_cuts_long_values_in_the_table_and_has_them_whole_below(chapter):
    source = chapter()
    profiles = source.parent / "profiles"
    profiles.mkdir()
    (profiles / "10_small.yml").write_text(f"full:\n  sizes: {[100] * 40}\n")
    table, below = fishlib("params", source).output.split("\n\n")
    assert below == f"sizes, full: {[100] * 40}\n"
    assert max(map(len, table.splitlines())) < 150
    assert "  [100, 100, 100, 100, 100, 1...  " in table


def test_a_profile_with_an_unknown_parameter_is_refused(chapter):
    source = chapter()
    (source.parent / "profiles").mkdir()
    (source.parent / "profiles" / "10_small.yml").write_text("full:\n  epoch: 3\n")
    result = fishlib("run", source, "--profile", "full")
    assert result.exit_code == 2
    assert "epoch" in result.output


@pytest.mark.parametrize("content", [b"full: {seed: 1", b"full:\n  seed: 1\n seed: 2\n", b"full: {seed: \xff}", b"? [1]: 2"],
                         ids=["not closed", "indented", "not UTF-8", "a list as a name"])
@pytest.mark.parametrize("words", [["params"], ["run"], ["sweep", "-g", "seed=0"]], ids=lambda words: words[0])
def test_profiles_that_are_not_yaml_are_named_in_one_line(chapter, words, content):
    source = chapter()
    file = source.parent / "profiles" / "10_small.yml"
    file.parent.mkdir()
    file.write_bytes(content)
    result = fishlib(*words, source)
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {file} is not YAML (")
    assert result.output.endswith("): correct it\n")
    assert result.output.count("\n") == 1


def test_only_unchanged_quick_runs_go_where_the_book_is_rendered_from(chapter, build):
    loaded = chapters.load(chapter())
    assert run.plan(loaded).folder == build / "executed" / "10_small"
    assert run.plan(loaded, given={"strength": 0.5}).folder == build / "executed" / "10_small"
    other = run.plan(loaded, given={"strength": 0.6})
    assert other.folder == build / "runs" / "10_small" / other.identity


def test_the_identity_changes_with_code_parameters_and_data_but_not_with_text_or_outputs(tmp_path, chapter, monkeypatch):
    def identity(source, **given):
        return run.plan(chapters.load(source), given=given).identity

    base = identity(chapter("x = 1"))
    assert identity(chapter("x = 1", text="# Other text")) == base
    assert identity(chapter("x = 1"), strength="0.50") == base
    assert identity(chapter("x = 2")) != base
    assert identity(chapter("x = 1"), strength=0.6) != base

    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path))
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    seen = []
    for images in (np.zeros(3), np.zeros(3), np.ones(3)):
        np.savez(tmp_path / "mnist.npz", train_images=images)
        seen.append(identity(chapter("x = 1"), dataset="mnist"))
    assert seen[0] == seen[1] != seen[2]

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    before = chapters._folder_content.__wrapped__(folder)
    (folder / "a.png").write_bytes(b"two")
    after = chapters._folder_content.__wrapped__(folder)
    assert after != before
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.png").write_bytes(b"left by a file browser")
    assert chapters._folder_content.__wrapped__(folder) == after


def test_the_identity_changes_with_the_library_and_the_pins_but_not_with_what_only_runs_chapters(tmp_path):
    package = tmp_path / "fishlib"
    shutil.copytree(chapters.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    seen = [chapters.library(package)]
    for file, changes in ((package / "rerun" / "cli.py", False), (package / "nets" / "__init__.py", True),
                          (tmp_path / "constraints.txt", True)):
        with file.open("a") as handle:
            handle.write("# edited\n")
        seen.append(chapters.library(package))
        assert (seen[-1] != seen[-2]) == changes


def test_a_run_planned_with_another_state_of_the_library_is_refused(tmp_path, chapter):
    from dataclasses import replace

    planned = replace(run.plan(chapters.load(chapter()), folder=tmp_path / "out"), identity="0" * 16)
    outcome = run.execute(planned)
    assert outcome.status == "failed"
    assert "start it again" in outcome.message
    assert not (tmp_path / "out").exists()


def test_new_stored_records_make_the_books_runs_stale_but_not_those_of_sweeps(tmp_path, chapter, build, monkeypatch):
    loaded = chapters.load(chapter())
    for planned, stale in ((run.plan(loaded), True), (run.plan(loaded, given={"seed": 1}), False)):
        planned.folder.mkdir(parents=True)
        planned.notebook.touch()
        provenance = {"identity": planned.identity, "given_data": chapters.given_data()}
        planned.results.write_text(json.dumps({"provenance": provenance}))
        assert run.finished(planned)
        with monkeypatch.context() as patch:
            patch.setattr(chapters, "given_data", lambda: "other records")
            assert run.finished(planned) != stale


def test_the_site_is_not_rendered_from_runs_of_another_state(chapter, build, monkeypatch):
    from fishlib.rerun import render

    source = chapter()
    monkeypatch.setattr(chapters, "CHAPTERS", source.parent)
    monkeypatch.setattr(render, "render", lambda executed, out: build / "html")
    planned = run.plan(chapters.load(source))
    planned.folder.mkdir(parents=True)
    planned.notebook.touch()
    given = run.given(planned)
    for identity, data, status in ((planned.identity, given, 0), (planned.identity, "other records", 1), ("0" * 16, given, 1)):
        planned.results.write_text(json.dumps({"chapter": "10_small", "parameters": planned.parameters, "records": {},
                                               "provenance": {"identity": identity, "given_data": data}}))
        result = fishlib("render")
        assert result.exit_code == status, result.output
        assert ("fishlib run 10_small" in result.output) == bool(status)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"parameters": {}}', '{"chapter": "10_small", "parameters": []}'])
@pytest.mark.parametrize("command", ["render", "pdf"])
def test_damaged_results_of_an_executed_chapter_are_named(command, text, build):
    file = build / "executed" / "10_small" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    result = fishlib(command)
    assert result.exit_code == 1
    assert f"{file} is not the results of a run" in result.output
    assert "run its chapter again" in result.output


def test_a_run_beyond_its_time_is_ended(tmp_path, chapter):
    result = fishlib("run", chapter("import time; time.sleep(600)"), "--out", tmp_path / "out", "--timeout", 2)
    assert result.exit_code == 1
    assert "past its limit of 2 s" in result.output
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_file_and_no_process(tmp_path, chapter, command, ending):
    mark, scratch = tmp_path / "kernel", tmp_path / "scratch"
    scratch.mkdir()
    source = chapter(MARK.format(file=str(mark)), "import time; time.sleep(600)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        # A shell that starts a job in the background may have it ignore interruptions.
        process = command("run", source, "--out", tmp_path / "out",
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    kernel = int(eventually(lambda: lines(mark))[0])
    process.send_signal(ending)
    process.wait(30)
    assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGKILL)
    eventually(lambda: not alive(kernel))
    eventually(lambda: not list(scratch.glob("fishlib-*")))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_still_written_into_goes_as_well(tmp_path, monkeypatch):
    scratch, remove, passes = tmp_path / "scratch", child.shutil.rmtree, []
    scratch.mkdir()

    def disturbed(folder, **options):
        remove(folder, **options)
        passes.append(folder)
        if len(passes) < 3:
            folder.mkdir()  # as a notebook that is saved meanwhile leaves it

    monkeypatch.setattr(child.shutil, "rmtree", disturbed)
    monkeypatch.setattr("psutil.Process.children", lambda process, recursive: [])
    monkeypatch.setattr(child.os, "read", lambda *given: b"")
    monkeypatch.setattr(child.os, "_exit", lambda status: None)
    child._end_with_parent(scratch)
    assert not scratch.exists()


def test_two_different_records_of_one_name_are_refused():
    def output(value):
        return {"output_type": "display_data", "data": {}, "metadata": {
            "scrapbook": {"name": "loss", "mime_prefix": "application/papermill.record/"}, "fishlib": {"value": value}}}

    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output(1.0), output(1.0)])])
    assert child.collect(executed)[0] == {"loss": 1.0}
    executed.cells[0].outputs.append(nbformat.from_dict(output(2.0)))
    with pytest.raises(run.RunFailed, match="'loss' and differ"):
        child.collect(executed)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    run.write(file, "before")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        run.write(file, "after")
    assert file.read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_command_line_starts_without_the_heavy_libraries():
    code = ("import sys, fishlib.rerun.cli; "
            "print(sorted({'torch', 'papermill', 'dask', 'distributed', 'pandas', 'sphinx'} & set(sys.modules)))")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(chapters.PACKAGE.parent)}).stdout
    assert output.strip() == "[]"


def test_runs_at_the_same_time_hold_different_devices_and_a_third_waits(tmp_path):
    from fishlib.rerun import devices

    got = []

    def third():
        with devices.held(["0", "1"], tmp_path) as name:
            got.append(name)

    with devices.held(["0", "1"], tmp_path) as first:
        with devices.held(["0", "1"], tmp_path) as second:
            assert {first, second} == {"0", "1"}
            thread = threading.Thread(target=third)
            thread.start()
            thread.join(0.5)
            assert not got
        thread.join(30)
    assert got == [second]


def test_a_killed_process_gives_its_device_back(tmp_path):
    from fishlib.rerun import devices

    code = ("import time; from pathlib import Path; from fishlib.rerun import devices\n"
            f"with devices.held(['0'], Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(chapters.PACKAGE.parent)})
    try:
        assert process.stdout.readline() == "held\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with devices.held(["0"], tmp_path) as name:
        assert name == "0"


def test_devices_are_those_that_cuda_may_see(monkeypatch):
    from fishlib.rerun import devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab12")
    assert devices.available() == ["2", "GPU-ab12"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.available() == []
    with pytest.raises(ValueError, match="shows no GPU"), devices.held(folder=Path("unused")):
        pass
