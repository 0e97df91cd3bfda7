"""The state of the engine goes to the host and back in the parts that devices hold, to the same bits."""

import jax
import numpy as np
import pytest
from training_cases import FULL, SETTINGS, counting, tiny

from spap_jax.errors import UserError
from spap_jax.parallel import mesh
from spap_jax.settings import FinetuneSettings
from spap_jax.training import train
from spap_jax.training.engine import Stage


def last_stage(settings: FinetuneSettings) -> Stage:
    [*_, stage] = train.finetune_stages(tiny(dtype="bfloat16"), counting(), None, settings)
    return stage


@pytest.mark.parametrize("settings", [SETTINGS, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(("count", "sharers"), [(1, 1), (4, 2)])
def test_a_stage_comes_back_as_it_was(settings: FinetuneSettings, count: int, sharers: int):
    with mesh.use_mesh(count, sharers):
        stage = last_stage(settings.replace(moment_dtype="bfloat16"))
        parts = stage.parts()
        again = stage.with_parts(parts, stage.checks)
        assert not parts["state"]  # each went when a device had it
        for one, other in zip(*(jax.tree.leaves((s.state, s.best)) for s in (stage, again)), strict=True):
            assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
            for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(theirs.data))


def test_the_host_gets_what_each_device_holds_and_gets_it_once():
    """Nothing is gathered: no array on the host is larger than a device's, and together they make up the state."""
    with mesh.use_mesh(4, 2):
        stage = last_stage(FULL.replace(moment_dtype="bfloat16"))
        parts = stage.parts()
        for name, tree in (("state", stage.state), ("best", stage.best)):
            for number, array in enumerate(jax.tree.leaves(tree)):
                mine = parts[name][str(number)].values()
                assert {part.shape for part in mine} == {array.addressable_data(0).shape}
                assert sum(part.nbytes for part in mine) == array.nbytes
            assert max(len(mine) for mine in parts[name].values()) == 4


def test_parts_are_arrays_of_their_own():
    """JAX keeps what it copied to the host with an array: with a state, it would be kept until that is gone."""
    array = mesh.put(np.arange(8.0))
    (part,) = mesh.parts_of(array).values()
    assert part is not array.addressable_data(0)
    assert part is not array.addressable_shards[0].data
    assert part.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()


def test_parts_of_other_devices_are_refused():
    with mesh.use_mesh(2):
        array = mesh.shard_chunks(np.arange(8.0))
        parts = mesh.parts_of(array)
        assert sorted(parts) == ["0", "4"]
        del parts["4"]
        with pytest.raises(UserError, match=r"is of other devices than those of this process.* resume=False"):
            mesh.from_parts(parts, array)


def test_a_state_of_which_an_array_was_not_stored_is_refused():
    with mesh.use_mesh(1):
        stage = last_stage(FULL.replace(moment_dtype="bfloat16"))
    parts = stage.parts()
    parts["state"].popitem()
    with pytest.raises(UserError, match=r"or of another version of SPAP-JAX: .* resume=False"):
        stage.with_parts(parts, stage.checks)
