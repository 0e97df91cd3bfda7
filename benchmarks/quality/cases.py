"""Models with their calibration and evaluation texts."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import spap_jax as spap

EXAMPLES = Path(__file__).parents[2] / "examples"

LENGTH = 256
"""Tokens per sequence or window, as in the training of the zoo's models."""

ZOO_TEXTS = {
    "stories": ("stories_calibration.txt", "stories_evaluation.txt"),
    "english": ("english_calibration.txt", "english_wikitext2_test.txt"),
}
"""Calibration and evaluation texts, by the last word of a model's name."""


@dataclass(frozen=True)
class Case:
    """A model's folder and its two texts."""

    model: Path
    calibration: Path
    evaluation: Path

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.resolve().name

    @functools.cached_property
    def files_hash(self) -> str:
        """A hash of the weights, the tokenizer and the texts."""
        weights = (self.model / name for name in ("config.json", "tokenizer.json"))
        return _hash([*weights, *sorted(self.model.glob("*.safetensors")), self.calibration, self.evaluation])


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise spap.UserError(f"{path} cannot be read ({error.strerror}); name another file.") from error
    return digest.hexdigest()[:12]


def cases_of(
    zoo: Path | None, model: Path | None = None, calibration: Path | None = None, evaluation: Path | None = None
) -> list[Case]:
    """Returns the zoo's models, or the bundled one, with their texts.

    Args:
        zoo: Folder with ``models/NAME`` and ``text/``. By default the examples.
        model: Folder of a single model.
        calibration: Calibration text for all models. By default chosen by the model's name.
        evaluation: Evaluation text, likewise.

    Raises:
        UserError: there is no model, a model's name matches no text, or one text is given for both uses.
    """
    models, texts = (EXAMPLES, EXAMPLES) if zoo is None else (zoo / "models", zoo / "text")
    folders = [model] if model else sorted(path.parent for path in models.glob("*/config.json"))
    if not folders:
        raise spap.UserError(f"there are no models under {models}; name a folder that holds models/NAME and text/.")
    return [_case(folder, texts, calibration, evaluation) for folder in folders]


def _case(model: Path, texts: Path, calibration: Path | None, evaluation: Path | None) -> Case:
    known = ZOO_TEXTS.get(model.resolve().name.rsplit("-")[-1])
    if known is None and not (calibration and evaluation):
        raise spap.UserError(
            f"the name of {model} tells no text (its last word is none of {', '.join(ZOO_TEXTS)}): "
            "name --data and --evaluation."
        )
    usual = known or ("", "")
    case = Case(model, calibration or texts / usual[0], evaluation or texts / usual[1])
    if case.calibration.resolve() == case.evaluation.resolve():
        raise spap.UserError(f"{case.evaluation} would be calibrated and judged on: name two texts.")
    return case
