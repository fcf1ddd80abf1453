"""Full disks, folders closed to writing, Ctrl-C, odd paths and foreign files: no command leaves half a result."""

import errno
import os
import pickle
import re
import resource
import signal
import tarfile
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from small_chapters import eventually, lines, load, raising

import fishlib
from fishlib import codec, data, training, units
from fishlib.nets import mlp
from fishlib.rerun import assign, chapters, cli, collect, grade, refresh, render, run

MARK = "from pathlib import Path; Path({file!r}).write_text('here')"
TABLE = pd.DataFrame({"x": np.arange(500.0), "y": np.arange(500.0) ** 2})
BLOB = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
TROUBLES = {"full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "closed folder": PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Ctrl-C": KeyboardInterrupt()}
# Everything of the library that writes a file, as a function of the folder.
WRITERS = {
    "a run's notebook or results": lambda folder: run.write(folder / "results.json", "x" * 50_000),
    "collected table": lambda folder: collect.save(TABLE, folder / "table"),
    "plot": lambda folder: collect.plot(TABLE, "x", "y", None, folder / "plot.png"),
    "data set": lambda folder: data._write(folder / "set.npz", {"images": BLOB}),
    "compressed network": lambda folder: codec._write_whole(folder / "net.fish", BLOB.tobytes()),
    "stage of unit pruning": lambda folder: units._replace(folder / "stage.pt", lambda path: torch.save(
        {"w": torch.from_numpy(BLOB)}, path)),
}


