"""The inputs of a command: their places, which its output must not touch, and their files, fetched before its work."""

from collections.abc import Iterable
from pathlib import Path

from spap_jax import checkpoint
from spap_jax.data.sources import data_file, local_file, read_file, shares_of
from spap_jax.storage.location import model_place


def inputs(
    model: str, teacher: str | None = None, data: str | None = None, evaluation: str | None = None
) -> dict[str, str | Path | None]:
    """Returns the paths and addresses of models and data by role, as `check_output` expects them; nothing is read."""
    models = {"the model": model, "the teacher": teacher}
    places: dict[str, str | Path | None] = {role: model_place(name) for role, name in models.items() if name}
    for role, named in (("the data", data), ("the evaluation data", evaluation)):
        parts = shares_of(named) if named else []
        places |= {
            f"{role} (part {number})" if len(parts) > 1 else role: data_file(part.data)
            for number, part in enumerate(parts, 1)
        }
    return places


def fetch(models: Iterable[str | None], data: Iterable[str | None] = ()) -> None:
    """Downloads checkpoints and data files that are not in the cache, before a spinner disrupts a download's bar.

    Files named as c4:FILE are data files too; data sets of the hub are skipped.

    Raises:
        UserError: One is not there, cannot be downloaded, or is an empty data file or one of an unsupported type.
    """
    for part in [part for name in data if name for part in shares_of(name)]:
        if file := data_file(part.data):
            read_file(local_file(file))  # which opens it, and reads nothing
    for name in filter(None, models):
        checkpoint.locate(name)
