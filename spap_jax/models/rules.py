"""Rules that map a weight's checkpoint name and axes to those of the parameter tree."""

import math
import re
from typing import NamedTuple

import numpy as np
from einops import rearrange

from spap_jax.models.host_arrays import contiguous


class Rule(NamedTuple):
    """Mapping between a tensor of a checkpoint and an array of the parameter tree, in both directions.

    Swapping the sides of ``axes`` inverts it; its letters (``docs/architecture.md``) give both shapes and the prunable
    axis f.

    Attributes:
        theirs: Name in the checkpoint, with ``{i}`` for the layer.
        ours: Path in the parameter tree; arrays under ``layers/`` are stacked over layers.
        axes: For example ``"(n h) d -> d n h"``.
    """

    theirs: str
    ours: str
    axes: str

    @property
    def sides(self) -> tuple[str, str]:
        """The axes in the checkpoint and in the parameter tree."""
        theirs, ours = self.axes.split(" -> ")
        return theirs, ours

    @property
    def letters(self) -> list[str]:
        """The axis letters in the parameter tree."""
        return self.sides[1].split()

    @property
    def stacked(self) -> bool:
        """Whether every layer has a tensor of this rule."""
        return self.ours.startswith("layers/")

    def named(self, prefix: str, head: str) -> "Rule":
        """Returns the same rule for a decoder inside a larger model, whose tensors have longer names."""
        theirs = self.theirs.replace("lm_head.weight", head)
        return self._replace(theirs=prefix + theirs.removeprefix("model.") if theirs.startswith("model.") else theirs)

    def shapes(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes in the checkpoint and in one layer of the tree, given ``DecoderConfig.axes``."""
        theirs, ours = (rearranged_shape(side, sizes) for side in self.sides)
        return theirs, ours

    def read(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """Rearranges a checkpoint's tensor to our axes, as a view of it."""
        return rearrange(tensor, self.axes, **self._grouped(sizes))

    def write(self, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """Inverts ``read``; the result is contiguous, since safetensors writes wrong data for non-contiguous views."""
        theirs, ours = self.sides
        return contiguous(rearrange(array, f"{ours} -> {theirs}", **self._grouped(sizes)))

    def _grouped(self, sizes: dict[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in self.axes if letter in sizes}


def rearranged_shape(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of one side of a rule: ``"(n h) d"`` with n=2, h=3, d=5 is (6, 5)."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in _groups(side))


def _groups(side: str) -> list[list[str]]:
    """Splits a side into the letters of each axis: ``"(n h) d"`` is [[n, h], [d]]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w+", side)]
