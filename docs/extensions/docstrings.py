"""What mkdocstrings has to know of the library's docstrings and signatures."""

import re
from typing import Any

import griffe

_SIBLINGS = ("tekfac", "tkfac", "ekfac", "kfac")


class Docstrings(griffe.Extension):
    """Shows examples as code, and the arguments that the family of four shares in each of it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that was loaded."""
        if obj.docstring:
            # Griffe knows the heading of several examples only; the lines behind that of a single
            # one would be taken for quotations.
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            # The star of a shape, (*lead, i, o), is no emphasis.
            obj.docstring.value = text.replace("(*lead", r"(\*lead")

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when everything is loaded: spells out what the code gives to `inspect` only."""
        bare = pkg["_optimizer.transforms.scale_by_tekfac"].parameters
        ready = pkg["_optimizer.ready.tekfac"].parameters
        own = [p for p in ready if p.kind is not griffe.ParameterKind.var_keyword]
        known = {p.name for p in own}
        options = [
            p for p in bare if p.kind is griffe.ParameterKind.keyword_only and p.name not in known
        ]
        for name in _SIBLINGS:
            pkg[f"_optimizer.transforms.scale_by_{name}"].parameters = bare
            pkg[f"_optimizer.ready.{name}"].parameters = griffe.Parameters(*own, *options)
