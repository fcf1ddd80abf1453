"""The table of all results."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fishlib.rerun import chapters, collect
from fishlib.rerun.cli import main


def leave(root, records, chapter="10_small", library="a", **parameters):
    """Results as a run leaves them."""
    folder = root / chapter / f"{sum(1 for _ in root.rglob('results.json')):04d}"
    folder.mkdir(parents=True)
    provenance = {"identity": folder.name, "library": library, "commit": "abc", "versions": {"torch": "2"}}
    content = {"chapter": chapter, "parameters": parameters, "records": records, "provenance": provenance}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(tmp_path, build, monkeypatch):
    """Where runs are looked for: those of sweeps and the stored ones."""
    monkeypatch.setattr(collect, "STORED", tmp_path / "stored")
    return build / "runs", tmp_path / "stored"


def fishlib_results(tmp_path, *words):
    return CliRunner().invoke(main, ["results", *map(str, words), "--out", str(tmp_path / "table")])


def test_every_run_is_a_row_with_parameters_records_and_provenance(folders, tmp_path):
    swept, stored = folders
    for seed, strength in itertools.product(range(2), (0.0, 0.1)):
        leave(swept, {"accuracy": 0.9 + seed / 100, "curve": [1.0, 2.0], "cost": {"bytes": 7}}, seed=seed,
              strength=strength)
    leave(stored, {"accuracy": 0.99}, chapter="11_other", seed=0)
    table = collect.results()
    assert len(table) == 5
    row = table[(table["chapter"] == "10_small") & (table["seed"] == 1) & (table["strength"] == 0.1)].iloc[0]
    assert row["accuracy"] == 0.91
    assert row["curve"] == [1.0, 2.0]
    assert row["cost.bytes"] == 7
    assert row["provenance.commit"] == "abc"
    assert row["provenance.versions.torch"] == "2"
    assert set(collect.results("11*")["chapter"]) == {"11_other"}
    assert len(collect.results("10_small/0001")) == 1
    assert set(collect.stored()["chapter"]) == {"11_other"}
    assert collect.stored("12*").empty

    assert fishlib_results(tmp_path, "--summary").exit_code == 0
    parquet, csv = pd.read_parquet(tmp_path / "table.parquet"), pd.read_csv(tmp_path / "table.csv")
    assert list(parquet.columns) == list(csv.columns) == list(table.columns)
    np.testing.assert_array_equal(parquet["accuracy"], table["accuracy"])
    np.testing.assert_array_equal(csv["accuracy"], table["accuracy"])
    assert sorted(file.name for file in tmp_path.glob("*table*")) == [
        "table.csv", "table.parquet", "table_summary.csv", "table_summary.parquet"]


def test_stored_runs_stand_side_by_side_with_a_row_for_each_quantity_that_one_of_them_has():
    runs = pd.DataFrame([{"profile": "cpu", "epochs": 6, "accuracy": 0.87654}, {"profile": "full", "epochs": 160}])
    words = {"accuracy": "test accuracy", "epochs": "passes", "bytes": "bytes"}
    shown = collect.side_by_side(runs, words, precision=2)
    assert shown.data.columns.to_list() == ["cpu", "full"]
    assert shown.data.index.to_list() == ["test accuracy", "passes"]
    assert ">0.88<" in shown.to_html()
    assert "not run" in shown.to_html()
    assert "No larger run has been stored yet." in collect.side_by_side(pd.DataFrame(), words).to_html()


def test_printed_tables_are_one_a_chapter_with_what_all_its_rows_have_and_fit_a_terminal(folders, tmp_path):
    for seed in (0, 1):
        leave(folders[0], {"accuracy": 0.9 + seed / 100, "curve": [1.0, 2.0], "cost": {"bytes": 7}, "said": "w" * 90}
              | ({"once": 5} if seed else {}), seed=seed, strength=0.5)
    leave(folders[0], {"loss": 0.25}, chapter="11_other", seed=0)
    result = fishlib_results(tmp_path)
    small, other = result.output.split("11_other, 1 run")
    assert small.splitlines()[1] == "10_small, 2 runs"
    assert small.splitlines()[2].split() == ["identity", "seed", "accuracy"]
    assert other.splitlines()[1].split() == ["identity", "loss"]
    assert max(map(len, result.output.splitlines()[:-2])) <= 80
    assert {"curve", "cost.bytes", "said", "once"} <= set(pd.read_csv(tmp_path / "table.csv").columns)


def test_printed_summaries_have_deviations_where_some_settings_have_several_seeds(folders, tmp_path):
    for seed, strength in ((0, 0.5), (1, 0.5), (0, 1.0)):
        leave(folders[0], {"accuracy": 0.9 + seed / 100}, seed=seed, strength=strength)
    lines = fishlib_results(tmp_path, "--summary").output.splitlines()
    assert lines[1] == "10_small, 3 runs"
    assert lines[2].split() == ["strength", "record", "mean", "std", "low", "high", "n"]


def test_printed_summaries_name_their_records_however_long_the_names(folders, tmp_path):
    name = "accuracy_of_the_smallest_network_that_keeps_nine_tenths"
    for seed in (0, 1):
        leave(folders[0], {"accuracy": 0.9, name: 0.5}, seed=seed, rule="r" * 30 + str(seed))
    lines = fishlib_results(tmp_path, "--summary").output.splitlines()
    assert lines[2].split()[:2] == ["record", "mean"]
    assert lines[4].split()[:2] == [name, "0.5"]


def test_printed_tables_tell_folders_of_images_by_the_last_part_of_their_paths(folders, tmp_path):
    leaves = str(tmp_path / "pictures of many plants" / "leaves")
    for dataset in ("digits", leaves):
        leave(folders[0], {"accuracy": 0.9}, dataset=dataset, seed=0)
    for words in ((), ("--summary",)):
        lines = fishlib_results(tmp_path, *words).output.splitlines()
        assert "dataset" in lines[2].split()
        assert [word for line in lines[3:5] for word in line.split() if word in ("digits", "leaves")] == ["digits", "leaves"]
    assert leaves in set(pd.read_csv(tmp_path / "table.csv")["dataset"])


def test_without_pyarrow_one_line_says_what_to_install(folders, tmp_path, monkeypatch):
    leave(folders[0], {"accuracy": 0.9}, seed=0)

    def without(*_, **__):
        raise ImportError("Unable to find a usable engine; tried using: 'pyarrow'.\nA suitable version is needed.\n - more")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", without)
    result = fishlib_results(tmp_path)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("'pyarrow': the table needs pyarrow, pip install 'fishlib[sweep]'")


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, -math.inf], {"inner": math.nan}])
def test_records_that_are_not_finite_are_refused_by_name(folders, tmp_path, value):
    leave(folders[0], {"accuracy": 0.9}, seed=0)
    bad = leave(folders[0], {"loss": value}, seed=1)
    result = fishlib_results(tmp_path)
    assert result.exit_code == 1
    assert "loss" in result.output
    assert str(bad) in result.output
    assert not list(tmp_path.glob("table*"))


def test_two_runs_of_the_same_parameters_are_refused_by_name(folders, tmp_path):
    first = leave(folders[0], {"accuracy": 0.9}, seed=0)
    second = leave(folders[0], {"accuracy": 0.9}, seed=0, library="b")
    result = fishlib_results(tmp_path)
    assert result.exit_code == 1
    assert str(first) in result.output
    assert str(second) in result.output
    shutil.rmtree(second)
    shutil.copytree(first, second)
    assert fishlib_results(tmp_path).exit_code == 1


def test_a_run_that_was_stored_unchanged_counts_once(folders):
    run = leave(folders[0], {"accuracy": 0.9}, seed=0)
    shutil.copytree(run, folders[1] / "10_small" / run.name)
    table = collect.results()
    assert len(table) == 1
    assert table["file"][0].startswith(str(folders[1]))


def test_a_record_named_as_a_parameter_of_another_value_is_refused(folders):
    leave(folders[0], {"strength": 2.0}, seed=0, strength=1.0)
    with pytest.raises(ValueError, match="strength are named as parameters"):
        collect.results()


@pytest.mark.parametrize("change", [
    {"records": [1.0]}, {"parameters": "seed"}, {"provenance": None}, {"chapter": 7}, "{", "[]"], ids=str)
def test_a_file_that_is_not_the_results_of_a_run_is_named(folders, tmp_path, change):
    file = leave(folders[0], {"accuracy": 0.9}, seed=0) / "results.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(change if isinstance(change, str) else json.dumps(whole | change))
    result = fishlib_results(tmp_path)
    assert result.exit_code == 1
    assert f"{file} is not the results of a run (" in result.output
    assert "): remove it" in result.output


@pytest.mark.parametrize("words", [["results"], ["pdf"], ["grade", "one.ipynb"]], ids=lambda words: words[0])
@pytest.mark.parametrize("out", ["", ".", "/", "folder/.."])
def test_a_path_without_a_file_name_is_refused_before_anything_is_done(folders, words, out, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    leave(folders[0], {"accuracy": 0.9}, seed=0)
    result = CliRunner().invoke(main, [*words, "--out", out])
    assert result.exit_code == 2
    assert "names no file" in result.output or "is a directory" in result.output
    assert "accuracy" not in result.output


def test_runs_from_several_states_of_the_library_are_noted(folders, tmp_path):
    for seed, library in enumerate("aab"):
        leave(folders[0], {"accuracy": 0.9}, seed=seed, library=library)
    result = fishlib_results(tmp_path)
    assert result.exit_code == 0
    assert "10_small come from 2 states" in result.output


def test_without_any_run_the_command_says_so(folders, tmp_path):
    result = fishlib_results(tmp_path, "09*")
    assert result.exit_code == 1
    assert "no finished run matches '09*'" in result.output


def test_the_summary_of_known_numbers(folders):
    for seed, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        leave(folders[0], {"value": value, "text": "x"}, seed=seed, sizes=[3, 1])
    leave(folders[0], {"value": 7}, seed=0, sizes=[5])
    many, one = (row for _, row in collect.summary(collect.results()).iterrows())
    # Student's t for three degrees of freedom is 3.182446 [any table].
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (many["sizes"], many["record"], many["n"]) == ([3, 1], "value", 4)
    assert (many["mean"], many["std"]) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    assert (many["low"], many["high"]) == (pytest.approx(2.5 - half, abs=1e-5), pytest.approx(2.5 + half, abs=1e-5))
    assert (one["sizes"], one["mean"], one["n"]) == ([5], 7.0, 1)
    assert math.isnan(one["std"])
    assert math.isnan(one["low"])


def test_the_summary_counts_yes_and_no_beside_chapters_that_lack_the_record(folders):
    for seed, met in enumerate((True, False)):
        leave(folders[0], {"met": met, "note": "x"}, seed=seed)
    leave(folders[0], {"value": 1.0}, chapter="11_other", seed=0)
    summary = collect.summary(collect.results()).set_index("record")
    assert set(summary.index) == {"met", "value"}
    assert (summary["mean"]["met"], summary["n"]["met"]) == (0.5, 2)


@given(st.dictionaries(st.tuples(st.integers(0, 5), st.sampled_from(["a", "b", None])), st.floats(-1e3, 1e3), min_size=1))
@settings(deadline=None, max_examples=30)
def test_the_summary_agrees_with_a_loop_over_rows(values):
    table = pd.DataFrame([{"chapter": "c", "seed": seed, "kind": kind, "value": value}
                          for (seed, kind), value in values.items()])
    table.attrs["parameters"] = ["seed", "kind"]
    summary = collect.summary(table)
    for kind in {kind for _, kind in values}:
        group = [value for (_, other), value in values.items() if other == kind]
        row = summary[summary["kind"].isna() if kind is None else summary["kind"] == kind].iloc[0]
        assert row["n"] == len(group)
        assert row["mean"] == pytest.approx(sum(group) / len(group), abs=1e-9)
        if len(group) > 1:
            assert row["std"] == pytest.approx(np.std(group, ddof=1), abs=1e-9)


def test_a_plot_is_drawn_and_an_unknown_column_is_answered_with_those_there_are(folders, tmp_path):
    for seed, strength in itertools.product(range(3), (0.0, 0.1)):
        leave(folders[0], {"accuracy": 0.9 + seed / 100}, seed=seed, strength=strength)
    result = fishlib_results(tmp_path, "--plot", "strength", "accuracy", "-")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "table.png").stat().st_size > 5000
    result = fishlib_results(tmp_path, "--plot", "strenght", "accuracy", "seed")
    assert result.exit_code == 1
    assert "no column 'strenght': use chapter, identity, seed, strength, accuracy" in result.output


@pytest.mark.parametrize(("column", "told"), [
    ("acuracy", "no column 'acuracy': use"), ("curve", "the column 'curve' holds lists: use one of seed, strength, accuracy"),
    ("said", "the column 'said' holds no numbers: use one of seed, strength, accuracy")])
def test_a_column_that_cannot_be_drawn_is_refused_before_anything_is_saved(folders, tmp_path, column, told):
    leave(folders[0], {"accuracy": 0.9, "curve": [1.0, 2.0], "said": "so"}, seed=0, strength=0.5)
    result = fishlib_results(tmp_path, "--plot", "strength", column, "-")
    assert result.exit_code == 1
    assert told in result.output
    assert not list(tmp_path.glob("*table*"))


def test_columns_of_plots_on_the_pages_are_parameters_and_records_of_the_chapter(tmp_path):
    import re
    import shlex

    from fishlib.rerun import claims

    lines = [line for page in (chapters.ROOT / "chapters").glob("*.md") for line in page.read_text("utf-8").splitlines()
             if re.match(r"(\$ )?fishlib results .*--plot", line)]
    assert lines
    for line in lines:
        context = main.commands["results"].make_context("results", shlex.split(line.removeprefix("$ "))[2:])
        chapter = chapters.load(context.params["pattern"])
        row = {name: one.default for name, one in chapter.parameters.items()}
        row |= collect._flat(claims.in_chapter(chapter.path.stem)["records"])
        x, y, hue = context.params["plot"]
        collect.check_plot(pd.DataFrame([row]), x, y, None if hue == "-" else hue)


def test_the_plan_for_a_cluster_counts_right_and_its_file_is_valid(tmp_path):
    import re
    import shlex

    from fishlib.rerun import sweep

    page = (chapters.ROOT / "chapters" / "howto_cluster.md").read_text(encoding="utf-8")
    command = re.search(r"# 3\. all of it\n(.*?)\n\n", page, re.S)[1].replace("\\\n", " ")
    words = shlex.split(command)
    axes = sweep.grid(chapters.load(words[2]), [words[i + 1] for i, word in enumerate(words) if word == "-g"])
    assert math.prod(map(len, axes.values())) == 1000
    file = tmp_path / "slurm.yml"
    file.write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    slurm, jobs = sweep.slurm_settings(file)
    assert jobs * slurm["cores"] == 16


def test_a_record_that_is_a_list_in_one_run_and_a_number_in_another_is_saved(tmp_path):
    table = pd.DataFrame({"accuracy": [[0.5, 0.6], 0.7, None], "number": [1.0, 2.0, None]})
    parquet, _ = collect.save(table, tmp_path / "all")
    again = pd.read_parquet(parquet)
    assert again["accuracy"].tolist()[:2] == ["[0.5, 0.6]", "0.7"]
    assert again["number"].tolist()[:2] == [1.0, 2.0]
