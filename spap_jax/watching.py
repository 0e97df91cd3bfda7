"""The progress display of runs that are started from Python."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console

from spap_jax.pruning.progress import Progress
from spap_jax.reporting.schema import Check, LayerReport


class WatchCallbacks(NamedTuple):
    """Callbacks for the progress of a pruning run.

    Attributes:
        step: Called with the report of every step.
        part: Called after every joint step with the number of steps made, and their total.
    """

    step: Callable[[LayerReport | Check], None]
    part: Callable[[int, int], None] | None = None


def watched() -> bool:
    """Whether users see standard error: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or Console().is_jupyter


@contextmanager
def sampling(progress: bool | Callable[..., None] | None) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of the sampled sequences are written.

    Args:
        progress: As in `pruning`; a function is not called with these numbers.
    """
    if not callable(progress) and (watched() if progress is None else progress):
        from spap_jax.cli.console import counting

        with counting() as count:
            yield functools.partial(count, "sequences written")
    else:
        yield lambda done, total: None


@contextmanager
def pruning(run: Progress, progress: bool | Callable[[LayerReport | Check], None] | None) -> Iterator[WatchCallbacks]:
    """Shows the progress of pruning.

    Args:
        run: Formats the steps of the run.
        progress: Whether to show it, or a function to call instead; None shows it if it is `watched`.
    """
    if callable(progress):
        yield WatchCallbacks(progress)
    elif watched() if progress is None else progress:
        from spap_jax.cli.console import layer_progress

        with layer_progress(run, 0) as bars:
            yield WatchCallbacks(bars.advance, bars.together)
    else:
        yield WatchCallbacks(lambda report: None)


@contextmanager
def training(steps: int, progress: bool | Callable[[Check], None] | None) -> Iterator[Callable[[Check], None]]:
    """Shows the progress of training.

    Args:
        steps: Number of optimizer steps.
        progress: As in `pruning`; a function is called after every evaluation on the held-out sequences.
    """
    if callable(progress):
        yield progress
    elif watched() if progress is None else progress:
        from spap_jax.cli.console import training_progress

        with training_progress(steps) as show:
            yield show
    else:
        yield lambda check: None
