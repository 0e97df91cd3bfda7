"""Reads Hugging Face folders, layer by layer or completely, and writes them under the same names, bit for bit."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spap_jax.checkpoint import inventory
from spap_jax.checkpoint.config_text import check_describable, read_config_text, understood, written_config_text
from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.inventory import HEAD
from spap_jax.checkpoint.output import new_folder
from spap_jax.checkpoint.ranged import AtAddress
from spap_jax.checkpoint.shards import Shards
from spap_jax.checkpoint.side_files import copy_side_files
from spap_jax.checkpoint.stored import Stack, Stored
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import NotFiniteError, UserError
from spap_jax.models import FAMILIES, DecoderConfig, Params, Rule
from spap_jax.models.host_arrays import is_finite
from spap_jax.models.model import Model, Source
from spap_jax.parallel import mesh

SHARD_BYTES = 5 * 10**9

PlaceParams = Callable[[DecoderConfig, Params], Params]
"""Places stored parameters on devices, as JAX arrays."""


def local(config: DecoderConfig, params: Params) -> Params:
    """Places parameters on one device, as `placement.shard_params` does without a mesh."""
    return jax.tree.map(mesh.put, params)


def as_stored(config: DecoderConfig, params: Params) -> Params:
    """Leaves parameters where they are stored; the parts that are indexed later are read then."""
    return params


def on_host(config: DecoderConfig, params: Params) -> Params:
    """Reads parameters into the memory of the host, as numpy arrays."""
    return jax.tree.map(np.asarray, params)


class Reader:
    """A Hugging Face folder whose config and tensors have been checked against each other; data are read on demand.

    Attributes:
        family: Family of the model.
        config: Config of the model.
        source: Where the model came from, for writing it back.
        bytes: Number of bytes of all tensors.
        dtypes: Names of the dtypes of its weights, by their path in the parameter tree.
        at_address: Whether the weights are read from an address.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        """Reads config.json and the headers of the weight files.

        Args:
            folder: Folder of the checkpoint.
            name: The name that the user gave; by default the folder.

        Raises:
            UserError: The model is not supported, or its files do not match; all faults are listed at once.
        """
        self._folder = folder = Path(folder)
        name = name or str(folder)
        text = read_config_text(folder / "config.json")
        self.family, self.config = understood(text, name)
        self._rules = self.family.rules_for(self.config)
        self._elsewhere = AtAddress.of(folder)
        self.at_address = self._elsewhere is not None
        self._files = TensorFiles.open(folder, self._elsewhere)
        self._stored = inventory.stored_names(self._files, self.family, self.config.tied)
        head_stored = self.config.tied and HEAD in self._stored
        expected = inventory.expected_tensors(self.config, head_stored)
        inventory.check_inventory(name, self._files, self._stored, expected)
        self.source = Source(name, folder.absolute(), text, head_stored)
        stored = {full: self._files.tensors[theirs] for full, theirs in self._stored.items()}
        self.bytes = sum(tensor.bytes for tensor in stored.values())
        self.dtypes = {each.rule.ours: stored[full].dtype for full, each in expected.items()}

    def fingerprint(self) -> str:
        """Computes the fingerprint of the config and the weights; see `fingerprint.py`."""
        return fingerprint(self._folder)

    def check_unchanged(self) -> None:
        """Checks that weights at an address are still those that were read.

        Raises:
            UserError: They are not, or the store fails.
        """
        if self._elsewhere:
            self._elsewhere.check_unchanged()

    def check_finite(self, watch: Callable[[int, int], None] = lambda *_: None) -> None:
        """Reads all weights, a piece at a time: pruning layer by layer would reach the last ones hours later.

        Args:
            watch: Called with the number of bytes checked so far, and the total number.

        Raises:
            UserError: A file is damaged, or a weight is not finite.
        """
        seen = 0
        for name in self._stored.values():
            for cuts in self._files.pieces(name):
                watch(seen, self.bytes)
                seen += self._files.read(name, cuts).nbytes
        watch(self.bytes, self.bytes)

    def outer(self) -> Params:
        """The parameters outside of the layers, as `Stored`, which reads data on demand."""
        outer = {rule.ours: self._array(rule) for rule in self._rules if not rule.stacked}
        return {"embed": {}, "head": {}} | unflatten_dict(outer, sep="/")

    def layer(self, index: int) -> Params:
        """The parameters of one layer, as `Stored`, padded to the config's widest layer."""
        arrays = {rule.ours: self._array(rule, index) for rule in self._rules if rule.stacked}
        return unflatten_dict(arrays, sep="/")["layers"]

    def model(self, place: PlaceParams = local) -> Model:
        """Reads the complete model, with stacked layers.

        Args:
            place: Places the parameters on devices; by default, on one device.

        Raises:
            UserError: A file is damaged, a weight is not finite, or a tied model stores a head of its own.
        """
        layers = range(self.config.layers)
        stacks = {r.ours: Stack([self._array(r, layer) for layer in layers]) for r in self._rules if r.stacked}
        params = self.outer() | unflatten_dict(stacks, sep="/")
        return Model(self.config, place(self.config, params), self.source)

    def _array(self, rule: Rule, layer: int | None = None) -> Stored:
        twin = self._stored[HEAD] if self.source.head_stored and rule.ours == "embed/tokens" else None
        own = self.config if layer is None else self.config.of_layer(layer)
        room = rule.shapes(self.config.axes)[1]
        return Stored(self._files, self._stored[rule.theirs.format(i=layer)], rule, own.axes, room, twin)


