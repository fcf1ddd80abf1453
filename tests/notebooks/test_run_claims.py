"""`fishlib run --claims`: what is missing is made and stored; a budget, a failure or a kill leaves nothing half done."""

import errno
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_chapters import alive, eventually, lines, load, raising, write_chapter

from fishlib.rerun import chapters, claims
from fishlib.rerun.cli import main

# Forty steps, of which the folder for checkpoints remembers how many are done.
STEPS = '''import os, time
from pathlib import Path

folder = Path(os.environ["FISHLIB_CHECKPOINTS"])
folder.mkdir(parents=True, exist_ok=True)
done = folder / "done"
Path({pid!r}).write_text(str(os.getpid()))
while len(done.read_text() if done.exists() else "") < 40:
    time.sleep(0.1)
    with done.open("a") as file:
        _ = file.write("x")
    with open({log!r}, "a") as file:
        _ = file.write("step\\n")
'''


@pytest.fixture
def book(tmp_path, monkeypatch, build):
    """Writes chapters and claims for them in a folder of their own; `book.folder` is where results are stored."""

    def make(minutes=1.0, dataset="digits", **cells):
        runs = {}
        for number, (name, source) in enumerate(cells.items()):
            stem = f"1{number}_{name}"
            path = write_chapter(tmp_path / "chapters" / f"{stem}.ipynb", source)
            profiles = path.parent / "profiles" / f"{stem}.yml"
            profiles.parent.mkdir(exist_ok=True)
            profiles.write_text(json.dumps({"full": {"strength": 2, "dataset": dataset}}))
            runs[name] = {"chapter": stem, "profile": "full", "gpu": minutes / (number + 1), "cpu": minutes / (number + 1)}
        listed = [{"id": f"c-{name}", "proposal": "S1", "item": 1, "claim": "x", "bar": "x", "run": name,
                   "holds": "accuracy > 0.5"} for name in runs]
        (tmp_path / "claims.yml").write_text(json.dumps({"runs": runs, "claims": listed}))

    make.folder = tmp_path / "stored"
    monkeypatch.setattr(chapters, "CHAPTERS", tmp_path / "chapters")
    monkeypatch.setattr(claims, "STORED", make.folder)
    monkeypatch.setattr(claims.load, "__defaults__", (tmp_path / "claims.yml", claims.PUBLISHED))
    return make


def fishlib(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_what_is_missing_is_made_in_order_of_time_stored_and_not_made_again(book):
    book(slow="x = 1", quick="x = 2")
    result = fishlib("run", "--claims", "missing")
    assert result.exit_code == 0, result.output
    assert result.output.index("quick: running") < result.output.index("slow: running")
    stored = load(book.folder / "11_quick" / "quick")
    assert stored["records"] == {"accuracy": pytest.approx(0.92)}
    assert {"code", "quick", "seconds", "device"} <= set(stored["provenance"])
    assert "0 runs to make" in fishlib("run", "--claims", "missing").output
    listed = fishlib("claims").output
    assert listed.count("current") == 4
    assert "holds: 2, holds in part: 0" in listed


def test_one_run_is_chosen_by_its_name_or_by_that_of_its_claim(book):
    book(one="x = 1", two="x = 2")
    assert fishlib("run", "--claims", "c-two").exit_code == 0
    assert [folder.name for folder in book.folder.iterdir()] == ["11_two"]
    wrong = fishlib("run", "--claims", "three")
    assert wrong.exit_code == 2
    assert "'three' is neither" in wrong.output


@pytest.mark.parametrize(("words", "message"), [
    ([], "name a chapter"), (["--budget", "10m", "10_one"], "goes with --claims"), (["--claims", "missing", "10_one"], "alone"),
    (["--claims", "missing", "--profile", "full"], "alone"), (["--claims", "missing", "--budget", "soon"], "write 90s"),
    (["--claims", ""], "'' is neither")])
def test_words_that_do_not_go_together_are_refused(book, words, message):
    book(one="x = 1")
    result = fishlib("run", *words)
    assert result.exit_code == 2
    assert message in result.output


def test_a_failing_run_does_not_stop_the_others_and_is_not_stored(book):
    book(good="x = 1", bad="raise RuntimeError('on purpose')")
    result = fishlib("run", "--claims", "missing")
    assert result.exit_code == 1
    assert "on purpose" in result.output
    assert [folder.name for folder in book.folder.iterdir()] == ["10_good"]


def test_a_run_without_its_data_or_too_long_for_the_budget_is_not_begun(book, monkeypatch, tmp_path):
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path))
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    book(one="x = 1", dataset="mnist")
    result = fishlib("run", "--claims", "missing")
    assert result.exit_code == 1
    assert "put it into FISHLIB_DATA" in result.output
    assert result.output.endswith("not made: one\n")
    book(one="x = 1", minutes=60)
    result = fishlib("run", "--claims", "missing", "--budget", "10s")
    assert "in one piece" in result.output
    assert result.exit_code == 1
    assert not book.folder.exists()


