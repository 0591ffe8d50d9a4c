"""The results page: its tables are those of the records, and none is wider than the page."""

import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "results.md").read_text()
RECORDS = ROOT / "benchmarks" / "records"

# Of their one row the page makes a table by hand, beside the optimizers that train longer.
BY_HAND = {"half_resnet8_cifar10", "half_vggmini_cifar10"}
EXPERIMENTS = sorted(path.parent.name for path in RECORDS.glob("*/experiment.json"))
WIDTH = 105  # characters, with three between two columns


def found_tables(page):
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.M)
    ]


def has_begun(line):
    """Not a row of an entry that was never run."""
    return set(line.split("|")[2:-1]) != {" – "}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_are_those_of_the_records(name):
    (found,) = report.read(RECORDS / name)
    assert f"python -m benchmarks.paper {name}" in PAGE
    if name in BY_HAND:
        return
    for table in report.tables(found):
        assert "\n".join(filter(has_begun, table.splitlines())) in PAGE


def test_summary_repeats_the_records():
    (found,) = report.read(RECORDS / "reading_resnet8_cifar10")
    in_epochs, in_seconds = (
        {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table}
        for table in (text.splitlines()[2:] for text in report.tables(found))
    )
    _, _, *rows = found_tables(PAGE)[0]
    assert len(rows) == 6
    for label, *shown in rows:
        name = "SGDM" if label == "SGD, momentum" else label
        assert shown == [*in_epochs[name][2:5], in_seconds[name][1]]


def test_tables_fit_the_page():
    """Words of a header, and of the first column, may stand one below the other."""
    for header, _, *rows in found_tables(PAGE):
        first = max(20, *(len(word) for row in rows for word in row[0].split()))
        columns = list(zip(*rows, strict=True))[1:]
        widths = [
            max(*map(len, column), *map(len, title.split()), 0)
            for title, column in zip(header[1:], columns, strict=True)
        ]
        assert first + sum(width + 3 for width in widths) <= WIDTH, header


def test_pictures_are_at_hand():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE)
    assert len(shown) > 5
    for picture in shown:
        assert (ROOT / "docs" / picture).exists(), picture
