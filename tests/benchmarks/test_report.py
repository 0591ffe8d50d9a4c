"""The report: its tables are the records, and unfinished experiments are reported too."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import report
from benchmarks.reporting import results
from tests.benchmarks.tiny import records


def written(out, directory, **changed):
    """A copy of the experiment's JSON with another description, and its report."""
    shutil.copytree(out / "runs", directory / "x" / "runs")
    return written_over(out, directory, **changed)


def written_over(out, directory, **changed):
    description = json.loads((out / "experiment.json").read_text()) | changed
    (directory / "x" / "experiment.json").write_text(json.dumps(description))
    report.main([str(directory)])
    return (directory / "report.md").read_text()


def row(text, label):
    """Cells of a line of the first table."""
    (line, *_) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def is_drawn(path):
    with Image.open(path) as image:
        return image.format == "PNG" and image.size[0] > 100


def test_comparison_is_reported(out, tmp_path):
    published = {"source": "a book", "accuracy": {"SGDM": (91.5, 0.25)}}
    text = written(out, tmp_path, published=published)
    final = [r for r in records(out) if r["label"] == "SGDM" and not r["search"]]
    accuracies = [100 * r["curve"][-1]["test_accuracy"] for r in final]
    cells = row(text, "SGDM")
    assert cells[1] == f"learning_rate {final[0]['settings']['learning_rate']:g}"
    assert cells[3] == f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
    assert cells[4] == "91.50 ± 0.25"
    first = [next(e["epoch"] for e in r["curve"] if e["train_loss"] <= 2.3) for r in final]
    assert float(cells[5].split(" ± ")[0]) == pytest.approx(np.mean(first), abs=0.051)
    assert row(text, "TEKFAC")[4] == "–"
    assert "fast: 2 of 2 runs diverged" in text
    assert "a fixed, even sample of 3 of a grid of 6: TEKFAC" in text
    assert "all of a grid of 3: SGDM" in text
    assert is_drawn(tmp_path / "tiny.png")


def test_unfinished_experiment_is_reported(out, tmp_path):
    shutil.copytree(out / "runs", tmp_path / "x" / "runs")
    for path in (tmp_path / "x" / "runs").glob("*seed1*"):
        path.unlink()
    text = written_over(out, tmp_path)
    assert "not finished: TEKFAC, SGDM, fast" in text
    assert "±" not in row(text, "SGDM")[3]
    shutil.rmtree(tmp_path / "x" / "runs")
    text = written_over(out, tmp_path, winners={})
    assert row(text, "SGDM")[1:4] == ["–", "–", "–"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"settings": {"learning_rate": 7.0}}, {"epochs": 3}, {"seed": 9}, {"task": {}}],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_of_another_experiment_do_not_count(out, tmp_path, changed):
    """What an experiment that has been changed since has left in its directory."""
    shutil.copytree(out / "runs", tmp_path / "x" / "runs")
    expected = written_over(out, tmp_path)
    for index, record in enumerate(records(out)):
        path = tmp_path / "x" / "runs" / f"old{index}.json"
        path.write_text(json.dumps(record | changed | {"search": False}))
    assert written_over(out, tmp_path) == expected


def test_ablation_is_reported(out, tmp_path):
    text = written(out, tmp_path, view="ablation")
    means = {
        label: np.mean(
            [
                100 * r["curve"][-1]["test_accuracy"]
                for r in records(out)
                if r["label"] == label and not r["search"]
            ]
        )
        for label in ("TEKFAC", "SGDM")
    }
    assert row(text, "TEKFAC")[4] == "+0.00"
    assert row(text, "SGDM")[4] == f"{means['SGDM'] - means['TEKFAC']:+.2f}"
    assert row(text, "fast")[4] == "–"
    assert is_drawn(tmp_path / "tiny.png")


def test_sweep_is_reported(out, tmp_path):
    text = written(out, tmp_path, view="sweep", axes=["learning_rate", "damping"])
    tekfac = next(r for r in records(out) if r["label"] == "TEKFAC" and not r["search"])
    cells = row(text, f"tekfac, damping {tekfac['settings']['damping']:g}")
    assert sum("±" in cell for cell in cells[1:-1]) == 1
    assert cells[-1] == "0.0"
    # Two entries of SGD: their rates stand in one row, and one of them diverged.
    assert sum(cell != "–" for cell in row(text, "sgd")[1:-1]) == 1
    assert is_drawn(tmp_path / "tiny.png")


def test_overview_of_published_figures(out, tmp_path):
    published = {"source": "a book", "accuracy": {"SGDM": (91.5, 0.25), "fast": (1, 0)}}
    for name in ("one", "two"):
        shutil.copytree(out, tmp_path / name)
        description = json.loads((out / "experiment.json").read_text())
        description |= {"name": name, "title": name, "published": published}
        (tmp_path / name / "experiment.json").write_text(json.dumps(description))
    report.main([str(tmp_path)])
    cells = row((tmp_path / "report.md").read_text(), "two")
    assert cells[1].endswith("(91.50 ± 0.25)")
    assert cells[2] == "– (1.00 ± 0.00)"


def test_nothing_to_report_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path)])
    assert end.value.code == 2
    assert "no experiment.json in" in capsys.readouterr().err


def test_share_of_anothers_epochs():
    def outcome(*curves):
        found = [
            {
                "seed": seed,
                "curve": [
                    {"epoch": k, "seconds": 2.0 * k, "train_loss": x}
                    for k, x in enumerate(curve, 1)
                ],
            }
            for seed, curve in enumerate(curves)
        ]
        return results.Outcome("some", "sgd", {}, {}, found, 0)

    fast, slow = outcome([3, 1, 0.5, 0.4], [2, 2, 2, 2]), outcome([4, 3, 2, 1], [4, 1, 2, 3])
    assert fast.share_of(slow, "epoch")[0] == 2 / 4
    assert math.isnan(fast.share_of(slow, "seconds")[1])
    assert slow.share_of(fast, "epoch")[1] == 2 / 1
    assert fast.share_of(outcome([4, 3, 2, 1]), "seconds") == [4.0 / 8.0]


def test_plateau():
    rates = [1e-3, 1e-2, 1e-1, 1.0]
    assert results.plateau(rates, [50, 90, 90, 50]) == pytest.approx(1 + 2 / 40)
    assert results.plateau(rates, [90, 89.5, 80, 89.5]) == pytest.approx(1 + 0.5 / 9.5)
    assert results.plateau(rates, [10, 90, math.nan, 90]) == pytest.approx(1 / 80 + 1 / 90)
    assert results.plateau([0.1], [90]) == 0
    assert math.isnan(results.plateau(rates, [math.nan] * 4))
