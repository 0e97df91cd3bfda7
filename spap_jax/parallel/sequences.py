"""Token sequences divided into chunks for the devices, the one form in which pruning and training read them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from spap_jax.parallel import mesh


class Sequences(NamedTuple):
    """Sequences in chunks of one size, as many chunks on each device; the last sequences may be padding.

    Arrays of tokens are on the host, or on the devices as `sharded` puts them. Streams are on the devices.

    Attributes:
        tokens: [C, B, T] token ids; padding repeats the last sequence.
        real: Number of sequences that are no padding.
        mask: [C, B, T] True on the tokens whose predictions count; None if all count.
        entering: [C, B, T, d] the stream before the first block that is trained; None for the embedded tokens.
        target: [C, B, T, d] the last stream of the model whose predictions are the target; None without.
    """

    tokens: Any
    real: int
    mask: Any = None
    entering: jax.Array | None = None
    target: jax.Array | None = None

    @property
    def rows(self) -> np.ndarray:
        """The sequences that are no padding, [B, T]."""
        return self.tokens.reshape(-1, self.tokens.shape[-1])[: self.real]

    @property
    def counted(self) -> jax.Array | None:
        """[C, B, T] 1, or 0 for padding, spread over the devices; None if there is none."""
        number = np.arange(self.tokens.shape[0] * self.tokens.shape[1]).reshape(*self.tokens.shape[:2], 1)
        if number.size == self.real:
            return None
        return mesh.shard_chunks(np.broadcast_to(number < self.real, self.tokens.shape).astype(np.float32))

    def sharded(self) -> "Sequences":
        """Returns them with tokens and mask on the devices."""
        mask = None if self.mask is None else mesh.shard_chunks(self.mask)
        return self._replace(tokens=mesh.shard_chunks(self.tokens), mask=mask)


def chunked(tokens: np.ndarray, most: int, mask: np.ndarray | None = None) -> Sequences:
    """Divides token blocks [B, T] into chunks of at most ``most`` sequences for the devices; none if there are none."""
    chunks, size = division(len(tokens), most, mesh.data_size())
    rows = np.minimum(np.arange(chunks * size), len(tokens) - 1).reshape(chunks, size)
    return Sequences(tokens[rows], len(tokens), None if mask is None else mask[rows])


def division(count: int, most: int, devices: int) -> tuple[int, int]:
    """Returns the number and the size of chunks of ``count`` sequences, with little padding.

    ``most`` is the maximum size of a chunk; each of the devices has the same number of chunks.
    """
    own = -(-count // devices)
    most = min(most, max(1, own))
    # The largest size is not always best: it could need nearly a chunk of padding.
    size = min(range(most, (most - 1) // 2, -1), key=lambda size: -own % size)
    return devices * -(-own // size), size


def fitted_of(count: int, held_out: float) -> int:
    """Returns how many of ``count`` sequences are fitted; the rest is held out, at least one if ``held_out`` > 0."""
    return count if held_out <= 0 else count - min(count - 1, max(1, round(held_out * count)))
