"""Generating assignments by otter-grader and grading submissions, also hostile ones."""

import copy
import os
import zipfile
from pathlib import Path

import masters
import nbformat
import psutil
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell

from fishlib.rerun import assign
from fishlib.rerun.cli import main
from fishlib.rerun.confine import version

pytest.importorskip("otter", reason="assignments are generated and graded by otter-grader (extra: course)")

from fishlib.rerun import grade as grading

NAME = "fisher_information"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """All assignments, generated once; the solutions are graded by the tests below."""
    out = tmp_path_factory.mktemp("assignments")
    return {name: assign.generate(name, out, check=False) for name in masters.NAMES}


def archive(folder: Path) -> Path:
    return folder / f"{folder.name}-autograder.zip"


def grade(folder: Path, submission: Path, **limits):
    if not version():
        pytest.skip("needs Linux with Landlock, which confines a process to a folder")
    return grading.grade(submission, archive(folder), **limits)


def read(folder: Path, kind: str) -> nbformat.NotebookNode:
    return nbformat.read(folder / kind / f"{folder.name}.ipynb", as_version=4)


@pytest.fixture
def submit(built, tmp_path):
    """Grade the first assignment's solutions after a change: a function of the notebook, or a first cell."""
    def run(change, **limits):
        notebook = copy.deepcopy(read(built[NAME], "solutions"))
        if callable(change):
            change(notebook)
        else:
            notebook.cells.insert(0, new_code_cell(change))
        nbformat.write(notebook, tmp_path / "submission.ipynb")
        return grade(built[NAME], tmp_path / "submission.ipynb", **limits)
    return run


