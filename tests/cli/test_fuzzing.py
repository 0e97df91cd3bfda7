"""For any arguments and any file contents, a command succeeds or fails with one sentence, and changes no other file.

The cases are generated from the options of the program, so that new options are covered; they are the same in every
run. There are thirty; ``make test-all`` sets ``SPAP_FUZZ=18``, which tries eighteen times as many.
"""

import contextlib
import functools
import io
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from commands import STORIES, tiny, token_file
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save

from spap_jax.cli import main
from spap_jax.cli.app import app

TIMES = float(os.environ.get("SPAP_FUZZ", "1"))

WORDS = [
    *("", " ", "-", "--", ".", "/", "~", "é\udcff", "a\nb", "\x1b[31m", "[b]x[/b]", "{x}", "%s", "abc", "x" * 300),
    *("0", "1", "-1", "2", "3", "64", "2147483647", "2147483648", str(2**63), "9" * 5000, "8.5", "0.5", "0.999"),
    *("-0.0", "1e3", "1e-300", "1e400", "nan", "inf", "true", "None", "0.3,0.5", "0.3,0.3", "0.3,", ",", "v5e-7"),
    *("no", "no/no", "no.npy", "model", "model/config.json", "model.txt/no", "ids.npy", "notes.txt", "empty"),
    *("h100x3", "/dev/null"),
    *("/proc/no", "owner/name", "owner/name:x", "hf://owner/name", "hf://a b", "gs://", "gs://x/y", "no://x", "c4:"),
    *("c4:no.json", "wikitext2:../notes.txt", "localhost:1"),
]
"""Values for every option: numbers, paths, names and addresses, and strings that are none of these."""

BASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "plan": (("../model",), {"--mesh": "v5e-8"}),
    # Data that hold no tokens and no prompts end these commands after all cheap checks, once the model is read.
    "prune": (("../model",), {"--data": "../floats.npy", "--output": "out"}),
    "write": (("../model",), {"--prompts": "../rows.jsonl", "--output": "out.jsonl"}),
    "finetune": (("../model",), {"--data": "../floats.npy", "--output": "out"}),
    "eval": (("../model",), {"--data": "../ids.npy", "--sequences": "1", "--sequence-length": "8"}),
    "bench": (("../model", "no"), {}),
    "report": (("../model",), {}),
    "convert": (("../model",), {"--to": "huggingface", "--output": "out"}),
    "push": (("../model", "owner/name"), {}),
    "doctor": ((), {}),
}
"""Arguments that would be valid for each command with other data: positional ones, and options."""


class World(NamedTuple):
    """A folder in which the commands run, and which must stay unchanged outside of ``outputs``.

    Attributes:
        folder: Path of the folder.
        logged: Messages that other libraries log at level WARNING or above.
    """

    folder: Path
    logged: list[str]

    def contents(self) -> dict[Path, bytes | None]:
        """Returns the bytes of all files outside of ``outputs``, and None for folders."""
        files = [file for file in self.folder.rglob("*") if self.folder / "outputs" not in (file, *file.parents)]
        return {file: None if file.is_dir() else file.read_bytes() for file in files}

    def ends_well(self, *words: str) -> int:
        """Runs a command, checks that it exits with code 0 or 2 and well-formed messages, and returns the code."""
        note(f"spap {shlex.join(words)}")
        before = self.contents()
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        lines = err.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
        said = [line for line in lines if line.startswith("spap: ") and not line.startswith("spap: warning: ")]
        assert code in (0, 2), lines
        assert len(said) == (code == 2), lines
        assert not said or said == lines[-1:]
        assert not any("Traceback" in line or "Warning" in line for line in lines), lines
        assert not self.logged
        assert self.contents() == before
        return code

    def outputs(self) -> Path:
        """Empties the folder of outputs and returns it."""
        for left in (self.folder / "outputs").iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return self.folder / "outputs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    tiny(folder / "model")
    shutil.copytree(STORIES, folder / "stories")
    token_file(folder / "ids.npy")
    np.save(folder / "floats.npy", np.zeros((16, 64)))
    (folder / "rows.jsonl").write_text("{}")
    (folder / "notes.txt").write_text("dear diary")
    (folder / "outputs").mkdir()
    world, made, place = World(folder, []), logging.getLogRecordFactory(), Path.cwd()

    def record(*args: Any, **more: Any) -> logging.LogRecord:
        one = made(*args, **more)
        if one.levelno >= logging.WARNING:
            world.logged.append(f"{one.name}: {one.getMessage()}")
        return one

    logging.setLogRecordFactory(record)
    os.chdir(folder / "outputs")
    yield world
    os.chdir(place)
    logging.setLogRecordFactory(made)