def test_a_damaged_data_file_does_not_keep_the_runs_on_other_data_from_running(book, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist.npz").write_text("no zip file")
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path / "data"))
    book(hurt="x = 1", whole="x = 2")
    profile = chapters.CHAPTERS / "profiles" / "10_hurt.yml"
    profile.write_text(profile.read_text(encoding="utf-8").replace("digits", "mnist"), encoding="utf-8")
    result = fishlib("run", "--claims", "missing")
    assert result.exit_code == 1
    assert "hurt: " in result.output
    assert "is damaged or not an npz file" in result.output
    assert result.output.endswith("not made: hurt\n")
    assert [folder.name for folder in book.folder.iterdir()] == ["11_whole"]
    assert fishlib("claims").exit_code == 0


def test_runs_that_the_budget_has_no_time_for_are_named_and_the_status_tells_of_them(book, monkeypatch):
    book(one="x = 1", two="x = 2")
    monkeypatch.setattr("fishlib.rerun.cli._seconds", lambda text: -1.0)
    result = fishlib("run", "--claims", "missing", "--budget", "1s")
    assert result.exit_code == 1
    assert result.output.endswith("the budget is spent: start the same command again to go on\nnot made: two, one\n")


def test_runs_for_claims_and_their_records_work_in_a_folder_of_any_name(book, monkeypatch, tmp_path):
    monkeypatch.setattr(chapters, "BUILD", tmp_path / "mein Büchlein 書" / "_build")
    monkeypatch.setattr(claims, "STORED", tmp_path / "gemerkt ä")
    book(one="x = 1")
    assert fishlib("run", "--claims", "missing").exit_code == 0
    assert load(tmp_path / "gemerkt ä" / "10_one" / "one")["records"] == {"accuracy": pytest.approx(0.92)}


def test_a_run_stopped_by_the_budget_goes_on_where_it_was(book, tmp_path):
    log, pid = tmp_path / "log", tmp_path / "pid"
    book(steps=STEPS.format(log=str(log), pid=str(pid)), minutes=60)
    first = fishlib("run", "--claims", "missing", "--budget", "6s")
    assert first.exit_code == int("stored as" not in first.output), first.output
    assert not book.folder.exists() or "stored as" in first.output
    before = [json.loads(file.read_bytes())["seconds"] for file in (chapters.BUILD / "checkpoints").glob("*.json")]
    again = fishlib("run", "--claims", "missing")
    assert again.exit_code == 0, again.output
    made = load(book.folder / "10_steps" / "steps")
    assert len(lines(log)) == 40
    assert made["provenance"]["seconds"] > sum(before)
    assert not list((chapters.BUILD / "checkpoints").iterdir())


def test_a_run_that_comes_to_no_checkpoint_within_the_budget_does_not_keep_the_others_from_running(book, tmp_path):
    mark = tmp_path / "begun"
    book(good="x = 1", stuck=f"import time\nopen({str(mark)!r}, 'a').write('x ')\n# FISHLIB_CHECKPOINTS\ntime.sleep(600)")
    first = fishlib("run", "--claims", "stuck", "--budget", "3s")
    assert first.exit_code == 1, first.output
    assert "stopped at the end of the budget" in first.output
    second = fishlib("run", "--claims", "missing", "--budget", "5s")
    assert re.search(r"stuck: it came to no checkpoint in \d+ s: give it at least twice as long", second.output)
    assert "good: " in second.output
    assert len(lines(mark)) <= 1


@pytest.mark.parametrize(("trouble", "status"), [(OSError(errno.ENOSPC, "No space left"), 1), (KeyboardInterrupt(), 130),
                                                 (PermissionError(errno.EACCES, "Permission denied"), 1)], ids=str)
