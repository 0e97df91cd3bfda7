"""The inputs of a command by role, so that its output cannot overwrite them."""

from pathlib import Path


def inputs(
    model: str, teacher: str | None = None, data: str | None = None, evaluation: str | None = None
) -> dict[str, str | Path | None]:
    """Returns the paths and addresses of models and data by role, as `check_output` expects them; nothing is read."""
    from spap_jax.checkpoint import model_place

    return {
        "the model": model_place(model),
        "the teacher": teacher and model_place(teacher),
        **_data_places("the data", data),
        **_data_places("the evaluation data", evaluation),
    }


def _data_places(role: str, data: str | None) -> dict[str, str | Path | None]:
    """Returns the places of data, or of the parts of a mixture."""
    from spap_jax.data.sources import data_file, shares_of

    parts = shares_of(data) if data else []
    return {
        f"{role}{f' (part {number})' * (len(parts) > 1)}": data_file(part.data) for number, part in enumerate(parts, 1)
    }
