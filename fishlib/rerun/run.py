"""One run of a chapter: where it goes, whether it is finished already, and its execution in a process of its own."""

from __future__ import annotations

import concurrent.futures as cf
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fishlib.rerun import chapters
from fishlib.rerun.chapters import Chapter

SHOWN = "FISHLIB_SHOWN"  # variable that tells a run of the book where all these runs are
BEFORE = "FISHLIB_SECONDS_BEFORE"  # variable that tells a run that goes on how long it ran before it was stopped


@dataclass(frozen=True)
class Run:
    """A chapter with all its parameters, and the folder for its executed notebook and its results.json."""

    chapter: Path
    profile: str
    parameters: dict[str, Any]
    identity: str
    folder: Path

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.chapter.stem}.ipynb"

    @property
    def partial(self) -> Path:
        """Where the notebook of a failed run is kept."""
        return self.folder / f"{self.chapter.stem}.failed.ipynb"

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    @property
    def shown(self) -> Path | None:
        """The folder of all runs that the book shows, if this is one of them."""
        return self.folder.parent if self.folder.parent == (chapters.BUILD / "executed").resolve() else None


@dataclass(frozen=True)
class Outcome:
    """How an execution ended: `status` is finished, failed, timeout or stopped; `message` tells what went wrong."""

    status: str
    seconds: float
    message: str = ""


@dataclass
class Running:
    """The processes of runs under way and the cells they are at; an interrupted command ends them here."""

    processes: set[subprocess.Popen] = field(default_factory=set)
    cells: dict[str, tuple[int, int]] = field(default_factory=dict)
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.processes):
            stop(process)


class RunFailed(Exception):
    """A run did not finish; the message names the cell and the error."""


def plan(chapter: Chapter, profile: str = "quick", given: Mapping[str, Any] | None = None,
         folder: Path | None = None, below: Path | None = None) -> Run:
    """The run of a chapter with a profile and parameters, nothing executed.

    Parameters
    ----------
    folder : of the notebook and the results; by default `_build/executed/<chapter>` for the values that the book shows
        (profile quick, nothing changed) and `_build/runs/<chapter>/<identity>` for all others
    below : instead of `folder`, the folder that gets `<chapter>/<identity>`

    Raises
    ------
    ValueError
        as `Chapter.settle`
    """
    values = chapter.settle(profile, given)
    identity = chapter.identity(values)
    if folder is None and below is None and profile == "quick" and values == chapter.settle():
        folder = chapters.BUILD / "executed" / chapter.path.stem
    if folder is None:
        folder = (below or chapters.BUILD / "runs") / chapter.path.stem / identity
    return Run(chapter.path, profile, values, identity, Path(folder).resolve())


def finished(run: Run) -> bool:
    """Whether the run's folder holds this very run, complete.

    What the book shows depends also on what its chapters compare with (see `given`), so that it counts there.
    """
    try:
        provenance = json.loads(run.results.read_text(encoding="utf-8"))["provenance"]
        current = provenance["identity"] == run.identity and run.notebook.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return current and (run.shown is None or provenance.get("given_data") == given(run))


def given(run: Run) -> str:
    """Hash of what a run reads beside its images: what `data/` holds, and the other chapters' results if it judges them."""
    from fishlib.rerun import claims

    data = chapters.given_data()
    return chapters.digest(data + claims.read_by(run.chapter, run.shown)) if claims.judges(run.chapter) else data


def renew_text(run: Run) -> None:
    """Bring the text of a finished notebook up to date with its chapter: the code is the same, so its outputs stay."""
    import nbformat

    executed = chapters.read(run.notebook)
    renewed = with_outputs(chapters.read(run.chapter), executed)
    if [cell.source for cell in renewed.cells] != [cell.source for cell in executed.cells]:
        write(run.notebook, nbformat.writes(renewed))


def with_outputs(source: Any, executed: Any, injected: bool = True) -> Any:
    """`source` with the outputs of `executed`, whose code cells are the same but for an injected cell of parameters."""
    tags = [cell.metadata.get("tags", []) for cell in executed.cells]
    ran = [cell for cell, names in zip(executed.cells, tags, strict=True)
           if cell.cell_type == "code" and "injected-parameters" not in names]
    extra = [cell for cell, names in zip(executed.cells, tags, strict=True) if "injected-parameters" in names]
    cells, outputs = [], iter(ran)
    for cell in source.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            model = next(outputs)
            cell.outputs, cell.execution_count = model.outputs, model.execution_count
            if injected and "parameters" in cell.metadata.get("tags", []):
                cells += extra
    source.cells = cells
    return source


