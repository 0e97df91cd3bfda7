"""Options without effect, because other options disable the step that they belong to."""

from collections.abc import Iterator

from spap_jax.baselines import METHODS, update_used
from spap_jax.errors import option, warn
from spap_jax.settings import PruneSettings

_ROUNDS = ("rounds", "steps", "learning_rate")
_SWEEPS = ("sweeps", "sweep_blocks", "sweep_steps", "sweep_learning_rate")


def warn_of_ignored(settings: PruneSettings) -> None:
    """Warns of settings that were changed but have no effect in combination with the others."""
    for names, why in _unused(settings):
        changed = [option(name) for name in names if getattr(settings, name) != getattr(PruneSettings, name)]
        if changed:
            warn(f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} no effect: {why}.")


def _unused(settings: PruneSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the names of unused settings, and the reason."""
    method = settings.method
    if method != "spap":
        yield ("penalty", "penalty_stages"), f"the method {method} has no penalty"
    if not METHODS[method].swaps:
        yield ("swap_rounds",), f"the method {method} makes no swaps"
    update, rounds, sweeps = update_used(settings), settings.rounds, settings.decided.sweeps
    if update != "alternate":
        yield (*_ROUNDS, *_SWEEPS, "step_tokens"), f"the update {update} has no rounds and no sweeps"
        return
    if not rounds:
        yield _ROUNDS[1:], "there are no rounds"
    if not sweeps:
        yield _SWEEPS[1:], "there are no sweeps"
    if not rounds and not sweeps:
        yield ("step_tokens",), "there are no rounds and no sweeps"
