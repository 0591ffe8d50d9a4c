"""Prints the lowest versions that pyproject.toml permits, as constraints for pip.

The bounds are defined only in pyproject.toml. ``python .ci/oldest.py plot`` prints those of the
dependencies and of the extra `plot`. Save them to a file for ``pip install --constraint FILE``.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def main(extras: list[str]) -> None:
    """Prints a line for each requirement; exits with a message if one has no lower bound."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    lines = sum((optional[extra] for extra in extras), start=project["dependencies"])
    for requirement in map(Requirement, lines):
        bounds = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(bounds) != 1:
            sys.exit(f"{PROJECT.name}: {requirement} needs one lower bound, such as >=1.0")
        print(f"{requirement.name}=={bounds[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
