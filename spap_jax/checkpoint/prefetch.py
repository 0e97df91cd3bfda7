"""Reads blocks in order, each while the one before it is computed."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel import placement


def blocks_in_order(
    config: DecoderConfig, read_layer: Callable[[int], Params], numbers: Sequence[int]
) -> Generator[tuple[int, Params], None, None]:
    """Yields blocks with their numbers, placed as by `placement.shard_params`.

    A thread reads the next block to the host's memory meanwhile; ``read_layer`` returns arrays, or objects that are
    read when indexed. The caller's thread puts blocks onto devices, in the same order in every process.

    Raises:
        UserError: A block cannot be read; raised when its turn has come.
    """
    with ThreadPoolExecutor(1, "reading") as reader:

        def begin(number: int) -> Future[Params]:
            return reader.submit(placement.reading(config, read_layer(number)))

        following = map(begin, numbers)
        coming = next(following, None)
        for number in numbers:
            assert coming is not None
            placed = jax.block_until_ready(placement.shard_params(config, coming.result()))
            coming = next(following, None)  # now, so that the host holds one block at a time
            yield number, placed
            del placed
