"""The commands: what they refuse, what they print, and the files they write."""

import functools
import json
import os
import re

import jax
import pytest
from PIL import Image

from benchmarks import healthy, memory, peers, profile, speed
from benchmarks.data.sets import DATASETS
from benchmarks.models.convnets import MODELS
from benchmarks.optimizers.recipes import RECIPES
from benchmarks.train import main
from benchmarks.training.loop import Trainer
from benchmarks.training.options import parse
from benchmarks.training.search import TRIALS
from tests.benchmarks.refusals import assert_refused

# --- train -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_defaults(dataset):
    parsed = parse(["--dataset", dataset])
    assert parsed.model in MODELS
    assert parsed.curvature.factor_interval >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--dataset mnist",
            "unknown dataset 'mnist': choose from digits, cifar10, cifar100, alice",
        ),
        ("--dataset cifar100", "cifar100 is read from a directory: pass with --data"),
        ("--model alexnet", "unknown model 'alexnet': choose from cnn, resnet20, vgg16, vit"),
        ("--model transformer", "transformer reads windows, digits has images: choose .* cnn or"),
        ("--dataset alice --model vit", "vit reads images, alice has windows: .* transformer, or"),
        ("--dataset alice --width 30", "a width of 30 cannot be divided among 4 heads"),
        ("--dataset alice --subset 9000", "a subset of 9000 training windows .* alice has 2027"),
        ("--dataset alice --subset 20", "a batch of 32 is more than the 20 training windows"),
        ("--model vgg16", "vgg16 is made for 32x32 images, these are 8x8"),
        ("--optimizers tekfac,lion", "unknown optimizer 'lion'"),
        ("--optimizers sgd,sgd", "twice"),
        ("--subset 2000", "a subset of 2000 training images .* digits has 1437"),
        ("--subset 50", "a batch of 64 is more than the 50 training images"),
        ("--epochs 0", "--epochs: must be a whole number of 1 or more, got '0'"),
        ("--batch-size 2.5", "--batch-size: must be a whole number"),
        ("--factor-interval never", "--factor-interval: must be a whole number"),
        ("--target 101", "--target: must be a number from 0 to 100"),
        ("--damping much", "--damping: must be auto, trace or a positive number, got 'much'"),
        ("--damping -1", "--damping"),
        ("--basis-rank all", "--basis-rank: must be auto, a whole number, 1 or more, or a share"),
        ("--basis-rank 1.5", "--basis-rank: must be auto"),
        ("--basis-rank 0", "--basis-rank: must be auto"),
        ("--learning-rates 0", "--learning-rates must be one positive number"),
        ("--learning-rates sgd=nan", "--learning-rates must be one positive number"),
        ("--learning-rates sgd=1,sgd=2", "once for each optimizer"),
        ("--learning-rates kfac=0.1", "unknown optimizer in --learning-rates 'kfac'"),
        ("--colour red", "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(tmp_path, arguments, message, capsys):
    assert_refused([*arguments.split(), "--out", str(tmp_path)], message, capsys)


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_refused(["--out", str(tmp_path / "file")], "choose another --out", capsys)


@pytest.mark.slow
def test_whole_comparison(tmp_path, capsys):
    main(
        [
            *"--epochs 4 --seeds 2 --search-epochs 1 --target 60".split(),
            *("--learning-rates", "tekfac=0.03,sgd=0.1", "--out", str(tmp_path / "new" / "out")),
        ]
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "adam: training loss by learning rate" in printed.out
    assert "sgd: training loss by learning rate" not in printed.out
    assert "epochs to 60 %" in printed.out

    with Image.open(tmp_path / "new" / "out" / "curves.png") as image:
        assert image.format == "PNG"
    written = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert written["settings"]["curvature"]["factor_interval"] == 10
    assert written["settings"]["parameters"] == 21_546
    assert written["versions"]["jax"] == jax.__version__
    assert written["hardware"]["cpu_count"] == os.cpu_count()
    results = {result["optimizer"]: result for result in written["results"]}
    assert list(results) == ["tekfac", "sgd", "adam"]
    assert results["sgd"]["search"] is None
    assert len(results["adam"]["search"]["trials"]) == TRIALS
    for name, result in results.items():
        assert result["compile_seconds"] > 0
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        for run in result["runs"]:
            assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2, 3, 4]
            assert run["train_loss"] < 1.0, name
            assert run["epochs"][-1]["test_accuracy"] > 0.8, name
            assert run["median_step_ms"] > 0


# --- speed, peers and profile ----------------------------------------------------------------


@pytest.mark.slow
def test_speed_and_spikes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure_spikes", functools.partial(
        speed.measure_spikes, interval=3, rounds=1
    ))  # fmt: skip
    speed.main(["--models", "cnn", "--batch-size", "8", "--rounds", "2", "--spikes", "1",
                "--peak-tflops", "0.05", "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "speed.json").read_text())["results"]["cnn"]
    assert set(found["peers"]) == {"sgd", "adam", "muon", "soap"}
    assert set(found["tekfac"]) == {"all", "auto"}
    for program in found["tekfac"].values():
        kinds = program["kinds"]
        assert set(kinds) == {"off", "factors", "eigenbasis", "rescaling", "all three",
                              "50/50/200", "10/10/10"}  # fmt: skip
        assert min(kind["ratio"] for kind in kinds.values()) > 0
        assert set(program["spikes"]) == {"together", "staggered"}
        assert min(program["spikes"].values()) >= 1
    assert (tmp_path / "speed.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "worst step over median, staggered" in printed
    sgd = found["peers"]["sgd"]
    share = sgd["gflop"] / found["sgd_ms"] / 0.05
    assert f"{found['sgd_ms']:.2f}, {share:.1%}" in printed
    assert found["tekfac"]["all"]["gflop"] > sgd["gflop"] > 1e-3
    for wrong in (["--rounds", "0"], ["--basis-ranks", "all,most"], ["--models", "no"],
                  ["--peak-tflops", "0"]):  # fmt: skip
        with pytest.raises(SystemExit):
            speed.main(wrong)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for wrong, says in (
        (["--peers", str(damaged)], "--peers must be files that benchmarks.peers wrote"),
        (["--spikes", "-1"], "--spikes must be 0 or more"),
        (["--statistics-examples", "0"], "1 or more"),
        (["--out", str(damaged)], "exists"),
    ):
        with pytest.raises(SystemExit):  # before anything is timed
            speed.main(wrong)
        assert says in capsys.readouterr().err


def test_what_falls_together_costs_once():
    kinds = {"off": 1.0, "factors": 2.0, "eigenbasis": 3.0, "rescaling": 4.0, "all three": 5.0}
    kinds = {kind: {"ratio": ratio} for kind, ratio in kinds.items()}
    assert speed._amortised(kinds, (10, 10, 10)) == pytest.approx(1 + 4 / 10)
    # Of 200 steps one with all three, and three with factors and eigenbasis.
    expected = 1 + (4 + 3 * (1 + 2)) / 200
    assert speed._amortised(kinds, (50, 50, 200)) == pytest.approx(expected)


def test_peers_that_are_not_installed(tmp_path, monkeypatch, capsys):
    """SGD in their place: periods, ratios and JSON; and a sentence where there is none."""
    arguments = ["--models", "cnn", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(peers, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert "neither kfac-jax nor psgd-jax is installed" in capsys.readouterr().err

    asked = []

    def stand_in(task, settings):
        asked.append(settings)
        return Trainer(task, "sgd", {"learning_rate": 0.0})

    monkeypatch.setattr(peers, "is_installed", lambda: True)
    for wrong, says in ((["--models", "nosuch"], "nosuch"), (["--rounds", "0"], "1 or more")):
        with pytest.raises(SystemExit):
            peers.main([*arguments, *wrong])
        assert says in capsys.readouterr().err
    monkeypatch.setattr(peers, "KfacJaxTrainer", stand_in)
    monkeypatch.setitem(peers.RECIPES, "kron", RECIPES["sgd"])
    peers.main(arguments)
    assert asked == [{"curvature_update_period": 10, "inverse_update_period": 10}]
    found = json.loads((tmp_path / "peers.json").read_text())["results"]["cnn"]
    assert set(found) == {"kfac-jax, 10/10", "PSGD Kron, 0.03"}
    assert all(peer["ratio"] > 0 for peer in found.values())


@pytest.mark.slow
def test_profile(capsys):
    profile.main(["--model", "cnn", "--batch-size", "8", "--steps", "1"])
    out = capsys.readouterr().out
    for part in ("forward pass", "backward pass", "factors", "eigenbasis", "precondition"):
        assert part in out
    with pytest.raises(SystemExit):
        profile.main(["--steps", "0"])


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_benchmark(tmp_path, capsys):
    sizes = "--depth 4 --width 8 --positions 3 --batch-size 5".split()
    memory.main([*sizes, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "memory.json").read_text())
    assert set(written["results"]) == {"scan", "scan and remat"}
    for result in written["results"].values():
        assert result["plain gradient"] < result["with raw statistics"]
        assert all(value > 0 for value in result.values())
    for name, state in written["states"].items():
        assert state["Adam"] == 2 * state["SGD with momentum"], name
        assert state["SGD with momentum"] < state['TEKFAC, basis_rank="auto"'] < state["TEKFAC"]
        # Two factors, two bases, and three times the parameters: Θ and momentum here, and there
        # two averages.
        assert state["TEKFAC"] == pytest.approx(state["SOAP"], rel=1e-3)
    assert "with reduced statistics" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        memory.main(["--depth", "0"])
    assert end.value.code == 2


# --- healthy ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_healthy_run(tmp_path, capsys):
    picture = tmp_path / "new" / "run.png"
    healthy.main(["--epochs", "1", "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = re.match(r"22 steps, loss (\S+) to (\S+): ", capsys.readouterr().out)
    assert printed is not None
    first, last = map(float, printed.groups())
    assert last < first / 2


@pytest.mark.parametrize("option", ["--epochs=0", "--batch-size=2000", "--learning-rate=nan"])
def test_healthy_run_refuses(option, capsys):
    with pytest.raises(SystemExit) as ended:
        healthy.main([option])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
