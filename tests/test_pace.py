"""Estimates of the time left, from made-up times."""

import pytest

from spap_jax.pace import Left, Pace


def pace(*pieces: tuple[str, float, float]) -> Pace:
    """Return the pace after pieces of work, each with its kind, units and seconds."""
    known = Pace()
    for piece in pieces:
        known = known.after(*piece)
    return known


def test_nothing_is_said_of_the_first_piece_which_compiles():
    assert pace().left([("layer", 30)]) == Left(0, "layer")
    assert pace(("layer", 1, 300)).left([("layer", 29)]) == Left(0, "layer")
    assert pace(("layer", 1, 300), ("layer", 1, 80)).left([("layer", 28)]) == Left(2240, None)


def test_pieces_count_by_their_units():
    known = pace(("part", 9, 100), ("part", 6, 12), ("part", 2, 4))
    assert known.left([("part", 10), ("part", 5)]) == Left(30, None)


def test_each_kind_has_its_own_pace_and_ends_the_estimate_where_it_has_none():
    known = pace(("layer", 1, 9), ("layer", 1, 2), ("perplexity", 1, 1), ("perplexity", 4, 20))
    assert known.left([("layer", 3), ("perplexity", 2)]) == Left(16, None)
    assert known.left([("layer", 3), ("step", 7), ("perplexity", 2)]) == Left(6, "step")
    assert known.left([("layer", 0), ("perplexity", 2)]) == Left(10, None)


def test_programs_that_are_compiled_again_do_not_count_but_what_was_known_stays():
    known = pace(("layer", 1, 50), ("layer", 1, 2)).cold().after("layer", 1, 70)
    assert known.left([("layer", 5)]) == Left(10, None)
    assert known.after("layer", 1, 4).left([("layer", 5)]) == Left(15, None)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (Left(2340, None), "about 39 min left"),
        (Left(115, None), "about 120 s left"),
        (Left(1.04, None), "about 1 s left"),
        (Left(2340, "step"), "step in 39 min"),
        (Left(0.9, None), ""),
        (Left(0, "layer"), ""),
    ],
)
def test_words(left: Left, words: str):
    assert left.words == words