@pytest.mark.parametrize("name", masters.NAMES)
def test_student_version_in_the_book_is_what_its_master_gives(built, name):
    made = (built[name] / "student" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert (assign.ASSIGNMENTS / f"{name}.ipynb").read_text(encoding="utf-8") == made, f"fishlib assign {name} --book"


@pytest.mark.parametrize("name", masters.NAMES)
def test_student_version_has_neither_solutions_nor_hidden_checks(built, name):
    student, solutions = read(built[name], "student"), read(built[name], "solutions")
    text = nbformat.writes(student)
    assert "BEGIN SOLUTION" not in text
    assert "hidden=True" not in text
    assert sum(cell.source.startswith("grader.check(") for cell in student.cells) == len(masters.read(name).questions)
    assert "BEGIN SOLUTION" in nbformat.writes(solutions)
    with zipfile.ZipFile(archive(built[name])) as content:
        assert "hidden=True" in "".join(content.read(one).decode() for one in content.namelist() if one.endswith(".py"))


@pytest.mark.parametrize("name", masters.NAMES)
def test_solutions_get_full_points_and_the_untouched_student_version_none(built, name):
    solved = grade(built[name], built[name] / "solutions" / f"{name}.ipynb")
    assert (solved.status, solved.words) == ("graded", {})
    assert solved.score == solved.possible > 10
    untouched = grade(built[name], built[name] / "student" / f"{name}.ipynb")
    assert (untouched.status, untouched.score, untouched.possible) == ("graded", 0, solved.possible)
    assert set(untouched.words) == set(masters.read(name).questions)


def test_otters_own_command_grades_the_archive_without_docker(built, tmp_path):
    from otter import run

    results = run.main(str(built[NAME] / "student" / f"{NAME}.ipynb"), autograder=str(archive(built[NAME])),
                       output_dir=str(tmp_path), no_logo=True)
    assert results.total == 0
    assert (tmp_path / "results.json").is_file()


def test_given_seed_replaces_the_notebooks_own_and_the_same_archive_grades_its_sample(submit):
    def other(notebook):
        notebook.cells[:] = assign.with_seed(notebook, 4711).cells
        assert any("SEED = 4711  # your number" in cell.source for cell in notebook.cells)
        notebook.cells.append(new_code_cell("import os\nif SEED != 12:\n    os._exit(3)"))

    one = submit(other, seed=12)
    assert (one.status, one.score) == ("graded", one.possible)


@pytest.mark.parametrize(("line", "given"), [
    ("SEED = 0  # your number", "SEED = 12  # your number"), ("SEED=0", "SEED=12"), ("SEED  = 0", "SEED  = 12"),
    ("SEED: int = 0", "SEED: int = 12"), ("if True:\n    SEED = 0", "if True:\n    SEED = 12"),
    ("x, SEED = 1, 0", "x, SEED = 1, 12"),
    ("SEED = (SEED := 0)", "SEED = (12)"), ("é = 'é'; SEED = int(\n'0')", "é = 'é'; SEED = 12"),
    ("%matplotlib inline\r\nSEED=0", "%matplotlib inline\nSEED=12"),
    ("files = !ls\n\tSEED=0 # mine", "files = !ls\n\tSEED=12 # mine"),
    ("x = (7\n  % 3)\nSEED=0", "x = (7\n  % 3)\nSEED=12")])
def test_given_seed_stands_in_every_assignment_however_it_is_written(line, given):
    cells = [new_code_cell(f"{line}\nassert SEED == 12"), new_code_cell("SEED = 0")]
    seeded = assign.with_seed(nbformat.v4.new_notebook(cells=cells), 12)
    assert [cell.source for cell in seeded.cells] == [f"{given}\nassert SEED == 12", "SEED = 12"]


def test_reading_the_seed_is_no_assignment_and_a_notebook_without_any_gets_it_first():
    cells = [new_code_cell("print(SEED == 0, 'SEED = 0')\nSEED: int\nMY_SEED = 0")]
    seeded = assign.with_seed(nbformat.v4.new_notebook(cells=cells), 12)
    assert [cell.source for cell in seeded.cells] == ["SEED = 12", cells[0].source]


def test_without_otter_nothing_is_graded_instead_of_refused(built, monkeypatch, tmp_path):
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    file, table = built[NAME] / "solutions" / f"{NAME}.ipynb", tmp_path / "grades.csv"
    result = CliRunner().invoke(main, ["grade", str(file), "--autograder", str(archive(built[NAME])), "--out", str(table)])
    assert result.exit_code == 1
    assert "pip install 'fishlib[course]'" in result.output
    assert not table.exists()


def test_endless_cell_is_interrupted_and_the_rest_graded(submit):
    one = submit("while True:\n    pass", cell_seconds=10)
    assert (one.status, one.score) == ("graded", one.possible)


def test_endless_cell_that_holds_out_is_refused_within_the_limit(submit):
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass"
    one = submit(deaf, cell_seconds=1, seconds=8)
    assert (one.status, one.score) == ("refused", 0)
    assert "ran past its limit of 8 seconds" in one.message
    assert one.possible > 0


def test_exits_deleted_cells_and_renamed_answers_cost_their_own_points_only(submit):
    def spoil(notebook):
        cells = notebook.cells
        checks = [cell for cell in cells if cell.source.startswith("grader.check(")]
        cells.remove(checks[0])  # a check that the student deleted is made all the same
        cells.insert(3, new_code_cell("import sys\nsys.exit()"))
        for cell in cells:
            cell.source = cell.source.replace("def diagonal(", "def my_diagonal(")
            if cell.source.startswith("def from_adam("):
                cell.source = "def from_adam(v, m, B):\n    raise SystemExit"

    one = submit(spoil)
    assert one.status == "graded"
    assert set(one.words) == {"q2", "q5"}
    assert "there is no `diagonal`: keep the name" in one.words["q2"][0]
    assert "`from_adam` stopped with SystemExit" in one.words["q5"][0]
    assert one.score == one.possible - one.points["q2"][1] - one.points["q5"][1]


def test_notebook_without_its_first_cells_is_graded_with_words(submit):
    one = submit(lambda notebook: notebook.cells.__delitem__(slice(0, 3)))
    assert (one.status, one.score) == ("graded", 0)
    assert "SEED is not there" in one.words["q1"][0]


def test_kernel_that_ends_itself_is_refused(submit):
    one = submit("import os\nos._exit(0)")
    assert (one.status, one.score) == ("refused", 0)
    assert "its kernel ended" in one.message


def still_running(mark):
    return [process.pid for process in psutil.process_iter(["cmdline"]) if mark in " ".join(process.info["cmdline"] or [])]


def test_submission_can_neither_write_outside_nor_leave_a_process_nor_see_the_environment(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("FISHLIB_SECRET", "hunter2")
    target, kept, mark = tmp_path / "evil.txt", tmp_path / "kept.txt", f"left-{os.getpid()}"
    kept.write_text("kept")
    one = submit(f"""
import os, pathlib, subprocess, sys, tempfile
target, kept = pathlib.Path({str(target)!r}), pathlib.Path({str(kept)!r})
open("inside.txt", "w").write("its own folder is free")
tempfile.NamedTemporaryFile()
for act in (lambda: target.write_text("x"), lambda: kept.unlink(), lambda: os.truncate(kept, 0), lambda: os.mkdir(target),
            lambda: os.symlink("/", target), lambda: os.rename("inside.txt", target), lambda: os.link("inside.txt", target)):
    try:
        act()
    except OSError:
        continue
    os._exit(3)
subprocess.run(["sh", "-c", "echo x > '{target}'"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{mark}"], start_new_session=True)
subprocess.run(["sh", "-c", "setsid sh -c 'sleep 600; : {mark}' &"])
if "FISHLIB_SECRET" in os.environ:
    os._exit(3)
""")
    assert (one.status, one.score) == ("graded", one.possible)
    assert not target.exists()
    assert kept.read_text() == "kept"
    assert not still_running(mark)


def test_run_that_ends_the_process_above_it_is_refused_and_leaves_no_process(submit):
    mark = f"behind-{os.getpid()}"
    one = submit(f"""
import os, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{mark}"], start_new_session=True)
otter = os.getppid()
supervisor = int(open(f"/proc/{{otter}}/stat").read().rsplit(")", 1)[1].split()[1])
try:
    os.kill(supervisor, 0)
except PermissionError:
    os.kill(otter, signal.SIGKILL)
""")
    if version() >= 6:
        assert (one.status, one.score) == ("refused", 0)
    assert not still_running(mark)


def test_submission_for_another_assignment_or_without_a_notebook_is_refused(built, tmp_path):
    notebook = read(built[NAME], "student")
    notebook.metadata["otter"]["assignment_name"] = "cooking"
    nbformat.write(notebook, tmp_path / "other.ipynb")
    assert "belongs to the assignment 'cooking'" in grade(built[NAME], tmp_path / "other.ipynb").message
    (tmp_path / "broken.ipynb").write_text("{")
    assert "not a notebook" in grade(built[NAME], tmp_path / "broken.ipynb").message
    assert "there is no file" in grade(built[NAME], tmp_path / "absent.ipynb").message


def test_refused_submission_has_the_possible_points_of_the_archive_that_was_given(built, tmp_path):
    notebook = read(built[NAME], "student")
    notebook.metadata["otter"]["assignment_name"] = "cooking"
    nbformat.write(notebook, tmp_path / "other.ipynb")
    for name in ("other", "absent"):
        one = grade(built[NAME], tmp_path / f"{name}.ipynb")
        assert (one.status, one.score, one.possible) == ("refused", 0, grading.possible(archive(built[NAME])))
        assert one.possible > 10


def test_table_has_a_line_for_each_submission_with_points_and_words():
    text = grading.table([
        grading.Grade("a", "graded", 2, 3, {"q1": (2, 2), "q2": (0, 1)}, {"q2": ["the half is missing"]}),
        grading.Grade("b", "refused", 0, 3, message="its kernel ended")])
    assert text.splitlines() == ["submission,status,score,possible,q1,q2,message",
                                 "a,graded,2,3,2.0,0.0,q2: the half is missing", "b,refused,0,3,,,its kernel ended"]


def test_command_prints_words_writes_the_table_and_fails_when_one_was_refused(tmp_path, monkeypatch):
    grades = {"a": grading.Grade("a", "graded", 2, 3, {"q2": (0, 1)}, {"q2": ["the half is missing"]}),
              "b": grading.Grade("b", "refused", 0, 3, message="its kernel ended")}
    monkeypatch.setattr(grading, "grade", lambda submission, *_, **__: grades[str(submission)])
    result = CliRunner().invoke(main, ["grade", "a", "b", "--out", str(tmp_path / "grades.csv")])
    assert result.exit_code == 1
    assert result.output.splitlines() == ["a: graded, 2 of 3", "  q2: the half is missing",
                                          "b: refused, 0 of 3; its kernel ended"]
    assert (tmp_path / "grades.csv").read_text() == grading.table(list(grades.values()))


def test_command_says_what_to_do_without_an_archive_or_landlock(built, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "version", lambda: 1)
    with pytest.raises(grading.GradeError, match="run `make assignments` first"):
        grading.archive_of(read(built[NAME], "student"), tmp_path)
    with pytest.raises(grading.GradeError, match="is not an autograder archive"):
        grading.grade(built[NAME] / "student" / f"{NAME}.ipynb", built[NAME] / "student" / f"{NAME}.ipynb")
    monkeypatch.setattr(grading, "version", lambda: 0)
    result = CliRunner().invoke(main, ["grade", "a"])
    assert result.exit_code == 1
    assert "--unconfined" in result.output


def test_master_whose_solution_loses_points_is_not_generated(tmp_path, monkeypatch):
    (tmp_path / "masters").mkdir()
    notebook = nbformat.read(masters.MASTERS / f"{NAME}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("return B * (v - m**2) + m**2", "return B * v")
    nbformat.write(notebook, tmp_path / "masters" / f"{NAME}.ipynb")
    monkeypatch.setattr(assign, "ASSIGNMENTS", tmp_path)
    with pytest.raises(assign.AssignError, match="over-counts the squared mean gradient"):
        assign.generate(NAME, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_assignment_is_told_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=f"there is no assignment 'cooking': use one of .*{NAME}"):
        assign.generate("cooking", tmp_path)
    result = CliRunner().invoke(main, ["assign", NAME, "cooking", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
