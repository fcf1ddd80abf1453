"""The form that every chapter keeps, read from the notebooks themselves: nothing is executed here."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import yaml

from fishlib import notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))

pytestmark = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def code(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def text(path):
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


def outputs(path):
    return [output for cell in code(path) for output in cell.outputs]


def parameters_cell(path):
    (cell,) = [cell for cell in code(path) if "parameters" in cell.metadata.get("tags", [])]
    return notebook.declared(cell.source)


def test_has_one_title_and_a_cell_of_parameters_that_all_have_a_meaning(path):
    prose = re.sub(r"```.*?```", "", text(path), flags=re.DOTALL)
    assert len(re.findall(r"^# ", prose, flags=re.MULTILINE)) == 1
    assert all(parameter.help for parameter in parameters_cell(path).values())


def test_profiles_set_declared_parameters_to_valid_values(path):
    file = ROOT / "chapters" / "profiles" / f"{path.stem}.yml"
    profiles = yaml.safe_load(file.read_text()) if file.exists() else {}
    for values in profiles.values():
        for name, value in values.items():
            parameters_cell(path)[name].check(value)


def test_was_executed_without_errors_warnings_or_leftovers(path):
    book = nbformat.read(path, 4)
    assert set(book.metadata) <= {"kernelspec", "language_info"}
    assert book.metadata.kernelspec.name == "python3"
    assert any(output.output_type in ("display_data", "execute_result") for output in outputs(path))
    assert not [output for output in outputs(path) if output.output_type == "error" or output.get("name") == "stderr"]


def test_cells_stay_short_and_the_file_small(path):
    assert max(len(cell.source.splitlines()) for cell in code(path)) <= 30
    assert path.stat().st_size < 2_000_000


def test_every_figure_has_a_caption_a_name_and_words_for_those_who_do_not_see_it(path):
    for cell in code(path):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            about = cell.metadata["mystnb"]
            assert len(about["image"]["alt"]) > 40
            assert about["figure"]["caption"]
            assert about["figure"]["name"].startswith("fig-")


def test_numbers_cited_in_prose_were_recorded_and_records_are_unique(path):
    about = [output.get("metadata", {}).get("scrapbook", {}) for output in outputs(path)]
    records = [scrap["name"] for scrap in about if scrap]
    cited = set(re.findall(r"\{glue:text\}`([^`]+)`", text(path)))
    # Times differ from run to run, so that cells which are tagged for it keep no outputs in the repository.
    timed = [cell.source for cell in code(path) if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    recorded = {*records, "duration", *re.findall(r"record\(\"(\w+)\"", "\n".join(timed))}
    assert cited <= recorded
    assert len(records) == len(set(records))


def test_cells_that_show_nothing_are_folded(path):
    silent = [set(cell.metadata.tags) for cell in code(path) if "remove-output" in cell.metadata.get("tags", [])]
    assert all("hide-input" in tags for tags in silent)


def test_exercises_with_a_solution_have_a_starter_a_hint_and_a_check(path):
    cells = nbformat.read(path, 4).cells
    solved = [(question, cell) for question, cell in pairwise(cells) if cell.source.startswith("# Solution")]
    assert len(solved) >= 3
    for question, solution in solved:
        assert re.search(r"\*Starter:\* .*\*Hint:\* ", question.source)
        assert "hide-cell" in solution.metadata.tags
        assert "assert " in solution.source


def test_training_can_go_on_after_an_interruption(path):
    sources = "\n".join(cell.source for cell in code(path))
    assert "checkpoint=" in sources
    assert "FISHLIB_CHECKPOINTS" in sources


def test_ends_with_its_provenance(path):
    assert code(path)[-1].source.startswith("notebook.provenance(")
