"""Grading submissions by otter-grader without a container, each in a process that is confined, limited and ended whole.

A submission is code that somebody else wrote. It runs on a copy in a temporary folder, and may write there only (see
`fishlib.rerun.confine` for what that holds and what not); it sees none of this process's environment; a cell and the whole
run have time limits. The kernel that runs a submission also runs the checks, so a student who sets out to forge a score
can: look at what gets full points. For people who are not trusted at all, use a container or another machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from fishlib.rerun.assign import BUILT, with_seed
from fishlib.rerun.confine import confine, version

SUBREAPER = 36  # of prctl: children whose parent has ended stay below this process
LARGEST = 20_000_000  # bytes of a submission
MEMORY, FILE = 8 << 30, 1 << 30  # bytes of memory, and of a file, that a process of a submission may take
WORDS = re.compile(r"^\s*(?:\w+(?:Error|Interrupt|Exit|Exception)): (.+(?:\n(?!\s*$|\s*q\d).+)*)", re.MULTILINE)


class GradeError(Exception):
    """Nothing can be graded here; the message says why."""


@dataclass(frozen=True)
class Grade:
    """What became of a submission.

    Attributes
    ----------
    status : "graded", or "refused" when it could not be run to its end; then the score is 0 and `message` says why
    score, possible : points
    points : (score, possible) of each question
    words : what the failed checks of each question say
    """

    submission: str
    status: str
    score: float = 0.0
    possible: float = 0.0
    points: dict[str, tuple[float, float]] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    message: str = ""


def grade(submission: Path, autograder: Path | None = None, *, seconds: float = 180, cell_seconds: float = 60,
          seed: int | None = None, confined: bool = True) -> Grade:
    """Grade one notebook. It is not changed, nor is anything else outside a temporary folder.

    Parameters
    ----------
    autograder : archive that `make assignments` made; by default the one in `_build/assignments` that the notebook names
    seconds, cell_seconds : limits of the whole run (past it the submission is refused) and of a cell (past it the cell is
        interrupted, and the run goes on)
    seed : the number that this student was given; by default the one that stands in the notebook
    confined : False grades also where the system cannot confine a process to a folder, with the rights of this one

    Raises
    ------
    GradeError
        no archive, no otter-grader, or a system without Landlock
    """
    if importlib.util.find_spec("otter") is None:  # each submission would be refused for it
        raise GradeError("submissions are graded by otter-grader, pip install 'fishlib[course]'")
    if confined and not version():
        raise GradeError("this system cannot confine submissions to a folder (Linux with Landlock can): grade in a "
                         "container or on another machine, or say --unconfined to run them with your own rights")
    # Of a notebook that cannot be read nobody knows the assignment: its points are then those of the archive that was given.
    most = possible(Path(autograder)) if autograder else 0.0
    try:
        notebook = _read(Path(submission))
        archive = Path(autograder or archive_of(notebook))
        _same_assignment(notebook, archive)
    except ValueError as error:
        return Grade(str(submission), "refused", possible=most, message=str(error))
    with tempfile.TemporaryDirectory(prefix="fishlib-grade-", ignore_cleanup_errors=True) as folder:
        desk = Path(folder).resolve()
        nbformat.write(_prepared(notebook, seed), desk / "submission.ipynb")
        shutil.copyfile(archive, desk / "autograder.zip")
        job = {"cell_seconds": cell_seconds, "confined": confined}
        complaint = _run(desk, job, seconds)
        if complaint:
            return Grade(str(submission), "refused", possible=possible(archive), message=complaint)
        return _result(str(submission), json.loads((desk / "results.json").read_text(encoding="utf-8")), possible(archive))


def _read(submission: Path) -> nbformat.NotebookNode:
    if not submission.is_file():
        raise ValueError(f"there is no file {submission}")
    if submission.stat().st_size > LARGEST:
        raise ValueError(f"the file is larger than {LARGEST // 1_000_000} MB: clear its outputs")
    try:
        notebook = nbformat.read(submission, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ValueError(f"the file is not a notebook that can be read ({type(error).__name__})") from error
    return notebook


def name_of(notebook: nbformat.NotebookNode) -> str | None:
    """The assignment that a notebook says it belongs to."""
    meta = notebook.metadata.get("otter", {})
    return meta.get("assignment_name") if isinstance(meta, dict) else None


def archive_of(notebook: nbformat.NotebookNode, built: Path = BUILT) -> Path:
    """The archive that `make assignments` made for a notebook's assignment."""
    name = str(name_of(notebook))
    places = {path.parent.name: path for path in built.glob("*/*-autograder.zip")}
    if not places:
        raise GradeError(f"there are no archives in {built}: run `make assignments` first, or name one with --autograder")
    if name not in places:
        raise ValueError(f"the notebook says that it belongs to the assignment {name!r}; there are {', '.join(sorted(places))}")
    return places[name]


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as content:
            yield content
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise GradeError(f"{archive} is not an autograder archive: make it by `make assignments`") from error


def _same_assignment(notebook: nbformat.NotebookNode, archive: Path) -> None:
    with _opened(archive) as content:
        wanted = json.loads(content.read("otter_config.json")).get("assignment_name")
    if wanted and name_of(notebook) != wanted:
        raise ValueError(f"the notebook belongs to the assignment {name_of(notebook)!r}, the archive to {wanted!r}")


