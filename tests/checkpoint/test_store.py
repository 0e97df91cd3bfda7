"""The store of an unfinished run: its output, what another process finds, and that nothing of a user's is lost."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stores
from tiny_checkpoints import raw_tensors, write

from spap_jax.checkpoint import Reader, load, on_host, states, weight_files
from spap_jax.checkpoint.output import resume_folder
from spap_jax.checkpoint.store import FolderStore
from spap_jax.errors import NotFiniteError, UserError
from spap_jax.models import Params, decoder

RUN = {"seed": 1, "model": "a" * 64}


class Killed(BaseException):
    """Stands for kill -9: nothing is tidied up."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(write("llama", tmp_path_factory.mktemp("dense") / "model"))


def opened(dense: Reader, output: Any, identity: Any = RUN, **options: Any) -> FolderStore:
    return FolderStore(output, identity, dense.config, dense.source, dense.dtypes, **options)


def layer_of(dense: Reader, index: int) -> Params:
    return on_host(dense.config, dense.layer(index))


def put_all(dense: Reader, kept: FolderStore) -> None:
    """Puts what was not put before."""
    kept.outer(dense.outer())
    for index in range(dense.config.layers):
        if kept.block(index) is None:
            kept.put(index, layer_of(dense, index), {"layer": index})


def make_in(dense: Reader, kept: FolderStore) -> None:
    """Does what a command does in its store."""
    if not kept.finished:
        put_all(dense, kept)
        kept.finish({"README.md": "card"})
    kept.remove()


def make(dense: Reader, output: Any, identity: Any = RUN, **options: Any) -> None:
    with opened(dense, output, identity, **options) as kept:
        make_in(dense, kept)


def source_of(dense: Reader) -> Path:
    assert dense.source.folder
    return dense.source.folder


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("at", ["disk", "address"])
def test_the_output_has_the_bits_of_the_source(
    dense: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool, at: str
) -> None:
    frail = stores.begin()
    if not joined:
        monkeypatch.setattr(weight_files, "JOINED_BYTES", 0)
    make(dense, tmp_path / "out" if at == "disk" else "frail://bucket/out")
    if at == "address":
        assert {name.split("/")[2] for name in frail.store} == {"out"}
        (tmp_path / "out").mkdir()
        for name, content in stores.contents("/bucket/out").items():
            (tmp_path / "out" / name).write_bytes(content)
    assert raw_tensors(tmp_path / "out") == raw_tensors(source_of(dense))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if joined else dense.config.layers + 1)
    load(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    listed = json.loads((tmp_path / "out" / "spap_files.json").read_bytes())
    assert {"tokenizer.json", "config.json", "README.md"} < listed.keys()


@pytest.mark.parametrize("output", ["out", "frail://bucket/out"])
def test_a_later_process_finds_the_blocks(
    dense: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    stores.begin()
    monkeypatch.chdir(tmp_path)
    kept = opened(dense, output)
    kept.decide([1, 2])
    kept.put(0, layer_of(dense, 0), {"error": 0.5})
    kept.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with opened(dense, output) as kept:
        assert kept.found
        assert kept.decided == [1, 2]
        found = kept.block(0)
        assert found is not None
        assert found.report == {"error": 0.5}
        jax.tree.map(np.testing.assert_array_equal, found.params, layer_of(dense, 0))
        assert kept.block(1) is None
        assert kept.kept() == (1, 0)


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b"", None])
def test_after_a_damaged_block_all_are_absent(
    dense: Reader, tmp_path: Path, harm: Callable[[bytes], bytes] | None
) -> None:
    with opened(dense, tmp_path / "out") as kept:
        put_all(dense, kept)
    file = tmp_path / ".out.resume" / "block-00000.safetensors"
    file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
    with opened(dense, tmp_path / "out") as kept:
        assert kept.block(0) is None
        assert kept.kept()[0] == 0
        kept.put(0, layer_of(dense, 0), {})
        assert kept.block(1) is None


