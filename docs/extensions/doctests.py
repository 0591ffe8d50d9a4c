"""Shows the docstrings' examples as code.

Griffe knows the heading ``Examples:``; the library writes ``Example:``, as Google's style does for
a single one, and the lines behind it would be taken for quotations.
"""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Reads ``Example:`` at the end of its line as ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that was loaded."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
