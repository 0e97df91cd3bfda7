"""The state that a run keeps for resuming is complete or counts as lost, and belongs to that run alone."""

import contextlib
import errno
import functools
import json
import resource
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from tiny_checkpoints import write

from spap_jax import memory
from spap_jax.backend import traced_for
from spap_jax.checkpoint import load, lock, save_orbax, step_file
from spap_jax.checkpoint import unfinished as checkpoint_unfinished
from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.step_file import read_step, told_if_intact, write_step
from spap_jax.checkpoint.unfinished import Unfinished, resume_folder
from spap_jax.cli.resume_messages import telling
from spap_jax.errors import NotFiniteError, SpapWarning, UserError
from spap_jax.models.decoder import Params
from spap_jax.parallel import processes

RUN, BLOCKS = {"sparsity": 0.3, "model": "0" * 64}, 3


def layer(step: int) -> Params:
    weights = np.random.default_rng(step).normal(size=(7, 5))
    return {"mlp": {"up": weights.astype(np.float32), "bias": weights[0].astype(ml_dtypes.bfloat16)}}


def told(step: int) -> dict:
    return {"step": step, "error": float("nan") if step == 1 else 0.1 * step}


def same(one: Params, other: Params) -> bool:
    pairs = [(one["mlp"][name], other["mlp"][name]) for name in ("up", "bias")]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def made(output: Path, steps: int) -> Path:
    """Makes the given number of steps in a run and returns the run's folder."""
    with Unfinished(output, RUN, BLOCKS) as unfinished:
        for step in range(len(unfinished.told), steps):
            unfinished.add(functools.partial(layer, step), told(step))
    return unfinished.folder


def looked_at(output: Path) -> tuple[int, bool]:
    """Returns the number of valid steps, checking what is stored, and whether some were lost."""
    with Unfinished(output, RUN, BLOCKS) as unfinished:
        count = len(unfinished.told)
        assert json.dumps(unfinished.told) == json.dumps([told(step) for step in range(count)])
        for step in {*range(min(count, BLOCKS)), *range(count)[-1:]}:
            assert same(unfinished.read(step), layer(step))
        return count, unfinished.lost


def test_a_step_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Check that no more of a file is mapped into memory than the array that is read."""
    count, size = 6, 2**24
    write_step(tmp_path / "step", {str(number): np.ones(size // 4, np.float32) for number in range(count)}, [])
    mapped: list[int] = []
    monkeypatch.setattr(step_file, "safe_open", watching(mapped))
    assert told_if_intact(tmp_path / "step") == []
    assert len(read_step(tmp_path / "step")) == count
    assert len(mapped) == 2 * count
    assert max(mapped) - min(mapped) < size


def watching(mapped: list[int]):
    """Returns ``safe_open`` that notes the bytes of files that are in memory after each array."""

    @contextlib.contextmanager
    def opened(*where, **how):
        with safe_open(*where, **how) as file:
            yield SimpleNamespace(
                keys=file.keys,
                metadata=file.metadata,
                get_tensor=lambda name: (file.get_tensor(name), mapped.append(mapped_bytes()))[0],
            )

    return opened


def mapped_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("RssFile")]
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_all_blocks_and_the_newest_state_come_back(steps: int, tmp_path: Path):
    folder = made(tmp_path / "out", steps)
    assert looked_at(tmp_path / "out") == (steps, False)
    assert len([*(folder / "steps").iterdir()]) == min(steps, BLOCKS + 1)
    made(tmp_path / "out", steps + 2)
    assert looked_at(tmp_path / "out") == (steps + 2, False)


def test_a_state_is_on_disk_before_the_next_steps_change_its_arrays(tmp_path: Path):
    """A CPU's arrays are on the host, and the steps are given the very ones that are written."""
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        for step in range(BLOCKS + 1):
            unfinished.add(functools.partial(layer, step), told(step))
        assert (unfinished.folder / "steps" / f"{BLOCKS}.safetensors").exists()


def test_steps_do_not_wait_for_a_state_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_unfinished, "platform", lambda: "gpu")
    go_on, real = threading.Event(), write_step

    def slowly(path: Path, *what):
        assert go_on.wait(60) or path.stem != str(BLOCKS)
        real(path, *what)

    made(tmp_path / "out", BLOCKS)
    monkeypatch.setattr(checkpoint_unfinished, "write_step", slowly)
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        for step in range(BLOCKS, BLOCKS + 3):
            unfinished.add(functools.partial(layer, step), told(step))
        go_on.set()
        assert unfinished.count() == BLOCKS + 1
        unfinished.add(functools.partial(layer, BLOCKS + 3), told(BLOCKS + 3))
    assert states_in(unfinished.folder) == [BLOCKS + 3]
    assert looked_at(tmp_path / "out") == (BLOCKS + 4, False)


