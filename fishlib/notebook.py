"""What a chapter's first and last cells call: parameters, seeds, plot style, records and provenance.

A chapter declares its parameters once, in the cell tagged ``parameters``: literals only, each line
``name = literal  # meaning [choices or range]``, for instance::

    dataset = "digits"  # data set [digits | mnist | cifar10]
    epochs = 8  # passes over the training images [1 .. 1000]

`declared` reads such a cell for the command line and for the notebook itself, so that both check the same.
"""

from __future__ import annotations

import ast
import io
import json
import linecache
import math
import os
import platform
import re
import subprocess
import time
import tokenize
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "scikit-learn", "fishlib")
# Wong's colours (doi:10.1038/nmeth.1618) without yellow and black: they differ for colour-blind readers and show on
# white and on dark pages.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")

_run: dict[str, Any] = {"started": time.time(), "settings": {}, "profile": "interactive", "data": {}}


@dataclass(frozen=True)
class Parameter:
    """One line of a chapter's parameters cell."""

    name: str
    default: Any
    help: str = ""
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def valid(self) -> str:
        """The valid values in words."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.low is not None:
            return f"{self.kind.__name__} from {self.low:g} to {self.high:g}"
        return self.kind.__name__

    def check(self, value: Any) -> Any:
        """`value` as the parameter's type; ValueError names the valid values otherwise."""
        try:
            value = self._as_kind(value)
            inside = self.low is None or self.low <= value <= self.high
        except (TypeError, ValueError, SyntaxError):
            inside = False
        if not inside or (self.choices and not self._is_choice(value)):
            raise ValueError(f"{self.name}={value!r} is not valid: {self.name} is {self.valid}")
        return value

    def _as_kind(self, value: Any) -> Any:
        if isinstance(value, self.kind) and not (isinstance(value, bool) and self.kind is not bool):
            return value
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.default is None:
            return value
        if isinstance(value, str) and self.kind is not str:
            return self._as_kind_of_literal(value)
        raise TypeError

    def _as_kind_of_literal(self, text: str) -> Any:
        literal = {"true": True, "false": False}.get(text.lower())
        literal = ast.literal_eval(text) if literal is None else literal
        if isinstance(literal, str):
            raise TypeError
        return self._as_kind(literal)

    def _is_choice(self, value: Any) -> bool:
        # A data set may also be a folder of images.
        return value in self.choices or ("a folder" in self.choices and Path(str(value)).is_dir())


def declared(source: str) -> dict[str, Parameter]:
    """The parameters of a chapter, in order, from the source of its parameters cell.

    Raises
    ------
    ValueError
        a line that is not ``name = literal``, or a default outside its own choices or range
    """
    comments = {token.start[0]: token.string.lstrip("# ").strip()
                for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    parameters = {}
    for statement in ast.parse(source).body:
        try:
            (target,), default = statement.targets, ast.literal_eval(statement.value)
            parameter = _parameter(target.id, default, comments.get(statement.end_lineno, ""))
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"line {statement.lineno} of the parameters cell is not `name = literal  # meaning "
                             f"[choices or range]`: {ast.unparse(statement)} ({error})") from error
        parameters[parameter.name] = parameter
    return parameters


def _parameter(name: str, default: Any, comment: str) -> Parameter:
    match = re.fullmatch(r"(.*?)\s*(?:\[([^\]]*)\])?", comment)
    meaning, valid = match.group(1), match.group(2)
    choices, low, high = None, None, None
    if valid and ".." in valid:
        low, high = (float(bound) for bound in valid.split(".."))
    elif valid:
        choices = tuple(type(default)(choice.strip()) for choice in valid.split("|"))
    parameter = Parameter(name, default, meaning, choices, low, high)
    parameter.check(default)
    return parameter


def start(seed: int | None = None) -> SimpleNamespace:
    """Open a chapter: check its parameters, seed every generator, compute exactly, set the plot style, silence logs.

    Reads the parameters cell and the values now in the notebook, so that a value given by papermill, by the command line
    or by hand is checked the same way. Returns the values as attributes.

    Raises
    ------
    ValueError
        a parameter of the wrong type or outside its choices or range, named together with the valid values
    """
    import torch

    shell = _shell()
    parameters = _parameters_in(_cells(shell)) if shell else {}
    values = {name: parameter.check(shell.user_ns.get(name, parameter.default))
              for name, parameter in parameters.items()}
    if shell:
        shell.user_ns.update(values)
    seed = values.get("seed", 0) if seed is None else seed
    torch.manual_seed(seed)
    _seed_numpy(seed)
    torch.backends.cudnn.allow_tf32 = False  # else a GPU's convolutions keep 10 bits of a float32
    changed = {name for name, value in values.items() if value != parameters[name].default}
    profile = os.environ.get("FISHLIB_PROFILE", "custom" if changed else "quick")
    _run.update(started=time.time(), settings=values | {"seed": seed}, profile=profile, data={})
    quiet()
    plot_style()
    return SimpleNamespace(**values)


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _cells(shell: Any) -> list[str]:
    """Sources of the cells that were run: from the history, and for runs that keep none (nbval's) from the compiler's cache."""
    compiled = ["".join(entry[2]) for name, entry in linecache.cache.items() if "ipykernel" in name and len(entry) == 4]
    return [*shell.user_ns.get("In", []), *compiled]


def _parameters_in(cells: list[str]) -> dict[str, Parameter]:
    """The first cell of literal assignments that was run; with nothing of the kind, no parameters."""
    for source in cells:
        if not source.strip():
            continue
        try:
            if parameters := declared(source):
                return parameters
        except (ValueError, SyntaxError):
            continue
    return {}


