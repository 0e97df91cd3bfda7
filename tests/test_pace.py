"""Estimates of the time left, from made-up times."""

import pytest

from spap_jax.pace import Pace


def pace(*pieces: tuple[str, float, float]) -> Pace:
    """Return the pace after pieces of work, each with its kind, units and seconds."""
    known = Pace()
    for piece in pieces:
        known = known.after(*piece)
    return known


def test_nothing_is_said_of_the_first_piece_which_compiles():
    assert pace().left([("layer", 30)]) == ""
    assert pace(("layer", 1, 300)).left([("layer", 29)]) == ""
    assert pace(("layer", 1, 300), ("layer", 1, 80)).left([("layer", 28)]) == "about 37 min left"


def test_pieces_count_by_their_units():
    known = pace(("part", 9, 100), ("part", 6, 12), ("part", 2, 4))
    assert known.left([("part", 10), ("part", 5)]) == "about 30 s left"


def test_each_kind_has_its_own_pace_and_ends_the_estimate_where_it_has_none():
    known = pace(("layer", 1, 9), ("layer", 1, 2), ("perplexity", 1, 1), ("perplexity", 4, 20))
    assert known.left([("layer", 3), ("perplexity", 2)]) == "about 16 s left"
    assert known.left([("layer", 3), ("step", 7), ("perplexity", 2)]) == "step in 6 s"
    assert known.left([("layer", 0), ("perplexity", 2)]) == "about 10 s left"


def test_programs_that_are_compiled_again_do_not_count_but_what_was_known_stays():
    known = pace(("layer", 1, 50), ("layer", 1, 2)).cold().after("layer", 1, 70)
    assert known.left([("layer", 5)]) == "about 10 s left"
    assert known.after("layer", 1, 4).left([("layer", 5)]) == "about 15 s left"


@pytest.mark.parametrize(
    ("seconds", "then", "words"),
    [
        (2340, [], "about 39 min left"),
        (115, [], "about 120 s left"),
        (1.04, [], "about 1 s left"),
        (0.9, [], ""),
        (2340, [("step", 1)], "step in 39 min"),
        (0.9, [("step", 1)], ""),
    ],
)
def test_words(seconds: float, then: list[tuple[str, float]], words: str):
    assert pace(("layer", 1, 0), ("layer", 1, seconds)).left([("layer", 1), *then]) == words
