"""Several data sets mixed by weight: ``a.jsonl:0.7,b.txt:0.3``."""

import os
import re
from typing import NamedTuple

from spap_jax.errors import UserError, option

_WEIGHTED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")


class Share(NamedTuple):
    """A data set of a mixture by its name, and its weight."""

    data: str
    weight: float


def shares_of(data: str) -> list[Share]:
    """Returns the parts of a mixture; a name that is none is the only part.

    Args:
        data: Name of a data set, or several, separated by commas, each followed by a colon and its weight.

    Raises:
        UserError: It can be read in two ways, a weight is missing or 0, or a data set is named twice.
    """
    pieces = data.split(",")
    found = [_WEIGHTED.fullmatch(piece) for piece in pieces]
    if len(pieces) == 1 or not (any(found) or all(map(_exists, pieces))) or (_exists(data) and not all(found)):
        return [Share(data, 1.0)]
    for name in (data, *pieces):
        if _exists(name) and _WEIGHTED.fullmatch(name):
            raise UserError(f"{name} is the name of a file, and data with a weight: rename the file")
    parts = [Share(match[1], float(match[2])) for match in found if match]
    if len(parts) < len(pieces):
        without = pieces[[match is None for match in found].index(True)]
        raise UserError(
            f"{without!r} has no weight in the mixture {data}: write each data set as NAME:WEIGHT, and rename a file "
            "whose name has a comma"
        )
    names = [part.data for part in parts]
    for name, weight in parts:
        if not weight or names.count(name) > 1:
            what = "is named twice" if weight else "has the weight 0"
            raise UserError(f"{name} {what} in the mixture {data}: name each data set once, with a weight above 0")
    return parts


def sequence_counts(parts: list[Share], sequences: int) -> list[int]:
    """Returns the number of sequences of each part: in proportion to the weights, rounded to the given sum.

    Raises:
        UserError: A part would have none.
    """
    total = sum(part.weight for part in parts)
    exact = [sequences * part.weight / total for part in parts]
    whole = [int(number) for number in exact]
    largest = sorted(range(len(parts)), key=lambda number: whole[number] - exact[number])
    for number in largest[: sequences - sum(whole)]:
        whole[number] += 1
    for part, count in zip(parts, whole, strict=True):
        if not count:
            raise UserError(
                f"none of {sequences} sequences would be of {part.data} with the weight {part.weight:g}: raise its "
                f"weight or {option('sequences')}"
            )
    return whole


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))
