"""Claims beside the runs that decide them: what is read, what counts as the same run, which verdict follows."""

import ast
import json
import re
import shutil
import subprocess

import nbformat
import numpy as np
import pytest
from scipy import stats
from small_chapters import write_chapter

from fishlib.rerun import chapters, child, claims, run

RUN = {"chapter": "10_small", "profile": "full", "gpu": 1, "cpu": 2}
CLAIM = {"id": "better", "proposal": "S1", "item": 1, "claim": "It is better.", "bar": "above a half", "run": "small",
         "holds": "accuracy > 0.5", "in_part": "accuracy > 0.3", "decides": "accuracy"}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter with a profile `full` (strength 2), and a function that makes claims about it."""
    source = write_chapter(tmp_path / "chapters" / "10_small.ipynb")
    (source.parent / "profiles").mkdir()
    (source.parent / "profiles" / "10_small.yml").write_text("full: {strength: 2, dataset: mnist}\n")
    monkeypatch.setattr(chapters, "CHAPTERS", source.parent)
    monkeypatch.setattr(chapters, "data_content", lambda dataset: None)

    def load(runs=None, **changes):
        file = tmp_path / "claims.yml"
        file.write_text(json.dumps({"runs": runs or {"small": RUN}, "claims": [CLAIM | changes]}))
        return claims.load(file)

    return load


def results(accuracy=0.9, provenance=None, **parameters):
    given = {"seed": 0, "strength": 2.0, "dataset": "mnist", "sizes": [30, 10]} | parameters
    return {"chapter": "10_small", "parameters": given, "records": {"accuracy": accuracy}, "provenance": provenance or {}}


def test_the_books_own_claims_name_existing_rows_profiles_and_parameters():
    book = claims.load()
    assert {claim.item for claim in book.claims.values()} == set(range(1, 13))
    published = {claim.published for claim in book.claims.values()}
    assert {name for name, row in book.published.items() if row["claim_of"] == "proposal-2"} <= published
    for experiment in book.experiments.values():
        claims.planned(experiment)
        assert experiment.gpu > 0
        assert experiment.cpu > 0


def test_the_books_own_conditions_read_records_that_their_chapters_make():
    book = claims.load()
    of_files = {"judged_ratio", "judged_fewer", "judged_error"}
    for claim in (claim for claim in book.claims.values() if claim.holds):
        quick = claims.in_chapter(book.experiments[claim.run].chapter)
        made = {*quick["records"], *claims.settled(book.experiments[claim.run])} if quick else set()
        source = chapters.CHAPTERS / f"{book.experiments[claim.run].chapter}.ipynb"
        made |= set(re.findall(r'notebook\.record\(\\"(\w+)', source.read_text(encoding="utf-8")))  # some only with BatchNorm
        for text in filter(None, (claim.holds, claim.in_part, f"[{claim.decides}]")):
            names = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
            assert not quick or names <= {*made, *of_files, *claims.FUNCTIONS, "published"}, claim.id


def test_a_condition_for_holding_in_part_is_told_in_words():
    for claim in claims.load().claims.values():
        assert bool(claim.in_part) == ("in part" in claim.bar), claim.id


def files(**shares):
    """Rows of two seeds for each share of weights kept, in thousandths: ratio, validation error and test error."""
    return [{"kept": int(share[1:]) / 1000, "ratio": ratio + seed, "weights": int(share[1:]), "error": error,
             "test_accuracy": 1 - test} for seed in (0, 2) for share, (ratio, error, test) in shares.items()]


def test_the_file_beside_a_published_one_is_the_smallest_that_validation_allows():
    stored = files(k50=(10, 0.01, 0.02), k20=(20, 0.02, 0.03), k10=(40, 0.03, 0.01))
    one = claims.judged(stored, 0.01, 100.0, 0.02)
    assert (one["judged_ratio"], one["judged_fewer"]) == (21, 50)
    assert one["judged_error"] == pytest.approx(0.03)
    assert "2 % of the weights, the smallest" in one["judged_note"]
    assert one["judged_note"].endswith("would not have chosen: 41 times at 1.00%, 11 times at 2.00%")


def test_where_validation_allows_no_file_the_chapters_own_choice_is_judged_whatever_the_test_images_say():
    stored = files(k50=(10, 0.03, 0.005), k20=(20, 0.04, 0.03))
    one = claims.judged(stored, 0.02, 100.0, 0.01)
    assert one["judged_ratio"] == 21
    assert "which the chapter chose" in one["judged_note"]
    assert "11 times at 0.50%" in one["judged_note"]


def test_a_claim_about_files_is_judged_by_that_file_and_says_which(book):
    one = book(published="han-300", holds='judged_ratio >= published["file_compression"]', in_part="", decides="judged_ratio")
    run = results()
    run["records"] |= {"files": files(k50=(60, 0.01, 0.02), k20=(90, 0.02, 0.03)), "chosen": 0.02, "file_fewer": 100.0}
    said = claims.verdict(one.claims["better"], one, [run])
    assert (said.word, said.measured) == ("holds", "judged_ratio 61")
    assert "5 % of the weights" in said.conditions
    assert claims.verdict(one.claims["better"], one, [results()]).word == "not yet run"


def test_a_count_at_the_cap_of_its_search_decides_nothing(book):
    assert claims.uncapped(59, 60) == 59
    one = book(holds='accuracy > uncapped(1, strength)')
    assert claims.verdict(one.claims["better"], one, [results(5.0)]).word == "holds"
    capped = claims.verdict(book(holds="accuracy > uncapped(3, strength)").claims["better"], one, [results(5.0)])
    assert capped.word == "not yet run"
    assert "only says at least" in capped.conditions


def test_a_difference_is_clear_where_the_interval_of_the_samples_themselves_leaves_out_zero():
    random = np.random.default_rng(0)
    one, other = random.normal(3, 1, 5), random.normal(1, 0.2, 5)
    low = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95).low
    assert claims.clear(one.mean(), one.std(ddof=1), other.mean(), other.std(ddof=1), 5) == pytest.approx(low)
    assert claims.clear(0.9, 0.0, 0.5, 0.0, 3) == pytest.approx(0.4)
    with pytest.raises(LookupError, match="one seed"):
        claims.clear(0.9, 0.0, 0.5, 0.0, 1)


def test_paired_differences_leave_a_claim_to_the_interval_of_their_mean():
    differences = [0.3, 0.1, 0.4, 0.35]
    low = stats.ttest_1samp(differences, 0).confidence_interval(0.95).low
    assert claims.paired(differences) == pytest.approx(low)
    records = {"ours": [1.3, 2.1, 0.4, 1.35], "theirs": [1, 2, 0, 1]}
    assert claims.value("paired(minus(ours, theirs))", records) == pytest.approx(low)
    with pytest.raises(LookupError, match="one seed"):
        claims.paired([0.3])


def test_a_number_below_its_bound_decides_nothing():
    assert claims.beyond(0.5, 0.4) == 0.5
    with pytest.raises(LookupError, match="nothing can be compared"):
        claims.beyond(0.4, 0.4)


def test_a_caveat_is_told_and_lowers_the_confidence(book):
    one = book()
    sound = claims.verdict(one.claims["better"], one, [results(seeds=3)])
    caveat = {"caveat": "Half of the images were black."}
    flawed = claims.verdict(one.claims["better"], one, [results(seeds=3, provenance=caveat)])
    assert (sound.confidence, flawed.confidence) == ("high", "medium")
    assert "Half of the images were black." in flawed.conditions
    assert "3 seeds" in sound.conditions


def test_what_is_stored_at_full_size_decides_the_claims_that_name_it():
    """A key that no run has would leave a claim "not yet run" for ever."""
    for _, row in claims.table().iterrows():
        if row.record in ("current", "stale", "unknown") and row.run:
            assert row.verdict != "not yet run", (row.claim, row.conditions)


def test_each_part_of_the_scorecard_has_the_claims_of_its_own_proposal():
    cells = chapters.read(chapters.CHAPTERS / "09_scorecard.ipynb").cells
    source = next(cell.source for cell in cells if cell.cell_type == "code" and "parts = {" in cell.source)
    names = {"claims": claims, "book": claims.load(), "found": claims.stored()}
    exec(source[:source.index("COLOUR")], names)
    scored, parts = names["scored"], names["parts"]
    assert sum(mask.astype(int) for mask in parts.values()).eq(1).all()
    assert set(scored.proposal[parts["units"]]) == {"S2", "S1 + S2"}
    assert set(scored.proposal[parts["weights"] | parts["channels"]]) == {"S1", "book"}


def test_orders_of_layers_are_compared_over_those_that_both_have():
    assert claims.order("0.1 (2), 0.2 (3), 0.3 (4)", "9 (1), 1.5 (2), 2.5 (3), 3.5 (4)") == pytest.approx(1)
    assert claims.order("0.1 (2), 0.2 (3), 0.3 (4)", "3 (2), 2 (3), 1 (4)", 2) == pytest.approx(-1 - 2 / 2**0.5)
    with pytest.raises(LookupError, match="too few layers"):
        claims.order("0.1 (2)", "3 (2)")


def test_a_gain_over_several_scores_is_that_over_the_best_of_them():
    rows = [{"stage": "fine-tuned", "score": name, "removed": 0.9, "mean": mean}
            for name, mean in {"fisher": 0.9, "magnitude": 0.8, "hessian": 0.95}.items()]
    assert claims.gains(rows, "fisher", "magnitude") == [pytest.approx(0.1)]
    assert claims.gains(rows, "fisher", "magnitude", "hessian") == [pytest.approx(-0.05)]


def test_a_bar_without_a_spread_allows_medium_confidence_at_most(book):
    one = book(confidence="medium")
    assert claims.verdict(one.claims["better"], one, [results(seeds=3)]).confidence == "medium"


def test_what_the_bar_reads_of_a_published_row_is_shown_and_else_its_note(book):
    shown = claims.table(book(published="han-300", holds='accuracy > published["file_compression"]'), []).published[0]
    assert shown == "40 times smaller, 98.42% (lenet-300-100, mnist: deep compression)"
    shown = claims.table(book(published="pfa-kl-r56"), []).published[0]
    assert shown.startswith("accuracy change -0.61 points")


def test_a_number_is_read_after_its_name():
    assert claims.number("maxout -1.2, tri-planar +0.5", "tri-planar") == 0.5
    with pytest.raises(LookupError, match="separable"):
        claims.number("maxout -1.2", "separable")


@pytest.mark.parametrize(("change", "message"), [
    ({"run": "other"}, "no run 'other'"), ({"published": "nobody"}, "no row 'nobody'"), ({"holds": ""}, "say `why`"),
    ({"holds": "accuracy >"}, "not a condition"), ({"holds": "open('x')"}, "only functions"),
    ({"holds": "accuracy.real > 0"}, "Attribute"), ({"colour": "red"}, "colour"), ({"holds": 1}, "are texts"),
    ({"confidence": "certain"}, "high or medium"), ({"decides": "accuracy,, loss"}, "not a condition")])
def test_a_wrong_entry_is_refused_and_named(book, change, message):
    with pytest.raises(ValueError, match=message):
        book(**change)


@pytest.mark.parametrize("text", ["", "runs: [", "claims: []", "runs: {}\nclaims: {a: 1}", "- 1", "\tx",
                                  "runs: {a: 1}\nclaims: []", "runs: {}\nclaims: [x]"])
def test_a_malformed_file_of_claims_is_one_error(tmp_path, text):
    file = tmp_path / "claims.yml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"claims\.yml"):
        claims.load(file)


@pytest.mark.parametrize(("accuracy", "word"), [(0.9, "holds"), (0.4, "holds in part"), (0.1, "does not hold")])
def test_a_run_of_full_size_decides_by_the_bar(book, accuracy, word):
    one = book()
    said = claims.verdict(one.claims["better"], one, [results(accuracy)])
    assert (said.word, said.confidence, said.provisional) == (word, "medium", "")
    assert claims.verdict(one.claims["better"], one, [results(accuracy, seeds=3)]).confidence == "high"


def test_a_smaller_run_never_decides_and_says_what_it_was(book):
    one = book()
    said = claims.verdict(one.claims["better"], one, [results(strength=1.0)])
    assert (said.word, said.confidence, said.provisional) == ("not yet run", "low", "holds")
    assert said.conditions == "with strength 1.0"
    assert claims.verdict(one.claims["better"], one, [results(dataset="digits")]).provisional == ""


def test_a_smaller_run_says_nothing_about_a_published_number(book):
    one = book(published="he-r20", holds="accuracy > published['accuracy']")
    said = claims.verdict(one.claims["better"], one, [results(0.95, strength=1.0)])
    assert (said.word, said.provisional) == ("not yet run", "")
    assert claims.verdict(one.claims["better"], one, [results(0.95)]).word == "holds"


def test_the_full_run_decides_where_both_are_stored_and_a_missing_record_leaves_it_open(book):
    one = book()
    assert claims.verdict(one.claims["better"], one, [results(0.1, strength=1.0), results(0.9)]).word == "holds"
    other = book(holds="lost > 1", decides="lost")
    said = claims.verdict(other.claims["better"], other, [results(0.9)])
    assert said.word == "not yet run"
    assert "lost" in said.conditions


def test_a_chapter_that_is_not_there_yet_is_no_error(book):
    one = book(runs={"small": RUN | {"chapter": "11_later"}})
    assert claims.state(one.experiments["small"], [results()]) == "no chapter"
    assert claims.verdict(one.claims["better"], one, [results()]).word == "not yet run"


def with_quick_result(notebook, value):
    meta = {"scrapbook": {"name": "accuracy"}, "fishlib": {"value": value}}
    notebook.cells[2].outputs = [nbformat.v4.new_output("display_data", {"text/plain": ""}, metadata=meta)]
    return notebook


def rewrite(path, code=None, quick=None):
    """Give a chapter other code, or other quick results."""
    notebook = nbformat.read(path, 4)
    if code:
        notebook.cells[2].source += code
    if quick is not None:
        with_quick_result(notebook, quick)
    nbformat.write(notebook, path)


BEFORE = {"accuracy": {"none": [0.9, 0.85], "ours": 0.95}, "loss": 3.0, "weights": 120_000, "kept": [0, 4, 7], "best": "kl",
          "seconds": 5.0, "larger": True, "does_not_hold": 3}


@pytest.mark.parametrize(("after", "share"), [
    ({}, 0), ({"loss": 3.2, "accuracy": {"none": [0.915, 0.86], "ours": 0.94}}, 0), ({"more": 5.0}, 0),
    ({"best": "l1", "kept": [0, 5, 6, 9], "seconds": 50.0, "larger": False, "does_not_hold": 30}, 0),
    ({"loss": 4.0}, 1 / 5), ({"weights": 160_000}, 1 / 5), ({"accuracy": {"none": [0.5, 0.5], "ours": 0.95}}, 2 / 5)])
def test_quick_results_have_changed_by_the_numbers_that_moved_further_than_noise(after, share):
    assert claims.change(BEFORE, BEFORE | after) == share


@pytest.fixture
def committed(book, tmp_path, monkeypatch):
    """The chapter with a quick result of 0.9, committed in a repository; and a function to commit it again."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    path = chapters.CHAPTERS / "10_small.ipynb"
    rewrite(path, quick=0.9)
    (tmp_path / "fishlib").mkdir()
    (tmp_path / "fishlib" / "one.py").write_text("")
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    monkeypatch.setattr(chapters, "BUILD", tmp_path / "_build")

    def commit():
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], ["add", "fishlib", "chapters", "constraints.txt"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *words], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    commit.first = commit()
    claims._code_at.cache_clear()
    claims._quick_then.cache_clear()
    return commit


