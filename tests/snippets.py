"""Extracts the Python of a Markdown page, and runs it."""

import re
from typing import Any


def blocks(page: str, language: str = "python") -> list[str]:
    """The contents of the page's fenced blocks in the language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.S | re.M)


def run(page: str, name: str) -> dict[str, Any]:
    """Runs the page's Python in one namespace, which it returns; `name` is for tracebacks."""
    namespace: dict[str, Any] = {"__name__": name}
    found = blocks(page)
    assert found, f"{name} has no Python"
    for block in found:
        exec(compile(block, name, "exec"), namespace)
    return namespace
