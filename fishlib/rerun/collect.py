"""The results of all runs as one tidy table: a row a run; parameters, records and provenance as columns."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fishlib.rerun import chapters

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

STORED = chapters.ROOT / "data" / "runs"
KINDS = {"chapter": str, "parameters": dict, "records": dict, "provenance": dict}  # what a run leaves
FEW = 5  # names in one message
WIDE = 24  # letters of a text that still fits a table in a terminal


def results(pattern: str = "*", folders: Sequence[Path] | None = None) -> pd.DataFrame:
    """All finished runs, a row each.

    Parameters
    ----------
    pattern : shell pattern of chapters (``01*``) or of ``chapter/folder of the run``
    folders : where to look; by default `_build/runs`, where sweeps leave their runs, and `data/runs`, the full-size
        runs that the repository keeps. A run of the first that was stored unchanged in the second counts once.

    Returns
    -------
    DataFrame
        columns ``chapter``, ``identity``, one for each parameter and each record (nested records as ``name.key``), and
        ``provenance.*``; empty without any run; ``attrs["parameters"]`` lists the parameters' columns

    Raises
    ------
    ValueError
        two runs of one chapter with the same parameters, a record that is not finite, a record named as a parameter of
        another value, a damaged file; always with the files concerned
    """
    import pandas as pd

    folders = [chapters.BUILD / "runs", STORED] if folders is None else folders
    files = {file: content for file, content in _read(folders) if _matches(file, content["chapter"], pattern)}
    files = _without_stored_copies(files)
    _refuse_duplicates(files)
    _refuse_non_finite(files)
    table = pd.DataFrame([_row(file, content) for file, content in files.items()])
    names = (name for content in files.values() for name in content["parameters"])
    table.attrs["parameters"] = list(dict.fromkeys(names))
    return table


def stored(pattern: str = "*") -> pd.DataFrame:
    """The full-size runs that the repository keeps in `data/runs`, as `results`; what chapters compare with."""
    return results(pattern, [STORED])


def side_by_side(runs: pd.DataFrame, words: dict[str, str], precision: int = 3) -> Styler:
    """A table of runs for a chapter: a column for each profile, a row for each quantity in `words`, by what it is called there.

    Quantities that no run has are left out, and those that one run lacks are "not run"; a caption says so where there are no
    runs at all.
    """
    if runs.empty:
        return runs.style.set_caption("No larger run has been stored yet.")
    table = runs.set_index("profile")[[name for name in words if name in runs]].rename(columns=words)
    return table.T.style.format(precision=precision, na_rep="not run")


def _read(folders: Iterable[Path]) -> Iterable[tuple[Path, dict[str, Any]]]:
    for file in sorted({file.resolve() for folder in folders for file in Path(folder).rglob("results.json")}):
        yield file, read(file)


def read(file: Path) -> dict[str, Any]:
    """What a run left in its results.json; ValueError, with the file, if that is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for name, kind in KINDS.items():
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is {type(content[name]).__name__}, not {kind.__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the results of a run ({type(error).__name__}: {error}): remove it") from error
    return content


def _matches(file: Path, chapter: str, pattern: str) -> bool:
    return any(fnmatch(name, pattern) for name in (chapter, f"{chapter}.ipynb", f"{chapter}/{file.parent.name}"))


def _without_stored_copies(files: dict[Path, dict]) -> dict[Path, dict]:
    kept = [content for file, content in files.items() if file.is_relative_to(STORED.resolve())]
    return {file: content for file, content in files.items()
            if file.is_relative_to(STORED.resolve()) or content not in kept}


def _refuse_duplicates(files: dict[Path, dict]) -> None:
    first: dict[str, Path] = {}
    twice = []
    for file, content in files.items():
        key = json.dumps([content["chapter"], content["parameters"]], sort_keys=True)
        if key in first:
            twice.append(f"{first[key].parent} and {file.parent}")
        first.setdefault(key, file)
    if twice:
        raise ValueError("the same chapter with the same parameters, twice, perhaps with an older library: "
                         f"{_some(twice)}. Remove one of each, or narrow the pattern")


def _refuse_non_finite(files: dict[Path, dict]) -> None:
    found = [f"{name} in {file}" for file, content in files.items()
             for name, value in _flat(content["records"]).items() if not _finite(value)]
    if found:
        raise ValueError(f"records that are not finite: {_some(found)}. Remove these runs, or narrow the pattern")


def _some(names: list[str]) -> str:
    return "; ".join(names[:FEW]) + (f"; and {len(names) - FEW} more" if len(names) > FEW else "")


def _finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _flat(records: dict[str, Any]) -> dict[str, Any]:
    """Nested records under names joined by dots."""
    flat = {}
    for name, value in records.items():
        inner = {f"{name}.{key}": item for key, item in _flat(value).items()} if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else inner
    return flat


def _row(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    parameters, records, provenance = content["parameters"], _flat(content["records"]), content["provenance"]
    if clash := [name for name in records if name in parameters and records[name] != parameters[name]]:
        raise ValueError(f"{file}: the records {', '.join(clash)} are named as parameters but differ: rename them")
    return ({"chapter": content["chapter"], "identity": provenance.get("identity")} | parameters | records
            | {f"provenance.{name}": value for name, value in _flat(provenance).items() if name not in
               ("identity", "parameters")} | {"file": str(file)})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Every numeric record for every setting, over seeds: mean, standard deviation, 95 % interval of the mean, n.

    The standard deviation divides by n - 1; the interval is Student's, mean -+ t(0.975, n - 1) * std / sqrt(n). Both
    are empty for n = 1. `table` comes from `results`, rows left out or not.
    """
    import pandas as pd
    from scipy.stats import t

    names = table.attrs["parameters"]
    keys = ["chapter", *(name for name in names if name != "seed")]
    records = [name for name in table.columns if name not in [*names, "chapter", "identity", "file"]
               and not name.startswith("provenance.") and _counts(table[name])]
    if not records:
        return pd.DataFrame(columns=[*keys, "record", "mean", "std", "low", "high", "n"])
    # As text, so that lists, too, can be grouped; the values themselves come back from each group's first row.
    groups = table.astype({name: "string" for name in keys}).groupby(keys, dropna=False, sort=False).indices.values()
    rows = []
    for rows_of_group in groups:
        group = table.iloc[rows_of_group]
        for record in records:
            values = group[record].dropna().astype(float)
            n, mean, std = len(values), values.mean(), values.std()
            half = t.ppf(0.975, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
            if n:
                rows.append(dict(group[keys].iloc[0]) | {"record": record, "mean": mean, "std": std,
                                                         "low": mean - half, "high": mean + half, "n": n})
    return pd.DataFrame(rows)


def _counts(column: pd.Series) -> bool:
    """Whether a mean can be taken; a column of yes and no that some runs lack is one of objects."""
    from pandas.api.types import is_numeric_dtype

    return is_numeric_dtype(column) or column.dropna().map(lambda value: isinstance(value, bool)).all()


def readable(table: pd.DataFrame, parameters: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """What fits a terminal of a table of runs or of its summary: chapter by chapter, the columns that all rows have.

    Parameters that are the same in all rows of a chapter are left out, and so are lists, dictionaries, texts of more than
    `WIDE` letters, provenance, and records inside records; the files that `save` writes have everything. A summary keeps the
    names of its records and their means, however long. Of a folder of images the last part of its path is shown.
    """
    for chapter, rows in table.groupby("chapter", sort=False):
        whole = rows.dropna(axis="columns", how="all" if "record" in rows else "any")  # a single seed has no deviation
        shown = whole.drop(columns=["chapter", "file"], errors="ignore")
        same = [name for name in parameters if name in shown and shown[name].map(str).nunique() == 1]
        varied = [name for name in parameters if name in shown and name not in same]
        shown = shown.assign(**{name: shown[name].map(_last_part) for name in varied})
        kept = [*same, *(("record", "mean") if "record" in rows else ())]
        long = [name for name in shown.columns.difference(kept) if "." in name or not shown[name].map(_short).all()]
        yield chapter, shown.drop(columns=[*same, *long])


def _short(value: Any) -> bool:
    return not isinstance(value, list | dict) and (not isinstance(value, str) or len(value) <= WIDE)


def _last_part(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def mixed(table: pd.DataFrame) -> dict[str, int]:
    """Chapters whose runs come from more than one state of the library, with the number of states."""
    if "provenance.library" not in table:
        return {}
    states = table.groupby("chapter")["provenance.library"].nunique()
    return {chapter: int(count) for chapter, count in states.items() if count > 1}


def save(table: pd.DataFrame, stem: Path) -> tuple[Path, Path]:
    """Write `<stem>.parquet` and `<stem>.csv`, each whole or not at all; lists become JSON text."""
    flat = table.copy()
    for name in flat.columns:
        if flat[name].map(lambda value: isinstance(value, list)).any():
            flat[name] = flat[name].map(lambda value: json.dumps(value) if isinstance(value, list) else value)
        if flat[name].dtype == object and flat[name].dropna().map(type).nunique() > 1:
            flat[name] = flat[name].map(str, na_action="ignore")
    files = stem.with_name(stem.name + ".parquet"), stem.with_name(stem.name + ".csv")
    stem.parent.mkdir(parents=True, exist_ok=True)
    parts = [file.with_name(f".{file.name}.{os.getpid()}.part") for file in files]
    try:
        # Both are written before either takes its place: on a full disk the former two stay together.
        flat.to_parquet(parts[0], index=False)
        flat.to_csv(parts[1], index=False)
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return files


def check_plot(table: pd.DataFrame, x: str, y: str, hue: str | None) -> None:
    """Refuse columns that `plot` cannot draw.

    Raises
    ------
    ValueError
        a column that the table does not have, or one over or of which no number can be drawn, with those that can be
    """
    have = [name for name in table.columns if not name.startswith("provenance.")]
    if unknown := [name for name in (x, y, hue) if name is not None and name not in table.columns]:
        raise ValueError(f"no column {', '.join(map(repr, unknown))}: use {', '.join(have)}")
    if lists := [name for name in (x, y, hue) if name is not None and table[name].map(lambda one: isinstance(one, list)).any()]:
        raise ValueError(f"the column {lists[0]!r} holds lists: use one of {', '.join(n for n in have if _counts(table[n]))}")
    if not _counts(table[y]):
        raise ValueError(f"the column {y!r} holds no numbers: use one of {', '.join(n for n in have if _counts(table[n]))}")


def plot(table: pd.DataFrame, x: str, y: str, hue: str | None, out: Path) -> Path:
    """Draw a record over a parameter as mean with its 95 % interval over seeds, a line for each value of `hue`.

    Raises
    ------
    ValueError
        as `check_plot`, or an ending of `out` that no picture has
    """
    check_plot(table, x, y, hue)
    from matplotlib.figure import Figure

    from fishlib.notebook import plot_style

    plot_style()
    import seaborn as sns

    axes = Figure(figsize=(7.0, 3.6), layout="constrained").subplots()
    palette = sns.color_palette(n_colors=table[hue].nunique()) if hue else None
    sns.lineplot(table, x=x, y=y, hue=hue, palette=palette, errorbar=("ci", 95), seed=0, err_style="bars",
                 marker="o", ax=axes)
    part = out.with_name(f".{os.getpid()}.{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        axes.figure.savefig(part, facecolor="white")
        os.replace(part, out)
    except ValueError as error:
        raise ValueError(f"{out}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return out