def possible(archive: Path) -> float:
    """The points that an archive's checks add up to."""
    with _opened(archive) as content:
        texts = [content.read(name).decode() for name in content.namelist() if name.startswith("tests/")]
    return sum(float(points) for text in texts for points in re.findall(r"^@test_case\(points=([\d.]+)", text, re.MULTILINE))


def _prepared(notebook: nbformat.NotebookNode, seed: int | None) -> nbformat.NotebookNode:
    """A copy that any machine can run: the kernel of this Python, no outputs, the seed that was given out."""
    notebook = with_seed(notebook, seed) if seed is not None else nbformat.from_dict(notebook)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _environment(desk: Path) -> dict[str, str]:
    """What a submission may know of this process: where programs and the library are, and folders of its own."""
    places = {name: str(desk / "home") for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME",
                                                    "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return kept | places | {"PYTHONPATH": path, "TMPDIR": str(desk / "tmp"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
                            "PYTHONDONTWRITEBYTECODE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def _run(desk: Path, job: dict[str, Any], seconds: float) -> str:
    """Run the submission on `desk`; what went wrong, or nothing."""
    for name in ("home", "tmp"):
        (desk / name).mkdir()
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "fishlib.rerun.grade", json.dumps(job)], cwd=desk, stdout=log,
                                   stdin=subprocess.PIPE, stderr=log, env=_environment(desk), start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it ran past its limit of {seconds:g} seconds: does a loop never end?"
        finally:
            _end(process)
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    if process.returncode or not (desk / "results.json").is_file():
        if any("DeadKernelError" in line for line in lines):
            spent = time.monotonic() - started
            return f"its kernel ended after {spent:.0f} seconds: does a cell end it (exit(), quit()), or fill the memory?"
        return f"it could not be run: {lines[-1] if lines else 'its process ended without a word'}"
    return ""


def _end(process: subprocess.Popen) -> None:
    """End the run with everything that it has started, which stays below it as long as it lives."""
    import psutil

    with contextlib.suppress(psutil.Error):  # it has ended
        _end_below(psutil.Process(process.pid))
    process.kill()
    process.wait()
    process.stdin.close()


def _end_below(process: Any) -> None:
    """End all that a process has started; again, as long as something goes on starting more."""
    import psutil

    for _ in range(20):
        killed = []
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
                if child.status() != psutil.STATUS_ZOMBIE:
                    child.kill()
                    killed.append(child)
        if not killed:
            return
        psutil.wait_procs(killed, timeout=0.2)


def _result(submission: str, results: dict[str, Any], most: float) -> Grade:
    tests = [test for test in results["tests"] if "max_score" in test]
    if not tests:
        return Grade(submission, "refused", possible=most, message="its checks did not come to an end")
    points = {test["name"]: (float(test["score"]), float(test["max_score"])) for test in tests}
    words = {test["name"]: said for test in tests if (said := _words(test["output"])) and test["score"] < test["max_score"]}
    return Grade(submission, "graded", sum(score for score, _ in points.values()), most, points, words)


def _words(output: str) -> list[str]:
    found = [" ".join(words.split()) for words in WORDS.findall(output)]
    return list(dict.fromkeys(found))


def table(grades: Sequence[Grade]) -> str:
    """CSV with a line for each submission: status, points in all and by question, and the words of the failed checks."""
    import pandas as pd

    rows = [{"submission": one.submission, "status": one.status, "score": one.score, "possible": one.possible}
            | {question: points for question, (points, _) in one.points.items()}
            | {"message": one.message or "; ".join(f"{question}: {' '.join(words)}" for question, words in one.words.items())}
            for one in grades]
    return pd.DataFrame(rows).to_csv(index=False)


# In the process of a submission -----------------------------------------------------------------------------------------------

def _main() -> None:
    """Start the run in a process below this one, which the run cannot signal, and end whatever it leaves behind."""
    import ctypes

    import psutil

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if not worker:
        _work(json.loads(sys.argv[1]), Path.cwd())
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _, status = os.waitpid(worker, 0)
    _end_below(psutil.Process())
    sys.exit(int(status != 0))


def _end_with_parent() -> None:
    """Standard input stays open as long as the process that asked for the grade lives."""
    import psutil

    os.read(0, 1)
    _end_below(psutil.Process())
    os._exit(1)


def _work(job: dict[str, Any], desk: Path) -> None:
    import resource

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for limit, most in ((resource.RLIMIT_FSIZE, FILE), (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    if job["confined"]:
        confine(desk)
    _limit_cells(job["cell_seconds"])
    from otter import run

    run.main("submission.ipynb", autograder="autograder.zip", output_dir=str(desk), no_logo=True)


def _limit_cells(seconds: float) -> None:
    """Give the executor that otter takes a time limit for each cell; otter has no setting for it."""
    from nbconvert import preprocessors
    from traitlets import Bool, Integer

    class ExecutePreprocessor(preprocessors.ExecutePreprocessor):
        timeout = Integer(max(1, int(seconds)))
        interrupt_on_timeout = Bool(True)

    preprocessors.ExecutePreprocessor = ExecutePreprocessor


if __name__ == "__main__":
    _main()
