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

    While a block is computed, a thread reads the next one from its files to the memory of the host, and no other. It
    does nothing else: blocks are put onto devices in the thread of the caller, in the same order in every process.
    Blocks that are in memory already are taken when their turn comes. The thread ends before the generator does.

    Args:
        config: Config of the decoder.
        read_layer: Returns the parameters of a block by its number: arrays, or objects that are read when indexed.
        numbers: Numbers of the blocks.

    Raises:
        UserError: A block cannot be read; raised when its turn has come.
    """
    reader = ThreadPoolExecutor(1, "reading")

    def begin(number: int) -> Future[Params]:
        return reader.submit(placement.reading(config, read_layer(number)))

    coming = None
    try:
        for place, number in enumerate(numbers, start=1):
            read = (coming or begin(number)).result()
            coming = None
            placed = [jax.block_until_ready(placement.shard_params(config, read))]
            in_files = not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))
            del read  # before the next one is read, so that the host holds one at a time
            if in_files and place < len(numbers):
                coming = begin(numbers[place])
            yield number, placed.pop()  # the caller decides how long it stays
    finally:
        reader.shutdown(cancel_futures=True)