def test_a_record_is_stale_when_its_code_has_changed_and_the_quick_results_by_more_than_noise(book, committed):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    made = [results(provenance=vars(claims.mark(path)) | {"commit": committed.first})]
    assert claims.state(one, made) == "current"
    rewrite(path, quick=0.5)
    assert claims.state(one, made) == "current"  # the same code
    rewrite(path, code="\nmore = 1")
    assert claims.state(one, made) == "stale"
    rewrite(path, quick=0.89)  # another machine
    assert claims.state(one, made) == "current"
    assert claims.state(one, []) == "missing"


def test_quick_results_of_a_record_are_found_by_their_fingerprint_where_it_was_made_before_they_were_committed(book, committed):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    rewrite(path, quick=0.5)
    made = [results(provenance=vars(claims.mark(path)) | {"commit": committed.first})]
    committed()
    rewrite(path, code="\nmore = 1")
    assert claims.state(one, made) == "current"
    rewrite(path, quick=0.9)
    assert claims.state(one, made) == "stale"


def test_the_code_of_a_chapter_is_what_it_imports_and_no_more(tmp_path):
    package = tmp_path / "fishlib"
    package.mkdir()
    sources = {"one.py": "from . import two\n", "two.py": "x = 1\n", "three.py": "from fishlib.one import y\n", "four.py": ""}
    for name, text in sources.items():
        (package / name).write_text(text)

    def found(source):
        return [line.split()[0] for line in chapters.imported([source], package)]

    assert found("from fishlib import one") == ["one.py", "two.py"]
    assert found("import fishlib.three as t") == ["one.py", "three.py", "two.py"]
    assert found("import numpy") == []


