"""A griffe extension for `make docs`: our docstrings describe a field a line ("name: what it is"); Markdown would run
these lines together into one paragraph, so they become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^([*\w][\w*, ]{0,60}): (\S.*)$")


def to_list(text: str) -> str:
    """The docstring with every run of field lines as a Markdown list; continuation lines are indented already."""
    lines: list[str] = []
    in_list = False
    for line in text.split("\n"):
        match = _FIELD.match(line)
        # A colon inside a sentence is not a field: names are single words, or single words with commas.
        if match and all(re.fullmatch(r"\*{0,2}\w+", name.strip()) for name in match[1].split(",")):
            if not in_list and lines and lines[-1].strip():
                lines.append("")
            names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
            lines.append(f"- {names}: {match[2]}")
            in_list = True
            continue
        if in_list and line.strip() and not line.startswith(" "):
            lines.append("")
            in_list = False
        lines.append(line)
    return "\n".join(lines)


class Fields(griffe.Extension):
    """Rewrites the docstring of every object that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_list(obj.docstring.value)
