"""Docstrings are plain text in which only backticks are markup: indices[i] is no link."""

import re
from typing import Any

import griffe

CODE = re.compile(r"(```.*?```|`[^`]*`)", flags=re.S)


def escaped(text: str) -> str:
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"([\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = escaped(obj.docstring.value)
