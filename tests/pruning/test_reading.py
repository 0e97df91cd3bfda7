"""Blocks are read one ahead, by a thread that reads nothing else, and a process reads a weight once."""

import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hf_models import hf_model

from spap_jax.checkpoint import Reader
from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.pruning.run import Dense

WAIT = 60


def saved(variant: str, folder: Path, dtype: str = "float32") -> Path:
    copy.deepcopy(hf_model(variant)).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> DecoderConfig:
    return Reader(saved("llama", tmp_path)).config


class Filed:
    """An array that is read when numpy asks for it, and says so."""

    def __init__(self, array: np.ndarray, told: Callable[[], None]):
        self._array, self._told = array, told
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._told()
        return self._array


class Files:
    """Blocks of one matrix each, whose value is the block's number; reading of the block ``broken`` fails."""

    def __init__(self, config: DecoderConfig, broken: int | None = None):
        self.config, self.broken = dataclasses.replace(config, layers=9), broken
        self.shape = (config.intermediate, config.width)
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.reached = [threading.Event() for _ in range(9)]

    def layer(self, number: int) -> Any:
        def told() -> None:
            if number == self.broken:
                raise UserError(f"block {number} is damaged.")
            self.read.append(number)
            self.threads.add(threading.current_thread().name)
            self.reached[number].set()

        return {"mlp": {"down": Filed(np.full(self.shape, number, np.float32), told)}}

    def blocks(self, numbers: range) -> Any:
        return Dense(self.config, {}, self.layer).blocks(numbers)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_the_next_block_and_no_other_is_read_while_one_is_used(config: DecoderConfig):
    files, seen = Files(config), []
    for number, layer in files.blocks(range(2, 6)):
        assert isinstance(layer["mlp"]["down"], jax.Array)
        assert (layer["mlp"]["down"] == number).all()
        assert number == 5 or files.reached[number + 1].wait(WAIT)
        seen.append(number)
        assert files.read == [*range(2, min(number + 2, 6))]
    assert seen == [2, 3, 4, 5]
    assert all(name.startswith("reading") for name in files.threads)
    assert not readers()


def test_an_error_is_raised_when_its_block_has_its_turn(config: DecoderConfig):
    files, seen = Files(config, broken=2), []
    blocks = files.blocks(range(4))
    with pytest.raises(UserError, match="block 2 is damaged"):
        seen.extend(number for number, _ in blocks)
    assert seen == [0, 1]
    assert files.read == [0, 1]
    assert not readers()


def test_the_thread_ends_with_the_generator(config: DecoderConfig):
    files = Files(config)
    blocks = files.blocks(range(4))
    assert next(blocks)[0] == 0
    assert readers()
    blocks.close()
    assert not readers()
    assert set(files.read) <= {0, 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("count", "sharers"), [(1, 1), (4, 2)])
def test_blocks_are_those_that_are_read_in_turn(count: int, sharers: int, dtype: str, tmp_path: Path):
    reader = Reader(saved("llama_biases", tmp_path, dtype))
    with mesh.use_mesh(count, sharers):
        for number, layer in Dense(reader.config, {}, reader.layer).blocks():
            expected = shard_params(reader.config, jax.tree.map(np.asarray, reader.layer(number)))
            for ours, theirs in zip(jax.tree.leaves(layer), jax.tree.leaves(expected), strict=True):
                assert ours.sharding == theirs.sharding
                assert np.array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


def test_a_process_reads_a_weight_once_for_all_its_devices(config: DecoderConfig):
    told: list[int] = []
    query = np.arange(np.prod(shape := (config.width, config.heads, config.head_dim)), dtype=np.float32).reshape(shape)
    with mesh.use_mesh(4, 2):
        placed = shard_params(config, {"attention": {"q": Filed(query, lambda: told.append(1))}})["attention"]["q"]
    assert np.array_equal(placed, query)
    assert {shard.data.shape[1] for shard in placed.addressable_shards} == {config.heads // 2}
    assert told == [1]
