"""The progress display of runs that are started from Python."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console

from spap_jax.cli.console import WatchCallbacks, counting, layer_progress, training_progress
from spap_jax.pruning.progress import Progress
from spap_jax.report.schema import Check, LayerReport


def watched() -> bool:
    """Whether users see standard error: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or Console().is_jupyter


def _shown(progress: bool | Callable[..., None] | None) -> bool:
    return not callable(progress) and (watched() if progress is None else progress)


@contextmanager
def sampling(progress: bool | Callable[..., None] | None) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of the sampled sequences are written.

    Args:
        progress: As in `pruning`; a function is not called with these numbers.
    """
    with counting() if _shown(progress) else nullcontext() as count:
        yield functools.partial(count, "sequences written") if count else lambda done, total: None


def pruning(
    run: Progress, progress: bool | Callable[[LayerReport | Check], None] | None
) -> AbstractContextManager[WatchCallbacks]:
    """Shows the progress of pruning.

    Args:
        run: Formats the steps of the run.
        progress: Whether to show it, or a function to call instead; None shows it if it is `watched`.
    """
    if _shown(progress):
        return layer_progress(run, 0)
    return nullcontext(WatchCallbacks(progress if callable(progress) else lambda report: None))


def training(
    steps: int, progress: bool | Callable[[Check], None] | None
) -> AbstractContextManager[Callable[[Check], None]]:
    """Shows the progress of training.

    Args:
        steps: Number of optimizer steps.
        progress: As in `pruning`; a function is called after every evaluation on the held-out sequences.
    """
    if _shown(progress):
        return training_progress(steps)
    return nullcontext(progress if callable(progress) else lambda check: None)
