"""Options without effect, because other options disable the step that they belong to."""

from collections.abc import Collection, Iterator

from spap_jax.errors import option, warn
from spap_jax.settings import PruneSettings
from spap_jax.solver.methods import METHODS, update_used

_ROUNDS = ("rounds", "steps", "step_tokens", "learning_rate")
_JOINT = (
    "joint_passes", "joint_text_weight", "joint_weights", "joint_last", "joint_blocks", "joint_tokens",
    "joint_learning_rate", "moment_dtype", "compute_dtype", "remat",
)  # fmt: skip


def warn_of_ignored(settings: PruneSettings, asked: Collection[str] | None = None) -> None:
    """Warns of settings that were changed but have no effect in combination with the others.

    Args:
        settings: All settings.
        asked: Names of those that were asked for; by default, those that are not as usual.
    """
    for names, why in _unused(settings):
        unusual = [name for name in names if getattr(settings, name) != getattr(PruneSettings, name)]
        changed = [option(name) for name in unusual if asked is None or name in asked]
        if changed:
            warn(f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} no effect: {why}.")


def _unused(settings: PruneSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the names of unused settings, and the reason."""
    method = settings.method
    if method != "spap":
        yield ("penalty", "penalty_stages"), f"the method {method} has no penalty"
    if not METHODS[method].swaps:
        yield ("swap_rounds",), f"the method {method} makes no swaps"
    update = update_used(settings)
    if METHODS[method].score is not None and update in ("none", "bias"):
        fitted = ("ridge",) if settings.allocation == "uniform" else ()  # widths are chosen by solving for weights
        yield ("correction", *fitted), f"the method {method} with the update {update} solves for no weights"
    if update != "alternate":
        yield ("effort", *_ROUNDS, *_JOINT), f"the update {update} has no rounds and no joint steps"
        return
    if not settings.rounds:
        yield _ROUNDS[1:], "there are no rounds"
    if not settings.passes:
        yield _JOINT[1:], "there are no joint steps"
    if not (settings.rounds or settings.passes):
        yield ("effort",), "there are neither rounds nor joint steps"