def cases(count: int) -> Any:
    """Returns settings for the given number of cases, the same in every run."""
    return settings(
        max_examples=int(count * TIMES),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@functools.cache
def options(command: str) -> dict[str, list[str]]:
    """Returns the options of a command, with the choices that they define."""
    found = app[command].assemble_argument_collection()
    return {each.name: list(each.get_choices() or ()) for each in found if each.name.startswith("--")}


def test_every_command_is_tried():
    assert BASES.keys() == {name for name in app if not name.startswith("-")}
    assert all(options(command).keys() >= right.keys() for command, (_, right) in BASES.items())
    assert "spap" in options("prune")["--method"]


def texts() -> st.SearchStrategy[str]:
    return st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0/"), max_size=12)


@given(st.data())
@cases(8)
def test_words_and_options(world: World, data: st.DataObject):
    command = data.draw(st.sampled_from(list(BASES)))
    alone, right = BASES[command]
    alone = [data.draw(texts()) if data.draw(st.integers(0, 9)) == 0 else word for word in alone]
    known = options(command)
    names = data.draw(st.lists(st.sampled_from(sorted(known) or ["--no"]), max_size=2, unique=True))
    chosen = right | {name: data.draw(st.sampled_from(known.get(name) or WORDS) | texts()) for name in names}
    world.outputs()
    switches = data.draw(st.lists(st.sampled_from(["--overwrite", "--no-resume", "--no"]), max_size=1))
    world.ends_well(command, *alone, *(f"{name}={value}" for name, value in chosen.items()), *switches)


def values() -> st.SearchStrategy[Any]:
    """Generates JSON values, which also serve as TOML values."""
    plain = st.none() | st.booleans() | st.integers() | st.floats() | texts()
    large = st.sampled_from([0, -1, 1, 2, 7, 2**31, 10**12, 10**400, 1e308, -1e-5])
    return st.recursive(
        plain | large, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts(), v, max_size=3), max_leaves=4
    )


@given(st.data())
@cases(4)
def test_files_of_options(world: World, data: st.DataObject):
    command = data.draw(st.sampled_from(["plan", "prune", "finetune", "eval"]))
    alone, right = BASES[command]
    keys = st.sampled_from([name.removeprefix("--") for name in options(command)]) | texts()
    lines = [
        f"{json.dumps(key)} = {json.dumps(value)}"
        for key, value in data.draw(st.dictionaries(keys, values(), max_size=3)).items()
    ]
    file = world.outputs() / "options.toml"
    file.write_text("\n".join(lines), errors="surrogateescape")
    world.ends_well(command, *alone, *(f"{name}={value}" for name, value in right.items()), "--config", str(file))


ENDLESS = [b"[" * 100_000, b'{"text": ' * 100_000, b"9" * 5000, b'{"text": ' + b"9" * 5000 + b"}"]
"""JSON that is nested too deeply, and numbers with too many digits."""

CONFIG = json.loads((STORIES / "config.json").read_bytes())
FIELDS = [*CONFIG, "rope_scaling", "rope_theta", "quantization_config", "spap_intermediate_sizes", "sliding_window"]


@given(
    st.dictionaries(st.sampled_from(FIELDS) | texts(), values(), min_size=1, max_size=2),
    st.sampled_from(["plan", "eval"]),
)
@cases(6)
def test_fields_of_config_json(world: World, changes: dict[str, Any], command: str):
    folder = world.outputs() / "model"
    folder.mkdir()
    for file in (world.folder / "stories").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    world.ends_well(command, str(folder), *{"plan": ("--mesh", "v5e-8"), "eval": ("--data", "../floats.npy")}[command])


@given(st.data())
@cases(6)
def test_weight_files(world: World, data: st.DataObject):
    content = save(load_file(world.folder / "model" / "model.safetensors"))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)) | texts())
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    value = data.draw(
        values() | st.sampled_from(["F64", "F8_E4M3", "I32", "BOOL", [2**40, 2**40], [-1, 1], [0, 2**63]])
    )
    header |= {name: value if part is None else header.get(name, {}) | {part: value}}
    written = json.dumps(header).encode()
    stated = data.draw(st.sampled_from([len(written)] * 9 + [0, 1, 2**31, 2**60, 2**64 - 1]))
    content = stated.to_bytes(8, "little") + written + content[8 + length :]
    content = content[: data.draw(st.sampled_from([None] * 9 + [0, 7, 8, 9, 500, -1]))]
    folder = world.outputs() / "model"
    folder.mkdir()
    shutil.copy(world.folder / "model" / "config.json", folder)
    file = data.draw(st.sampled_from(["model.safetensors"] * 5 + ["pytorch_model.bin", "model.safetensors.index.json"]))
    (folder / file).write_bytes(content if data.draw(st.integers(0, 19)) else data.draw(st.sampled_from(ENDLESS)))
    world.ends_well("eval", str(folder), "--data", "../floats.npy")


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Generates the rows of a table, in which a column has cells of one kind."""
    kinds = st.none() | st.text(max_size=40), st.integers(-5, 5), st.binary(max_size=4)
    columns = (st.fixed_dictionaries({}, optional={"text": cell, "": st.integers(-5, 5)}) for cell in kinds)
    return st.one_of([st.lists(column, max_size=3) for column in columns])


def arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
    return hnp.arrays(hnp.scalar_dtypes() | st.just(np.dtype("U3")), shapes)


CONTENTS = {
    ".txt": st.text().map(lambda text: text.encode(errors="surrogatepass")),
    ".jsonl": st.lists(values()).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ".json": values().map(lambda value: json.dumps(value).encode()),
    ".parquet": rows().map(parquet),
    ".npy": arrays().map(npy),
    ".txt.gz": st.binary(),
    ".csv": st.binary(),
}


@given(st.data())
@cases(6)
def test_data_files(world: World, data: st.DataObject):
    ending = data.draw(st.sampled_from(sorted(CONTENTS)))
    content = data.draw(st.binary(max_size=200) if data.draw(st.integers(0, 3)) == 0 else CONTENTS[ending])
    if data.draw(st.booleans()) and content:
        at = data.draw(st.integers(0, len(content) - 1))
        content = data.draw(st.sampled_from([content[:at], content[:at] + b"\xff" + content[at + 1 :], content]))
    content = data.draw(st.sampled_from(ENDLESS)) if data.draw(st.integers(0, 19)) == 0 else content
    file = world.outputs() / f"data{ending}"
    file.write_bytes(content)
    world.ends_well("eval", "../stories", "--data", str(file), "--sequences", "1", "--sequence-length", "8")
