"""Several sparsities in one command: how they are typed, and a folder for each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from spap_jax.errors import UserError
from spap_jax.places import check_name
from spap_jax.settings import PruneSettings

if TYPE_CHECKING:
    from spap_jax.models.config import DecoderConfig


class PruneRun(NamedTuple):
    """A checkpoint to be made: the path or address of its folder, and how."""

    output: str
    settings: PruneSettings


def fractions(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    """Numbers with commas between them, as they were typed.

    Args:
        _: Type that is asked for.
        tokens: Words of the command line, or values of a TOML file.

    Raises:
        ValueError: one of them is not a number.
    """
    return tuple(_fraction(word) for token in tokens for word in token.value.split(","))


Sparsities = Annotated[
    tuple[float, ...],
    Parameter(converter=fractions, negative="", show_default=lambda found: ",".join(map(str, found))),
]
"""One sparsity or several, as the command line takes them."""

OTHERS = Parameter(name="*", parse="^(?!sparsity$)")
"""Makes an option of every field of PruneSettings but the sparsity, which has one of its own."""


def runs(output: str, sparsities: Sequence[float], settings: PruneSettings) -> list[PruneRun]:
    """The runs that a command asks for: one into ``output``, or several into folders in it.

    Raises:
        UserError: a sparsity is out of range or is given twice, or the output has no name.
    """
    check_name(output)
    if len(set(sparsities)) < len(sparsities):
        raise UserError(f"--sparsity {','.join(map(str, sparsities))} names a sparsity twice: name each once.")
    chosen = [settings.replace(sparsity=sparsity) for sparsity in sparsities]
    if len(chosen) == 1:
        return [PruneRun(output, chosen[0])]
    return [PruneRun(f"{output.rstrip('/')}/sparsity-{each.sparsity}", each) for each in chosen]


def check_different(wanted: Sequence[PruneRun], narrows: "Sequence[DecoderConfig]") -> None:
    """Refuses to make the same model twice.

    Args:
        wanted: The runs of a command.
        narrows: What each of them makes of the decoder.

    Raises:
        UserError: rounding makes two sparsities one.
    """
    for number, narrow in enumerate(narrows):
        if narrow in narrows[:number]:
            twice = wanted[narrows.index(narrow)].settings.sparsity, wanted[number].settings.sparsity
            raise UserError(
                f"--sparsity {twice[0]} and {twice[1]} both leave {narrow.intermediate} channels in a layer: name one "
                "of the two, or lower --round-to."
            )


def _fraction(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise ValueError(f'unable to convert "{word}" into float.') from error
