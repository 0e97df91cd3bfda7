"""One weight's two names, and the axes between them."""

import math
import re
from typing import NamedTuple

import numpy as np
from einops import rearrange


class Rule(NamedTuple):
    """How a tensor of a checkpoint becomes an array of the parameter tree, and back.

    The rule is stated once: ``axes`` reads from the checkpoint's shape to ours, and swapping its sides inverts it. Its
    letters (``docs/architecture.md``) give the shapes on both sides and say where the prunable axis f lies.

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
        """The checkpoint's axes and ours."""
        theirs, ours = self.axes.split(" -> ")
        return theirs, ours

    @property
    def letters(self) -> list[str]:
        """The letters of our axes."""
        return self.sides[1].split()

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return self.ours.startswith("layers/")

    def shapes(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes in the checkpoint and in one layer of the tree, for the axis sizes of ``DecoderConfig.axes``."""
        theirs, ours = (rearranged_shape(side, sizes) for side in self.sides)
        return theirs, ours

    def read(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """A checkpoint's tensor as an array of ours: the same numbers, the same dtype."""
        return np.ascontiguousarray(rearrange(tensor, self.axes, **self._grouped(sizes)))

    def write(self, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The inverse of ``read``; contiguous, since safetensors writes wrong data for views that are not."""
        theirs, ours = self.sides
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}", **self._grouped(sizes)))

    def theirs_of(self, index: tuple[slice, ...], sizes: dict[str, int]) -> tuple[tuple[slice, ...], dict[str, int]]:
        """Where a part of our array lies in the checkpoint's tensor, and the axis sizes of the part.

        Args:
            index: A slice for each of our axes; of letters that are one axis of theirs, only the first may be cut.
            sizes: Axis sizes of the whole.
        """
        spans = {letter: cut.indices(sizes[letter])[:2] for letter, cut in zip(self.letters, index, strict=True)}
        part = {letter: stop - start for letter, (start, stop) in spans.items()}
        cuts = []
        for first, *others in _groups(self.sides[0]):
            if any(part[letter] != sizes[letter] for letter in others):
                raise ValueError(f"{self.theirs} has no contiguous part at {index}")
            inner = math.prod(sizes[letter] for letter in others)
            cuts.append(slice(spans[first][0] * inner, spans[first][1] * inner))
        return tuple(cuts), sizes | part

    def _grouped(self, sizes: dict[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in self.axes if letter in sizes}


def rearranged_shape(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape of one side of a rule: ``"(n h) d"`` with n=2, h=3, d=5 is (6, 5)."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in _groups(side))


def _groups(side: str) -> list[list[str]]:
    """The letters of each axis of a side: ``"(n h) d"`` is [[n, h], [d]]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w+", side)]
