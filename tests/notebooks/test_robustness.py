"""Full disks, folders closed to writing, Ctrl-C, odd paths and foreign files: no command leaves half a result."""

import ast
import errno
import json
import os
import pickle
import resource
import signal
import sys
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

from fishlib import codec, data, notebook, training, units
from fishlib.nets import mlp
from fishlib.rerun import assign, browser, chapters, cli, collect, grade, refresh, render, run, sweep

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
    "table of a chapter": lambda folder: notebook.kept(folder / f"{len(content(folder))}.csv", lambda: TABLE),
    "compressed network": lambda folder: codec._write_whole(folder / "net.fish", BLOB.tobytes()),
    "stage of unit pruning": lambda folder: units._replace(folder / "stage.pt", lambda path: torch.save(
        {"w": torch.from_numpy(BLOB)}, path)),
}
CLOSED = Path("/sys/fishlib")  # nobody can make this folder, not even root
has_closed = pytest.mark.skipif(not CLOSED.parent.is_dir(), reason="no /sys, where nobody can write")


def fishlib_command(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def disk_that_fills_after(size):
    """Every write beyond `size` bytes of a file fails in the middle, as on a full disk."""
    before, compiles = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # Python would keep half a compiled module without an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = compiles


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


@pytest.mark.parametrize("words", [("run",), ("sweep", "-g", "seed=0", "--workers", 1)], ids=["run", "sweep"])
def test_run_on_a_full_disk_fails_with_one_sentence_and_leaves_no_result(words, tmp_path, chapter, command, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # as in disk_that_fills_after
    # Small files still fit: what a kernel needs to start. The notebook does not.
    process = command(words[0], chapter("print('x' * 2_000_000)"), *words[1:], "--out", tmp_path / "out",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "could not be written" in told
    assert "File too large" in told
    assert "Traceback" not in told
    # What there is of the notebook is kept under another name, if it is whole.
    for name in content(tmp_path / "out"):
        assert name.endswith(".failed.ipynb")
        nbformat.read(tmp_path / "out" / name, 4)


@pytest.mark.parametrize("place", ["in the way", pytest.param(CLOSED, marks=has_closed)])
def test_run_into_a_folder_that_cannot_be_made_says_so_and_is_not_started(place, tmp_path, chapter):
    (tmp_path / "in the way").write_text("a file")
    before, source = content(tmp_path), chapter(MARK.format(file=str(tmp_path / "ran")))
    result = fishlib_command("run", source, "--out", tmp_path / place / "out")
    assert result.exit_code == 1
    assert f"not started, for {tmp_path / place / 'out'} cannot be written to (" in result.output
    assert "name another folder" in result.output
    source.unlink()
    assert content(tmp_path) == before


@has_closed
@pytest.mark.parametrize("words", [("sweep", "{chapter}", "-g", "seed=0..9"), ("results",), ("render",), ("pdf",),
                                   ("grade", "one.ipynb"), ("assign",)], ids=lambda words: words[0])
def test_command_whose_result_cannot_be_written_says_so_before_its_work(words, chapter, build, monkeypatch):
    for work in ((sweep, "cluster"), (collect, "results"), (render, "stage"), (browser, "browser"), (grade, "grade"),
                 (assign, "_by_otter")):
        monkeypatch.setattr(*work, raising(AssertionError("it has begun")))
    result = fishlib_command(*(word.format(chapter=chapter()) for word in words), "--out", CLOSED / "out")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    told = result.output.splitlines()[-1]
    assert told.startswith(("Error: Permission denied: /sys/", "Error: Operation not permitted: /sys/"))
    assert "name a folder that can be written to" in told


def half(folder):
    folder.mkdir()
    (folder / "file").write_bytes(bytes(5000))
    return folder


def large_pdf(out, **_):
    pypdf = pytest.importorskip("pypdf", reason="no pypdf: pip install 'fishlib[browser]'")
    from fishlib.rerun import pdf

    book = pypdf.PdfWriter()
    book.add_metadata({"/Title": "x" * 5000})
    pdf._write(book, out)


# Commands, and what stands for their work; each of their results is larger than the disk of the test.
LARGE = {
    ("results", "table"): {},
    ("render", "html"): {"fishlib.rerun.render.stage": lambda executed, source, root: source,
                         "fishlib.rerun.render.build": lambda source, work: half(work / "new")},
    ("pdf", "book.pdf"): {"fishlib.rerun.pdf.print_book": large_pdf},
    ("grade", "grades.csv", "one.ipynb"): {"fishlib.rerun.grade.grade": lambda one, *_, **__: grade.Grade(
        str(one), "graded", 3, 4, message="x" * 5000)},
    ("assign", "", next(iter(assign.masters()))): {"fishlib.rerun.assign._by_otter": lambda master, work, check: work,
                                                   "fishlib.rerun.assign._sorted": lambda made, target, *_: half(target)},
}


@pytest.mark.parametrize(("words", "work"), LARGE.items(), ids=[words[0] for words in LARGE])
def test_command_on_a_disk_that_fills_ends_with_one_line_and_nothing_half_written(words, work, tmp_path, build, monkeypatch):
    results = {"chapter": "10_small", "parameters": {"seed": 0}, "records": {"text": "x" * 900}, "provenance": {}}
    run.write(build / "runs" / "10_small" / "results.json", json.dumps(results))
    for place, stands in work.items():
        monkeypatch.setattr(place, stands)
    before = content(tmp_path)
    command, out, *others = words
    with disk_that_fills_after(1000):
        result = fishlib_command(command, *others, "--out", tmp_path / out)
    assert result.exit_code == 1, result.output
    assert "File too large" in result.output
    assert "nothing half-written was left. Make room" in result.output
    assert content(tmp_path) == before


@pytest.mark.parametrize("words", [("run",), ("sweep", "-g", "seed=0..1")], ids=["run", "sweep"])
def test_interrupted_download_ends_the_command_before_any_run_and_leaves_no_data_set(words, tmp_path, chapter, monkeypatch):
    cache = tmp_path / "data" / "cache"

    def download(name, root, download):
        root.mkdir(parents=True)
        (root / f"{name}.gz").write_text("half")  # torchvision checks what it finds before it takes it
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "CACHE", cache)
    monkeypatch.setattr(data, "from_torchvision", download)
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    monkeypatch.setenv("FISHLIB_DATA", str(tmp_path))
    monkeypatch.setattr(run, "execute", None)
    result = fishlib_command(words[0], chapter(), *words[1:], "-p", "dataset", "mnist", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.output.endswith("interrupted: nothing half-written was left\n")
    assert not (tmp_path / "out").exists()
    assert list(content(cache)) == ["torchvision/mnist.gz"]


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


PICKLERS = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
UNPICKLING = ("read_pickle", "load_from_checkpoint", "yaml.load", "yaml.full_load", "yaml.unsafe_load")
HARMLESS = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False"),
            "numpy.load": ("allow_pickle", "False")}


def unpickles(source):
    """The imports and calls of a source that run whatever code a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [node for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            load = node.module in ("torch", "numpy", "yaml") and "load" in [alias.name for alias in node.names]
            found += [node] if load or (node.module or "").split(".")[0] in PICKLERS else []
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            option, value = HARMLESS["torch.load"] if "ckpt_path" in given else HARMLESS.get(name, (None, None))
            found += [node] if name.endswith(UNPICKLING) or (option and given.get(option) != value) else []
    return list(map(ast.unparse, found))


def code(*folders):
    """The code below folders of the repository, in files and in cells of notebooks, with its file."""
    files = [file for folder in folders for file in sorted((chapters.PACKAGE.parent / folder).rglob("*"))]
    for file in files:
        if file.suffix == ".py":
            yield file, file.read_text(encoding="utf-8")
        elif file.suffix == ".ipynb":
            for cell in nbformat.read(file, 4).cells:
                if cell.cell_type == "code":
                    yield file, assign.NO_PYTHON.sub(r"\1pass", cell.source)


def test_no_code_that_readers_run_loads_pickled_objects():
    sources = list(code("fishlib", "benchmarks", "chapters", "tests/course"))
    assert {"training.py", "units.py", "05_channel_divergence.ipynb", "masters"} <= {
        name for file, _ in sources for name in (file.name, file.parent.name)}
    assert [(file, found) for file, source in sources if (found := unpickles(source))] == []


def test_training_tells_lightning_to_load_weights_only_when_it_goes_on_from_a_checkpoint():
    source = Path(training.__file__).read_text(encoding="utf-8")
    assert source.count("ckpt_path=") == 1
    assert unpickles(source) == []
    assert len(unpickles(source.replace(", weights_only=True)", ")"))) == 1


@pytest.mark.parametrize("source", [
    "torch.load(f(x), map_location='cpu')", "torch.load(f(x), weights_only=False)", "np.load(file(a))", "import pickle as p",
    "from joblib import load", "from torch import load", "pd.read_pickle(file)", "yaml.load(text, Loader)",
    "trainer.fit(module, data, ckpt_path=path)", "trainer.test(module, ckpt_path=path, weights_only=False)"])
def test_code_that_could_unpickle_is_recognised(source):
    assert unpickles(source)


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