def test_results_that_cannot_be_stored_leave_the_former_ones_and_are_stored_when_they_can(book, trouble, status, monkeypatch):
    book(one="x = 1")
    assert fishlib("run", "--claims", "missing").exit_code == 0
    (file,) = book.folder.rglob("results.json")
    text = file.read_text(encoding="utf-8")
    for before in (text.replace("records", "of old"), None):  # damaged, and so missing; and not there
        file.write_text(before) if before else file.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", raising(trouble))
            result = fishlib("run", "--claims", "missing")
        assert result.exit_code == status, result.output
        assert "nothing half-written" in result.output
        assert [one.read_text() for one in book.folder.rglob("*") if one.is_file()] == ([before] if before else [])
    assert fishlib("run", "--claims", "missing").exit_code == 0
    assert file.read_text(encoding="utf-8") == text


def test_ctrl_c_ends_with_one_line_keeps_the_time_and_stores_nothing(book, monkeypatch):
    book(one="x = 1")
    monkeypatch.setattr("fishlib.rerun.run.perform", raising(KeyboardInterrupt()))
    result = fishlib("run", "--claims", "missing")
    assert result.exit_code == 130
    assert result.output.endswith("interrupted: start the same command again, it goes on\n")
    assert not book.folder.exists()
    (slices,) = (chapters.BUILD / "checkpoints").glob("*")
    assert json.loads(slices.read_text(encoding="utf-8"))["seconds"] > 0


@contextmanager
def another(book, tmp_path, build):
    """The same command in a process of its own, which is killed at the end of the block."""
    program = ("import sys\nfrom pathlib import Path\nfrom fishlib.rerun import chapters, claims\n"
               "build, folder, stored, file = map(Path, sys.argv[1:])\n"
               "chapters.BUILD, chapters.CHAPTERS, claims.STORED = build, folder, stored\n"
               "claims.load.__defaults__ = (file, claims.PUBLISHED)\n"
               "from fishlib.rerun.cli import main\nmain(['run', '--claims', 'missing'])\n")
    places = [build, chapters.CHAPTERS, book.folder, tmp_path / "claims.yml"]
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, places)], stdout=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": str(chapters.PACKAGE.parent)})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_run_that_another_process_works_on_is_left_out_until_that_one_is_gone(book, tmp_path, build):
    log, pid = tmp_path / "log", tmp_path / "pid"
    book(steps=STEPS.format(log=str(log), pid=str(pid)), other="x = 1")
    with another(book, tmp_path, build):
        eventually(lambda: len(lines(log)) > 3)
        result = fishlib("run", "--claims", "missing")
        assert result.exit_code == 1, result.output
        assert result.output.endswith("steps: another process works on it\nnot made: steps\n")
    eventually(lambda: not alive(int(pid.read_text(encoding="utf-8"))))
    assert [folder.name for folder in book.folder.iterdir()] == ["11_other"]
    assert fishlib("run", "--claims", "missing").exit_code == 0
    assert not list((chapters.BUILD / "checkpoints").iterdir())


def test_a_kill_leaves_no_process_and_no_half_written_result(book, tmp_path, build):
    log, pid = tmp_path / "log", tmp_path / "pid"
    book(steps=STEPS.format(log=str(log), pid=str(pid)))
    with another(book, tmp_path, build):
        eventually(lambda: len(lines(log)) > 3)
    eventually(lambda: not alive(int(pid.read_text(encoding="utf-8"))))
    assert not book.folder.exists()
    assert not list(Path(build).rglob("results.json"))
    assert fishlib("run", "--claims", "missing").exit_code == 0
    assert load(book.folder / "10_steps" / "steps")["records"] == {"accuracy": pytest.approx(0.92)}
    assert len(lines(log)) in (39, 40)  # a step may have reached its checkpoint and not the log


def test_a_finished_run_that_was_not_stored_any_more_is_stored_without_a_run(book, monkeypatch):
    book(one="x = 1")
    assert fishlib("run", "--claims", "missing").exit_code == 0
    (file,) = book.folder.rglob("results.json")
    text = file.read_text(encoding="utf-8")
    file.unlink()
    monkeypatch.setattr("fishlib.rerun.run.perform", None)
    assert fishlib("run", "--claims", "missing").exit_code == 0
    assert file.read_text(encoding="utf-8") == text


def test_a_newer_result_takes_the_place_of_the_older_one(book):
    book(one="x = 1")
    assert fishlib("run", "--claims", "missing").exit_code == 0
    (file,) = book.folder.rglob("results.json")
    old = file.parent.with_name("by another name") / "results.json"
    old.parent.mkdir()
    file.rename(old)
    file.parent.rmdir()
    assert fishlib("run", "--claims", "one").exit_code == 0
    assert [*book.folder.rglob("results.json")] == [old]
