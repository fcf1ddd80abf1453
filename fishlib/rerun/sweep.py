"""Sweeps: a chapter over a grid of parameters and seeds, each run a process of its own, on Dask.

What a finished run left is never done again, so an interrupted sweep goes on where it stopped. The loop that submits
(`drive`) needs nothing of Dask: any executor of `concurrent.futures` serves.
"""

from __future__ import annotations

import concurrent.futures as cf
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fishlib.rerun import chapters, devices
from fishlib.rerun.chapters import Chapter
from fishlib.rerun.run import Run, RunFailed, execute, finished, plan

if TYPE_CHECKING:
    from distributed import Client

MEMORY_PER_RUN = 2 * 2**30  # bytes: a kernel with torch and a small data set stays below
REQUEST = "device"  # the Dask resource of workers that have devices


@dataclass
class Progress:
    """How far a sweep is, in runs."""

    total: int
    done: int = 0
    failed: int = 0
    running: int = 0
    seconds_left: float | None = None


def grid(chapter: Chapter, words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each parameter of a grid: ``seed=0..4``, ``strength=0,1e-3,1e-2``, ``sizes=[300,100],[50]``.

    Raises
    ------
    ValueError
        a word that is not ``name=values``, an unknown parameter, a value that is not valid or given twice
    """
    values: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text.strip():
            raise ValueError(f"{word!r} is no part of a grid: write name=first..last or name=value,value,...")
        if name in values:
            raise ValueError(f"{name} is twice in the grid: give all its values at once, {name}=value,value,...")
        values[name] = [chapter.check(name, value) for value in _values(text)]
        counts = Counter(map(repr, values[name]))  # of their texts, since a value may be a list, which has no hash
        if twice := [value for value in values[name] if counts[repr(value)] > 1]:
            raise ValueError(f"{name}={twice[0]} is twice in {word!r}")
    return values


def _values(text: str) -> list[str]:
    if match := re.fullmatch(r"\s*(-?\d+)\.\.(-?\d+)\s*", text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError(f"{text} is empty: write the smaller number first")
        return [str(number) for number in range(first, last + 1)]
    # Commas inside brackets or quotes belong to the value.
    parts = re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+", text)
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", part.strip()) for part in parts]


def plans(chapter: Chapter, profile: str, given: Mapping[str, Any], axes: Mapping[str, Sequence[Any]],
          below: Path | None = None) -> list[Run]:
    """The runs of a grid, in order; each goes to `<chapter>/<identity>` below a folder, by default `_build/runs`."""
    if both := [name for name in axes if name in given]:
        raise ValueError(f"{', '.join(both)} is both fixed and in the grid: give it once")
    points = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [plan(chapter, profile, {**given, **point}, below=below or chapters.BUILD / "runs") for point in points]


def work(run: Run, force: bool = False, timeout: float | None = None, device: bool = False,
         threads: int | None = None) -> float:
    """One run, where a worker does it; its duration in seconds.

    Raises
    ------
    RunFailed
        a failing cell, a timeout, a machine whose library or data are not those of the sweep
    """
    # A worker may be lost after its run was finished and before it could say so.
    if finished(run) and not force:
        return 0.0
    environment = {} if threads is None or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    with devices.held() if device else nullcontext() as name:
        if name is not None:
            environment["CUDA_VISIBLE_DEVICES"] = name
        outcome = execute(run, timeout, environment)
    if outcome.status != "finished":
        raise RunFailed(outcome.message)
    return outcome.seconds


def drive(runs: Iterable[Run], executor: cf.Executor, slots: Callable[[], int], total: int,
          show: Callable[[Progress], None] = lambda progress: None,
          failure: Callable[[Run, BaseException], None] = lambda run, error: None, **options: Any) -> Progress:
    """Hand runs to an executor, few at a time, until all have ended; a failing run does not stop the others.

    Only the runs in flight are held, so that the memory of this process does not grow with their number.

    Parameters
    ----------
    slots : how many runs can be under way at once, asked again every second, for workers come and go
    total : number of runs
    show : called every second and at every end
    failure : called with each run that failed and its error
    options : of `work`
    """
    progress, waiting, flying = Progress(total), iter(runs), {}
    spent, room, asked = 0.0, slots(), time.monotonic()
    while True:
        # Two more than can run, so that no worker waits for this loop.
        for run in itertools.islice(waiting, max(0, room + 2 - len(flying))):
            flying[executor.submit(work, run, **options)] = run
        if not flying:
            return progress
        ended, _ = cf.wait(flying, timeout=1, return_when=cf.FIRST_COMPLETED)
        for future in ended:
            run, error = flying.pop(future), _error(future)
            if error is None:
                progress.done += 1
                spent += future.result()
            else:
                progress.failed += 1
                failure(run, error)
        if time.monotonic() - asked > 1:
            room, asked = slots(), time.monotonic()
        progress.running = min(len(flying), room)
        left = progress.total - progress.done - progress.failed
        progress.seconds_left = spent / progress.done * left / room if progress.done and room else None
        show(progress)


def _error(future: cf.Future) -> BaseException | None:
    try:
        return future.exception()
    except cf.CancelledError as error:
        raise ConnectionError("the scheduler gave the runs up, or is gone: start the sweep again, it goes on where it "
                              "stopped") from error


def default_workers(device: bool) -> int:
    """As many runs at once as the machine has devices, else as its cores and memory carry."""
    gpus = devices.available()
    if gpus:
        return len(gpus)
    if device:
        raise ValueError("--device-per-run: this machine shows no GPU; leave the option out to run on the CPU")
    return max(1, min(cores(), _memory() // MEMORY_PER_RUN))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().available


@contextmanager
def cluster(scheduler: str | None = None, workers: int | None = None, slurm: Path | None = None,
            device: bool = False) -> Iterator[Client]:
    """A Dask client: of the scheduler at an address, of SLURM jobs, or of a local cluster that ends with the block.

    Raises
    ------
    ValueError
        no scheduler at the address; a SLURM file that cannot be used
    """
    if scheduler:
        with _remote(scheduler) as client:
            yield client
    elif slurm:
        with _slurm(slurm, device) as jobs, jobs.get_client() as client:
            yield client
    else:
        with _local(workers or default_workers(device), device) as local, local.get_client() as client:
            yield client


def _remote(address: str) -> Client:
    from distributed import Client

    _check_address(address)
    try:
        return Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(f"no Dask scheduler answers at {address} ({error}): start one by `dask scheduler` and give "
                         "the address that it prints, such as tcp://10.0.0.1:8786") from error


def _check_address(address: str) -> None:
    """Refuse what is no address: Dask would try it all the same, and end with a traceback."""
    from distributed.comm import parse_address, parse_host_port
    from distributed.comm.registry import get_backend

    try:
        scheme, place = parse_address(address)
        get_backend(scheme)
        host, port = parse_host_port(place)
        if not host or not 0 < port < 2**16:
            raise ValueError("it needs a host and a port from 1 to 65535")
    except ValueError as error:
        raise ValueError(f"{address!r} is no address of a Dask scheduler ({error}): give the one that `dask scheduler` prints, "
                         "such as tcp://10.0.0.1:8786") from error


def _local(workers: int, device: bool) -> Any:
    import logging
    import warnings

    from distributed import LocalCluster

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        # A run's memory is that of its own process, which Dask's limit would not see.
        return LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=0, silence_logs=logging.CRITICAL,
                            dashboard_address="127.0.0.1:8787", resources={REQUEST: 1} if device else None)


def slurm_settings(file: Path) -> tuple[dict[str, Any], int]:
    """What a SLURM file says: the arguments of `dask_jobqueue.SLURMCluster`, and the number of jobs (key ``jobs``)."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), int) or content["jobs"] < 1:
        raise ValueError(f"{file} has to be a mapping with `jobs: <number>` and the arguments of "
                         "dask_jobqueue.SLURMCluster, such as queue, cores, memory and walltime")
    return {name: value for name, value in content.items() if name != "jobs"}, content["jobs"]


def _slurm(file: Path, device: bool) -> Any:
    settings, jobs = slurm_settings(file)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ValueError("--slurm needs dask-jobqueue: pip install 'fishlib[slurm]'") from error
    if device:
        threads, processes = settings.get("cores"), settings.get("processes", 1)
        if not isinstance(threads, int) or not isinstance(processes, int) or not 0 < processes <= threads:
            raise ValueError(f"{file} has to have `cores: <number>`, at least as many as `processes`, for --device-per-run: "
                             "each core of a job stands for one device")
        extra = [*settings.get("worker_extra_args", []), "--resources", f"{REQUEST}={threads // processes}"]
        settings["worker_extra_args"] = extra
    try:
        queue = SLURMCluster(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    queue.scale(jobs=jobs)
    return queue


def capacity(client: Client, device: bool) -> int:
    """How many runs the workers that are there now can do at once."""
    workers = client.scheduler_info()["workers"].values()
    return int(sum(min(worker["nthreads"], worker["resources"].get(REQUEST, 0)) if device else worker["nthreads"]
                   for worker in workers))


def executor(client: Client, retries: int, device: bool) -> cf.Executor:
    """The client as an executor: `retries` for runs that fail; those of lost workers are done again in any case."""
    return client.get_executor(pure=False, retries=retries, resources={REQUEST: 1} if device else None)
