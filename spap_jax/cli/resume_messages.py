"""Messages about a run that a command resumes, and about one that it leaves unfinished."""

import contextlib
from collections.abc import Callable, Iterator

from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.cli import console
from spap_jax.errors import NotFiniteError
from spap_jax.parallel.processes import leads


def layers_done(layers: int, checks: int, steps: int) -> str:
    """Describes the progress of a pruning run: every layer needs one step, and each check of the joint steps one."""
    if steps <= layers:
        return f"{steps} of {layers} layers are done"
    return f"all {layers} layers are done, and {steps - layers - 1} of {checks - 1} parts of the joint steps"


@contextlib.contextmanager
def telling(kept: Unfinished, before_end: list[Callable[[], str]], amount: Callable[[int], str]) -> Iterator[None]:
    """Reports what an interrupted process left, and what this one leaves if it ends early.

    Args:
        kept: The stored records of the run.
        before_end: List to which an action before a termination by SIGTERM is added.
        amount: Returns a clause without a full stop on the progress of a run that has stored this many records.
    """

    def end() -> str:
        kept.settle()
        console.err.show_cursor()  # a progress bar has hidden it
        return words()

    def words() -> str:
        if not leads():
            return f"its part of the run is kept in {kept.place}."
        done = amount(kept.count())
        return f"{done}, kept in {kept.place}: the same command goes on from there, --no-resume starts over."

    if kept.lost:
        console.err.print(f"{kept.place} was damaged: what is lost is computed again")
    if kept.told:
        console.err.print(f"going on: {amount(kept.count())}, kept in {kept.place}")
    before_end.append(end)
    try:
        yield
    except NotFiniteError:  # needs other settings, with which this run cannot be resumed
        kept.forget()
        raise
    except BaseException:
        if kept.count():
            console.err.print(words())
        raise
    before_end.remove(end)
