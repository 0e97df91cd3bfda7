"""Whether anyone watches a run that was started from Python, and what they see of it."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console

from spap_jax.pruning.progress import Progress
from spap_jax.pruning.report import LayerReport, SweepReport
from spap_jax.training.report import Check


class Watch(NamedTuple):
    """Who is told of a run of pruning.

    Attributes:
        step: Called with the report of every step.
        part: Called within the steps of a sweep on several layers with how many parts are done, and of how many.
    """

    step: Callable[[LayerReport | SweepReport], None]
    part: Callable[[int, int], None] | None = None


def watched() -> bool:
    """Whether a person sees what goes to standard error: on a terminal, or in a notebook."""
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
def pruning(run: Progress, progress: bool | Callable[[LayerReport | SweepReport], None] | None) -> Iterator[Watch]:
    """Shows how far pruning is.

    Args:
        run: Puts its steps into words.
        progress: Whether to show it, or who is told instead; None shows it if it is `watched`.
    """
    if callable(progress):
        yield Watch(progress)
    elif watched() if progress is None else progress:
        from spap_jax.cli.console import layer_progress

        with layer_progress(run, 0) as bars:
            yield Watch(bars.advance, bars.together)
    else:
        yield Watch(lambda report: None)


@contextmanager
def training(steps: int, progress: bool | Callable[[Check], None] | None) -> Iterator[Callable[[Check], None]]:
    """Shows how far training is.

    Args:
        steps: How many steps are to be made.
        progress: As in `pruning`; called with every look at the held-out sequences.
    """
    if callable(progress):
        yield progress
    elif watched() if progress is None else progress:
        from spap_jax.cli.console import training_progress

        with training_progress(steps) as show:
            yield show
    else:
        yield lambda check: None
