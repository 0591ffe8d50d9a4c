"""The README's Python runs, and its table is what the library prints."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_snippets_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    table = re.search(r"```text\n(.*?)```", README, flags=re.S)
    assert table is not None
    assert table[1].strip() == capsys.readouterr().out.strip()