def test_a_record_without_marks_is_compared_with_the_commit_that_made_it(book, committed, tmp_path):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    known = {"commit": committed.first, "library": chapters.library(tmp_path / "fishlib")}
    rewrite(path, code="\nmore = 1")
    assert claims.state(one, [results(provenance=known)]) == "current"  # the quick results are those of the commit
    assert claims.state(one, [results(provenance=known | {"commit": "0" * 40})]) == "unknown"
    rewrite(path, quick=0.5)
    assert claims.state(one, [results(provenance=known)]) == "stale"


def test_a_record_that_is_said_to_be_at_fault_is_stale_and_its_verdict_of_low_confidence(book, committed):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    faulty = vars(claims.mark(path)) | {"commit": committed.first, "stale": True, "caveat": "images of one class"}
    made = [results(provenance=faulty)]
    assert claims.state(one, made) == "stale"
    row = claims.table(book(), made).iloc[0]
    assert (row.record, row.confidence) == ("stale", "low")
    assert "images of one class" in row.conditions


def test_a_record_of_other_code_is_unknown_where_its_commit_cannot_be_read_and_still_listed(book, committed, monkeypatch):
    one, path = book().experiments["small"], chapters.CHAPTERS / "10_small.ipynb"
    made = [results(provenance=vars(claims.mark(path)) | {"commit": committed.first})]
    monkeypatch.setenv("PATH", "")
    assert claims.state(one, made) == "current"
    rewrite(path, code="\nmore = 1")
    assert claims.state(one, made) == "unknown"
    assert list(claims.table(book(), made).record) == ["unknown"]
    assert claims.chosen("stale", book(), made, gpu=False) == []


