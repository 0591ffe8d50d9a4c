"""The figures of the workloads' report, from records made by hand."""

import math

import pytest

from benchmarks.optimizers.rates import OWN_RATES
from benchmarks.problems.plan import entries
from benchmarks.problems.records import Record, smoothed_final, thinned
from benchmarks.reporting.standings import Standings, plateau, profile
from benchmarks.reporting.workloads import overall, report


def made(workload, optimizer, rate, losses, seed=0, validation=50.0, lost=False, ms=1.0, **options):
    """A record of 100 steps."""
    return Record(
        workload, optimizer, rate, seed, 100, options, list(losses), losses[0],
        None if lost else smoothed_final(losses), None, None if lost else validation,
        "accuracy %", True, lost, len(losses), ms, ms, 1.0, 10, {"jax": "0"}, "abc",
        {"device": "cpu", "cores": 2, "load": None},
    )  # fmt: skip


def curve(final, falls_at=50):
    """10, and from some step on the final loss."""
    return [10.0] * falls_at + [final] * (100 - falls_at)


def with_rates(workload, optimizer, finals, **kwargs):
    rates = kwargs.pop("rates", OWN_RATES[optimizer].values)
    return [
        made(workload, optimizer, r, curve(x), **kwargs) for r, x in zip(rates, finals, strict=True)
    ]


def standings(*records):
    return Standings(entries(records))


def test_ratios_and_geometric_means():
    found = standings(
        *with_rates("a", "adam", (4, 2, 3)),
        *with_rates("b", "adam", (1, 2, 3), validation=80.0),
        *with_rates("a", "sgd", (9, 8, 1), validation=75.0),
        *with_rates("b", "sgd", (4, 5, 6), validation=60.0),
        *with_rates("a", "soap", (0.8, 2, 2)),
        *with_rates("b", "soap", (8, 8, 8)),
    )
    assert found.reference == "adam"
    assert found.labels == ["sgd", "adam", "soap"]
    assert found.cells["sgd", "a"].best_rate == 0.1
    assert found.loss_over_adam("sgd", "a") == 0.5
    assert found.loss_over_adam("sgd", "b") == 4.0
    assert found.loss_over_others("sgd", "a") == pytest.approx(1 / 0.8)
    assert found.loss_over_others("soap", "b") == 8.0
    assert found.loss_over_others("soap", "a") == 0.8
    total = overall(found, "sgd")
    assert total["loss_over_adam"] == pytest.approx(math.sqrt(0.5 * 4))
    assert total["loss_over_others"] == pytest.approx(math.sqrt(1 / 0.8 * 4))
    assert total["worst_over_adam"] == 4.0
    assert total["error_over_adam"] == pytest.approx(math.sqrt((25 / 50) * (40 / 20)))
    assert found.over_best("sgd") == pytest.approx([1 / 0.8, 4])
    assert profile(found.over_best("sgd"), (1, 1.25, 4, 5)) == [0, 0.5, 1, 1]
    text = report(found, ("x.png",))
    assert "| sgd | 2 | 1.41 |" in text
    assert "| geometric mean | 1.41 | 1.00 |" in text


def test_fitted_sets_do_not_differ_and_small_errors_neither():
    found = standings(
        *with_rates("a", "adam", (1e-3, 1, 1), validation=100.0),
        *with_rates("a", "sgd", (1e-6, 1, 1), validation=99.5),
    )
    assert found.cells["adam", "a"].loss == pytest.approx(0.1)  # a hundredth of the start
    assert found.loss_over_adam("sgd", "a") == 1.0
    assert found.error_over_adam("sgd", "a") == 1.0


