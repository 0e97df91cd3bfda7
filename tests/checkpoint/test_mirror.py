"""An unfinished run whose output is at an address resumes after the loss of the local disk."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import stores

from spap_jax import memory
from spap_jax.checkpoint.unfinished import Unfinished, is_unfinished, resume_folder
from spap_jax.errors import UserError
from spap_jax.models.decoder import Params

OUTPUT, PLACE = "frail://bucket/runs/out", "/bucket/runs/.out.resume"
RUN, BLOCKS = {"sparsity": 0.3, "model": "0" * 64}, 3


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[stores.Frail]:
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    return stores.begin()


@pytest.fixture
def lose_disk(tmp_path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(tmp_path / "cache")


def layer(step: int) -> Params:
    return {"mlp": {"up": np.random.default_rng(step).normal(size=(7, 5)).astype(np.float32)}}


def make(steps: int) -> None:
    with Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        for step in range(len(kept.told), steps):
            kept.add(functools.partial(layer, step), {"step": step})
            assert kept.count() == step + 1


def look() -> tuple[int, bool]:
    """Returns the number of valid steps, checking what is stored, and whether some were lost."""
    with Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        count = len(kept.told)
        assert kept.told == [{"step": step} for step in range(count)]
        assert kept.count() == count
        for step in {*range(min(count, BLOCKS)), *range(count)[-1:]}:
            assert np.array_equal(kept.read(step)["mlp"]["up"], layer(step)["mlp"]["up"])
        return count, kept.lost


@pytest.mark.parametrize("steps", [1, 5])
def test_all_blocks_and_the_newest_state_come_back(steps: int, store, lose_disk: Callable[[], None]):
    assert not is_unfinished(OUTPUT)
    make(steps)
    lose_disk()
    assert is_unfinished(OUTPUT)
    files = [f"{step}.safetensors" for step in {*range(min(steps, BLOCKS)), steps - 1}]
    assert sorted(stores.contents(PLACE)) == sorted([*files, "run.json"])
    assert json.loads(stores.contents(PLACE)["run.json"]) == RUN
    assert look() == (steps, False)
    lose_disk()
    make(steps + 2)
    lose_disk()
    assert look() == (steps + 2, False)


def test_the_store_counts_and_not_this_machine(store, tmp_path: Path, lose_disk: Callable[[], None]):
    make(1)
    shutil.copytree(tmp_path / "cache", tmp_path / "old")
    make(4)
    lose_disk()
    shutil.copytree(tmp_path / "old", tmp_path / "cache")
    assert look() == (4, False)


def test_a_step_takes_the_place_of_another_only_when_it_has_arrived(store, lose_disk: Callable[[], None]):
    make(4)
    store.broken = f"put {PLACE}/4.safetensors"
    with pytest.raises(UserError, match="on fire"), Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        kept.add(functools.partial(layer, 4), {"step": 4})
    assert not resume_folder(OUTPUT).exists()
    store.broken = ""
    assert look() == (4, False)
    make(5)
    assert store.done.index(("put", f"{PLACE}/4.safetensors")) < store.done.index(("rm", f"{PLACE}/3.safetensors"))


def test_a_full_disk_leaves_the_copy_of_the_state_before_until_the_new_one_has_arrived(
    store, lose_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    make(4)
    steps = resume_folder(OUTPUT) / "steps"
    sizes = {path: path.stat().st_size for path in steps.iterdir()}  # of three blocks and a state
    free = 2 * sum(sizes.values()) - 2 * sizes[steps / "3.safetensors"]  # the result, but not another state beside it
    monkeypatch.setattr(memory, "free_disk", lambda _: free)
    store.broken = f"put {PLACE}/4.safetensors"
    with pytest.raises(UserError, match="on fire"), Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        kept.add(functools.partial(layer, 4), {"step": 4})
    store.broken = ""
    lose_disk()
    assert look() == (4, False)


def test_an_error_at_the_last_step_is_not_overlooked(store):
    make(1)
    store.broken = f"put {PLACE}/1.safetensors"
    with pytest.raises(UserError, match="on fire"), Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        kept.add(functools.partial(layer, 1), {"step": 1})


def test_a_damaged_copy_counts_as_lost(store, lose_disk: Callable[[], None]):
    make(3)
    lose_disk()
    content = stores.contents(PLACE)["2.safetensors"]
    store().pipe_file(f"{PLACE}/2.safetensors", content[: len(content) // 2])
    assert look()[0] == 2
    assert sorted(stores.contents(PLACE)) == ["0.safetensors", "1.safetensors", "run.json"]
    make(3)
    assert look() == (3, False)


def test_another_run_is_refused_and_can_be_discarded(store, lose_disk: Callable[[], None]):
    make(2)
    lose_disk()
    other = RUN | {"sparsity": 0.4}
    with pytest.raises(
        UserError, match=r"^frail://bucket/runs/\.out\.resume holds a run .* sparsity \(0\.3, now 0\.4\)"
    ):
        Unfinished(OUTPUT, other, BLOCKS)
    assert sorted(stores.contents(PLACE)) == ["0.safetensors", "1.safetensors", "run.json"]
    with Unfinished(OUTPUT, other, BLOCKS, fresh=True) as kept:
        assert kept.told == []
    assert sorted(stores.contents(PLACE)) == ["run.json"]


def test_what_is_left(store):
    with pytest.raises(UserError, match="no data"), Unfinished(OUTPUT, RUN, BLOCKS):
        raise UserError("no data")
    assert stores.contents("/bucket") == {}
    make(2)
    with Unfinished(OUTPUT, RUN, BLOCKS) as kept:
        kept.drop_steps()
        assert kept.count() == 0
    assert sorted(stores.contents(PLACE)) == ["run.json"]
    assert is_unfinished(OUTPUT)
    kept.remove()
    assert stores.contents("/bucket") == {}
    assert not resume_folder(OUTPUT).exists()


def test_a_local_run_has_no_copy(store, tmp_path: Path):
    with Unfinished(str(tmp_path / "out"), RUN, BLOCKS) as kept:
        assert kept.place == str(resume_folder(str(tmp_path / "out")))
