"""What a command says of a run that it goes on with, and of one that it leaves unfinished."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from spap_jax.checkpoint.resume import Unfinished
from spap_jax.cli import console
from spap_jax.errors import NotFiniteError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells at length what it then raises


def layers_done(layers: int, steps: int) -> str:
    """How far a run of pruning is: every layer takes a step, and one more in each sweep over the model."""
    if steps <= layers:
        return f"{steps} of {layers} layers are done"
    sweep, adjusted = divmod(steps - 1, layers)
    return f"all {layers} layers are done, and {adjusted + 1} of them adjusted in sweep {sweep}"


@contextlib.contextmanager
def telling(kept: Unfinished, before_end: list[Callable[[], str]], amount: Callable[[int], str]) -> Iterator[None]:
    """Says what an earlier process left, and what this one leaves if it ends before its time.

    Args:
        kept: What is kept.
        before_end: Gets what to do when the process is told to end.
        amount: Says in a sentence without an end how far a run is that has kept so many records.
    """

    def end() -> str:
        kept.settle()
        console.err.show_cursor()  # which a bar has hidden
        return words()

    def words() -> str:
        done = amount(kept.count())
        return f"{done}, kept in {kept.place}: the same command goes on from there, --no-resume starts over."

    if kept.lost:
        console.err.print(f"{kept.place} was damaged: what is lost is computed again")
    if kept.told:
        console.err.print(f"going on: {amount(kept.count())}, kept in {kept.place}")
    before_end.append(end)
    try:
        yield
    except NotFiniteError:  # other settings are needed, with which there is nothing to go on from
        kept.forget()
        raise
    except BaseException:
        if kept.count():
            console.err.print(words())
        raise
    before_end.remove(end)