class Writer:
    """Writes a Hugging Face folder in pieces; after the `with` block it is complete and in place, or absent.

    A piece is on disk when the call that writes it returns.

    Attributes:
        config: Config of the model, with the width that is written.
        source: Source of the config's text and the side files.
        bytes: Number of bytes of all tensors.
    """

    def __init__(
        self,
        folder: str | Path,
        config: DecoderConfig,
        source: Source,
        dtypes: Mapping[str, str],
        *,
        dtype: str | None = None,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        partial: Path | None = None,
        kept_beside: int = 0,
    ):
        """Prepares for writing; nothing is written before the `with` block begins.

        Args:
            folder: Output folder.
            config: Config of the model, with the width that is written.
            source: Source of the config's text and the side files.
            dtypes: Names of the arrays' dtypes by their path in the parameter tree, as in `Reader.dtypes`; biases that
                pruning added may be missing and then have the dtype of the MLP's output projection.
            dtype: "float32", "bfloat16" or "float16", to convert all arrays to; by default their dtypes are kept.
            overwrite: Whether to replace an existing folder that holds only files that this program wrote.
            shard_bytes: Maximum size of a weight file, unless one tensor is larger.
            partial: See `new_folder`.
            kept_beside: Number of bytes that the run keeps beside the folder until it is complete.

        Raises:
            UserError: The dtype is unknown, or config.json has no field for a part of the config.
        """
        check_describable(source, config)
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"there is no dtype {dtype!r} for weights: use one of {', '.join(DTYPES)}.")
        self.config, self.source = config, source
        self._dtype = dtype
        self._rules = FAMILIES[config.family].rules_for(config)
        self._expected = inventory.expected_tensors(config, source.head_stored)
        self._tensors = inventory.planned(self._expected, dtypes, dtype)
        self._shard_bytes = shard_bytes
        self.bytes = sum(tensor.bytes for tensor in self._tensors.values())
        self._output = new_folder(folder, overwrite, self.bytes + kept_beside, partial, source=source.folder)
        self._stack = contextlib.ExitStack()
        self._missing = set(self._expected)

    def __enter__(self) -> "Writer":
        """Creates the hidden folder.

        Raises:
            UserError: The folder exists and may not be replaced, or there is no room.
        """
        with self._stack:
            self._partial = self._stack.enter_context(self._output)
            self._stack.push(self._finish)
            self._shards = Shards(self._partial, self._tensors, self._shard_bytes)
            copy_side_files(self.source.folder, self._partial)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        """Checks that everything was written and moves the folder to its place; after an error, removes it."""
        return self._stack.__exit__(*raised)

    def outer(self, params: Params) -> None:
        """Writes the parameters outside of the layers; others in the tree are ignored."""
        arrays = flatten_dict(params, sep="/")
        for rule in self._rules:
            if not rule.stacked:
                self._add(rule.theirs, rule, arrays[rule.ours])
        if self.source.head_stored:
            self._add(HEAD, self._expected[HEAD].rule, arrays["embed/tokens"])

    def layer(self, index: int, params: Params) -> None:
        """Writes the parameters of one layer, padded to the config's widest layer; its own channels are written."""
        arrays = flatten_dict({"layers": params}, sep="/")
        for rule in self._rules:
            if rule.stacked:
                self._add(rule.theirs.format(i=index), rule, arrays[rule.ours], index)

    def file(self, name: str, content: str | bytes) -> None:
        """Adds a text file, such as a report or a model card."""
        if Path(name).name != name or name == "config.json" or name.startswith("model"):
            raise ValueError(f"{name!r} cannot be the name of an additional file of a checkpoint")
        (self._partial / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    def _add(self, name: str, rule: Rule, array: Any, layer: int | None = None) -> None:
        """Writes one tensor under its name in the checkpoint."""
        array = np.asarray(array)
        if name not in self._missing:
            raise ValueError(f"{name} was written before, or is not a tensor of this model")
        _, shape = rule.shapes(self.config.axes)
        if array.shape != shape:
            raise ValueError(f"{name} comes from an array {list(array.shape)}, and the config gives {list(shape)}")
        axes = self.config.axes if layer is None else self.config.of_layer(layer).axes
        whole, array = array, array[inventory.corner(rule.shapes(axes)[1])]
        if array.size < whole.size and np.count_nonzero(array) < np.count_nonzero(whole):
            raise ValueError(f"{name} has weights beyond the width of its layer")
        converted = _converted(name, array, self._dtype)
        planned = self._tensors[name].dtype
        if converted.dtype != DTYPES[planned]:
            raise ValueError(f"{name} has the dtype {array.dtype}, and {planned} was announced")
        self._shards.write(name, rule.write(converted, axes))
        self._missing.discard(name)

    def _finish(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Writes the index and the config, unless the block raised."""
        if error is not None:
            return
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, such as {min(self._missing)}")
        self._shards.write_index()
        text = written_config_text(self.source, self.config, self._dtype)
        (self._partial / "config.json").write_bytes(text.encode("utf-8"))


def save(
    model: Model,
    folder: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    files: Mapping[str, str | bytes] | None = None,
    partial: Path | None = None,
) -> None:
    """Writes a model as a Hugging Face folder that stock loaders read.

    Args:
        model: The model to write.
        folder: Output folder.
        dtype: "float32", "bfloat16" or "float16"; by default the dtypes of the arrays.
        overwrite: Whether to replace an existing folder that holds only files that this program wrote.
        files: Additional text files by name.
        partial: See `new_folder`.

    Raises:
        UserError: The folder exists and may not be replaced, or it is inside the folder that the model was loaded from;
            there is no room; or a weight does not fit the dtype.
    """
    dtypes = inventory.array_dtypes(model.params, model.config)
    with Writer(
        folder, model.config, model.source, dtypes, dtype=dtype, overwrite=overwrite, partial=partial
    ) as writer:
        writer.outer(model.params)
        for index in range(model.config.layers):
            writer.layer(index, jax.tree.map(lambda stack, i=index: stack[i], model.params["layers"]))
        for name, content in (files or {}).items():
            writer.file(name, content)


def weight_bytes(model: Model, dtype: str | None = None) -> int:
    """The number of bytes of the weights that `save` writes for a model."""
    expected = inventory.expected_tensors(model.config, model.source.head_stored)
    tensors = inventory.planned(expected, inventory.array_dtypes(model.params, model.config), dtype)
    return sum(tensor.bytes for tensor in tensors.values())


def _converted(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Converts an array to a checkpoint dtype; refuses values that are not finite or do not fit."""
    target = DTYPES[dtype] if dtype else array.dtype
    if not is_finite(array):
        raise NotFiniteError(f"the weight {name} became NaN or infinity, so the model is not written.")
    with np.errstate(over="ignore"):
        converted = array.astype(target, copy=False)
    if not is_finite(converted):
        raise NotFiniteError(f"the weight {name} has values too large for {dtype}: use bfloat16 or float32.")
    return converted