def test_a_quick_run_is_stale_where_the_books_own_run_has_other_results(book, tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "BUILD", tmp_path / "_build")
    rewrite(chapters.CHAPTERS / "10_small.ipynb", quick=0.9)
    one = book(runs={"small": RUN | {"profile": "quick"}}).experiments["small"]
    plan = claims.planned(one)

    def shown(accuracy, identity):
        run.write(plan.notebook, "{}")
        run.write(plan.results, json.dumps({"records": {"accuracy": accuracy}, "provenance": {
            "identity": identity, "given_data": run.given(plan)}}))
        return claims.state(one, [])

    assert claims.state(one, []) == "current"
    assert shown(0.9, plan.identity) == "current"
    assert shown(0.5, plan.identity) == "stale"
    assert shown(0.5, "of other code") == "current"
    assert one.command == "fishlib refresh 10_small"


def test_quick_runs_are_left_out_of_what_is_missing_or_stale_and_refused_by_name(book):
    one = book(runs={"small": RUN, "held": RUN | {"profile": "quick"}})
    assert claims.state(one.experiments["held"], []) == "missing"
    assert [each.id for each in claims.chosen("missing", one, [], gpu=False)] == ["small"]
    with pytest.raises(ValueError, match="use `fishlib refresh 10_small`"):
        claims.chosen("held", one, [], gpu=False)


