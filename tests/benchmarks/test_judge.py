"""The arithmetic of ``Judge``, on rows whose answers can be worked out by hand."""

import math

import pytest
from quality_rows import row

from benchmarks.quality.judge import Judge, Median, median_of, ratio_of
from benchmarks.quality.methods import PEERS, STEPPED, TARGETS
from benchmarks.quality.results import Row

MODEL = "llama-stories"


def all_peers(seeds: int = 3, rise: float = 0.2) -> list[Row]:
    return [row(peer, rise, seed) for peer in PEERS for seed in range(seeds)]


def test_who_is_a_peer() -> None:
    assert PEERS == ("random", "magnitude", "wanda", "flap", "fasp", "obs", "osscar")
    assert STEPPED == ("fasp + steps", "obs + steps")
    assert TARGETS["spap"] == {0.1: 0.50, 0.2: 0.45, 0.3: 0.45, 0.5: 0.55}
    assert TARGETS["spap, high effort"] == {0.2: 0.30, 0.3: 0.30}


def test_medians_say_of_how_many() -> None:
    assert median_of([]) is None
    assert median_of([3.0, 1.0]) == Median(2.0, 2, 1.0, 3.0)
    judge = Judge(row(rise=rise, seed=seed) for seed, rise in enumerate((0.3, 0.1, 0.2)))
    assert judge.median(MODEL, 0.3, "spap", lambda each: each.rise) == Median(0.2, 3, 0.1, 0.3)
    assert judge.median(MODEL, 0.3, "spap", lambda each: each.divergence) == Median(0.1, 3, 0.05, 0.15)
    assert judge.median(MODEL, 0.1, "spap", lambda each: each.rise) is None
    assert judge.median("other", 0.3, "spap", lambda each: each.rise) is None


def test_ratios_pair_seeds_and_take_each_seeds_best_peer() -> None:
    """On these rows, the ratio of medians and the best peer over all seeds would both give another result."""
    fasp, obs, ours = (0.10, 0.40, 0.20), (0.20, 0.10, 0.40), (0.08, 0.03, 0.12)
    rises = {"fasp": fasp, "obs": obs, "spap": ours}
    judge = Judge(row(method, rise, seed) for method, values in rises.items() for seed, rise in enumerate(values))
    found = judge.ratio(MODEL, 0.3, "spap", PEERS)  # 0.8, 0.3, 0.6
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.3, 0.8))
    verdict = judge.verdict(MODEL, 0.3, "spap")
    assert verdict.best == ("fasp", "obs")
    assert verdict.peers == 2
    assert (verdict.met, verdict.complete) == (False, False)


def test_a_seed_that_a_side_lacks_does_not_count() -> None:
    judge = Judge([row("obs", 0.2, 0), row("obs", 0.2, 1), row("spap", 0.1, 1), row("spap", 0.1, 2)])
    found = judge.ratio(MODEL, 0.3, "spap", PEERS)
    assert found is not None
    assert found.seeds == 1
    assert judge.ratio(MODEL, 0.3, "spap", STEPPED) is None


def test_met_and_missed() -> None:
    for rise, met in ((0.089, True), (0.0901, False)):
        judge = Judge([*all_peers(), *(row(rise=rise, seed=seed) for seed in range(3))])
        verdict = judge.verdict(MODEL, 0.3, "spap")
        assert (verdict.met, verdict.complete, verdict.target) == (met, True, 0.45)


def test_a_verdict_needs_every_peer_and_every_seed() -> None:
    ours = [row(rise=0.01, seed=seed) for seed in range(3)]
    without = [each for each in all_peers() if (each.method, each.seed) != ("osscar", 2)]
    assert not Judge(without + ours).verdict(MODEL, 0.3, "spap").complete
    assert not Judge(all_peers() + ours[:2]).verdict(MODEL, 0.3, "spap").complete
    assert Judge(all_peers() + ours).verdict(MODEL, 0.3, "spap").complete
    nothing = Judge([]).verdict(MODEL, 0.3, "spap")
    assert (nothing.ratio, nothing.met, nothing.best, nothing.peers) == (None, None, (), 0)


def test_where_nothing_is_asked_nothing_is_met() -> None:
    judge = Judge([row("obs", 0.2, sparsity=0.4), row("spap", 0.1, sparsity=0.4)])
    verdict = judge.verdict(MODEL, 0.4, "spap")
    assert verdict.target is None
    assert verdict.met is None


def test_of_no_rise_nothing_is_a_fraction() -> None:
    assert ratio_of(0.1, 0.2) == 0.5
    assert ratio_of(-0.1, 0.2) == -0.5
    assert ratio_of(-0.1, 0.0) == math.inf
    assert ratio_of(-0.2, -0.1) == math.inf
