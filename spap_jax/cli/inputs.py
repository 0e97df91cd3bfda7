"""What a command reads, by its role, so that its output is kept apart from it."""

from pathlib import Path


def inputs(
    model: str, teacher: str | None = None, data: str | None = None, evaluation: str | None = None
) -> dict[str, str | Path | None]:
    """The paths and addresses of models and data, as `check_output` takes them; nothing is read.

    Args:
        model: Folder, hub id or address of the checkpoint.
        teacher: The same of the dense checkpoint that it is trained towards.
        data: Calibration or training data.
        evaluation: Data on which perplexity is measured.
    """
    from spap_jax.checkpoint import model_place

    return {
        "the model": model_place(model),
        "the teacher": teacher and model_place(teacher),
        "the data": data and _data_place(data),
        "the evaluation data": evaluation and _data_place(evaluation),
    }


def _data_place(data: str) -> str | None:
    """The path or address of what a user calls data; None for data sets of the hub."""
    from spap_jax.named_sets import NAMED
    from spap_jax.remote import is_address
    from spap_jax.texts import looks_local

    short, _, copy = data.partition(":")
    if short in NAMED:
        return copy or None
    return data if is_address(data) or looks_local(data) else None
