"""Sweeps: grids, the loop that submits, and real Dask clusters with workers that die."""

import concurrent.futures as cf
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from small_chapters import alive, eventually, lines, load

from fishlib.rerun import chapters, sweep
from fishlib.rerun.cli import main
from fishlib.rerun.run import Run, RunFailed

# Tells of its begin and end in files that tests read; a run of seed 0 waits for a sign.
DIARY = '''import os
import time
from pathlib import Path

diary = Path({diary!r})
with (diary / "begun").open("a") as file:
    file.write(f"{{seed}}\\n")
if seed == 0:
    (diary / "process").write_text(str(os.getppid()))
while seed == 0 and not (diary / "go").exists():
    time.sleep(0.05)
with (diary / "ended").open("a") as file:
    file.write(f"{{seed}}\\n")
'''


def test_a_grid_is_written_as_ranges_and_lists(chapter):
    loaded = chapters.load(chapter())
    words = ["seed=0..3", "strength=0,1e-3, 1e-2", "dataset=digits,'mnist'", "sizes=[30,10],[5]"]
    assert sweep.grid(loaded, words) == {
        "seed": [0, 1, 2, 3], "strength": [0.0, 1e-3, 1e-2], "dataset": ["digits", "mnist"], "sizes": [[30, 10], [5]]}


@given(st.lists(st.floats(0, 10).map(lambda x: x + 0.0), min_size=1, unique=True), st.integers(0, 990), st.integers(0, 9))
def test_every_value_of_a_grid_comes_through(tmp_path_factory, values, first, more):
    from fishlib.notebook import declared

    loaded = chapters.Chapter(Path("x.ipynb"), declared("seed = 0  # [0 .. 1000]\nstrength = 0.5  # [0 .. 10]"), {}, "")
    assert sweep.grid(loaded, [f"seed={first}..{first + more}", f"strength={','.join(map(repr, values))}"]) == {
        "seed": list(range(first, first + more + 1)), "strength": values}