def test_another_run_is_refused_until_it_is_discarded(dense: Reader, tmp_path: Path) -> None:
    with opened(dense, tmp_path / "out") as kept:
        put_all(dense, kept)
    with pytest.raises(UserError, match=r"seed \(1, now 2\)"):
        opened(dense, tmp_path / "out", RUN | {"seed": 2})
    with opened(dense, tmp_path / "out", RUN | {"seed": 2}, fresh=True) as kept:
        assert not kept.found
        assert kept.block(0) is None
        put_all(dense, kept)
    (tmp_path / ".out.resume" / "run.json").write_text("{")  # a damaged identity counts as none
    with opened(dense, tmp_path / "out") as kept:
        assert not kept.found


def test_only_one_process_writes(dense: Reader, tmp_path: Path) -> None:
    with opened(dense, tmp_path / "out"):
        with pytest.raises(UserError, match="another process"):
            opened(dense, tmp_path / "out")
        opened(dense, tmp_path / "other").remove()


def test_an_error_before_the_first_block_leaves_nothing(dense: Reader, tmp_path: Path) -> None:
    kept = opened(dense, tmp_path / "out")
    kept.outer(dense.outer())
    kept.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not list(tmp_path.iterdir())


def test_what_would_overflow_again_is_not_kept(dense: Reader, tmp_path: Path) -> None:
    kept = opened(dense, tmp_path / "out")
    kept.put(0, layer_of(dense, 0), {})
    kept.put(1, jax.tree.map(lambda a: a * np.nan, layer_of(dense, 1)), {})
    with pytest.raises(NotFiniteError):
        kept.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_block_is_written_in_the_dtype_of_the_output(dense: Reader, tmp_path: Path) -> None:
    layer = jax.tree.map(jnp.asarray, layer_of(dense, 0))
    with opened(dense, tmp_path / "out", dtype="bfloat16") as kept:
        kept.put(0, layer, {})
    with opened(dense, tmp_path / "out", dtype="bfloat16") as kept:
        found = kept.block(0)
    assert found is not None
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found.params, layer)


