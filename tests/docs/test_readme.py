"""The README's Python runs and prints the table that the README shows."""

from pathlib import Path

from tests import snippets

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def test_snippets_run(capsys):
    snippets.run(README, "README.md")
    table, *_ = snippets.blocks(README, "text")
    assert table.strip() == capsys.readouterr().out.strip()
