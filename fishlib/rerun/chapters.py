"""Chapters as the command line sees them: where they are, what they can be asked for, what a run depends on."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fishlib.notebook import ROOT, Parameter, declared

PACKAGE = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
BUILD = ROOT / "_build"


def find(name: str | Path) -> Path:
    """The notebook of a chapter, named by path, file name or stem.

    Raises
    ------
    ValueError
        there is no such chapter; the message names those that exist
    """
    path = Path(name)
    places = [path, ROOT / path]
    if path.parent == Path():
        places += [CHAPTERS / path.name, CHAPTERS / f"{path.name}.ipynb"]
    for place in places:
        if place.suffix == ".ipynb" and place.is_file():
            return place.resolve()
    stems = ", ".join(sorted(chapter.stem for chapter in CHAPTERS.glob("[0-9]*.ipynb"))) or f"none in {CHAPTERS}"
    raise ValueError(f"there is no chapter {str(name)!r}: use the path of a notebook, or one of {stems}")


def read(chapter: Path) -> Any:
    """The notebook as nbformat reads it; ValueError when it is none."""
    import nbformat

    try:
        return nbformat.read(chapter, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{chapter} is not a notebook ({type(error).__name__}): restore the file") from error


@dataclass(frozen=True)
class Chapter:
    """A chapter, read once: what it declares, and the part of a run's identity that all its runs share."""

    path: Path
    parameters: dict[str, Parameter]
    profiles: dict[str, dict[str, Any]]
    base: str

    def check(self, name: str, value: Any) -> Any:
        """`value` as the type of the parameter `name`; ValueError with the valid names or values."""
        if name not in self.parameters:
            valid = f"use one of {', '.join(self.parameters)}" if self.parameters else "it has none"
            raise ValueError(f"{self.path.stem} has no parameter {name!r}: {valid}")
        parameter = self.parameters[name]
        try:
            value = parameter.check(value)
        except ValueError as error:
            raise ValueError(f"{error}{_advice(parameter, value)}") from error
        if isinstance(value, str) and parameter.choices and value not in parameter.choices and Path(value).is_dir():
            # A run works in a folder of its own, where a relative path would mean something else.
            return str(Path(value).resolve())
        return value

    def settle(self, profile: str = "quick", given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All parameters of a run: defaults, then the profile's values, then those given; every one checked.

        Raises
        ------
        ValueError
            unknown profile or parameter, or a value of the wrong type or out of range, with the valid choices
        """
        if profile not in self.profiles:
            raise ValueError(f"{self.path.stem} has no profile {profile!r}: use one of {', '.join(self.profiles)}")
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        for name, value in [*self.profiles[profile].items(), *(given or {}).items()]:
            values[name] = self.check(name, value)
        return values

    def identity(self, values: Mapping[str, Any]) -> str:
        """What the numbers of a run depend on, as 16 hexadecimal digits.

        A hash of the chapter's code (not its text or outputs), all parameters, the library's source, the pinned
        versions and the content of the data set. The run of an unchanged identity need not be repeated.
        """
        parts = [self.base, dict(values), data_content(values.get("dataset"))]
        return _digest(json.dumps(parts, sort_keys=True).encode())[:16]


def _advice(parameter: Parameter, value: Any) -> str:
    """What the words for a value that is not valid cannot know: how a list is written, where a folder was looked for."""
    if parameter.kind is list:
        return f', in quotes and as Python writes it: "{parameter.default}"'
    if "a folder" in (parameter.choices or ()):
        return f" (there is no folder {Path(str(value)).resolve()})"
    return ""


def load(name: str | Path) -> Chapter:
    """Find and read a chapter.

    Raises
    ------
    ValueError
        no such chapter, no notebook, or parameters or profiles that are not declared as they should be
    """
    path = find(name)
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    source = next((cell.source for cell in code if "parameters" in cell.metadata.get("tags", [])), "")
    try:
        known = declared(source)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from error
    base = json.dumps([path.stem, [cell.source for cell in code], library()])
    return Chapter(path, known, _profiles(path), _digest(base.encode()))


def _profiles(path: Path) -> dict[str, dict[str, Any]]:
    """Parameter values by profile, from `profiles/<chapter>.yml` beside the chapter; `quick` changes nothing."""
    import yaml

    file = path.parent / "profiles" / f"{path.stem}.yml"
    if not file.is_file():
        return {"quick": {}}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())}): correct it") from error
    if not isinstance(content, dict) or not all(isinstance(values or {}, dict) for values in content.values()):
        raise ValueError(f"{file} has to map the name of each profile to its parameters' values")
    return {"quick": {}} | {str(name): values or {} for name, values in content.items()}


def library(package: Path = PACKAGE) -> str:
    """Hash of the library's source, without what only runs chapters, and of the pinned versions."""
    files = sorted(file for file in package.rglob("*.py") if file.relative_to(package).parts[0] != "rerun")
    pins = package.parent / "constraints.txt"
    return _digest_of_files(package.parent, [*files, *([pins] if pins.is_file() else [])])


def imported(sources: Sequence[str], package: Path = PACKAGE) -> list[str]:
    """Hashes of the modules of `package` that code imports, directly or through one another; of a subpackage all files.

    What only runs chapters is left out, as in `library`.
    """
    waiting, found = list(sources), {}
    while waiting:
        for name in _names(waiting.pop(), package.name):
            files = [package / f"{name}.py"] if not (package / name).is_dir() else sorted((package / name).glob("*.py"))
            for file in files:
                if name != "rerun" and file not in found and file.is_file():
                    found[file] = _digest(file.read_bytes())
                    waiting.append(file.read_text(encoding="utf-8"))
    return [f"{file.relative_to(package).as_posix()} {found[file]}" for file in sorted(found)]


def _names(source: str, package: str) -> set[str]:
    """The modules right below the package that a source imports; those of relative imports as seen from the package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{package}.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "") if node.level else (node.module or "").removeprefix(package).removeprefix(".")
            if node.level or (node.module or "").split(".")[0] == package:
                names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return names


def data_content(dataset: str | None) -> str | None:
    """The content of a data set on disk: of an npz file the checksums that it holds, of a folder all its files.

    None without a data set, for one bundled with a library, and for one that is not on disk yet (see `missing_data`).
    """
    if dataset is None or dataset == "digits":
        return None
    if _is_folder(dataset):
        return _folder_content(Path(dataset))
    file = _data_file(dataset)
    if file is None:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            return _digest(json.dumps(sorted((m.filename, m.CRC, m.file_size) for m in archive.infolist())).encode())
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{file} is damaged or not an npz file ({error}): "
                         "delete it, or put a whole file in its place") from error


def missing_data(dataset: str | None) -> bool:
    """Whether the data set has to be downloaded before a run can have an identity."""
    return dataset not in (None, "digits") and not _is_folder(dataset) and _data_file(dataset) is None


def fetch(dataset: str) -> None:
    """Download a data set once, before runs that would all do it; errors as those of `fishlib.data.load_arrays`."""
    from fishlib.data import load_arrays

    load_arrays(dataset)


def _is_folder(dataset: str) -> bool:
    return Path(dataset).is_absolute() and Path(dataset).is_dir()


def _data_file(dataset: str) -> Path | None:
    # As fishlib.data.find, whose import would cost the command line the seconds that torch takes.
    folders = [*filter(None, [os.environ.get("FISHLIB_DATA")]), ROOT / "data" / "cache"]
    files = (Path(folder) / f"{dataset}.npz" for folder in folders)
    return next((file for file in files if file.is_file()), None)


@cache
def _folder_content(folder: Path) -> str:
    # What `fishlib.data` passes over must not make another run of the same images.
    seen = (file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return _digest_of_files(folder, sorted(file for file in seen if file.is_file()))


def given_data(root: Path = ROOT) -> str:
    """Hash of what `data/` gives to the chapters beside images: published numbers, claims, the records of stored runs.

    With it the module that judges the claims, which is no part of `library`.
    """
    data, judge = root / "data", root / "fishlib" / "rerun" / "claims.py"
    given = [*sorted(data.glob("*.csv")), *sorted(data.glob("*.yml")), *sorted((data / "runs").rglob("*.json"))]
    return _digest_of_files(root, [*given, *([judge] if judge.is_file() else [])])


def _digest_of_files(root: Path, files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}\0{_digest(file.read_bytes())}\n".encode())
    return total.hexdigest()


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return _digest(text.encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