def fishlib_command(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def disk_that_fills_after(size):
    """Every write beyond `size` bytes of a file fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_trouble_before_a_file_is_in_place_leaves_the_former_one_and_nothing_else(write, trouble, tmp_path, monkeypatch):
    write(tmp_path)
    before = content(tmp_path)
    assert before
    monkeypatch.setattr(os, "replace", raising(trouble))
    with pytest.raises(type(trouble)):
        write(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_disk_that_fills_in_the_middle_of_a_file_leaves_nothing(write, tmp_path):
    with disk_that_fills_after(1000), pytest.raises((OSError, RuntimeError)):
        write(tmp_path)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_checkpoint_of_a_training_is_the_former_one_when_the_new_one_cannot_be_written(trouble, tmp_path, digits, monkeypatch):
    file = tmp_path / "training.ckpt"
    training.fit(mlp(digits.shape, 10, [4]), digits, epochs=1, checkpoint=file)
    before = content(tmp_path)
    file.rename(tmp_path / "kept")
    monkeypatch.setattr(os, "replace", raising(trouble))
    with pytest.raises(type(trouble)):
        training.fit(mlp(digits.shape, 10, [4]), digits, epochs=1, checkpoint=file)
    assert list(content(tmp_path).values()) == list(before.values())


def test_run_on_a_full_disk_fails_with_one_sentence_and_leaves_no_result(tmp_path, chapter, command):
    # Small files still fit: what a kernel needs to start. The notebook does not.
    process = command("run", chapter("print('x' * 2_000_000)"), "--out", tmp_path / "out",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "could not be written" in told
    assert "File too large" in told
    assert "Traceback" not in told
    # What there is of the notebook is kept under another name, if it is whole.
    assert not (tmp_path / "out" / "results.json").exists()
    for file in (tmp_path / "out").glob("*"):
        assert file.name.endswith(".failed.ipynb")
        nbformat.read(file, 4)


def test_run_into_a_folder_that_cannot_be_made_says_so(tmp_path, chapter):
    (tmp_path / "file").write_text("in the way")
    result = fishlib_command("run", chapter(), "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "could not be written" in result.output
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


@pytest.fixture
def finished(tmp_path, chapter, build):
    """A finished run where sweeps leave theirs."""
    source = chapter("print('done')")
    assert fishlib_command("run", source, "-p", "seed", 3).exit_code == 0
    return source


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_commands_that_write_one_file_end_with_one_line_and_nothing_half_written(trouble, tmp_path, finished, monkeypatch):
    before = content(tmp_path)
    notebook = next(chapters.BUILD.rglob(f"{finished.stem}.ipynb"))
    source = chapters.load(finished)
    planned = run.plan(source, given={"seed": 3}, folder=notebook.parent)
    commands = {"results": lambda: fishlib_command("results"),
                "results with a plot": lambda: fishlib_command("results", "--plot", "seed", "accuracy", "-")}
    monkeypatch.setattr(os, "replace", raising(trouble))
    for name, command in commands.items():
        result = command()
        assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1), name
        assert "nothing half-written" in result.output, name
        assert "Traceback" not in result.output, name
        assert content(tmp_path) == before, name
    with pytest.raises(type(trouble)):
        refresh.renew(planned)
    assert content(tmp_path) == before


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_refresh_that_cannot_write_leaves_the_chapter_as_it_was(trouble, chapter, monkeypatch):
    source = chapter("print('new')")
    before, renewing = source.read_bytes(), refresh.renew

    def renew(one):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", raising(trouble))
            return renewing(one)

    monkeypatch.setattr(refresh, "renew", renew)
    result = fishlib_command("refresh", source)
    assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    assert "nothing half-written" in result.output
    assert content(source.parent) == {source.name: before}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_render_in_trouble_keeps_the_former_site(trouble, tmp_path, monkeypatch):
    out = tmp_path / "html"
    out.mkdir()
    (out / "searchindex.js").write_text("former")

    def build(source, work):
        (work / "new").mkdir()
        (work / "new" / "searchindex.js").write_text("half")
        raise trouble

    monkeypatch.setattr(cli, "_stale", lambda executed: [])
    monkeypatch.setattr(render, "stage", lambda executed, source, root: source)
    monkeypatch.setattr(render, "build", build)
    result = fishlib_command("render", "--out", out)
    assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    assert content(tmp_path) == {"html/searchindex.js": b"former"}


def failing_at(number, trouble):
    """`os.replace` that fails when it is called for the time of this number."""
    calls, replace = [], os.replace

    def fail(*places):
        calls.append(places)
        if len(calls) == number:
            raise trouble
        replace(*places)

    return fail


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
@pytest.mark.parametrize("number", [1, 2])
def test_assign_in_trouble_keeps_the_former_assignment(number, trouble, tmp_path, monkeypatch):
    name = next(iter(assign.masters()))

    def made(by_otter, target, *_):
        target.mkdir()
        (target / "student").write_text("new")
        return target

    monkeypatch.setattr(assign, "_by_otter", lambda master, work, check: work)
    monkeypatch.setattr(assign, "_sorted", made)
    (tmp_path / name).mkdir()
    (tmp_path / name / "student").write_text("former")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_at(number, trouble))
        result = fishlib_command("assign", name, "--out", tmp_path)
    assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    assert "nothing half-written" in result.output
    assert content(tmp_path) == {f"{name}/student": b"former"}
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert fishlib_command("assign", name, "--out", tmp_path).exit_code == 0
    assert content(tmp_path) == {f"{name}/student": b"new"}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_grades_that_cannot_be_written_leave_the_former_table(trouble, tmp_path, monkeypatch):
    (tmp_path / "grades.csv").write_text("former")
    monkeypatch.setattr(grade, "grade", lambda one, *_, **__: grade.Grade(str(one), "graded", 3, 4))
    monkeypatch.setattr(os, "replace", raising(trouble))
    result = fishlib_command("grade", "one.ipynb", "--out", tmp_path / "grades.csv")
    assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    assert "nothing half-written" in result.output
    assert content(tmp_path) == {"grades.csv": b"former"}


def test_interrupted_grading_keeps_the_grades_that_are_there(tmp_path, monkeypatch):
    def graded(submission, *_, **__):
        if submission.stem == "third":
            raise KeyboardInterrupt
        return grade.Grade(str(submission), "graded", 3, 4)

    monkeypatch.setattr(grade, "grade", graded)
    result = fishlib_command("grade", "first.ipynb", "second.ipynb", "third.ipynb", "--out", tmp_path / "grades.csv")
    assert result.exit_code == 130
    assert list(pd.read_csv(tmp_path / "grades.csv").submission) == ["first.ipynb", "second.ipynb"]


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
@pytest.mark.parametrize("method", ["to_parquet", "to_csv"])
def test_collected_tables_stay_together_when_one_cannot_be_written(method, trouble, tmp_path, monkeypatch):
    collect.save(TABLE, tmp_path / "table")
    before = content(tmp_path)
    monkeypatch.setattr(pd.DataFrame, method, raising(trouble))
    with pytest.raises(type(trouble)):
        collect.save(2 * TABLE, tmp_path / "table")
    assert content(tmp_path) == before


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_ending_between_two_tables_leaves_both_whole_and_nothing_beside_them(trouble, tmp_path, monkeypatch):
    collect.save(TABLE, tmp_path / "table")
    names = set(content(tmp_path))
    monkeypatch.setattr(os, "replace", failing_at(2, trouble))
    with pytest.raises(type(trouble)):
        collect.save(2 * TABLE, tmp_path / "table")
    assert set(content(tmp_path)) == names
    assert pd.read_csv(tmp_path / "table.csv").equals(TABLE)
    assert pd.read_parquet(tmp_path / "table.parquet").equals(2 * TABLE)


def test_an_error_that_room_does_not_help_is_told_without_that_advice(monkeypatch):
    monkeypatch.setattr(chapters, "load", raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "git")))
    told = fishlib_command("params", "00_why_compact")
    assert told.exit_code == 1
    assert "No such file or directory: git" in told.output
    assert "Make room" not in told.output
    monkeypatch.setattr(chapters, "load", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert "Make room" in fishlib_command("params", "00_why_compact").output


@pytest.mark.parametrize("words", [("refresh",), ("sweep", "-g", "seed=0..1", "--workers", 1)], ids=["refresh", "sweep"])
def test_interrupted_command_leaves_its_chapter_alone_and_no_result(words, tmp_path, chapter, command):
    mark = tmp_path / "kernel"
    source = chapter(MARK.format(file=str(mark)), "import time; time.sleep(600)")
    before = source.read_bytes()
    out = [] if words[0] == "refresh" else ["--out", tmp_path / "out"]
    process = command(words[0], source, *words[1:], *out,
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    eventually(lambda: lines(mark))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert source.read_bytes() == before
    assert not list(tmp_path.rglob("results.json"))
    assert not list(tmp_path.rglob("*.part"))


def test_paths_with_spaces_and_letters_of_any_alphabet_work_for_every_command(tmp_path, chapter, monkeypatch):
    folder = tmp_path / "mein Büchlein 書"
    source = folder / "10 kleine Übung.ipynb"
    chapter("print('getan')").rename(folder.mkdir() or source)
    assert fishlib_command("params", source).exit_code == 0
    assert fishlib_command("run", source, "--out", folder / "ein Lauf").exit_code == 0
    assert load(folder / "ein Lauf")["records"]["accuracy"] == pytest.approx(0.905)
    result = fishlib_command("results", "--in", folder, "--out", folder / "Tabelle ä", "--plot", "seed", "accuracy", "-")
    assert result.exit_code == 0, result.output
    assert {"Tabelle ä.csv", "Tabelle ä.parquet", "Tabelle ä.png"} <= {file.name for file in folder.iterdir()}
    swept = fishlib_command("sweep", source, "-g", "seed=3", "--workers", 1, "--out", folder / "ein Gitter")
    assert swept.exit_code == 0, swept.output
    assert len(list((folder / "ein Gitter" / source.stem).glob("*/results.json"))) == 1
    assert fishlib_command("refresh", source).exit_code == 0
    assert "getan" in source.read_text(encoding="utf-8")


def test_nothing_in_the_library_loads_pickled_objects():
    for file in Path(fishlib.__file__).parent.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, (file, call)
        for call in re.findall(r"np\.load\([^)]*\)", source):
            assert "allow_pickle=False" in call, (file, call)
        assert not re.search(r"\bimport (?:pickle|joblib|dill|shelve|marshal)\b|\bread_pickle\(|\byaml\.load\(", source), file


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, digits):
    trap, file = tmp_path / "sprung", tmp_path / "training.ckpt"
    torch.save({"conditions": Trap(trap)}, file)
    with pytest.raises(ValueError, match="is not a checkpoint of this library"):
        training.fit(mlp(digits.shape, 10, [4]), digits, epochs=1, checkpoint=file)
    assert not trap.exists()


def test_original_files_of_a_data_set_are_not_unpickled_unless_their_content_is_the_known_one(tmp_path):
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "sprung"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(RuntimeError, match="corrupted"):
        data.from_torchvision("cifar10", tmp_path)
    assert not trap.exists()


def test_archives_of_data_sets_unpack_inside_their_folder_only(tmp_path, monkeypatch):
    from torchvision.datasets.utils import extract_archive

    archive = tmp_path / "set.tar.gz"
    (tmp_path / "escaped").write_text("out")
    with tarfile.open(archive, "w:gz") as package:
        package.add(tmp_path / "escaped", "../../escaped")
    (tmp_path / "escaped").unlink()

    def download(name, root, download):
        extract_archive(str(archive), str(tmp_path / "deep" / "er"))
        pytest.fail("the archive was unpacked")

    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path))
    monkeypatch.setattr(data, "from_torchvision", download)
    with pytest.raises(ConnectionError, match="outside the destination"):
        data.load_arrays("cifar10")
    assert not list(tmp_path.rglob("escaped"))
    assert tarfile.TarFile.extraction_filter is None, "the setting of the whole process was changed"