def execute(run: Run, timeout: float | None = None, environment: Mapping[str, str] | None = None,
            running: Running | None = None) -> Outcome:
    """Execute a run by papermill in a process of its own; it leaves notebook and results.json, or a partial notebook.

    The process ends with this one, however this one ends. Nothing is written to the run's folder before the end, but whether
    something could be is tried first: a chapter may take days.

    Parameters
    ----------
    timeout : seconds for the whole run
    environment : variables added to this process's own
    running : told of the process and its progress
    """
    running = running or Running()
    started = time.monotonic()
    try:
        check_writable(run.folder)
    except OSError as error:
        return Outcome("failed", 0.0, f"{run.chapter.stem}: not started, for {run.folder} cannot be written to "
                                      f"({error.strerror or error}): make room, or name another folder")
    with tempfile.TemporaryDirectory(prefix="fishlib-", ignore_cleanup_errors=True) as scratch:
        with (Path(scratch) / "log").open("w+", encoding="utf-8", errors="replace") as log:
            process = _spawn(run, Path(scratch), environment or {}, log)
            running.processes.add(process)
            clock = threading.Timer(timeout, stop, [process]) if timeout else None
            try:
                if running.stopped:
                    stop(process)
                if clock:
                    clock.start()
                error = _follow(process, lambda *cell: running.cells.update({run.chapter.stem: cell}))
            finally:
                if clock:
                    clock.cancel()
                stop(process)
                process.stdout.close()
                running.processes.discard(process)
                running.cells.pop(run.chapter.stem, None)
            seconds = time.monotonic() - started
            if process.returncode == 0:
                return Outcome("finished", seconds)
            if running.stopped:
                return Outcome("stopped", seconds)
            late = bool(timeout) and seconds >= timeout
            cause = f"it ran past its limit of {timeout:g} s" if late else error or _last_words(log)
        kept = _keep_partial(run, Path(scratch) / "run.ipynb")
    note = f"\nThe partial notebook: {kept}" if kept else ""
    return Outcome("timeout" if late else "failed", seconds, f"{run.chapter.stem}: {cause}{note}")


def _spawn(run: Run, scratch: Path, environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen:
    # The kernel has to import the library whose source the run's identity names.
    path = os.pathsep.join(filter(None, [str(chapters.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "fishlib.rerun.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        text=True, encoding="utf-8", start_new_session=True,
        env=os.environ | {"PYTHONPATH": path, "FISHLIB_PROFILE": run.profile, SHOWN: str(run.shown or "")} | dict(environment))
    job = {"chapter": str(run.chapter), "profile": run.profile, "parameters": run.parameters, "given": given(run),
           "identity": run.identity, "folder": str(run.folder), "scratch": str(scratch)}
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended at once; its last words are in the log
    return process


def _follow(process: subprocess.Popen, on_cell: Callable[[int, int], None]) -> str:
    """Read the process's messages to their end; what failed, if it says so."""
    error = ""
    for line in process.stdout:
        message = json.loads(line)
        if "cell" in message:
            on_cell(message["cell"], message["of"])
        error = message.get("error", error)
    process.wait()
    return error


def stop(process: subprocess.Popen) -> None:
    """End a run's process together with its kernel."""
    if process.poll() is None:
        try:
            process.stdin.write("stop\n")
            process.stdin.flush()
        except (OSError, ValueError):
            pass
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        process.stdin.close()
    except OSError:
        pass  # the job could not be handed over, for the process had ended


def perform(runs: Sequence[Run], jobs: int, timeout: float | None = None, environment: Mapping[str, str] | None = None,
            running: Running | None = None, tick: Callable[[], None] = lambda: None) -> Iterator[tuple[Run, Outcome]]:
    """Execute runs, `jobs` at a time; each with its outcome as it ends. An interruption ends all of them.

    Parameters
    ----------
    tick : called twice a second
    """
    running = running or Running()
    pool = cf.ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(execute, run, timeout, environment, running): run for run in runs}
        while waiting:
            ended, _ = cf.wait(waiting, timeout=0.5, return_when=cf.FIRST_COMPLETED)
            tick()
            for future in ended:
                yield waiting.pop(future), future.result()
    finally:
        running.stop()
        pool.shutdown(cancel_futures=True)


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()]
    return "\n".join(["the process of the run ended early:", *lines[-15:]])


def _keep_partial(run: Run, notebook: Path) -> Path | None:
    """Keep what a failing run has of its notebook, if there is one, and whole, and room for it."""
    try:
        text = notebook.read_text(encoding="utf-8")
        json.loads(text)
        write(run.partial, text)
    except (OSError, ValueError):
        return None
    return run.partial


def check_writable(folder: Path) -> None:
    """OSError if nothing can be written to `folder`, or, where it is still to be made, to the folder that it goes into.

    It is neither made for that nor is anything left in it.
    """
    folder = Path(folder).resolve()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"fishlib")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # not the name of the probe


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def swap(new: Path, out: Path) -> None:
    """Put the folder `new` at `out`; what was there goes only once `new` is in place."""
    former = new.parent / "former"
    try:
        if out.exists():
            os.replace(out, former)
        os.replace(new, out)
    except BaseException:
        if former.exists() and not out.exists():
            os.replace(former, out)
        raise


def plain(text: str) -> str:
    """Text without the escape sequences of terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