def _seed_numpy(seed: int) -> None:
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- scikit-learn and SciPy still draw from the global generator


def quiet() -> None:
    """Keep Lightning's logs and notes of other libraries out of a chapter's output."""
    import logging

    import pytorch_lightning  # noqa: F401 -- its import sets the levels that are lowered here

    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def plot_style() -> None:
    """Figures with an opaque white ground, so that they read in light and in dark, and colours for colour-blind readers."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS), font_scale=0.95)
    mpl.rcParams.update({
        "figure.figsize": (7.0, 3.6), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
        "figure.facecolor": "white", "savefig.facecolor": "white", "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False, "grid.color": "#e3e3e3"})


def record(name: str, value: Any, text: str | None = None) -> None:
    """Keep a number under a name: prose cites it as ``{glue:text}`name```, results.json and tables read it.

    Parameters
    ----------
    name : unique in the chapter
    value : number, string, bool, or lists and dictionaries of them; fractions as fractions (an accuracy is 0.985)
    text : how prose shows it; by default the value with four significant digits

    Raises
    ------
    ValueError
        a value that is not finite, or that JSON cannot hold
    """
    value = _plain(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"record({name!r}, {value!r}): a record is a finite number, text, or lists of them") from error
    if text is None:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    _publish({"application/papermill.record/text/plain": text},
             {"scrapbook": {"name": name, "mime_prefix": "application/papermill.record/"}, "fishlib": {"value": value}})


def _plain(value: Any) -> Any:
    """NumPy and torch scalars and arrays as Python numbers and lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _publish(data: dict[str, str], meta: dict[str, Any]) -> None:
    from IPython.display import display

    display(data, metadata=meta, raw=True)


def kept(path: str | Path | None, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that takes long: as it stands in the file `path`, else computed and then written there as a whole.

    So a run that was stopped goes on where it was. The name of the file has to say all that decides the table; without one
    nothing is kept.
    """
    import pandas as pd

    path = path and Path(path)
    if path and path.exists():
        return pd.read_csv(path, float_precision="round_trip")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    table = compute()
    if path:
        part = path.with_name(f"{path.name}.part{os.getpid()}")
        try:
            table.to_csv(part, index=False)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return table


def provenance(data: Any = None) -> None:
    """The last cell of a chapter: where its numbers come from, as a table, and for the runner as metadata.

    Records ``profile`` and ``duration`` as well, so that a chapter's first lines can cite them.

    Parameters
    ----------
    data : an ImageData, or several, whose fingerprints are stated
    """
    import pandas as pd

    facts = collect_provenance(data)
    rows = {
        "profile": facts["profile"],
        "parameters": ", ".join(f"{name}={value}" for name, value in facts["parameters"].items()),
        "data": ", ".join(f"{name} {value[:12]}" for name, value in facts["data"].items()) or "none",
        "code": (facts["commit"] or "unknown")[:12] + (" with uncommitted changes" if facts["dirty"] else ""),
        "device": f"{facts['device']}, at most {facts['memory_bytes'] / 1e9:.1f} GB of its memory",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "duration": f"{facts['duration_s']:.0f} s",
    }
    record("profile", facts["profile"])
    record("duration", facts["duration_s"], rows["duration"])
    _publish({"text/html": _table(rows), "text/plain": pd.Series(rows).to_string()}, {"fishlib": {"provenance": facts}})


def _table(rows: dict[str, str]) -> str:
    from html import escape

    body = "".join(f"<tr><th scope='row'>{escape(key)}</th><td>{escape(str(value))}</td></tr>"
                   for key, value in rows.items())
    return f"<table class='provenance'><tbody>{body}</tbody></table>"


def collect_provenance(data: Any = None) -> dict[str, Any]:
    """Commit, versions, device, peak memory, seed, profile, parameters, data fingerprints and duration since `start`."""
    from pytorch_lightning import LightningDataModule

    sets = [data] if isinstance(data, LightningDataModule) else list(data or [])
    commit, dirty = _commit()
    return {
        "commit": commit, "dirty": dirty, "profile": _run["profile"], "parameters": _plain(_run["settings"]),
        "seed": _run["settings"].get("seed"), "data": {one.name: one.fingerprint for one in sets},
        "device": device_name(), "memory_bytes": peak_memory(), "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "duration_s": round(time.time() - _run["started"], 1),
    }


def _commit() -> tuple[str | None, bool | None]:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name() -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Bytes: the most that torch has held on the GPU, or without one, the most that this process has held."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as text for prose: 0.985 -> '98.5 %'."""
    if not math.isfinite(fraction):
        raise ValueError(f"percent({fraction}): the fraction is not finite")
    return f"{100 * fraction:.{digits}f} %"


def half_width(differences: Sequence[float], grain: float = 0.0) -> float:
    """Half of the 95 % interval of a mean of paired differences d, one a seed, by Student's t: t_{0.975, n-1} sd(d) / sqrt(n).

    Parameters
    ----------
    differences : n numbers; of a single one the interval is infinite
    grain : the least difference that can be counted, such as one image of the test: no interval is narrower, for a spread of
        zero over few seeds is a coincidence of counting
    """
    import numpy as np
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    if values.size < 2:
        return math.inf
    return max(float(stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size)), grain)


def told_apart(differences: Sequence[float], grain: float = 0.0) -> bool:
    """Whether that interval leaves zero out, so that the seeds tell the mean of the differences from zero."""
    return abs(sum(differences) / len(differences)) > half_width(differences, grain) + 1e-9  # rounding is no difference