def test_a_chapter_that_judges_the_others_reads_the_runs_of_the_book_and_is_run_again_with_them(book, tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "BUILD", tmp_path / "_build")
    rewrite(chapters.CHAPTERS / "10_small.ipynb", quick=0.5)
    judge = write_chapter(chapters.CHAPTERS / "11_judge.ipynb", "from fishlib.rerun import claims, stored")
    assert claims.judges(judge)
    assert not claims.judges(chapters.CHAPTERS / "10_small.ipynb")
    plan = run.plan(chapters.load(judge))
    shown = plan.shown / "10_small" / "results.json"

    def given(**records):
        run.write(shown, json.dumps({"records": {"accuracy": 0.9} | records}))
        return run.given(plan)

    assert claims.in_chapter("10_small")["records"] == {"accuracy": 0.5}
    assert given(duration=3.0) == given(duration=5.0)
    assert given(accuracy=0.8) != given(accuracy=0.9)
    assert run.given(run.plan(chapters.load("10_small"))) == chapters.given_data()
    monkeypatch.setenv(run.SHOWN, str(plan.shown))
    assert claims.in_chapter("10_small")["records"] == {"accuracy": 0.9}
    before = given()
    rewrite(chapters.CHAPTERS / "10_small.ipynb", quick=0.7)
    assert given() != before


