"""A Sphinx extension for the page of the library: in a docstring |g| is a norm and *shape a starred name, not reST."""

from __future__ import annotations

import re

LITERAL = re.compile(r"(``.+?``|`.+?`)")


def escape(lines: list[str]) -> list[str]:
    """`lines` of reST with bars and lone stars of running text escaped; literals, code blocks and doctests stay."""
    escaped, block_indent = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block_indent is not None and line.strip() and indent <= block_indent:
            block_indent = None
        is_code = block_indent is not None or line.lstrip().startswith((">>>", "..."))
        escaped.append(line if is_code else _escape_text(line))
        if block_indent is None and line.rstrip().endswith("::"):
            block_indent = indent
    return escaped


def _escape_text(line: str) -> str:
    parts = LITERAL.split(line)
    # An even number of stars is emphasis, which is meant.
    special = r"([|*])" if "".join(parts[::2]).count("*") % 2 else r"(\|)"
    return "".join(part if number % 2 else re.sub(special, r"\\\1", part) for number, part in enumerate(parts))


def setup(app: object) -> dict[str, bool]:
    def process(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
        lines[:] = escape(lines)

    app.connect("autodoc-process-docstring", process, priority=900)
    return {"parallel_read_safe": True}
