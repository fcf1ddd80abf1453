"""A Sphinx extension for the page of the library: a bar in a docstring is a norm, |g|, not a reST substitution."""

from __future__ import annotations

import re

LITERAL = re.compile(r"(``.+?``|`.+?`)")


def escape_bars(lines: list[str]) -> list[str]:
    """`lines` of reST with the bars of running text escaped; literals, literal blocks and doctests stay as they are."""
    escaped, block_indent = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block_indent is not None and line.strip() and indent <= block_indent:
            block_indent = None
        if block_indent is None and not line.lstrip().startswith((">>>", "...")):
            parts = LITERAL.split(line)
            escaped.append("".join(part if number % 2 else part.replace("|", r"\|") for number, part in enumerate(parts)))
        else:
            escaped.append(line)
        if block_indent is None and line.rstrip().endswith("::"):
            block_indent = indent
    return escaped


def setup(app: object) -> dict[str, bool]:
    def process(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
        lines[:] = escape_bars(lines)

    app.connect("autodoc-process-docstring", process, priority=900)
    return {"parallel_read_safe": True}
