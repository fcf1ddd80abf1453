"""The command `fishlib`: run, sweep and collect chapters, render the book.

Exit status: 0 when all is done; 1 when a run or the rendering failed, or a run that claims need is still not made; 2 when
the command itself cannot be followed (nothing was run then); 130 when it was interrupted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from fishlib.rerun import chapters
from fishlib.rerun import run as runs

LONGEST = 30  # letters of a value in a table
# Errors of a disk that is full, and of a place that is closed to writing.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class BadInput(click.ClickException):
    """The command cannot be followed; nothing was run."""

    exit_code = 2


@contextmanager
def checking() -> Iterator[None]:
    """What is checked inside is the user's input: an error is told in one sentence."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


class FilePath(click.Path):
    """The path of a file to write. It has a name: that of "" would be the folder that one is in."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Path:
        path = Path(super().convert(value, parameter, context))
        if path.name in ("", ".."):
            self.fail(f"{str(value)!r} names no file: write folder/name", parameter, context)
        return path


class Display:
    """Lines that stay, and in a terminal a last line that shows what is going on."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()

    def line(self, text: str, **style: Any) -> None:
        self.status("")
        click.echo(click.style(text, **style) if style else text)

    def status(self, text: str) -> None:
        if self.live:
            click.echo(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", nl=False)


class Commands(click.Group):
    """A full disk, a folder that is closed to writing and Ctrl-C end every command with one line that says so."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing half-written was left", err=True)
            sys.exit(130)
        except click.BadOptionUsage as error:
            if error.option_name not in ("-p", "--parameter"):
                raise
            raise BadInput(f"{error.option_name} takes a name and a value, as in {error.option_name} epochs 4") from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output has gone, which click ends quietly
            place = f": {error.filename2 or error.filename}" if error.filename else ""
            advice = (". Make room, or name a folder that can be written to, and start the command again"
                      if error.errno in UNWRITABLE else "")
            raise click.ClickException(f"{error.strerror or error}{place}; nothing half-written was left{advice}") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fishlib")
def main() -> None:
    """Run the book's chapters with parameters of your own, sweep them over grids, collect results, render the site.

    A chapter is named by path, file name or stem (00_why_compact), from any folder.
    """


def _refuse_equals(context: click.Context, option: click.Parameter, given: Sequence[tuple[str, str]]) -> Any:
    """Written as name=value, a parameter would take the next word of the command for its value."""
    for name, _ in given:
        if "=" in name:
            raise BadInput(f"-p {name}: write name and value apart, -p {shlex.join(name.split('=', 1))}")
    return given


def _refuse_apart(context: click.Context, option: click.Parameter, words: Sequence[str]) -> Any:
    """Written as name and values apart, a part of a grid would leave its values for another word of the command."""
    for word in words:
        if "=" not in word:
            raise BadInput(f"{word!r} is no part of a grid: write name=first..last or name=value,value,... in one word")
    return words


parameters = click.option("-p", "--parameter", "given", nargs=2, multiple=True, metavar="NAME VALUE", callback=_refuse_equals,
                          help="Set a parameter of the chapter; see `fishlib params CHAPTER`. Repeatable.")
profile = click.option("--profile", default="quick", show_default=True,
                       help="Named set of values in chapters/profiles/<chapter>.yml; quick is the chapter's defaults.")
timeout = click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                       help="End a run that takes longer, as failed. No limit by default.")
force = click.option("--force", is_flag=True, help="Run also what is finished already.")


@main.command()
@click.argument("names", metavar="CHAPTER...", nargs=-1)
@profile
@parameters
@click.option("--claims", "which", metavar="WHICH",
              help="Instead of chapters: run and store what claims need. missing, stale, or names from `fishlib claims`.")
@click.option("--budget", metavar="DURATION", help="With --claims: end after 90s, 10m or 8h; start again to go on.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for <chapter>.ipynb and results.json; with several chapters, a folder in it for each.")
@click.option("-j", "--jobs", type=click.IntRange(min=1),
              help="Chapters at once. Default: as cores and memory allow at quick on a CPU, else one.")
@timeout
@force
def run(names: Sequence[str], profile: str, given: Sequence[tuple[str, str]], which: str | None, budget: str | None,
        out: Path | None, jobs: int | None, timeout: float | None, force: bool) -> None:
    """Execute chapters by papermill, each in a process of its own.

    Writes the executed notebook and results.json (records, parameters, provenance). Without --out, runs at the quick
    profile with nothing changed go to _build/executed/<chapter>/, where `fishlib render` takes them from; all others
    go to _build/runs/<chapter>/<identity>/. A finished run is not run again as long as its chapter, parameters, data,
    library and pinned versions stay the same; one that the book shows, also as long as the stored records do. A chapter that
    reads the results of the others comes after them. A failing run leaves <chapter>.failed.ipynb.

    With --claims, the runs that decide the proposals' claims are made one after the other, the shortest first, and their
    results stored in data/runs. It can be killed at any moment: start it again, and what was trained is not trained again
    where the chapter keeps checkpoints. Several such commands at once share the work. The exit status is 0 when all of them
    are made, so that a shell can repeat it.
    """
    with checking():
        _check_claims(which, names, budget, profile != "quick" or given or out or jobs or timeout or force)
        seconds = None if budget is None else _seconds(budget)
    if which is not None:
        sys.exit(_work(which, seconds))
    with checking():
        loaded = list({chapter.path: chapter for chapter in map(chapters.load, names)}.values())
        settled = [chapter.settle(profile, _pairs(given)) for chapter in loaded]
    _fetch(values.get("dataset") for values in settled)
    with checking():
        planned = [runs.plan(chapter, profile, values, _folder(out, chapter, len(loaded)))
                   for chapter, values in zip(loaded, settled, strict=True)]
        _refuse_shared_folders(planned)
    display, failed = Display(), []
    for part in _judging_last(planned):
        waiting = _without_finished(part, force, display)
        failed += _perform(waiting, jobs or _default_jobs(len(waiting), profile), timeout, display)
    if failed:
        sys.exit(1)


def _check_claims(which: str | None, names: Sequence[str], budget: str | None, others: Any) -> None:
    if which is None and not names:
        raise ValueError("name a chapter, or say --claims missing")
    if which is None and budget is not None:
        raise ValueError("--budget goes with --claims; --timeout limits a single run")
    if which is not None and (names or others):
        raise ValueError("--claims goes with --budget alone: chapters, profiles and parameters are those of data/claims.yml")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"--budget {text!r} is no duration: write 90s, 10m or 8h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _work(which: str, budget: float | None) -> int:
    """Make and store the runs that claims need, as far as the budget goes; the exit status."""
    from fishlib.rerun import claims as judging
    from fishlib.rerun import devices

    ends, gpu, left_over = None if budget is None else time.monotonic() + budget, bool(devices.available()), []
    with checking():
        wanted = judging.chosen(which, judging.load(), judging.stored(), gpu)
    display = Display()
    display.line(f"{_runs(len(wanted))} to make, on {'a GPU' if gpu else 'the CPU'}")
    for number, one in enumerate(wanted):
        left = None if ends is None else ends - time.monotonic()
        if left is not None and left <= 0:
            display.line("the budget is spent: start the same command again to go on")
            left_over += wanted[number:]
            break
        expected = 60 * (one.gpu if gpu else one.cpu)
        try:
            plan = judging.planned(one)
            reason = _cannot_start(plan, expected, left)
        except ValueError as error:  # a damaged data file concerns the runs on it alone
            reason = str(error)
        if reason:
            display.line(f"{one.id}: {reason}")
        if reason or not _make(one, plan, expected, left, display):
            left_over.append(one)
    if left_over:
        display.line(f"not made: {', '.join(one.id for one in left_over)}")
    return int(bool(left_over))


def _cannot_start(plan: runs.Run | None, expected: float, left: float | None) -> str:
    """Why a run is not begun; empty if it is."""
    from fishlib.rerun import claims as judging

    if plan is None:
        return "its chapter is not there yet"
    dataset = plan.parameters.get("dataset")
    if chapters.missing_data(dataset):
        return f"{dataset}.npz is not on this machine: put it into FISHLIB_DATA"
    if left is None or runs.finished(plan):
        return ""
    if expected > left and not judging.resumes(plan):
        return f"it takes about {_duration(expected)} in one piece, more than is left of the budget"
    if left < 2 * (futile := _slices(plan)["futile"]):
        return f"it came to no checkpoint in {_duration(futile)}: give it at least twice as long"
    return ""


def _slices(plan: runs.Run) -> dict[str, float]:
    """Of a run that was stopped: the seconds of its parts, and those of the last one if it left no checkpoint."""
    try:
        return json.loads(_slices_file(plan).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"seconds": 0.0, "futile": 0.0}


def _slices_file(plan: runs.Run) -> Path:
    return chapters.BUILD / "checkpoints" / f"{plan.identity}.json"


def _kept(folder: Path) -> dict[Path, tuple[int, int]]:
    """The checkpoints of a run, with what changes when one is written."""
    files = [(file, file.stat()) for file in folder.rglob("*") if file.is_file()]
    return {file: (about.st_size, about.st_mtime_ns) for file, about in files}


@contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Hold the lock `file`; whether no other process does. The kernel gives it back when a process ends, however it ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(lock.fileno()), file.stat())  # else its last holder has just removed it
        except (BlockingIOError, FileNotFoundError):
            held = False
        try:
            yield held
        finally:
            if held:
                file.unlink(missing_ok=True)


def _make(one: Any, plan: runs.Run, expected: float, left: float | None, display: Display) -> bool:
    """Run an experiment, or go on with it, and store its results; whether they are stored."""
    with _alone(_slices_file(plan).with_suffix(".lock")) as alone:
        if not alone:
            display.line(f"{one.id}: another process works on it")
        return alone and _make_alone(one, plan, expected, left, display)


def _make_alone(one: Any, plan: runs.Run, expected: float, left: float | None, display: Display) -> bool:
    from fishlib.rerun import claims as judging

    folder, parts = chapters.BUILD / "checkpoints" / plan.identity, _slices_file(plan).is_file()
    if not runs.finished(plan):
        display.line(f"{one.id}: running {one.chapter}, about {_duration(expected)} when begun anew")
        began, before, kept = time.monotonic(), _slices(plan)["seconds"], _kept(folder)
        running, places = runs.Running(), {"FISHLIB_CHECKPOINTS": str(folder), runs.BEFORE: str(before)}

        def stopped(in_vain: bool) -> None:
            seconds = time.monotonic() - began
            runs.write(_slices_file(plan), json.dumps({"seconds": before + seconds, "futile": seconds * in_vain}))

        try:
            ((_, outcome),) = runs.perform([plan], 1, left, places, running,
                                           lambda: display.status(f"{one.id} {running.cells}"))
        except KeyboardInterrupt:
            stopped(in_vain=False)
            display.line("interrupted: start the same command again, it goes on")
            sys.exit(130)
        if outcome.status == "timeout":
            stopped(in_vain=_kept(folder) == kept)
            plan.partial.unlink(missing_ok=True)
            display.line(f"{one.id}: stopped at the end of the budget, start again to go on")
            return False
        if outcome.status != "finished":
            display.line(outcome.message, fg="red")
            return False
    file = judging.store(plan, one)
    shutil.rmtree(folder, ignore_errors=True)
    _slices_file(plan).unlink(missing_ok=True)
    made = json.loads(file.read_text(encoding="utf-8"))["provenance"]
    memory = made.get("memory_bytes")
    display.line(f"{one.id}: {_duration(made['seconds'])} on {made['device'] or 'an unknown device'}"
                 + (f", at most {memory / 1e9:.1f} GB{' in its last part' if parts else ''}" if memory else "")
                 + f"; stored as {_short(file)}")
    return True


def _pairs(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    if len(dict(given)) < len(given):
        raise ValueError("a parameter is given twice: give each -p name once")
    return dict(given)


def _fetch(datasets: Iterator[Any]) -> None:
    """Download what is missing before anything runs: parallel runs would all do it, compute nodes often cannot."""
    for dataset in dict.fromkeys(datasets):
        if chapters.missing_data(dataset):
            click.echo(f"{dataset} is not on this machine yet: looking for it")
            try:
                chapters.fetch(dataset)
            except (ValueError, OSError) as error:
                raise click.ClickException(str(error)) from error


def _folder(out: Path | None, chapter: chapters.Chapter, count: int) -> Path | None:
    return out if out is None or count == 1 else out / chapter.path.stem


def _refuse_shared_folders(planned: Sequence[runs.Run]) -> None:
    taken: dict[Path, Path] = {}
    for one in planned:
        if one.folder in taken:
            raise ValueError(f"{taken[one.folder]} and {one.chapter} would both go to {one.folder}: run them apart")
        taken[one.folder] = one.chapter
        others = [file for file in one.folder.glob("*.ipynb") if file not in (one.notebook, one.partial)]
        if others and one.results.is_file():
            raise ValueError(f"{one.folder} holds the run of another chapter ({others[0].name}): choose another --out")


def _judging_last(planned: Sequence[runs.Run]) -> list[list[runs.Run]]:
    """Runs in two parts: a chapter that reads the results of the others runs when they have theirs."""
    from fishlib.rerun import claims as judging

    last = [one for one in planned if judging.judges(one.chapter)]
    return [[one for one in planned if one not in last], last]


def _without_finished(planned: Sequence[runs.Run], force: bool, display: Display) -> list[runs.Run]:
    waiting = []
    for one in planned:
        if force or not runs.finished(one):
            waiting.append(one)
        else:
            runs.renew_text(one)
            display.line(f"{one.chapter.stem}: finished before, unchanged (--force runs it again): "
                         f"{_short(one.notebook)}")
    return waiting


def _default_jobs(count: int, profile: str) -> int:
    from fishlib.rerun import devices, sweep

    return 1 if profile != "quick" or devices.available() else max(1, min(count, sweep.default_workers(False)))


def _perform(waiting: Sequence[runs.Run], jobs: int, timeout: float | None, display: Display,
             lasting: bool = True) -> list[runs.Run]:
    """Execute runs and tell of each, with the place of its notebook where that is `lasting`; those that failed."""
    failed, running, started = [], runs.Running(), time.monotonic()
    if waiting:
        display.line(f"running {', '.join(one.chapter.stem for one in waiting)}"
                     + (f", {min(jobs, len(waiting))} at a time" if len(waiting) > 1 else ""))

    def tick() -> None:
        cells = ", ".join(f"{stem} cell {cell} of {of}" for stem, (cell, of) in sorted(running.cells.items()))
        display.status(f"{time.monotonic() - started:4.0f} s  {cells}")

    try:
        for one, outcome in runs.perform(waiting, jobs, timeout, _threads(jobs), running, tick):
            if outcome.status == "finished":
                display.line(f"{one.chapter.stem}: finished in {outcome.seconds:.0f} s" + f": {_short(one.notebook)}" * lasting)
            else:
                failed.append(one)
                display.line(outcome.message, fg="red")
    except KeyboardInterrupt:
        display.line("interrupted: the runs under way were ended, those finished stay")
        sys.exit(130)
    display.status("")
    return failed


def _threads(jobs: int) -> dict[str, str]:
    """Share the cores among runs at the same time, unless the user has."""
    from fishlib.rerun.sweep import cores

    return {} if jobs == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@main.command()
def claims() -> None:
    """List the claims of the proposals with their verdicts, and the runs that decide them.

    A record is current, stale (the code that the chapter runs has changed since it was made, and the quick results in the
    chapter by more than noise), unknown (the code has changed, and the commit that made the record cannot be read here) or
    missing; each run is shown with its expected time and the command that makes and stores it.
    """
    from fishlib.rerun import claims as judging

    with checking():
        book, found = judging.load(), judging.stored()
        table = judging.table(book, found)
        states = {name: judging.state(one, found) for name, one in book.experiments.items()}
    rows = [["claim", "record", "verdict", "confidence", "a smaller run says", "run"]]
    rows += [[row.claim, row.record or "none", row.verdict, row.confidence, row.provisional, row.run]
             for row in table.itertuples()]
    _columns(rows)
    click.echo()
    _columns([["run", "record", "one GPU", "one CPU thread", "command"], *(
        [one.id, states[one.id], _duration(60 * one.gpu), _duration(60 * one.cpu), one.command]
        for one in book.experiments.values())])
    counts = table.verdict.value_counts()
    click.echo("\n" + ", ".join(f"{word}: {counts.get(word, 0)}" for word in judging.VERDICTS))


def _columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@main.command()
@click.argument("name", metavar="CHAPTER")
def params(name: str) -> None:
    """List a chapter's parameters: type, default, valid values, meaning, and what its profiles change."""
    with checking():
        chapter = chapters.load(name)
        others = {profile: chapter.settle(profile) for profile in chapter.profiles if profile != "quick"}
    rows, long = [["name", "type", "quick", *others, "valid", "meaning"]], []
    for parameter in chapter.parameters.values():
        values = [repr(parameter.default), *(repr(settled[parameter.name]) for settled in others.values())]
        rows.append([parameter.name, parameter.kind.__name__, *map(_cut, values), _cut(_valid(parameter)), parameter.help])
        texts = zip(["quick", *others, "valid"], [*values, _valid(parameter)], strict=True)
        long += [f"{parameter.name}, {column}: {text}" for column, text in texts if _cut(text) != text]
    _columns(rows)
    for line in long:
        click.echo(f"\n{line}")


def _cut(text: str) -> str:
    """A text short enough for a column."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _valid(parameter: Any) -> str:
    if parameter.choices:
        return " | ".join(map(str, parameter.choices))
    return f"{parameter.low:g} .. {parameter.high:g}" if parameter.low is not None else "any"


@main.command()
@click.option("--executed", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of executed chapters. Default: _build/executed.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the site. Default: _build/html.")
def render(executed: Path | None, out: Path | None) -> None:
    """Render the book from executed chapters; ends with the path of its first page."""
    from fishlib.rerun import render as rendering

    _refuse_stale(executed or chapters.BUILD / "executed", "run `fishlib run {}`")
    try:
        site = rendering.render(executed, out)
    except rendering.RenderError as error:
        raise click.ClickException(str(error)) from error
    click.echo(site / "index.html")


@main.command()
@click.option("--out", type=FilePath(dir_okay=False), help="The file. Default: _build/book.pdf.")
def pdf(out: Path | None) -> None:
    """Print the rendered site to one PDF, by Chromium; ends with its path."""
    from fishlib.rerun import pdf as printing

    _refuse_stale(chapters.BUILD / "executed", "run `fishlib run {}` and `fishlib render`")
    display = Display()
    try:
        file = printing.print_book(out=out, show=lambda page: display.status(f"printing {page}"))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    display.status("")
    click.echo(file)


def _refuse_stale(executed: Path, advice: str) -> None:
    try:
        stale = _stale(executed)
    except ValueError as error:
        raise click.ClickException(f"{error}, and run its chapter again") from error
    if stale:
        raise click.ClickException(f"{', '.join(stale)} ran with another state of chapter, library, data or pins: "
                                   + advice.format(" ".join(stale)))


def _stale(executed: Path) -> list[str]:
    """Chapters whose run is not what they would give now."""
    from fishlib.rerun import collect

    stale = []
    for file in sorted([*executed.glob("results.json"), *executed.glob("*/results.json")]):
        content = collect.read(file)
        source, values = chapters.CHAPTERS / f"{content['chapter']}.ipynb", content["parameters"]
        if source.is_file():
            now = runs.Run(source, "", values, chapters.load(source).identity(values), file.parent.resolve())
            stale += [] if runs.finished(now) else [content["chapter"]]
    return stale


@main.command()
@click.argument("names", metavar="CHAPTER...", nargs=-1, required=True)
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Chapters at once, as for `run`.")
@timeout
def refresh(names: Sequence[str], jobs: int | None, timeout: float | None) -> None:
    """Execute chapters again at the quick profile and renew their outputs in place.

    Leaves out what changes from run to run: times, versions, the provenance table, outputs of cells tagged
    nbval-ignore-output, outputs of more than 400,000 characters. A chapter that fails is left as it was, and what was
    executed of it stays in a folder of its own. A chapter that reads the results of the others, as the scorecard does, comes
    after them and reads their new ones.
    """
    with checking():
        loaded = {chapter.path: chapter for chapter in map(chapters.load, names)}
        chapters.BUILD.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="refresh-", dir=chapters.BUILD))
    failed: list[runs.Run] = []
    try:
        with checking():
            planned = [runs.plan(chapter, folder=scratch / str(number) / chapter.path.stem)
                       for number, chapter in enumerate(loaded.values())]
            _renew(planned, jobs, timeout, failed)
    finally:
        if not failed:
            shutil.rmtree(scratch)
    if failed:
        sys.exit(1)


def _renew(planned: Sequence[runs.Run], jobs: int | None, timeout: float | None, failed: list[runs.Run]) -> None:
    """Execute chapters and take their outputs over; those that fail are added to `failed`."""
    from fishlib.rerun import refresh as refreshing

    display = Display()
    for part in _judging_last(planned):
        failed += _perform(part, jobs or _default_jobs(len(part), "quick"), timeout, display, lasting=False)
        for one in part:
            if one not in failed:
                changed = refreshing.renew(one)
                display.line(f"{_short(one.chapter)}: {'renewed' if changed else 'unchanged'}")


@main.command()
@click.argument("name", metavar="CHAPTER")
@click.option("-g", "--grid", "words", multiple=True, metavar="NAME=VALUES", callback=_refuse_apart,
              help="Values of a parameter: seed=0..4, or strength=0,1e-3,1e-2. Repeatable; all combinations run.")
@profile
@parameters
@click.option("--scheduler", metavar="ADDRESS", help="Use the Dask scheduler at this address (tcp://host:8786).")
@click.option("--workers", type=click.IntRange(min=1),
              help="Start so many workers here. Default: as many as GPUs, else as cores and memory carry.")
@click.option("--slurm", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Start workers as SLURM jobs: a YAML file with `jobs` and arguments of dask_jobqueue.SLURMCluster.")
@click.option("--device-per-run/--shared-devices", "device", default=None,
              help="Give each run a GPU of its own. Default: where this machine has several. With --scheduler, start "
                   "the workers with `--resources device=<GPUs of the worker>`.")
@click.option("--retries", type=click.IntRange(min=0), default=0, show_default=True,
              help="Times that a failing run is tried again. Runs of lost workers are done again in any case.")
@timeout
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder that gets <chapter>/<identity>/ for each run. Default: _build/runs.")
@force
@click.option("--dry-run", is_flag=True, help="List the runs, and which are finished; start nothing.")
def sweep(name: str, words: Sequence[str], profile: str, given: Sequence[tuple[str, str]], scheduler: str | None,
          workers: int | None, slurm: Path | None, device: bool | None, retries: int, timeout: float | None,
          out: Path | None, force: bool, dry_run: bool) -> None:
    """Run a chapter over a grid of parameters, on a local Dask cluster or on one that is there.

    Finished runs are skipped: start an interrupted sweep again and it goes on where it stopped. A failing run does not
    stop the others; it leaves its partial notebook and is named at the end. `fishlib results` collects the numbers.
    """
    from fishlib.rerun import devices
    from fishlib.rerun import sweep as sweeping

    with checking():
        if sum(choice is not None for choice in (scheduler, workers, slurm)) > 1:
            raise ValueError("--scheduler, --workers and --slurm exclude each other: give one of them")
        chapter = chapters.load(name)
        axes = sweeping.grid(chapter, words)
        fixed = chapter.settle(profile, _pairs(given))
        if slurm:
            sweeping.slurm_settings(slurm)
    _fetch(iter(axes.get("dataset", [fixed.get("dataset")])))
    with checking():
        planned = sweeping.plans(chapter, profile, _pairs(given), axes, out)
    display = Display()
    waiting = [one for one in planned if force or not runs.finished(one)]
    display.line(f"{chapter.path.stem}: {_runs(len(planned))}, {len(planned) - len(waiting)} finished before")
    if dry_run:
        for one in planned:
            point = " ".join(f"{axis}={one.parameters[axis]}" for axis in axes)
            display.line(f"{'to do   ' if one in waiting else 'finished'}  {point}  {_short(one.folder)}")
        return
    if waiting and not scheduler and not slurm:  # elsewhere the folder may be another machine's
        runs.check_writable(waiting[0].folder)
    if device is None:
        device = not scheduler and not slurm and len(devices.available()) > 1
    options = {"force": force, "timeout": timeout, "device": device}
    failed = _sweep(waiting, axes, display, (scheduler, workers, slurm), retries, options) if waiting else []
    place = f" --in {shlex.quote(_short(out))}" if out else ""
    display.line(f"{_runs(len(planned))}: {len(planned) - len(failed)} finished, {len(failed)} failed; collect them by "
                 f"`fishlib results {shlex.quote(chapter.path.stem)}{place}`")
    for text in failed:
        display.line(f"failed: {text}", fg="red")
    if failed:
        sys.exit(1)


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _sweep(waiting: Sequence[runs.Run], axes: Sequence[str], display: Display, where: tuple, retries: int,
           options: dict[str, Any]) -> list[str]:
    """Do the runs on a cluster; the failed ones, by their place in the grid."""
    from fishlib.rerun import sweep as sweeping

    scheduler, workers, slurm = where
    failed: list[str] = []

    def failure(one: runs.Run, error: BaseException) -> None:
        failed.append(" ".join(f"{axis}={one.parameters[axis]}" for axis in axes) + f"  {_short(one.folder)}")
        display.line(str(error) or type(error).__name__, fg="red")

    try:
        with ExitStack() as stack:
            with checking():
                client = stack.enter_context(sweeping.cluster(scheduler, workers, slurm, options["device"]))
            if not scheduler and not slurm:
                options = options | {"threads": max(1, sweeping.cores() // sweeping.capacity(client, False))}
            device = options["device"]
            _welcome(client, display, device)
            sweeping.drive(waiting, sweeping.executor(client, retries, device),
                           lambda: sweeping.capacity(client, device), len(waiting), _Shown(display), failure, **options)
    except KeyboardInterrupt:
        display.line("interrupted: start the same sweep again, it goes on where it stopped")
        sys.exit(130)
    except ImportError as error:
        raise click.ClickException(f"{error}: sweeps need Dask, pip install 'fishlib[sweep]'") from error
    except ConnectionError as error:
        raise click.ClickException(str(error)) from error
    display.status("")
    return failed


def _welcome(client: Any, display: Display, device: bool) -> None:
    from fishlib.rerun import sweep as sweeping

    display.line(f"Dask dashboard: {client.dashboard_link or 'none (pip install bokeh)'}")
    if not sweeping.capacity(client, device):
        resource = f" --resources {sweeping.REQUEST}=<number of GPUs>" if device else ""
        display.line("no worker that can take these runs has joined yet, waiting; by hand: "
                     f"`dask worker {client.scheduler.address} --nthreads 1{resource}`")


class _Shown:
    """Progress as one changing line in a terminal, else as a line for each run that ends."""

    def __init__(self, display: Display) -> None:
        self.display, self.ended = display, 0

    def __call__(self, progress: Any) -> None:
        ended = progress.done + progress.failed
        left = "" if progress.seconds_left is None else f", about {_duration(progress.seconds_left)} left"
        if not progress.running and ended < progress.total:
            left = ", no worker is there"
        text = (f"done {progress.done}, running {progress.running}, failed {progress.failed}, "
                f"waiting {progress.total - ended - progress.running}{left}")
        if self.display.live:
            self.display.status(text)
        elif ended != self.ended:
            self.display.line(text)
        self.ended = ended


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"


@main.command()
@click.argument("names", metavar="[ASSIGNMENT]...", nargs=-1)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="The student's number; the samples follow from it.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder that gets <assignment>/ for each. Default: _build/assignments.")
@click.option("--no-check", is_flag=True, help="Do not grade the solutions first.")
@click.option("--book", is_flag=True, help="Renew the student versions that the book shows (seed 0).")
def assign(names: Sequence[str], seed: int, out: Path | None, no_check: bool, book: bool) -> None:
    """Generate assignments from their masters: student version, solutions, archive of the autograder. All by default.

    Needs the extra `course` (otter-grader). The solutions are graded first; a master whose solutions do not get full
    points leaves what was there before.
    """
    from fishlib.rerun import assign as assigning

    if book and seed:
        raise BadInput("the book shows the student versions of seed 0: leave --seed or --book out")
    with checking():
        for name in names:
            assigning.check_name(name, seed)
    for name in names or assigning.masters():
        try:
            made = assigning.generate(name, out or assigning.BUILT, seed, not no_check)
        except assigning.AssignError as error:
            raise click.ClickException(str(error)) from error
        click.echo(_short(made))
        if book:
            click.echo(f"{name} in the book: {'renewed' if assigning.publish(name, made) else 'unchanged'}")


@main.command()
@click.argument("submissions", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--autograder", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Archive to grade by. Default: that of _build/assignments which the notebook names.")
@click.option("--seed", type=click.IntRange(min=0), help="The number that was given out. Default: the notebook's own.")
@click.option("--seconds", type=click.FloatRange(min=1), default=180, show_default=True, help="Limit of a submission.")
@click.option("--cell-seconds", type=click.FloatRange(min=1), default=60, show_default=True,
              help="Limit of a cell. Below 20, a task that never ends can cost the whole submission.")
@click.option("--out", type=FilePath(dir_okay=False), help="Table to write (CSV), a line each.")
@click.option("--unconfined", is_flag=True, help="Grade also where a process cannot be kept from writing elsewhere.")
def grade(submissions: Sequence[Path], autograder: Path | None, seed: int | None, seconds: float, cell_seconds: float,
          out: Path | None, unconfined: bool) -> None:
    """Grade submissions, each in a process that may write in a temporary folder only and has a time limit.

    Needs the extra `course` (otter-grader). Exit status 1 when one was refused. Ctrl-C keeps the grades that are there.
    """
    from fishlib.rerun import grade as grading

    if out:
        runs.check_writable(out.parent)
    grades = []
    try:
        for submission in submissions:
            grades.append(one := grading.grade(submission, autograder, seed=seed, seconds=seconds, cell_seconds=cell_seconds,
                                               confined=not unconfined))
            click.echo(f"{submission}: {one.status}, {one.score:g} of {one.possible:g}"
                       + (f"; {one.message}" if one.message else ""))
            for question, words in one.words.items():
                click.echo("\n".join(f"  {question}: {line}" for line in words))
    except grading.GradeError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if out and grades:  # also those of before an interruption
            runs.write(out, grading.table(grades))
    if any(one.status == "refused" for one in grades):
        sys.exit(1)


@main.command()
@click.argument("pattern", default="*")
@click.option("--in", "folders", multiple=True, type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Where to look. Default: _build/runs and data/runs (the stored full-size runs). Repeatable.")
@click.option("--out", type=FilePath(), help="Path of the tables, without ending. Default: _build/results.")
@click.option("--summary", "summarise", is_flag=True,
              help="Mean, standard deviation, 95 % interval and n of each record for each setting, over seeds.")
@click.option("--plot", nargs=3, metavar="X Y HUE",
              help="Draw Y over X, a line for each HUE (- for one line), to <out>.png.")
def results(pattern: str, folders: Sequence[Path], out: Path | None, summarise: bool,
            plot: tuple[str, str, str] | None) -> None:
    """Collect the results of all runs into one tidy table, as parquet and CSV; print what of it fits a terminal.

    PATTERN chooses chapters ('01*') or runs ('01*/3fa9*'). Two runs with the same chapter and parameters, and records
    that are not finite, are refused by name.
    """
    from fishlib.rerun import collect

    out = out or chapters.BUILD / "results"
    runs.check_writable(out.parent)
    try:
        table = collect.results(pattern, list(folders) or None)
        if table.empty:
            raise ValueError(f"no finished run matches {pattern!r}: `fishlib sweep` makes some, --in names folders")
        if plot:
            x, y, hue = plot[0], plot[1], None if plot[2] == "-" else plot[2]
            collect.check_plot(table, x, y, hue)
        for chapter, states in collect.mixed(table).items():
            click.secho(f"note: the runs of {chapter} come from {states} states of the library", fg="yellow", err=True)
        shown = collect.summary(table) if summarise else table
        for chapter, part in collect.readable(shown, table.attrs["parameters"]):
            click.secho(f"\n{chapter}, {_runs(int((table['chapter'] == chapter).sum()))}", bold=True)
            click.echo(part.to_string(index=False, max_rows=60, float_format="{:.4g}".format,
                                      line_width=shutil.get_terminal_size().columns))
        click.echo()
        files = [*collect.save(table, out)]
        if summarise:
            files += collect.save(shown, out.with_name(f"{out.name}_summary"))
        if plot:
            files.append(collect.plot(table, x, y, hue, out.with_name(f"{out.name}.png")))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        first = str(error).partition("\n")[0].rstrip(".")  # pandas tells of each engine that it tried
        raise click.ClickException(f"{first}: the table needs pyarrow, pip install 'fishlib[sweep]'") from error
    for file in files:
        click.echo(_short(file))


if __name__ == "__main__":
    main()
