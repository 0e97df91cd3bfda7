"""Calls are made in another thread, in order and one at a time, and none of their errors is lost."""

import threading
from collections.abc import Callable

import pytest

from spap_jax.checkpoint.behind import Behind

WAIT = 60


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("writing")]


def fail() -> None:
    raise OSError("the disk is full")


def test_the_caller_goes_on_while_one_call_is_made():
    begun, may_end, made = threading.Event(), threading.Event(), []

    def slow(number: int) -> None:
        begun.set()
        assert may_end.wait(WAIT)
        made.append(number)

    with Behind() as behind:
        behind(slow, 1)
        assert begun.wait(WAIT)
        assert made == []
        may_end.set()
        behind(made.append, 2)
        behind(made.append, 3)
        assert made[:2] == [1, 2]
    assert made == [1, 2, 3]
    assert not writers()


def two_calls(first: Callable[[], None], second: Callable[[], None]) -> None:
    with Behind() as behind:
        behind(first)
        behind(second)


def test_an_error_is_raised_by_the_next_call():
    made = []
    with pytest.raises(OSError, match="the disk is full"):
        two_calls(fail, lambda: made.append(2))
    assert made == []
    assert not writers()


def test_an_error_of_the_last_call_is_raised_at_the_end():
    made = []
    with pytest.raises(OSError, match="the disk is full"):
        two_calls(lambda: made.append(1), fail)
    assert made == [1]
    assert not writers()


def test_an_error_of_the_caller_comes_first():
    def wrong() -> None:
        with Behind() as behind:
            behind(fail)
            raise KeyError

    with pytest.raises(KeyError):
        wrong()
    assert not writers()