def test_the_scorecard_shows_the_results_that_stand_in_the_chapter_on_units():
    """The column for units and digits on page 9 has the validation accuracies of page 8, in order."""
    units, score = (nbformat.read(next(chapters.CHAPTERS.glob(f"{number}_*.ipynb")), 4) for number in ("08", "09"))
    records = child.collect(units)[0]
    values = sorted((value for name, value in records.items()
                     if name.startswith("validation_") and "scratch" not in name and isinstance(value, float)), reverse=True)
    pages = ["".join(output.data.get("text/html", "")) for cell in score.cells if cell.cell_type == "code"
             for output in cell.outputs if "data" in output]
    (page,) = [page for page in pages if "units: accuracy in %" in page]
    rows = [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    assert re.match(rf"(\s|&nbsp;)*{records['dataset']}, {records['network']}, the units kept there\s", rows[0])
    order = [found[0] for row in rows[1:] if (found := re.findall(r"\d+\.\d", row))]  # of the first run
    assert order == [f"{100 * value:.1f}" for value in values]


def test_no_share_on_the_scorecard_is_above_a_hundred_per_cent():
    """Records are put into words by their names, so that a count must not be taken for a fraction."""
    score = nbformat.read(chapters.CHAPTERS / "09_scorecard.ipynb", 4)
    first, second = (cell.source for cell in score.cells if cell.id in ("measured-in-words", "in-words"))
    names = {"re": re}
    exec(f"{first}\n{second}", names)
    said = claims.table().measured.map(names["in_words"])
    shares = [float(share) for words in said for share in re.findall(r"([\d.e+]+) %", words)]
    assert len(shares) > 20
    assert max(shares) <= 100
    said = names["in_words"]('number (others_above, "maxout") -1.3, same_start (1 / (3 fan-in)) 2.07')
    assert said == ("points above a narrower Conv2d (at equal parameters, maxout) -1.3, "
                    "above a narrower Conv2d, first weights of (1 / (3 fan-in)) 2.07 points")
