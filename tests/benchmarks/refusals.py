"""What a command says where it cannot run: one sentence, and exit code 2."""

import re

import pytest

from benchmarks.train import main


def assert_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    *notices, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("python -m benchmarks.train: ")
    assert re.search(message, sentence), sentence
    assert all(line.startswith("notice: ") for line in notices)
