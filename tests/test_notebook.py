import json
import math
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from scipy import stats

from fishlib import notebook

SOURCE = '''dataset = "digits"  # data set [digits | mnist | a folder]
epochs = 8  # passes [1 .. 1000]
strength = 0.5  # of the penalty [0 .. 10]
verbose = True  # print more
sizes = [1, 2]  # of layers
'''


def test_declared_reads_names_defaults_meanings_and_valid_values():
    parameters = notebook.declared(SOURCE)
    assert list(parameters) == ["dataset", "epochs", "strength", "verbose", "sizes"]
    assert parameters["dataset"].choices == ("digits", "mnist", "a folder")
    assert (parameters["epochs"].low, parameters["epochs"].high, parameters["epochs"].help) == (1, 1000, "passes")
    assert parameters["sizes"].default == [1, 2]


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("epochs", 3, 3), ("epochs", "3", 3), ("strength", 2, 2.0), ("strength", "1e-3", 1e-3), ("verbose", "false", False),
    ("dataset", "mnist", "mnist"), ("sizes", "[3]", [3])])
def test_values_are_taken_in_the_type_of_the_default(name, value, expected):
    found = notebook.declared(SOURCE)[name].check(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("epochs", 0, "epochs=0 is not valid: epochs is int from 1 to 1000"), ("epochs", 2.5, "int from"),
    ("epochs", True, "int from"), ("epochs", "many", "int from"), ("epochs", "5k", "int from"),
    ("strength", "x", "float from 0 to 10"),
    ("dataset", "nmist", "one of digits, mnist, a folder"), ("verbose", 1, "verbose is bool")])
def test_wrong_values_are_refused_with_the_valid_ones(name, value, message):
    with pytest.raises(ValueError, match=message):
        notebook.declared(SOURCE)[name].check(value)


def test_a_folder_is_a_valid_data_set_where_the_chapter_allows_it(tmp_path):
    assert notebook.declared(SOURCE)["dataset"].check(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("source", ["epochs = 2 + x", "epochs = 0  # passes [1 .. 9]", "print(1)", "a = b = 1"])
def test_a_cell_of_anything_but_literals_is_refused(source):
    with pytest.raises(ValueError, match="of the parameters cell is not"):
        notebook.declared(source)


def run_cells(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    return [[output for output in cell.outputs] for cell in book.cells]


@pytest.fixture(scope="module")
def outputs():
    return run_cells(
        'dataset = "digits"  # data set [digits | mnist]\nseed = 3  # first seed [0 .. 9]\nepochs = 2  # passes [1 .. 5]',
        "epochs = 4",  # as papermill injects a value
        "from fishlib import notebook\nsettings = notebook.start()\nimport torch, numpy as np",
        "print(settings.epochs, settings.seed, torch.initial_seed())",
        "notebook.record('accuracy', np.float32(0.985)); notebook.record('curve', np.arange(3))",
        "from fishlib.data import ImageData\nnotebook.provenance(ImageData())",
        "epochs = 9\ntry:\n    notebook.start()\nexcept ValueError as error:\n    print(error)")


def test_start_checks_the_values_in_the_notebook_and_seeds(outputs):
    assert outputs[3][0].text.split() == ["4", "3", "3"]
    assert outputs[6][0].text == "epochs=9 is not valid: epochs is int from 1 to 5\n"


def test_a_record_is_glue_and_keeps_its_value(outputs):
    accuracy, curve = outputs[4]
    assert accuracy.metadata["scrapbook"] == {"name": "accuracy", "mime_prefix": "application/papermill.record/"}
    assert accuracy.data == {"application/papermill.record/text/plain": "0.985"}
    assert accuracy.metadata["fishlib"]["value"] == pytest.approx(0.985)
    assert curve.metadata["fishlib"]["value"] == [0, 1, 2]


def test_provenance_states_where_numbers_come_from(outputs):
    facts = outputs[5][-1].metadata["fishlib"]["provenance"]
    assert facts["profile"] == "custom"
    assert facts["parameters"] == {"dataset": "digits", "seed": 3, "epochs": 4}
    assert set(facts["data"]) == {"digits"}
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"]
    assert facts["duration_s"] >= 0
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], torch.tensor(float("nan")), object()])
def test_a_record_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"record\('loss'"):
        notebook.record("loss", value)


def test_a_kept_table_is_computed_once_and_read_back_exactly(tmp_path):
    table, calls = pd.DataFrame({"name": ["a", "b"], "value": [0.1 + 0.2, 1e-17 / 3]}), []
    for _ in range(2):
        found = notebook.kept(tmp_path / "table.csv", lambda: calls.append(1) or table)
        pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert len(calls) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
    assert notebook.kept(None, lambda: table) is table


def test_a_table_that_was_not_finished_is_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        notebook.kept(tmp_path / "table.csv", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_percent_takes_fractions():
    assert notebook.percent(0.98512, 2) == "98.51 %"
    with pytest.raises(ValueError, match="not finite"):
        notebook.percent(np.nan)


def test_importing_the_library_stays_light():
    code = ("import fishlib, fishlib.notebook, sys\n"
            "print([m for m in ('torch', 'sphinx', 'dask', 'papermill') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_paired_differences_have_students_interval_which_one_seed_and_the_grain_of_counting_widen():
    differences = [0.4, 1.1, 0.7, 0.2]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert notebook.half_width(differences) == pytest.approx((interval.high - interval.low) / 2)
    assert notebook.told_apart(differences) == (interval.low > 0)
    assert not notebook.told_apart([0.4, -1.1, 0.7])
    assert notebook.half_width([0.5]) == math.inf
    assert not notebook.told_apart([0.5])
    assert notebook.told_apart([1 / 144] * 3)
    assert not notebook.told_apart([1 / 144] * 3, grain=1 / 144)
    assert not notebook.told_apart([0.0, 0.0, 0.0])


def test_a_kept_table_makes_its_folder_before_it_is_computed(tmp_path):
    def compute():
        assert (tmp_path / "new").is_dir()
        return pd.DataFrame({"a": [1]})

    assert notebook.kept(tmp_path / "new" / "table.csv", compute).a.to_list() == [1]