def test_lost_runs_count_as_untrained():
    rates = OWN_RATES["sgd"].values
    found = standings(
        *with_rates("a", "adam", (2, 2, 2)),
        made("a", "sgd", rates[0], curve(5.0)),
        made("a", "sgd", rates[1], [10.0, 11.0], lost=True),
        made("a", "sgd", rates[2], [10.0, 11.0], lost=True),
        *with_rates("b", "adam", (2, 2, 2)),
        *[made("b", "sgd", rate, [10.0, 30.0], lost=True) for rate in rates],
    )
    assert found.cells["sgd", "a"].losses == {rates[0]: 5.0, rates[1]: 10.0, rates[2]: 10.0}
    total = overall(found, "sgd")
    assert (total["lost"], total["runs"]) == (5, 6)
    assert total["loss_over_adam"] == pytest.approx(math.sqrt(2.5 * 5))
    assert total["reached"] == 0
    assert math.isnan(found.error_over_adam("sgd", "b"))
    assert "| 5 of 6 |" in report(found, ())


def test_means_over_seeds_and_unfinished_entries():
    rates = OWN_RATES["sgd"].values
    found = standings(
        *(made("a", "sgd", r, curve(x), seed) for r in rates for seed, x in enumerate((2.0, 4.0))),
        made("a", "sgd", rates[0], curve(0.5), 2),  # a seed that the other rates lack
        made("b", "sgd", rates[0], curve(1.0)),  # not all rates
    )
    assert found.cells["sgd", "a"].loss == 3.0
    assert len(found.cells["sgd", "a"].runs) == 2
    assert ("sgd", "b") not in found.cells
    assert math.isnan(found.loss_over_adam("sgd", "a"))
    assert "not finished, so left out: sgd on b" in report(found, ())


@pytest.mark.parametrize(
    ("losses", "decades"),
    [
        ({1e-3: 1.0, 1e-2: 1.04, 1e-1: 1.04, 1.0: 2.0}, 2),
        ({1e-3: 1.0, 1e-2: 1.06, 1e-1: 1.04}, 0),
        ({1e-1: 1.05, 1e-3: 1.05, 1e-2: 1.0}, 2),
        ({0.5: 1.0}, 0),
    ],
)
def test_width_of_the_plateau(losses, decades):
    assert plateau(losses) == pytest.approx(decades)


def test_steps_and_seconds_to_adams_loss():
    rates = OWN_RATES["sgd"].values
    found = standings(
        *(made("a", "adam", r, curve(1.0, 75), ms=2.0) for r in OWN_RATES["adam"].values),
        *(made("a", "sgd", r, curve(0.5, 35), ms=3.0) for r in rates),
        *(made("b", "adam", r, curve(1.0, 75)) for r in OWN_RATES["adam"].values),
        *(made("b", "sgd", r, curve(1.5, 5)) for r in rates),
    )
    # The mean over five steps is at the target once all five are.
    assert found.steps_over_adam("adam", "a") == 1.0
    assert found.steps_over_adam("sgd", "a") == pytest.approx(40 / 80)
    assert found.seconds_over_adam("sgd", "a") == pytest.approx(0.75)
    assert found.steps_over_adam("sgd", "b") == math.inf
    total = overall(found, "sgd")
    assert (total["reached"], total["comparable"]) == (1, 2)
    assert total["steps_over_adam"] == pytest.approx(0.5)


def test_every_entry_has_as_many_rates():
    adam, own = OWN_RATES["adam"].values, OWN_RATES["tekfac"].values
    both = sorted({*adam, *own})
    records = [made("a", "tekfac", rate, curve(1.0)) for rate in (*both, 0.5)]
    records += [made("a", "tekfac", rate, curve(1.0), damping=1.0) for rate in adam]
    assert {e.label: e.rates for e in entries(records)} == {
        "tekfac": own,
        "tekfac at Adam's rates": adam,
        "tekfac at 0.5": (0.5,),
        "tekfac damping=1.0 at Adam's rates": adam,
    }


def test_mixed_states_of_the_library_are_named():
    records = with_rates("a", "tekfac", (1, 1, 1))
    records[0] = records[0]._replace(library="xyz")
    assert "**tekfac: 2 states of the library are mixed (abc, xyz)**" in report(
        standings(*records), ()
    )


def test_curves_are_thinned_to_means():
    assert thinned([4.0, 2.0]) == [4.0, 2.0]
    assert thinned(list(range(200))) == [0.5 + 2 * i for i in range(100)]
    assert smoothed_final([9.0] * 38 + [1.0, 3.0]) == 2.0
    assert smoothed_final([5.0, 1.0]) == 1.0