@pytest.mark.parametrize(("words", "named"), [
    (["seed"], "name=first..last"), (["seed="], "name=first..last"), (["sed=1,2"], "seed, strength, dataset, sizes"),
    (["seed=0..2000"], "int from 0 to 1000"), (["seed=3..1"], "empty"), (["seed=1,1"], "twice"),
    (["seed=1", "seed=2"], "twice"), (["strength=1,1.0"], "twice"), (["dataset=digits,svhn"], "digits, mnist"),
    (["sizes=[5],[5]"], "sizes=[5] is twice"), (["seed=1,0,2,0"], "seed=0 is twice"),
])
def test_a_mistyped_grid_fails_before_anything_is_submitted(tmp_path, chapter, monkeypatch, words, named):
    monkeypatch.setattr(sweep, "cluster", None)
    grid = [part for word in words for part in ("-g", word)]
    result = CliRunner().invoke(main, ["sweep", str(chapter()), *grid, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert named in result.output
    assert not (tmp_path / "out").exists()


def test_a_grid_in_two_words_is_answered_with_how_it_is_written(chapter):
    result = CliRunner().invoke(main, ["sweep", str(chapter()), "-g", "seed", "0..3"])
    assert result.exit_code == 2
    assert "'seed' is no part of a grid: write name=first..last" in result.output


def test_a_parameter_is_either_fixed_or_in_the_grid(chapter):
    result = CliRunner().invoke(main, ["sweep", str(chapter()), "-g", "seed=0..3", "-p", "seed", "1"])
    assert result.exit_code == 2
    assert "seed is both fixed and in the grid" in result.output


def test_each_point_of_the_grid_is_one_run_with_a_folder_of_its_own(tmp_path, chapter):
    loaded = chapters.load(chapter())
    axes = sweep.grid(loaded, ["seed=0..4", "strength=0,0.5"])
    runs = sweep.plans(loaded, "quick", {"dataset": "mnist"}, axes, tmp_path)
    assert [(run.parameters["seed"], run.parameters["strength"]) for run in runs] == [
        (seed, strength) for seed in range(5) for strength in (0.0, 0.5)]
    assert {run.folder for run in runs} == {tmp_path / "10_small" / run.identity for run in runs}
    assert len({run.folder for run in runs}) == 10


def test_a_finished_run_handed_out_again_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "finished", lambda run: True)
    monkeypatch.setattr(sweep, "execute", None)
    assert sweep.work(_run(0, tmp_path)) == 0.0
    with pytest.raises(TypeError):
        sweep.work(_run(0, tmp_path), force=True)


def _run(seed: int, folder: Path) -> Run:
    return Run(Path("10_small.ipynb"), "quick", {"seed": seed}, f"{seed:016x}", folder / str(seed))


class Kept:
    """A result of some size; the test sees whether the submitting side lets go of it."""

    def __init__(self, kept: weakref.WeakSet):
        self.content = bytearray(200_000)
        kept.add(self)

    def __radd__(self, other: float) -> float:
        return other + 0.0


def test_memory_of_the_submitting_process_stays_flat_over_200_runs(tmp_path, monkeypatch):
    kept: weakref.WeakSet = weakref.WeakSet()
    held, traced, flying, most = [], [], set(), 0

    def work(run, **options):
        return Kept(kept)

    def show(progress):
        if (progress.done + progress.failed) % 40 == 0:
            gc.collect()
            held.append(len(kept))
            traced.append(tracemalloc.get_traced_memory()[0])

    class Pool(cf.ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            nonlocal most
            future = super().submit(*args, **kwargs)
            flying.add(future)
            future.add_done_callback(flying.discard)
            most = max(most, len(flying))
            return future

    monkeypatch.setattr(sweep, "work", work)
    tracemalloc.start()
    try:
        with Pool(2) as pool:
            progress = sweep.drive((_run(seed, tmp_path) for seed in range(200)), pool, lambda: 2, 200, show)
    finally:
        tracemalloc.stop()
    assert (progress.done, progress.failed, progress.running) == (200, 0, 0)
    assert most <= 4
    assert max(held) <= 6
    assert max(traced) - traced[0] < 6 * 200_000 + 100_000


def test_failing_runs_are_named_and_do_not_stop_the_others(tmp_path, monkeypatch):
    def work(run, **options):
        if run.parameters["seed"] % 5 == 0:
            raise RunFailed(f"seed {run.parameters['seed']}")

        return 1.0

    monkeypatch.setattr(sweep, "work", work)
    failed = []
    with cf.ThreadPoolExecutor(3) as pool:
        progress = sweep.drive([_run(seed, tmp_path) for seed in range(20)], pool, lambda: 3, 20,
                               failure=lambda run, error: failed.append((run.parameters["seed"], str(error))))
    assert (progress.done, progress.failed) == (16, 4)
    assert sorted(failed) == [(seed, f"seed {seed}") for seed in (0, 5, 10, 15)]


def test_a_scheduler_that_gives_runs_up_is_an_error(tmp_path):
    class Gone(cf.Executor):
        def submit(self, *args, **kwargs):
            future = cf.Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(ConnectionError, match="goes on where it stopped"):
        sweep.drive([_run(0, tmp_path)], Gone(), lambda: 1, 1)


def test_without_a_scheduler_at_the_address_the_message_says_how_to_start_one(chapter, tmp_path):
    pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        import distributed

        def refuse(*args, **kwargs):
            raise OSError("timed out")

        patch.setattr(distributed, "Client", refuse)
        result = CliRunner().invoke(main, ["sweep", str(chapter()), "-g", "seed=0..3", "--scheduler", "tcp://localhost:9",
                                           "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "dask scheduler" in result.output


@pytest.fixture
def dask():
    """Starts `dask` commands in processes of their own and ends them, with all their children, after the test."""
    pytest.importorskip("distributed")
    started = []

    def start(*words):
        environment = os.environ | {"PYTHONPATH": str(chapters.PACKAGE.parent), "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED":
                                    "error"}
        process = subprocess.Popen([sys.executable, "-m", "dask", *words], env=environment, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a `dask` command and its workers at once; the run's own process and its kernel have to notice."""
    import psutil

    for member in _family(process.pid):
        with contextlib.suppress(psutil.Error):  # it ended since it was listed
            if not {"fishlib.rerun.child", "ipykernel_launcher"} & set(member.cmdline()):
                member.kill()
    process.wait()


def _family(pid: int) -> list:
    import psutil

    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_workers_joined_over_tcp_do_a_sweep_and_a_killed_workers_run_is_done_again(tmp_path, chapter, command, dask):
    diary, out = tmp_path / "diary", tmp_path / "out"
    diary.mkdir()
    source = chapter(DIARY.format(diary=str(diary)))
    address = f"tcp://127.0.0.1:{_free_port()}"
    dask("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
    workers = [dask("worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path / name))
               for name in ("a", "b")]
    words = ["sweep", source, "-g", "seed=0..3", "--scheduler", address, "--out", out]
    process = command(*words)
    told = []
    threading.Thread(target=lambda: told.extend(process.stdout), daemon=True).start()

    run = int(eventually(lambda: lines(diary / "process"))[0])
    end(next(worker for worker in workers if run in [child.pid for child in _family(worker.pid)]))
    eventually(lambda: lines(diary / "begun").count("0") == 2 or process.poll() is not None)
    (diary / "go").touch()
    assert process.wait(60) == 0, "".join(told)
    eventually(lambda: "4 finished, 0 failed" in "".join(told))

    assert sorted(lines(diary / "ended")) == ["0", "1", "2", "3"]
    folders = sorted((out / "10_small").iterdir())
    assert sorted(load(folder)["parameters"]["seed"] for folder in folders) == [0, 1, 2, 3]

    # Finished: neither the scheduler nor the workers are asked for anything.
    for worker in workers:
        end(worker)
    again = CliRunner().invoke(main, [str(word) for word in words])
    assert again.exit_code == 0, again.output
    assert "4 finished before" in again.output
    assert len(lines(diary / "begun")) == 5


def test_a_local_cluster_starts_and_stops_by_itself_and_a_failing_run_stops_no_other(tmp_path, chapter, command,
                                                                                     monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    source = chapter("assert seed != 1, 'seed one'", "import os; record('threads', int(os.environ['OMP_NUM_THREADS']))",
                     "record('device', os.environ['CUDA_VISIBLE_DEVICES'])")
    out = tmp_path / "out"
    words = ["sweep", source, "-g", "seed=0..2", "--workers", 2, "--device-per-run", "--retries", 1, "--out", out]
    process = command(*words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "http://" in output
    assert "3 runs: 2 finished, 1 failed" in output
    assert "AssertionError: seed one" in output
    folders = {len(list(folder.glob("*.failed.ipynb"))): folder for folder in (out / "10_small").iterdir()}
    assert f"failed: seed=1  {folders[1]}" in output
    assert not (folders[1] / "results.json").exists()
    assert load(folders[0])["records"]["threads"] >= 1
    assert load(folders[0])["records"]["device"] in ("6", "7")


def test_an_interrupted_sweep_ends_its_workers_and_goes_on_where_it_stopped(tmp_path, chapter, command):
    pytest.importorskip("distributed")
    import psutil

    diary, out = tmp_path / "diary", tmp_path / "out"
    diary.mkdir()
    source = chapter(DIARY.format(diary=str(diary)))
    words = ["sweep", source, "-g", "seed=1,0", "--workers", 1, "--out", out]
    process = command(*words, start_new_session=True)
    eventually(lambda: "0" in lines(diary / "begun"))
    family = psutil.Process(process.pid).children(recursive=True)
    # As Ctrl-C in a terminal: the whole group is interrupted.
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "goes on where it stopped" in output
    assert "Traceback" not in output
    eventually(lambda: not any(alive(child.pid) for child in family))
    (diary / "go").touch()
    again = command(*words)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert "2 runs, 1 finished before" in output
    assert lines(diary / "begun") == ["1", "0", "0"]
    assert lines(diary / "ended") == ["1", "0"]


@pytest.mark.parametrize("address", ["garbage", "tcp://host", "tcp://host:port", "tcp://host:99999", "tcp://:8786", "foo://host:1",
                                     "::1:8786"])
def test_what_is_no_address_of_a_scheduler_is_refused_before_dask_tries_it(tmp_path, chapter, monkeypatch, address):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", None)
    words = ["sweep", str(chapter()), "-g", "seed=0", "--out", str(tmp_path / "out"), "--scheduler", address]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert f"'{address}' is no address of a Dask scheduler (" in result.output
    assert "such as tcp://10.0.0.1:8786" in result.output


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:8786", "10.0.0.1:8786", "tls://node7:80", "tcp://[::1]:8786"])
def test_addresses_that_dask_prints_are_taken(address):
    pytest.importorskip("distributed")
    sweep._check_address(address)


def test_a_slurm_file_without_the_number_of_jobs_is_refused(tmp_path, chapter):
    file = tmp_path / "slurm.yml"
    file.write_text("queue: gpu\n")
    result = CliRunner().invoke(main, ["sweep", str(chapter()), "-g", "seed=0..3", "--slurm", str(file)])
    assert result.exit_code == 2
    assert "jobs: <number>" in result.output


@pytest.mark.parametrize("text", ["", "cores: many\n", "cores: 2\nprocesses: 4\n", "cores: 2\nprocesses: 0\n"])
def test_a_slurm_file_whose_devices_cannot_be_counted_is_refused(tmp_path, chapter, text):
    pytest.importorskip("dask_jobqueue")
    file = tmp_path / "slurm.yml"
    file.write_text("jobs: 1\nqueue: gpu\n" + text)
    words = ["sweep", str(chapter()), "-g", "seed=0..3", "--slurm", str(file), "--device-per-run"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "slurm.yml has to have `cores: <number>`" in " ".join(result.output.split())


SLURM = """jobs: 2
queue: gpu
cores: 4
processes: 4
memory: 64GB
walltime: "01:00:00"
job_cpu: 16
interface: lo
job_extra_directives: ["--gres=gpu:4"]
job_script_prologue: ["export OMP_NUM_THREADS=4"]
"""


def test_a_slurm_file_becomes_job_scripts_with_devices(tmp_path, monkeypatch):
    queue = pytest.importorskip("dask_jobqueue")
    asked = []
    monkeypatch.setattr(queue.SLURMCluster, "scale", lambda self, jobs: asked.append(jobs))
    file = tmp_path / "slurm.yml"
    file.write_text(SLURM)
    with sweep._slurm(file, device=True) as jobs:
        script = jobs.job_script()
    assert asked[0] == 2
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=16", "#SBATCH --gres=gpu:4", "export OMP_NUM_THREADS=4"):
        assert line in script
    for option in ("--nthreads 1 ", "--nworkers 4 ", "--resources device=1 "):
        assert option in script


def test_a_wrong_key_of_a_slurm_file_is_named(tmp_path):
    pytest.importorskip("dask_jobqueue")
    file = tmp_path / "slurm.yml"
    file.write_text(SLURM + "quue: gpu\n")
    with pytest.raises(ValueError, match="quue"):
        sweep._slurm(file, device=False)
