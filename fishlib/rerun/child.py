"""The process of one run: executes the chapter by papermill and publishes its notebook and results.json.

It reads its job as one line of JSON on standard input and reports on standard output, a JSON object a line. Standard
input stays open as long as the parent lives: its end, or a second line, ends this process and its kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fishlib import notebook
from fishlib.rerun import chapters, claims
from fishlib.rerun.run import BEFORE, Run, RunFailed, plain, write


def main() -> None:
    # Only reports go to the parent: whatever else is printed goes to the log.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**message: Any) -> None:
        reports.write(json.dumps(message) + "\n")
        reports.flush()

    job = json.loads(open(0, "rb", buffering=0, closefd=False).readline())  # unbuffered: a word behind it is for the thread
    scratch = Path(job.pop("scratch"))
    threading.Thread(target=_end_with_parent, args=[scratch], daemon=True).start()
    run = Run(Path(job["chapter"]), job["profile"], job["parameters"], job["identity"], Path(job["folder"]))
    try:
        started = time.monotonic()
        executed = execute(run, scratch, report)
        publish(run, executed, job["given"], time.monotonic() - started + float(os.environ.get(BEFORE, 0)))
    except RunFailed as error:
        report(error=str(error))
        sys.exit(1)
    except OSError as error:
        report(error=f"its notebook or results could not be written ({error}): make room, or name another folder")
        sys.exit(1)


def _end_with_parent(scratch: Path) -> None:
    import psutil

    word = os.read(0, 64)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    for _ in range(0 if word else 100):  # the main thread may still write the notebook there, which a single pass would leave
        shutil.rmtree(scratch, ignore_errors=True)
        if not scratch.exists():
            break
        time.sleep(0.05)
    os._exit(1)


def execute(run: Run, scratch: Path, report: Callable[..., None]) -> Any:
    """Execute the chapter in `scratch`, as papermill does it; the executed notebook."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    chapter = chapters.load(run.chapter)
    if chapter.identity(run.parameters) != run.identity:
        raise RunFailed("the chapter, the library, the pins or the data are no longer those that the run was planned "
                        "with (edited since, or not the same on this machine): start it again")

    class Reporting(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *args: Any, **kwargs: Any) -> Any:
            begin = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
                report(cell=cell_index + 1, of=len(nb_man.nb.cells))
                begin(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, *args, **kwargs)

    papermill_engines.register("reporting", Reporting)
    changed = {name: value for name, value in run.parameters.items() if value != chapter.parameters[name].default}
    # Runs at the same time must not meet in one working directory, nor leave files beside the chapters.
    desk, source = scratch / "desk", scratch / "source.ipynb"
    desk.mkdir()
    shutil.copyfile(run.chapter, source)
    try:
        executed = papermill.execute_notebook(
            source, scratch / "run.ipynb", parameters=changed, engine_name="reporting", kernel_name="python3",
            language="python", progress_bar=False, cwd=desk)
    except papermill.PapermillExecutionError as error:
        raise RunFailed(_failure(error.exec_count, error.source, f"{error.ename}: {error.evalue}")) from error
    executed.metadata.pop("papermill", None)
    return executed


def _failure(count: int | None, source: str, error: str) -> str:
    shown = source.splitlines()
    shown = shown if len(shown) <= 30 else [*shown[:30], "..."]
    return "\n".join([f"cell [{count}] failed:", *(f"    {line}" for line in shown), plain(error)])


def publish(run: Run, executed: Any, given_data: str, seconds: float) -> None:
    """Write the executed notebook and then results.json, each whole: where results.json is, the run is finished."""
    import nbformat

    records, provenance = collect(executed)
    provenance = _fallback(run, seconds) | provenance | {
        "profile": run.profile, "identity": run.identity, "library": chapters.library(), "given_data": given_data,
        **vars(claims.mark(run.chapter)),
        "seconds": round(seconds, 1), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    results = {"chapter": run.chapter.stem, "parameters": run.parameters, "records": records, "provenance": provenance}
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    run.results.unlink(missing_ok=True)
    write(run.notebook, nbformat.writes(executed))
    run.partial.unlink(missing_ok=True)
    write(run.results, text)


def collect(executed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Records by name and provenance, from the metadata of an executed notebook's outputs.

    Raises
    ------
    RunFailed
        two records of one name and different values
    """
    records, provenance = {}, {}
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            meta = output.get("metadata", {})
            ours = meta.get("fishlib", {})
            provenance |= ours.get("provenance", {})
            if "value" not in ours or "scrapbook" not in meta:
                continue
            name = meta["scrapbook"]["name"]
            if records.setdefault(name, ours["value"]) != ours["value"]:
                raise RunFailed(f"two records are named {name!r} and differ: give each a name of its own")
    return records, provenance


def _fallback(run: Run, seconds: float) -> dict[str, Any]:
    """What can be said of the origin of a chapter that does not state it."""
    commit, dirty = notebook._commit()
    return {"commit": commit, "dirty": dirty, "seed": run.parameters.get("seed"), "device": None, "data": {},
            "versions": {name: notebook._version(name) for name in notebook.PACKAGES}, "duration_s": round(seconds, 1)}


if __name__ == "__main__":
    main()