def test_after_a_failed_write_no_process_gives_up_the_state_that_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others learn that this one cannot take another state before they write theirs."""
    monkeypatch.setattr(checkpoint_unfinished, "platform", lambda: "gpu")
    made(tmp_path / "out", BLOCKS + 1)
    said: list[list[int]] = []
    monkeypatch.setattr(processes, "known_to_all", lambda mine: said.append([*mine]) or set(said[-1]))
    unfinished = Unfinished(tmp_path / "out", RUN, BLOCKS)
    monkeypatch.setattr(checkpoint_unfinished, "write_step", lambda *_: (_ for _ in ()).throw(OSError("on fire")))
    unfinished.add(functools.partial(layer, BLOCKS + 1), told(BLOCKS + 1))
    with contextlib.suppress(OSError):
        unfinished._behind.wait()
    said.clear()
    with pytest.raises(OSError, match="on fire"), unfinished:
        unfinished.add(functools.partial(layer, BLOCKS + 2), told(BLOCKS + 2))
    assert said == [[]]
    assert states_in(unfinished.folder) == [BLOCKS]


def test_processes_that_would_make_different_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "told_to_all", lambda _: RUN | {"model": "1" * 64})  # the first one's
    monkeypatch.setattr(processes, "known_to_all", set)
    with pytest.raises(UserError, match=r"differ in what they read, .* from the first: here model differs; give all"):
        Unfinished(tmp_path / "out", RUN, BLOCKS)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(processes, "told_to_all", lambda mine: mine)
    monkeypatch.setattr(processes, "known_to_all", lambda _: set())  # another one differs
    with pytest.raises(UserError, match="or in their settings, from the first; give all of them the same command"):
        Unfinished(tmp_path / "out", RUN, BLOCKS)


def test_what_the_first_process_lost_the_others_do_not_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "out", 2)
    monkeypatch.setattr(processes, "told_to_all", lambda mine: False if mine is True else mine)
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        assert (unfinished.found, unfinished.told) == (False, [])


def states_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "steps").iterdir() if int(path.stem) >= BLOCKS)


def test_a_state_leaves_room_for_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where there is room for one state, the one before goes first; where there is none, that one stays."""
    size = sum(array.nbytes for array in layer(0)["mlp"].values())
    folder = made(tmp_path / "out", BLOCKS)
    steps = folder / "steps"
    blocks = sum(path.stat().st_size for path in steps.iterdir())
    disk, free = shutil.disk_usage, [2 * blocks + size]
    monkeypatch.setattr(
        checkpoint_unfinished.shutil,
        "disk_usage",
        lambda path: disk(path)._replace(
            free=free[0] - sum((steps / f"{n}.safetensors").stat().st_size for n in states_in(folder))
        ),
    )
    made(tmp_path / "out", BLOCKS + 2)
    assert states_in(folder) == [BLOCKS + 1]
    free[0] -= 1
    with pytest.warns(SpapWarning, match="has no room for it beside the result"):
        made(tmp_path / "out", BLOCKS + 4)
    assert states_in(folder) == [BLOCKS + 1]
    assert looked_at(tmp_path / "out") == (BLOCKS + 2, False)


