"""The inputs of a command: their places, which its output must not touch, and their files, fetched before its work."""

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


def fetch_models(*names: str | None) -> None:
    """Downloads checkpoints that are not in the cache, before a spinner disrupts a download's bar.

    Raises:
        UserError: One is not there, or cannot be downloaded.
    """
    for name in filter(None, names):
        checkpoint.locate(name)


def fetch_data(*names: str | None) -> None:
    """Downloads data files into the cache, copies named as c4:FILE among them; data sets of the hub are skipped.

    Raises:
        UserError: A file cannot be downloaded, is missing or empty, or is of an unsupported type.
    """
    for data, _ in [part for name in names if name for part in shares_of(name)]:
        if file := data_file(data):
            read_file(local_file(file))  # which opens it, and reads nothing