def test_widths_may_be_decided_after_the_store_is_opened(dense: Reader, tmp_path: Path) -> None:
    widths = [dense.config.intermediate // (index + 1) for index in range(dense.config.layers)]

    def cut(index: int) -> Params:
        layer = layer_of(dense, index)
        mlp = decoder.with_channels(decoder.with_channels(layer["mlp"], widths[index]), widths[0])
        return layer | {"mlp": mlp}

    with opened(dense, tmp_path / "out") as kept:
        kept.config = dense.config.with_widths(widths)
        for index in range(dense.config.layers):
            kept.put(index, cut(index), {})
            jax.tree.map(np.testing.assert_array_equal, kept.layer(index), cut(index))
        kept.put(1, layer_of(dense, 1), {})
        with pytest.raises(ValueError, match="does not fit"):
            kept.layer(1)


# Steps


def test_a_state_is_saved_by_time_and_never_before_the_first_step(
    dense: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": jnp.arange(7.0), "b": (jnp.int32(3), jnp.ones((2, 3), jnp.bfloat16))}
    with opened(dense, tmp_path / "out") as kept:
        put_all(dense, kept)
        kept.save_state(state, [{"loss": 1.0}])
        kept.save_state(state, [{"loss": 1.0}] * 2)  # too soon
        assert kept.kept()[1] == 0
        monkeypatch.setattr(states, "SECONDS", 0)
        for count in (3, 4):
            kept.save_state(jax.tree.map(lambda a, n=count: a * n, state), [{"loss": float("nan")}] * count)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with opened(dense, tmp_path / "out") as kept:
        assert kept.kept()[1] == 4
        found = kept.restore_state(like)
        assert found is not None
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * 4), found[0], state)
        assert len(found[1]) == 4
    for file in (tmp_path / ".out.resume" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(b"?")
    with opened(dense, tmp_path / "out") as kept:
        assert kept.restore_state(like) is None
        assert kept.block(0) is not None


def test_changed_blocks_are_those_of_the_output_alone(dense: Reader, tmp_path: Path) -> None:
    changed = jax.tree.map(lambda a: a + 1, layer_of(dense, 1))
    with opened(dense, tmp_path / "out") as kept:
        put_all(dense, kept)
        kept.replace(1, changed)
        jax.tree.map(np.testing.assert_array_equal, kept.layer(1), changed)
    with opened(dense, tmp_path / "out") as kept:
        found = kept.block(1)
        assert found is not None
        jax.tree.map(np.testing.assert_array_equal, found.params, layer_of(dense, 1))
        put_all(dense, kept)
        kept.replace(1, changed)
        kept.finish({})
    jax.tree.map(np.testing.assert_array_equal, layer_of(Reader(tmp_path / "out"), 1), changed)


# Ends of a process


@pytest.mark.parametrize(
    ("variant", "joined", "overwrite"), [("llama", True, True), ("llama", False, False), ("qwen3_vl", False, False)]
)
def test_a_process_that_is_killed_anywhere(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool, overwrite: bool
) -> None:
    dense = Reader(write(variant, tmp_path / "in"))
    if not joined:
        monkeypatch.setattr(weight_files, "JOINED_BYTES", 0)
    count, last = itertools.count(), 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(count) == last:
                raise Killed
            return function(*arguments, **options)

        return counted

    for owner, name in ((Path, "rename"), (Path, "write_bytes"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    for last in itertools.count():
        case = tmp_path / str(last)
        out = case / "out"
        case.mkdir()
        if overwrite:
            count = itertools.count(10**9)
            make(dense, out, RUN | {"seed": 2})
        count = itertools.count()
        kept = None
        try:
            kept = opened(dense, out, overwrite=overwrite)
            make_in(dense, kept)
        except Killed:
            pass
        else:
            assert last > 10
            return
        finally:
            if kept:
                kept._release()
        count = itertools.count(10**9)
        if overwrite and not (out / "config.json").exists():
            assert (case / ".out.resume" / "replaced" / "config.json").exists()
        make(dense, out, overwrite=overwrite)
        assert raw_tensors(out) == raw_tensors(source_of(dense))
        assert {path.name for path in case.iterdir()} == {"out"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_process_that_is_killed_anywhere_at_an_address(dense: Reader, overwrite: bool) -> None:
    whole = None
    for last in itertools.count():
        frail = stores.begin()
        if overwrite:
            make(dense, "frail://bucket/out", RUN | {"seed": 2})
        begun = len(frail.done)
        frail.killing = begun + last
        try:
            make_in(dense, opened(dense, "frail://bucket/out", overwrite=overwrite))  # and not left, as by a kill
        except UserError:
            frail.killing = -1
            make(dense, "frail://bucket/out", overwrite=overwrite)
            whole = whole or stores.contents("/bucket/out")
            assert stores.contents("/bucket/out") == whole
            assert {name.split("/")[2] for name in frail.store} == {"out"}
        else:
            assert last > 10
            return


def test_what_was_made_is_made_until_the_command_has_ended(dense: Reader, tmp_path: Path) -> None:
    with opened(dense, tmp_path / "out") as kept:
        put_all(dense, kept)
        kept.finish({})
    with opened(dense, tmp_path / "out") as kept:
        assert kept.finished
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with opened(dense, tmp_path / "out") as kept:
        assert not kept.finished
        assert not kept.found
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        opened(dense, tmp_path / "out")


# What is not lost


@pytest.mark.parametrize("joined", [True, False])
def test_what_appears_meanwhile_stays(
    dense: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    if not joined:
        monkeypatch.setattr(weight_files, "JOINED_BYTES", 0)
    kept = opened(dense, tmp_path / "out")
    put_all(dense, kept)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists") as raised:
        kept.finish({})
    kept.__exit__(UserError, raised.value, None)
    assert (tmp_path / "out" / "thesis.tex").exists()
    (tmp_path / "out").rename(tmp_path / "mine")
    with opened(dense, tmp_path / "out") as kept:
        assert kept.finished
    assert raw_tensors(tmp_path / "out") == raw_tensors(source_of(dense))


def test_files_of_others_beside_the_output(dense: Reader, tmp_path: Path) -> None:
    (tmp_path / ".out.resume").mkdir()
    (tmp_path / ".out.resume" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        opened(dense, tmp_path / "out")
    assert resume_folder(tmp_path / "out").entries() == {"thesis.tex"}