@pytest.mark.parametrize("room", [0, -1])
def test_a_state_leaves_room_for_a_result_that_is_not_made_of_blocks(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state, result = layer(0), 10**6
    size = sum(array.nbytes for array in state["mlp"].values())
    monkeypatch.setattr(memory, "free_disk", lambda _: result + size + room)
    told_of = nullcontext() if room == 0 else pytest.warns(SpapWarning, match="has no room for it beside the result")
    with told_of, Unfinished(tmp_path / "out", RUN, 0, result=result) as unfinished:
        stored(unfinished, state, told(0))
    assert (unfinished.folder / "steps" / "0.safetensors").exists() == (room == 0)


def stored(unfinished: Unfinished, state: Params, told: dict) -> None:
    """Add a step, and wait until it is stored, or is not."""
    unfinished.add(lambda: state, told)
    unfinished.count()


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_state_before(tmp_path: Path):
    """Where nothing more can be written, the result could not be either."""
    folder = made(tmp_path / "out", BLOCKS + 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="steps filled up"), Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
            unfinished.add(functools.partial(layer, BLOCKS + 1), {"long": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert states_in(folder) == [BLOCKS]


def test_a_host_without_memory_for_a_state_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best weights are on the host, and once more if better ones come before the state is written."""
    state = {"state": jax.tree.map(jnp.asarray, layer(BLOCKS)), "best": layer(BLOCKS)}
    size = sum(array.nbytes for array in jax.tree.leaves(state))
    for left, sharers, kept in ((size, 1, [BLOCKS]), (size - 1, 1, []), (2 * size - 1, 2, [])):
        monkeypatch.setattr(memory, "left", lambda left=left: left)
        monkeypatch.setattr(processes, "on_this_host", lambda sharers=sharers: sharers)
        folder = made(tmp_path / f"out{left}", BLOCKS)
        with Unfinished(tmp_path / f"out{left}", RUN, BLOCKS) as unfinished, traced_for("gpu"):
            with nullcontext() if kept else pytest.warns(SpapWarning, match="as this host has no memory for it"):
                stored(unfinished, state, told(BLOCKS))
            stored(unfinished, state, told(BLOCKS + 1))  # which has no more room
        assert states_in(folder) == [step + 1 for step in kept]


def test_nothing_is_left_of_a_run_without_steps_or_one_that_ended(tmp_path: Path):
    with pytest.raises(UserError, match="no data"), Unfinished(tmp_path / "out", RUN, BLOCKS):
        raise UserError("no data")
    assert not [*tmp_path.iterdir()]
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        unfinished.add(functools.partial(layer, 0), told(0))
    unfinished.remove()
    assert not [*tmp_path.iterdir()]


def test_nothing_is_left_of_a_run_that_went_on_to_what_cannot_be_gone_on_from(tmp_path: Path):
    made(tmp_path / "out", 2)
    with pytest.raises(NotFiniteError), Unfinished(tmp_path / "out", RUN, BLOCKS) as kept, telling(kept, [], str):
        raise NotFiniteError("give a larger --ridge")
    assert not [*tmp_path.iterdir()]


def test_what_an_earlier_process_left_stays_after_an_error_before_the_next_step(tmp_path: Path):
    """Also when it left no step: the decision that it made, or the mark that one of several outputs is made."""
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        unfinished.decide([1, 2])
    with pytest.raises(UserError, match="no data"), Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        raise UserError("no data")
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        assert (unfinished.found, unfinished.decided) == (True, [1, 2])


def test_a_step_that_cannot_be_read_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "out", 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as crowded:
        crowded.setattr(step_file, "safe_open", full)
        with pytest.raises(OSError, match="Too many open files"):
            made(tmp_path / "out", 2)
    assert looked_at(tmp_path / "out") == (2, False)


def test_the_name_of_a_run_stays_until_the_command_ends(tmp_path: Path):
    """With several outputs, one is in its place while the others are made, and the command may be interrupted often."""
    made(tmp_path / "out", 2)
    for _ in range(2):
        with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
            assert unfinished.found
            unfinished.drop_steps()
            assert unfinished.count() == 0
    assert (resume_folder(tmp_path / "out") / "run.json").exists()


def test_any_damage_is_noticed(tmp_path: Path):
    """The file of a step is truncated anywhere, removed, or has one bit of a weight or of its hash flipped."""
    folder = made(tmp_path / "out", 3)
    content = (folder / "steps" / "1.safetensors").read_bytes()
    weights = content.index(layer(1)["mlp"]["up"].tobytes())
    cut = [content[:end] for end in (0, 4, 9, len(content) // 2, len(content) - 1)]
    places = (content.index(b'"sha256":"') + 12, weights, len(content) - 1)
    flipped = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    for number, damaged in enumerate([None, *cut, *flipped]):
        output = tmp_path / str(number)
        shutil.copytree(folder, resume_folder(output))
        step = resume_folder(output) / "steps" / "1.safetensors"
        if damaged is None:
            step.unlink()
        else:
            step.write_bytes(damaged)
        assert looked_at(output) == (1, True)
        made(output, 3)
        assert looked_at(output) == (3, False)


def test_a_torn_step_is_as_none(tmp_path: Path):
    """A process that was killed while it wrote a step leaves a part of the file under another name."""
    steps = made(tmp_path / "out", 5) / "steps"
    (steps / "5.safetensors.new").write_bytes((steps / "4.safetensors").read_bytes()[:100])
    assert looked_at(tmp_path / "out") == (5, False)
    assert sorted(path.stem for path in steps.iterdir()) == ["0", "1", "2", "4"]


def test_a_state_that_is_lost_leaves_the_blocks(tmp_path: Path):
    folder = made(tmp_path / "out", 6)
    (folder / "steps" / "5.safetensors").write_bytes(b"")
    assert looked_at(tmp_path / "out") == (3, True)


def test_a_state_that_was_not_yet_removed_is_used_where_its_follower_is_lost(tmp_path: Path):
    other, folder = made(tmp_path / "other", 5), made(tmp_path / "out", 6)
    (folder / "steps" / "5.safetensors").write_bytes(b"")
    shutil.copy(other / "steps" / "4.safetensors", folder / "steps")
    assert looked_at(tmp_path / "out") == (5, True)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_run_without_its_name_counts_as_lost(content: str, tmp_path: Path):
    folder = made(tmp_path / "out", 2)
    (folder / "run.json").write_text(content)
    assert looked_at(tmp_path / "out") == (0, True)


def test_another_run_is_refused_and_may_be_discarded(tmp_path: Path):
    folder = made(tmp_path / "out", 2)
    other = {"sparsity": 0.4, "model": "1" * 64, "seed": 0}
    with pytest.raises(UserError) as refused:
        Unfinished(tmp_path / "out", other, BLOCKS)
    assert str(refused.value) == (
        f"{folder} holds a run that was interrupted and differs from this one in sparsity (0.3, now 0.4), model, "
        "seed (None, now 0): repeat the command as it was, or pass resume=False to discard that run and start over."
    )
    assert looked_at(tmp_path / "out") == (2, False)
    with Unfinished(tmp_path / "out", other, BLOCKS, fresh=True) as unfinished:
        assert (unfinished.found, unfinished.told) == (False, [])
    assert json.loads((folder / "run.json").read_text()) == other


def test_one_process_at_a_time(tmp_path: Path):
    with Unfinished(tmp_path / "out", RUN, BLOCKS), pytest.raises(UserError, match="another process writes into"):
        Unfinished(tmp_path / "out", RUN, BLOCKS)


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when the process that had the lock removes the file after another opened it, and a third makes a new one."""
    real = lock.fcntl.flock

    def late(handle: int, how: int) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", real)
        (tmp_path / "lock").unlink()
        real(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.locked(tmp_path / "lock", "is here"), pytest.raises(UserError, match="another process is here"):
        lock.take_lock(tmp_path / "lock", "is here")
    assert not [*tmp_path.iterdir()]


def test_what_another_run_has_begun_meanwhile_stays(tmp_path: Path):
    """As in the place of the first of several outputs, while the command makes the others."""
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as first:
        first.drop_steps()
    with Unfinished(tmp_path / "out", {"sparsity": 0.4}, BLOCKS, fresh=True) as other:
        first.remove()
        other.add(functools.partial(layer, 0), told(0))
        first.remove()
    first.remove()
    assert (other.folder / "steps" / "0.safetensors").exists()
    assert json.loads((other.folder / "run.json").read_text()) == {"sparsity": 0.4}


def test_what_others_put_there_stays(tmp_path: Path):
    folder = made(tmp_path / "out", 2)
    (folder / "letter.txt").write_text("dear")
    with Unfinished(tmp_path / "out", RUN, BLOCKS) as unfinished:
        pass
    unfinished.remove()
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_a_fingerprint_is_of_the_content(tmp_path: Path):
    folder = write("llama", tmp_path / "in", shard="40KB")
    first = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == first
    for path in (folder / "config.json", *folder.glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint(folder) != first
        path.write_bytes(content)
    assert fingerprint(folder) == first


def test_a_fingerprint_of_an_orbax_folder(tmp_path: Path):
    save_orbax(load(write("llama", tmp_path / "in")), tmp_path / "orbax")
    first = fingerprint(tmp_path / "orbax")
    copy = shutil.copytree(tmp_path / "orbax", tmp_path / "copy")
    assert fingerprint(copy) == first
    largest = max((copy / "params").rglob("*"), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(copy) != first


def test_a_long_file_is_looked_at_from_end_to_end(tmp_path: Path):
    folder = write("llama", tmp_path / "in")
    long = folder / "model.safetensors"
    with long.open("r+b") as file:
        file.truncate(1 << 30)  # sparse, so it takes no space
    first = fingerprint(folder)
    for place in (0, (1 << 30) - 1):
        with long.open("r+b") as file:
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1]))
        assert fingerprint(folder) != first
        with long.open("r+b") as file:
            file.seek(place)
            file.write(before)
    assert fingerprint(folder) == first
