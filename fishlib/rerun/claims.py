"""The claims of the two proposals beside the runs that decide them: what is stored, what is stale, what is missing.

`data/claims.yml` names the claims and their runs. A run counts as *stored* when `data/runs` holds results of its chapter
with its parameters; results of the same chapter and data set with other parameters are a *smaller run*, which never
decides a claim and at most points to a verdict. A run at the quick profile stands in the chapter itself.

A stored run is **stale** when both have changed since it was made: the code that its chapter runs (its cells and the
modules of fishlib that they import, directly or through one another), and the quick results that stand in the chapter by
more than noise (see `change`). New code that leaves the quick results alone makes nothing stale; nor do quick results that
another machine or one more record has changed. The quick results of then are those of a commit; where the commit is not
there, as in a shallow clone or an unpacked archive, nothing is said of a record whose code differs: it is *unknown*.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fishlib.rerun import chapters, collect
from fishlib.rerun import run as runs

if TYPE_CHECKING:
    import pandas as pd

FILE = chapters.ROOT / "data" / "claims.yml"
PUBLISHED = chapters.ROOT / "data" / "published.csv"
STORED = chapters.ROOT / "data" / "runs"
VERDICTS = ("holds", "holds in part", "does not hold", "not yet run")
TIMES = ("duration", "seconds", "cost_ratio")  # the names under which chapters record times
# What the chapter that judges the stored runs counts in them; it changes with each new one, and is no result of its own.
COUNTS = (*(word.replace(" ", "_") for word in VERDICTS), "claims", "own_claims", "decided", "hints", "stored_points",
          "information_best")
MOVED = 1 / 6  # the share of its numbers from which the quick results of a chapter have changed
FAMILIES = ("resnet", "vgg", "densenet")  # networks that differ in their depth alone
FEW = 3  # seeds from which a verdict is of high confidence
PUBLISHED_AS = {"accuracy": "{:.2%}", "base_accuracy": "{:.2%} before", "file_compression": "{:g} times smaller",
                "parameters_M": "{:g} M parameters", "mac_M": "{:g} M operations",
                "parameters_fewer": "{:g} times fewer parameters", "parameters_removed_pct": "{:g} % of the parameters removed"}
ALLOWED = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
           ast.Div, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Name, ast.Load,
           ast.Constant, ast.Subscript, ast.Call, ast.List)


def number(text: str, name: str) -> float:
    """The number that follows a name in a text; LookupError if there is none."""
    if match := re.search(rf"(?<!\w){re.escape(name)} ([+-]?\d+(?:\.\d+)?)", text):
        return float(match[1])
    raise LookupError(f"no number for {name} in {text!r}")


def each(rows: Sequence[Mapping[str, Any]], text: str) -> list[Any]:
    """An expression over the columns of each row of a table."""
    return [value(text, row) for row in rows]


def gains(rows: Sequence[Mapping[str, Any]], one: str, *others: str) -> list[float]:
    """Mean accuracy of a score above the best of others after fine-tuning, at each share removed (chapter 3's `scores`)."""
    means = {(row["score"], row["removed"]): row["mean"] for row in rows if row["stage"] == "fine-tuned"}
    return [mean - max(means[other, share] for other in others) for (name, share), mean in means.items() if name == one]


def above(numbers: Sequence[float], bound: float) -> int:
    """How many numbers are above a bound."""
    return sum(number > bound for number in numbers)


def clear(one: float, spread: float, other: float, other_spread: float, seeds: int) -> float:
    """The difference of two means over as many seeds less the half width of its 95 % interval (Welch); above zero where the
    seeds tell the first to be the larger. LookupError for a single seed, which has no spread."""
    from scipy import stats

    if seeds < 2:
        raise LookupError("one seed has no spread")
    if not spread and not other_spread:
        return one - other
    freedom = (seeds - 1) * (spread**2 + other_spread**2) ** 2 / (spread**4 + other_spread**4)
    return one - other - float(stats.t.ppf(0.975, freedom)) * ((spread**2 + other_spread**2) / seeds) ** 0.5


def minus(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences of two lists, pair by pair."""
    return [one - other for one, other in zip(numbers, others, strict=True)]


def paired(differences: Sequence[float]) -> float:
    """The mean of paired differences, one a seed, less the half width of its 95 % interval (Student); above zero where the
    seeds tell it to be. LookupError for a single seed."""
    from fishlib.notebook import half_width

    if len(differences) < 2:
        raise LookupError("one seed has no spread")
    return sum(differences) / len(differences) - half_width(differences)


def uncapped(count: float, cap: float) -> float:
    """A count from a search that ended below its cap; LookupError at the cap, where it only says "at least"."""
    if count < cap:
        return count
    raise LookupError(f"the search ended at {cap:g}, so that a count of {count:g} only says at least")


def beyond(number: float, bound: float) -> float:
    """A number above a bound; LookupError below it, where what is to be compared with it could show nothing."""
    if number > bound:
        return number
    raise LookupError(f"{number:.3g} is not above {bound:.3g}, so that nothing can be compared with it")


def order(one: str, other: str, errors: float = 0) -> float:
    """Rank correlation of two texts such as "0.007 (2), 0.008 (3)" over the n layers, in brackets, that both have; less so
    many standard errors, 1 / sqrt(n - 1) where the two have nothing to do with each other."""
    from scipy.stats import spearmanr

    values, others = ({layer: float(value) for value, layer in re.findall(r"([\d.]+) \((\d+)\)", text)}
                      for text in (one, other))
    both = sorted(values.keys() & others.keys())
    if len(both) < 3:
        raise LookupError(f"too few layers in {one!r} and {other!r}")
    found = spearmanr([values[layer] for layer in both], [others[layer] for layer in both]).statistic
    return float(found) - errors / (len(both) - 1) ** 0.5


def judged(files: Sequence[Mapping[str, Any]], chosen: float, fewer: float, error: float) -> dict[str, Any]:
    """The stored file (chapter 3) that is held against a published error: the one that *validation* chooses for it.

    To choose by the test images would be to tune on them. Of the shares of weights kept, each a mean over seeds, the one of
    largest ratio is taken whose validation error is at most the published error; if there is none, the one that the chapter
    chose, which it did by validation too.

    Parameters
    ----------
    files : rows with `kept`, `ratio`, `weights`, `error` (validation) and `test_accuracy`
    chosen, fewer : share that the chapter chose, and how many times fewer weights its file has
    error : the published error, a fraction

    Returns
    -------
    dict
        `judged_ratio`, `judged_fewer`, `judged_error` (test), and in words `judged_note`, with the files that are better on
        the test images and that validation would not have chosen
    """
    import pandas as pd

    table = pd.DataFrame(files).groupby("kept")[["ratio", "weights", "error", "test_accuracy"]].mean()
    table["fewer"], table["test"] = fewer * table.weights[chosen] / table.weights, 1 - table.test_accuracy
    table, error = table.round(9), round(error, 9)  # 1 - 0.98 is not 0.02
    within = table[table.error <= error]
    kept = within.ratio.idxmax() if len(within) else chosen
    one = table.loc[kept]
    better = table[(table.test <= error) & ((table.ratio > one.ratio) | (one.test > error))]
    note = (f"the file with {100 * kept:.3g} % of the weights, "
            + ("the smallest whose validation error is within the published error" if len(within) else
               "which the chapter chose, for no file's validation error is within the published error"))
    if len(better):
        note += ("; on the test images others are within it, which validation would not have chosen: "
                 + ", ".join(f"{row.ratio:.0f} times at {row.test:.2%}" for row in better.itertuples()))
    return {"judged_ratio": float(one.ratio), "judged_fewer": float(one.fewer), "judged_error": float(one.test),
            "judged_note": note}


FUNCTIONS = {"abs": abs, "len": len, "max": max, "min": min, "number": number, "each": each, "gains": gains, "above": above,
             "clear": clear, "minus": minus, "paired": paired, "uncapped": uncapped, "beyond": beyond, "order": order}


@dataclass(frozen=True)
class Experiment:
    """A run that decides claims: its chapter, profile and parameters, and minutes expected on a GPU and on one CPU thread."""

    id: str
    chapter: str
    profile: str
    gpu: float
    cpu: float
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What makes and stores it."""
        return f"fishlib refresh {self.chapter}" if self.profile == "quick" else f"fishlib run --claims {self.id}"


@dataclass(frozen=True)
class Claim:
    """A claim in the book's words, and the bar that decides it; see `data/claims.yml` for the fields.

    `proposal` is S1, S2, or "book" for a claim of the book's own. `confidence` is the most that its bar allows: medium where
    it compares means of which no spread is recorded, or that the spread over seeds does not tell apart.
    """

    id: str
    proposal: str
    item: int
    claim: str
    bar: str
    run: str | None = None
    published: str | None = None
    decides: str = ""
    holds: str = ""
    in_part: str = ""
    why: str = ""
    confidence: str = "high"


@dataclass(frozen=True)
class Verdict:
    """`word` is one of `VERDICTS` and comes from a run of full size; `provisional` is what a smaller run points to."""

    word: str
    confidence: str
    measured: str = ""
    provisional: str = ""
    conditions: str = ""


@dataclass(frozen=True)
class Book:
    """All claims and all experiments, by id, and the published rows that they name."""

    claims: dict[str, Claim]
    experiments: dict[str, Experiment]
    published: dict[str, dict[str, Any]]


def load(file: Path = FILE, published: Path = PUBLISHED) -> Book:
    """Read and check `claims.yml`.

    Raises
    ------
    ValueError
        a file that is not YAML or has not both parts, a field that is unknown or missing, an id given twice, a run or a
        published row that does not exist, a condition that cannot be read; the message names the entry
    """
    import pandas as pd

    content = _content(file)
    rows = {row["id"]: row for row in pd.read_csv(published).to_dict("records")}
    experiments = {name: _entry(Experiment, name, values, id=name) for name, values in content["runs"].items()}
    claims = {}
    for number, values in enumerate(content["claims"], 1):
        claim = _entry(Claim, f"claim {number}", values)
        if claim.id in claims:
            raise ValueError(f"claims.yml: the id {claim.id} is given twice")
        _check(claim, experiments, rows)
        claims[claim.id] = claim
    return Book(claims, experiments, rows)


def _content(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    parts = content if isinstance(content, dict) else {}
    if not isinstance(parts.get("runs"), dict) or not isinstance(parts.get("claims"), list):
        raise ValueError(f"{file} has to hold `runs`, a mapping, and `claims`, a list")
    return parts


def _entry(kind: type, name: str, values: Any, **more: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"claims.yml, {name}: it has to map fields to values, not to be {values!r}")
    try:
        return kind(**more, **values)
    except TypeError as error:
        raise ValueError(f"claims.yml, {values.get('id', name)}: {error}") from error


def _check(claim: Claim, experiments: Mapping[str, Experiment], rows: Mapping[str, Any]) -> None:
    if claim.run is not None and claim.run not in experiments:
        raise ValueError(f"claims.yml, {claim.id}: there is no run {claim.run!r}; use one of {', '.join(experiments)}")
    if claim.published is not None and claim.published not in rows:
        raise ValueError(f"claims.yml, {claim.id}: published.csv has no row {claim.published!r}")
    if not (claim.run and claim.holds) and not claim.why:
        raise ValueError(f"claims.yml, {claim.id}: name a run and a condition `holds`, or say `why` there is none")
    if claim.confidence not in ("high", "medium"):
        raise ValueError(f"claims.yml, {claim.id}: confidence is high or medium, not {claim.confidence!r}")
    if not all(isinstance(text, str) for text in (claim.holds, claim.in_part, claim.decides)):
        raise ValueError(f"claims.yml, {claim.id}: holds, in_part and decides are texts: put them into quotes")
    for text in (claim.holds, claim.in_part, f"[{claim.decides}]"):
        try:
            _parse(text or "True")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"claims.yml, {claim.id}: {text!r} is not a condition over records ({error})") from error


def _decides(claim: Claim) -> list[str]:
    """The expressions in `decides`, as they are written."""
    source = f"[{claim.decides}]"
    return [ast.get_source_segment(source, node) for node in ast.parse(source, mode="eval").body.elts]


def _parse(text: str) -> ast.Expression:
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise ValueError(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise ValueError(f"the only functions are {', '.join(FUNCTIONS)}")
    return tree


def value(text: str, records: Mapping[str, Any]) -> Any:
    """An arithmetic expression or a condition over records, for instance ``lost["half"] < 0.5 and seeds > 2``.

    Raises
    ------
    ValueError
        something other than arithmetic and comparisons
    LookupError
        a record that is not there
    """
    try:
        return eval(compile(_parse(text), "<claim>", "eval"), {"__builtins__": {}} | FUNCTIONS, dict(records))
    except (NameError, KeyError) as error:
        raise LookupError(f"no record {error.name if isinstance(error, NameError) else error.args[0]}") from error


def stored(folder: Path | None = None) -> list[dict[str, Any]]:
    """The contents of all results.json below a folder, by default `data/runs`; without those that are damaged."""
    return list(_read(folder or STORED).values())


def _read(folder: Path) -> dict[Path, dict[str, Any]]:
    found = {}
    for file in sorted(folder.rglob("results.json")):
        try:
            found[file] = collect.read(file)
        except ValueError:
            continue  # `fishlib results` names it
    return found


def planned(experiment: Experiment) -> runs.Run | None:
    """The run of an experiment, nothing executed; None while its chapter is not there.

    Raises
    ------
    ValueError
        a profile or parameters that the chapter does not have; a data file that is damaged
    """
    if (chapter := _chapter(experiment)) is None:
        return None
    return runs.plan(chapter, experiment.profile, experiment.parameters)


def settled(experiment: Experiment) -> dict[str, Any] | None:
    """All parameters of an experiment, as `planned`, which no data file is read for."""
    chapter = _chapter(experiment)
    return chapter and chapter.settle(experiment.profile, experiment.parameters)


def _chapter(experiment: Experiment) -> chapters.Chapter | None:
    there = (chapters.CHAPTERS / f"{experiment.chapter}.ipynb").is_file()
    return chapters.load(experiment.chapter) if there else None


def results(experiment: Experiment, found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, bool]:
    """The results that an experiment has, and whether they are of full size.

    Of smaller runs, those on the same data set with a network of the same family count, and of these the one that shares
    most parameters.
    """
    if experiment.profile == "quick":
        content = in_chapter(experiment.chapter)
        return content, content is not None
    wanted = settled(experiment)
    if wanted is None:
        return None, False
    alike = [content for content in found if content["chapter"] == experiment.chapter
             and _subject(content["parameters"]) == _subject(wanted)]
    best = min(alike, key=lambda content: len(differences(content, wanted)), default=None)
    return best, best is not None and not differences(best, wanted)


def _subject(parameters: Mapping[str, Any]) -> tuple[Any, str]:
    """Data set and family of the network: resnet20 and resnet110 are of one family, lenet300 and lenet5 are not."""
    name = str(parameters.get("network", ""))
    family = name.rstrip("0123456789")
    return parameters.get("dataset"), family if family in FAMILIES else name


def differences(content: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of stored results that are not those of a plan, with the values that they had."""
    had = content["parameters"]
    return {name: had[name] for name in parameters if name in had and had[name] != parameters[name]}


def in_chapter(stem: str) -> dict[str, Any] | None:
    """The results of the quick profile of a chapter; None without the chapter or outputs.

    They are those of the run that the book shows where the folder of these runs is named by the variable `runs.SHOWN`, as
    it is for the runs of the book, and else those that stand in the chapter's own outputs.
    """
    shown = os.environ.get(runs.SHOWN)
    records = (_shown_records(Path(shown), stem) if shown else {}) or _own_records(stem)
    return {"chapter": stem, "parameters": {}, "records": records, "provenance": {"profile": "quick"}} if records else None


def _shown_records(folder: Path, stem: str) -> dict[str, Any]:
    try:
        return json.loads((folder / stem / "results.json").read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _own_records(stem: str) -> dict[str, Any]:
    from fishlib.rerun import child

    path = chapters.CHAPTERS / f"{stem}.ipynb"
    return child.collect(chapters.read(path))[0] if path.is_file() else {}


def judges(chapter: Path) -> bool:
    """Whether a chapter reads the results of the others: it imports this module."""
    sources = "\n".join(cell.source for cell in chapters.read(chapter).cells if cell.cell_type == "code")
    return re.search(r"^from fishlib\.rerun import .*\bclaims\b", sources, re.MULTILINE) is not None


def read_by(chapter: Path, shown: Path | None) -> str:
    """Hash of the results of the other chapters, which a chapter that judges them reads; of times nothing.

    Parameters
    ----------
    shown : folder of the runs that the book shows, for a run of the book
    """
    others = sorted(path.stem for path in chapters.CHAPTERS.glob("[0-9]*.ipynb") if path.stem != chapter.stem)
    read = {stem: [_own_records(stem), _shown_records(shown, stem) if shown else {}] for stem in others}
    return chapters.digest(json.dumps(_without_times(read), sort_keys=True))


def _without_times(item: Any) -> Any:
    if isinstance(item, dict):
        return {name: _without_times(inner) for name, inner in item.items() if name not in TIMES}
    return [_without_times(inner) for inner in item] if isinstance(item, list) else item


def verdict(claim: Claim, book: Book, found: Sequence[dict[str, Any]]) -> Verdict:
    """What the results at hand say of a claim.

    Of high confidence is a run of full size with three seeds or more, or exact arithmetic, unless the claim's own field
    `confidence` says medium; of medium confidence a run of full size with fewer seeds, or with a caveat. A smaller run gives a
    provisional word, of low confidence, unless the bar is a published number, which is one of full size.
    """
    if not claim.run or not claim.holds:
        return Verdict(VERDICTS[3], "none", conditions=claim.why)
    experiment = book.experiments[claim.run]
    content, full = results(experiment, found)
    if content is None:
        return Verdict(VERDICTS[3], "none")
    if not full and "published" in claim.holds:
        return Verdict(VERDICTS[3], "none", conditions="the bar is one of full size, and only a smaller run is stored")
    row = book.published.get(claim.published, {})
    file = _judged(content["records"], row) if "judged_" in claim.holds else {}
    names = content["parameters"] | content["records"] | file | {"published": row}
    try:
        word = next((word for word, text in ((VERDICTS[0], claim.holds), (VERDICTS[1], claim.in_part))
                     if text and value(text, names)), VERDICTS[2])
        measured = ", ".join(f"{_label(text)} {_shown(value(text, names))}" for text in _decides(claim))
    except (LookupError, TypeError) as error:
        return Verdict(VERDICTS[3], "none", conditions=f"the stored run does not decide it: {claim.why or error}")
    if full:
        exact = experiment.profile == "quick" or content["parameters"].get("seeds", 1) >= FEW
        stale, caveat = content["provenance"].get("stale"), content["provenance"].get("caveat", "")
        confidence = "low" if stale else claim.confidence if exact and not caveat else "medium"
        said = [f"profile {experiment.profile}", *_beyond(content["parameters"]), file.get("judged_note"), caveat]
        return Verdict(word, confidence, measured, conditions="; ".join(filter(None, said)))
    return Verdict(VERDICTS[3], "low", measured, word, _conditions(content, settled(experiment)))


def _beyond(parameters: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of a run of full size beside its profile."""
    words = {"seeds": "{} seeds", "limit": "{} images for training", "test_limit": "{} test images",
             "shift": "training images moved at random, {} px at most"}
    return [text.format(parameters[name]) for name, text in words.items() if parameters.get(name)]


def _judged(records: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The judged file where the records and the published row tell it."""
    try:
        return judged(records["files"], records["chosen"], records["file_fewer"], 1 - row["accuracy"])
    except KeyError:
        return {}


def _label(text: str) -> str:
    return re.sub(r"(\w)\(", r"\1 (", text.replace('"]["', ", ").replace('["', " (").replace('"]', ")"))


def _shown(number: Any) -> str:
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _conditions(content: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    other = differences(content, parameters)
    return "with " + ", ".join(f"{name} {value}" for name, value in other.items())


def table(book: Book | None = None, found: Sequence[dict[str, Any]] | None = None) -> pd.DataFrame:
    """All claims with their verdicts, a row each.

    `published` says what the bar reads of the published row, its accuracy and its conditions, or else its note; `record` is
    the `state` of the run that decides, and empty for a claim without one.
    """
    import pandas as pd

    book, found = book or load(), stored() if found is None else found
    states, rows = {name: state(one, found) for name, one in book.experiments.items()}, []
    for claim in book.claims.values():
        said = verdict(claim, book, found)
        rows.append({"claim": claim.id, "proposal": claim.proposal, "item": claim.item, "words": claim.claim,
                     "published": _beside(claim, book), "verdict": said.word, "confidence": said.confidence,
                     "provisional": said.provisional, "measured": said.measured, "conditions": said.conditions,
                     "record": states.get(claim.run, ""), "bar": claim.bar, "run": claim.run or "",
                     "chapter": book.experiments[claim.run].chapter if claim.run else ""})
    return pd.DataFrame(rows)


def _beside(claim: Claim, book: Book) -> str:
    """What is published: the columns that the bar reads, and the accuracy; the note where it has neither."""
    if claim.published is None:
        return ""
    row = book.published[claim.published]
    read = re.findall(r"published\[['\"](\w+)['\"]\]", claim.holds + claim.in_part)
    said = [PUBLISHED_AS[name].format(row[name]) for name in dict.fromkeys([*read, "accuracy"]) if row[name] == row[name]]
    return f"{', '.join(said) or row['note']} ({row['network']}, {row['dataset']}: {row['method']})"


def state(experiment: Experiment, found: Sequence[dict[str, Any]]) -> str:
    """Of the record of an experiment: "current", "stale", "unknown", "missing", or "no chapter".

    A quick run stands in its chapter. It is stale where the book's own run of the chapter, made with the present code, gave
    other results; as long as there is no such run, nothing can be said against it.
    """
    if settled(experiment) is None:
        return "no chapter"
    content, full = results(experiment, found)
    if content is None or not full:
        return "missing"
    if experiment.profile == "quick":
        return "current" if _shows(planned(experiment), content["records"]) else "stale"
    return _state_of(content)


def _shows(plan: runs.Run, records: Mapping[str, Any]) -> bool:
    again = _shown_records(plan.folder.parent, plan.chapter.stem) if runs.finished(plan) else {}
    return not again or change(records, again) <= MOVED


def _state_of(content: Mapping[str, Any]) -> str:
    stem, provenance = content["chapter"], content["provenance"]
    if provenance.get("stale"):  # said by hand, with a caveat: the run itself was at fault, so no comparison can tell
        return "stale"
    commit = provenance.get("commit") or ""
    code = provenance.get("code") or _code_at(commit, stem, provenance.get("library"))
    if code == mark(chapters.CHAPTERS / f"{stem}.ipynb").code:
        return "current"
    then = _quick_then(stem, commit, provenance.get("quick"))
    if not then and _git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        return "unknown"
    return "current" if then and change(then, _own_records(stem)) <= MOVED else "stale"


def mark(chapter: Path, package: Path = chapters.PACKAGE) -> SimpleNamespace:
    """`code`: hash of what a chapter runs; `quick`: hash by which its results are found again among those of commits."""
    from fishlib.rerun import child

    book = chapters.read(chapter)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    code = chapters.digest(json.dumps([cells, chapters.imported(cells, package)]))
    return SimpleNamespace(code=code[:16], quick=_fingerprint(child.collect(book)[0]))


def _fingerprint(records: Mapping[str, Any]) -> str | None:
    return chapters.digest(json.dumps(_floats(records), sort_keys=True))[:16] if records else None


def _floats(item: Any) -> Any:
    if isinstance(item, dict):
        return {name: _floats(inner) for name, inner in item.items() if name not in TIMES}
    if isinstance(item, list):
        return [_floats(inner) for inner in item]
    return f"{item:.2e}" if isinstance(item, float) else None


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The share of the numbers in both records that differ by more than a fifth of the larger one, and by more than 0.05
    where both lie between -1 and 1, as shares and correlations do.

    Other vector instructions round otherwise, and trained networks then differ nearly as those of two seeds do. That moved 9,
    13 and 12 % of the numbers of chapters 5, 7 and 8, which have the fewest; another seed moved 17 % in chapter 5. The
    correction of fine-tuning in the wrong mode had moved 22 % there. What changes results by less than another processor
    does is not seen. Times are left out, and what is counted in stored runs. So are texts, which say in words what
    numbers say beside them, and lists of whole numbers, such as the positions of kept units: one comparison that falls the
    other way shifts all behind it.
    """
    one, other = dict(_numbers(before)), dict(_numbers(after))
    both = one.keys() & other.keys()
    return sum(_differ(one[name], other[name]) for name in both) / max(1, len(both))


def _numbers(item: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(item, dict):
        for key, inner in item.items():
            if key not in (*TIMES, *COUNTS):
                yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(item, list) and not all(isinstance(inner, int) for inner in item):
        for place, inner in enumerate(item):
            yield from _numbers(inner, f"{name}/{place}")
    elif isinstance(item, int | float) and not isinstance(item, bool):
        yield name, item


def _differ(one: float, other: float) -> bool:
    size = max(abs(one), abs(other))
    return abs(one - other) > max(0.2 * size, 0.05 if size <= 1 else 0)


def _git(*words: str) -> bytes | None:
    """What git prints in the repository; None without git, without a repository, or for what it does not have."""
    try:
        done = subprocess.run(["git", "-C", str(chapters.ROOT), *words], capture_output=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout


@cache
def _code_at(commit: str, stem: str, library: str | None) -> str | None:
    """The `code` of a chapter at a commit; None where the library had changes that were not committed."""
    names = ["fishlib", "constraints.txt", f"chapters/{stem}.ipynb"]
    archive = _git("archive", commit, *names) if commit else None
    if archive is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
        package = Path(folder) / "fishlib"
        return mark(Path(folder) / names[-1], package).code if chapters.library(package) == library else None


@cache
def _quick_then(stem: str, commit: str, fingerprint: str | None) -> dict[str, Any]:
    """The quick results that stood in a chapter when a run was made; empty if they are in no commit.

    A run knows them by their fingerprint, for they may have been committed after it; older runs by the commit alone.
    """
    name = f"chapters/{stem}.ipynb"
    later = (_git("log", "--format=%H", "--", name) or b"").decode().split() if fingerprint else []
    committed = (_records_at(one, name) for one in filter(None, [commit, *later]))
    return next((records for records in committed if fingerprint in (None, _fingerprint(records))), {})


def _records_at(commit: str, name: str) -> dict[str, Any]:
    import nbformat

    from fishlib.rerun import child

    text = _git("show", f"{commit}:{name}")
    try:
        return child.collect(nbformat.reads(text.decode(), as_version=4))[0] if text else {}
    except (ValueError, runs.RunFailed):
        return {}  # no notebook, or one of before the rule that a name is recorded once


# Making what is missing.


def chosen(which: str, book: Book, found: Sequence[dict[str, Any]], gpu: bool) -> list[Experiment]:
    """Experiments to run, those of shortest expected time first.

    Parameters
    ----------
    which : "missing", "stale" (both without the quick runs, which chapters hold, and without records of which the state is
        unknown), or names of runs or claims, separated by commas
    gpu : whether the expected time is that on a GPU

    Raises
    ------
    ValueError
        a name that is neither a run nor a claim with a run, or a run that the chapter itself holds
    """
    names = [name.strip() for name in which.split(",")]
    if names in (["missing"], ["stale"]):
        wanted = [one for one in book.experiments.values() if one.profile != "quick" and state(one, found) == names[0]]
    else:
        wanted = list({one.id: one for one in (_experiment(name, book) for name in names)}.values())
    if held := [one for one in wanted if one.profile == "quick"]:
        raise ValueError(f"{held[0].id} is a quick run, which its chapter holds: use `{held[0].command}`")
    return sorted(wanted, key=lambda one: one.gpu if gpu else one.cpu)


def _experiment(name: str, book: Book) -> Experiment:
    run = book.claims[name].run if name in book.claims and name not in book.experiments else name
    if run not in book.experiments:
        raise ValueError(f"{name!r} is neither a run nor a claim that a run decides: use missing, stale, or names that "
                         "`fishlib claims` lists")
    return book.experiments[run]


def resumes(run: runs.Run) -> bool:
    """Whether the chapter keeps unfinished training, so that a run that was stopped goes on."""
    sources = (cell.source for cell in chapters.read(run.chapter).cells if cell.cell_type == "code")
    return any("FISHLIB_CHECKPOINTS" in source for source in sources)


def store(run: runs.Run, experiment: Experiment) -> Path:
    """Copy the results of a finished run to `data/runs`, whole or not at all, in place of older ones of the same run."""
    text = run.results.read_text(encoding="utf-8")
    target = STORED / experiment.chapter / experiment.id / "results.json"
    for file, content in _read(STORED).items():
        if content["chapter"] == experiment.chapter and not differences(content, run.parameters):
            target = file
    runs.write(target, text)
    return target
