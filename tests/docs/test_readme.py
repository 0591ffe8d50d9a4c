"""The README: its Python runs, its table is what the library prints, and it stays short."""

import re
from pathlib import Path

from tests import snippets

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_snippets_run(capsys):
    snippets.run(README, "README.md")
    (table,) = snippets.blocks(README, "text")
    assert table.strip() == capsys.readouterr().out.strip()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_two_commands():
    assert snippets.blocks(README, "sh") == [
        'pip install -e ".[benchmarks]" && python -m benchmarks.train\n',
        'pip install -e ".[dev]" && pytest\n',
    ]


def test_one_picture():
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert (ROOT / picture).exists()


def test_links_resolve():
    """Pages, and headings on them: lower case, without punctuation, hyphens for spaces."""
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert len(links) > 15
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def shown(page: str, label: str) -> list[str]:
    """Cells of the first row of the page whose first cell, in bold or not, is the label."""
    pages = (line.replace("*", "") for line in page.splitlines())
    (row, *_) = (line for line in pages if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def test_results_are_those_of_the_page():
    names = README.split("\n| | TEKFAC | ")[1].split(" |\n")[0].split(" | ")
    page = (ROOT / "docs" / "results.md").read_text()
    losses, accuracies = shown(README, "train loss"), shown(README, "test accuracy %")
    for name, loss, accuracy in zip(["TEKFAC", *names], losses, accuracies, strict=True):
        exact_loss, exact_accuracy, *_ = shown(page, name)
        assert loss == f"{float(exact_loss.split()[0]):.2f}"
        assert accuracy == " ± ".join(f"{float(x):.1f}" for x in exact_accuracy.split(" ± "))


def test_costs_are_those_of_the_page():
    page = (ROOT / "docs" / "costs.md").read_text()
    whole, truncated = page.split('**TEKFAC, `basis_rank="auto"`**')[:2]
    long, short = "intervals 50/50/200", "intervals 10/10/10"
    assert shown(README, long) == shown(whole, f"amortised, {long}")
    assert shown(README, short) == shown(whole, f"amortised, {short}")
    assert shown(README, f'{long}, `basis_rank="auto"`') == shown(truncated, f"amortised, {long}")
