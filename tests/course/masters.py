"""Masters as these tests take them: their questions with solutions and checks, run in this process without a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

MASTERS = Path(__file__).resolve().parents[2] / "chapters" / "assignments" / "masters"
NAMES = [path.stem for path in sorted(MASTERS.glob("*.ipynb"))]
CONFIG = re.compile(r'""" # BEGIN TEST CONFIG\n(.*?)""" # END TEST CONFIG\n', re.DOTALL)


@dataclass
class Question:
    text: str = ""
    solution: list[str] = field(default_factory=list)
    checks: list[tuple[dict[str, Any], Callable]] = field(default_factory=list)


@dataclass
class Master:
    given: list[str] = field(default_factory=list)
    questions: dict[str, Question] = field(default_factory=dict)

    def environment(self, seed: int = 0, **others: str) -> dict[str, Any]:
        """What the notebook defines when the solutions have run, with `others` in place of those of some questions."""
        env: dict[str, Any] = {}
        for source in self.given:
            exec(source.replace("SEED = 0", f"SEED = {seed}"), env)
        for name, question in self.questions.items():
            for source in [others[name]] if name in others else question.solution:
                exec(source, env)
        return env

    def complaints(self, name: str, env: dict[str, Any]) -> list[str | None]:
        """What each check of a question says; None where it is content."""
        said: list[str | None] = []
        for _, check in self.questions[name].checks:
            try:
                check(env)
                said.append(None)
            except AssertionError as error:
                said.append(str(error))
        return said


def read(name: str) -> Master:
    master, question, block = Master(), None, None
    for cell in nbformat.read(MASTERS / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "raw":
            word = cell.source.splitlines()[0].removeprefix("# ")
            begins, _, what = word.partition(" ")
            if word == "BEGIN QUESTION":
                question = master.questions.setdefault(yaml.safe_load(cell.source)["name"], Question())
            elif word == "END QUESTION":
                question = None
            else:
                block = what if begins == "BEGIN" else None
        elif cell.cell_type == "markdown" and question:
            question.text += cell.source
        elif cell.cell_type == "code" and question is None:
            master.given.append(cell.source)
        elif cell.cell_type == "code" and block == "SOLUTION":
            question.solution.append(cell.source)
        elif cell.cell_type == "code" and block == "TESTS":
            (config,) = CONFIG.findall(cell.source)
            scope: dict[str, Any] = {}
            exec(CONFIG.sub("", cell.source), scope)
            (check,) = [value for key, value in scope.items() if key.startswith("test_")]
            question.checks.append((yaml.safe_load(config), check))
    return master


def blank(source: str) -> str:
    """A solution cell as the student gets it."""
    return re.sub(r"^( *)# BEGIN SOLUTION\n.*?# END SOLUTION", r"\1...", source, flags=re.DOTALL | re.MULTILINE)
