"""Dry runs of toy programs, compared with what the compiler says of them and with the arrays of a real run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from spap_jax.parallel import mesh
from spap_jax.parallel.program import describe, program
from spap_jax.planning.dry_run import Operations, RefusedError, recording


@program(static_argnames="turns", donate_argnames="x")
def multiplied(x: jax.Array, weight: jax.Array, turns: int) -> tuple[jax.Array, jax.Array]:
    return jax.lax.scan(lambda y, _: (y @ weight, None), x, None, length=turns)[0], weight.sum()


@program
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight) @ weight.T


def inputs() -> tuple[jax.Array, jax.Array]:
    return mesh.shard_chunks(np.ones((64, 32), np.float32)), mesh.replicate(mesh.put(np.ones((32, 48), np.float32)))


def test_memory_is_what_the_compiler_says_beside_the_arrays_that_are_alive():
    with mesh.use_mesh(4):
        x, weight = inputs()
        compiled = jax.jit(lambda x, weight: jnp.tanh(x @ weight) @ weight.T).lower(x, weight).compile()
        sizes: Any = compiled.memory_analysis()
        with recording() as dry:
            x, weight = inputs()
            assert dry.held == 64 * 32 * 4 // 4 + 32 * 48 * 4 == sizes.argument_size_in_bytes
            beside = describe(np.zeros((8, 100), np.float32), PartitionSpec("data"))
            product(x, weight)
            needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
            assert dry.peak == ("product", needed + 800)
            del beside
            result: Any = product(x, weight)
            assert dry.programs["product"].calls == 2
            assert dry.held == sizes.argument_size_in_bytes + sizes.output_size_in_bytes
            assert result.sharding.spec == PartitionSpec("data")
            del x, weight, result
            assert dry.held == 0


def test_a_donated_argument_is_counted_once_and_not_used_again():
    with mesh.use_mesh(1), recording() as dry:
        x, weight = (describe(np.zeros((n, 512), np.float32)) for n in (100_000, 512))
        held = dry.held
        y, _ = multiplied(x, weight, turns=3)
        assert dry.held == held + 4
        assert dry.peak[1] < held + 2 * x.nbytes  # XLA's own buffer for the loop, and no more
        with pytest.raises(ValueError, match="donated"):
            multiplied(x, weight, turns=3)
        y.delete()
        assert dry.held == held + 4 - x.nbytes


def test_operations_count_every_turn_of_a_loop_on_all_devices():
    @program
    def summed(x: jax.Array, weight: jax.Array) -> jax.Array:
        own = jax.shard_map(lambda x: jax.lax.psum(x @ weight, "data"), in_specs=PartitionSpec("data"),
                            out_specs=PartitionSpec(), axis_names={"data"})  # fmt: skip
        with jax.default_matmul_precision("highest"):
            return own(x)

    with mesh.use_mesh(4, 2), recording() as dry:
        x, weight = (describe(np.zeros((n, 32), np.float32)) for n in (64, 32))
        multiplied(x, weight, turns=7)
        assert dry.programs["multiplied"].operations == Operations(quick=7 * 2 * 64 * 32 * 32)
        summed(describe(np.zeros((64, 32), np.float32)), weight)
        assert dry.programs["summed"].operations == Operations(full=2 * 64 * 32 * 32)


def test_what_the_host_reads():
    shapes = ((2, 3), np.float32), (4, np.int32), ((), np.float32)
    with recording():
        array, numbers, number = (describe(np.ones(shape, dtype)) for shape, dtype in shapes)
        assert np.asarray(array).tolist() == [[0, 0, 0], [0, 0, 0]]
        assert numbers.tolist() == jax.device_get(numbers).tolist() == [0, 1, 2, 3]
        assert (int(number), bool(number)) == (0, False)
        first, second = float(number), float(number)
        assert 0 < second < 0.8 * first  # a round that gains so much is worth its time at every effort
        assert jax.block_until_ready([array])[0] is array


def test_a_program_runs_outside_of_dry_runs():
    assert float(product(jnp.ones((2, 2)), jnp.zeros((2, 2))).sum()) == 0


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 59.45G of "
         "15.75G hbm. Exceeded hbm capacity by 43.70G.", 59.45 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.62G) exceeds "
         "available HBM (15.75G)", 28.62 * 2**30),
        ("INTERNAL: Mosaic failed", None),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses(message: str, needed: float | None, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with recording(), pytest.raises(RefusedError if needed else jax.errors.JaxRuntimeError) as caught:
        product(describe(np.zeros((2, 2))), describe(np.zeros((2, 2))))
    assert getattr(caught.value, "needed", None) == (needed and pytest.approx(needed, rel=1e-6))
