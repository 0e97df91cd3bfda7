"""Several sparsities in one command: their syntax, and a folder for each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from spap_jax.errors import UserError
from spap_jax.settings import PruneSettings
from spap_jax.storage.location import check_name

if TYPE_CHECKING:
    from spap_jax.models import DecoderConfig


class PruneRun(NamedTuple):
    """A checkpoint to make: the path or address of its folder, and the settings."""

    output: str
    settings: PruneSettings


def fractions(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    """Parses numbers separated by commas.

    Args:
        _: Requested type.
        tokens: Words of the command line, or values of a TOML file.

    Raises:
        ValueError: one of them is not a number.
    """
    return tuple(_fraction(word) for token in tokens for word in token.value.split(","))


SparsityOption = Annotated[
    tuple[float, ...],
    Parameter(converter=fractions, negative="", show_default=lambda found: ",".join(map(str, found))),
]
"""One sparsity or several, as given on the command line."""

OTHERS = Parameter(name="*", parse="^(?!sparsity$)")
"""Makes an option of every field of PruneSettings except the sparsity, which has its own option."""


def runs(output: str, sparsities: Sequence[float], settings: PruneSettings) -> list[PruneRun]:
    """Returns the runs that a command requests: one into ``output``, or several into folders in it.

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
    """Checks that no two runs make the same model.

    Args:
        wanted: The runs of a command.
        narrows: The pruned config of each run.

    Raises:
        UserError: two sparsities are equal after rounding.
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
