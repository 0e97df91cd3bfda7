"""Keeps an unfinished run beside its output, and makes the output of what it kept.

A finished block is written once, as a shard of the output: tensors under Hugging Face names in the output's dtype, its
report in the metadata. At the end the shards are renamed, or joined if they are small. So

    with FolderStore("pruned", identity, config, reader.source, reader.dtypes) as store:
        if not store.finished:                              # the output of this very run may be in place already
            store.outer(reader.outer())
            for i in range(config.layers):
                block = store.block(i)                      # from an interrupted run
                if block is None:
                    block = store.put(i, layer, report)     # written while the next one is computed
                ...                                         # go on from block.params: what the file holds
            resumed = store.restore_state(like)             # of joint steps, or of training: (tree, checks)
            ...
            store.save_state(tree, checks)                  # after every check; saves every few minutes
            store.replace(i, layer)                         # blocks that joint steps changed
            store.finish({"README.md": text})
    store.remove()                                          # when the whole command has succeeded

makes `pruned` from `.pruned.resume`, which holds

    run.json           everything that the result depends on; and the output's files, once nothing is left to compute
    decided.json       what was decided before the first block
    outer.safetensors  block-00000.safetensors ...  joint-00011.safetensors ...
    state/             an Orbax checkpoint of the state of steps
    output/            files of the output, while it is made
    replaced/          the folder that was in the output's place

and is removed by `remove`. A process that is killed loses the block in progress, and the steps since the last state.

In a run of several processes, each has a store and makes all calls; the leading one writes, and all read. So the output
has to be in a place that all of them see.
"""

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spap_jax.backend import platform
from spap_jax.checkpoint import inventory, weight_files
from spap_jax.checkpoint.config_text import check_describable, written_config_text
from spap_jax.checkpoint.folders import NEW, LocalFolder, RemoteFolder, disk_errors, folder_at, sync
from spap_jax.checkpoint.inventory import HEAD
from spap_jax.checkpoint.manifest import MANIFEST, manifest_text, parse_manifest
from spap_jax.checkpoint.output import RUN, check_output, check_place, put_in_place, resume_folder
from spap_jax.checkpoint.side_files import side_files
from spap_jax.checkpoint.tensors import DTYPES, Tensor
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import FAMILIES, DecoderConfig, Params, Rule
from spap_jax.models.host_arrays import is_finite
from spap_jax.models.model import Source
from spap_jax.parallel import mesh, processes
from spap_jax.parallel.placement import layer_to_host
from spap_jax.storage.location import beside, check_name, is_address, real_path

Json = dict[str, Any]
Text = str | bytes

STATE_SECONDS = 180
"""Seconds of steps between two saved states."""

_DECIDED, _OUTER, _STATE, _STAGED = "decided.json", "outer.safetensors", "state", "output"

_LONG = 60
"""Length from which a value in an identity is not shown in messages."""


class Block(NamedTuple):
    """A finished block of an interrupted run: parameters on the host, padded to the widest layer, and a JSON report."""

    params: Params
    report: Json


class FolderStore:
    """What is kept of a run into a folder or an address, and at last its output; see the module.

    Attributes:
        config: Config of the output; it may be set until the first block is written, if widths are decided later.
        place: Where the run is kept, for messages.
        finished: Whether the output of this run is in place.
        found: Whether an earlier process kept something of this run.
    """

    def __init__(
        self,
        output: str | Path,
        identity: Mapping[str, Any] | None,
        config: DecoderConfig,
        source: Source,
        dtypes: Mapping[str, str],
        *,
        dtype: str | None = None,
        overwrite: bool = False,
        fresh: bool = False,
    ):
        """Opens the store, before the long work.

        Args:
            output: A path, or an address other than the hub's.
            identity: Everything that the result depends on, by name, as JSON values. None if nothing should stay when
                the process ends before the output is complete.
            dtypes: As in `Reader.dtypes`; biases that pruning adds have the dtype of the MLP's output projection.
            dtype: "float32", "bfloat16" or "float16" for all weights of the output; by default they keep theirs.
            overwrite: Whether a folder in the output's place may be replaced, if all files in it are of such a run.
            fresh: Whether to discard what an earlier process kept.

        Raises:
            UserError: The output may not be replaced; another process or run, or other files, are where it is kept;
                config.json cannot describe the config; or processes see different folders or identities.
        """
        check_name(output)
        check_describable(source, config)
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"there is no dtype {dtype!r} for weights: use one of {', '.join(DTYPES)}.")
        self.config, self._source, self._dtypes, self._dtype = config, source, dtypes, dtype
        self._output = output if is_address(output) else real_path(output)
        self._overwrite = overwrite
        self._identity = None if identity is None else json.loads(json.dumps(identity))
        role = processes.broadcast_from_leader(f"partial-{os.urandom(4).hex()}")
        self._folder = resume_folder(output) if identity is not None else folder_at(beside(self._output, role))
        self.place = self._folder.address
        self.found = self.finished = False
        self._blocks = 0  # number of the first block that is not there, or has not been looked for
        self._changed: set[int] = set()
        self._saved: float | None = None
        self._manager: Any = None
        self._lock: int | None = None
        self._thread = ThreadPoolExecutor(1, "writing")
        self._writing: Future[None] | None = None
        try:
            self._open(fresh)
        except BaseException:
            if self._lock is not None and self._is_useless():
                self._folder.clear()
            self._release()
            raise

    def __enter__(self) -> Self:
        """Returns `self`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Waits for pending writes; removes what cannot be resumed, and raises what writing raised."""
        failed = self._writing.exception() if self._writing else None
        ended = error or failed
        useless = isinstance(ended, NotFiniteError) or self._identity is None or (ended and self._is_useless())
        if processes.is_leader() and useless:
            self._folder.clear()
        self._release()
        if failed and not error:
            raise failed

    @property
    def bytes(self) -> int:
        """Number of bytes of the output's weights."""
        return sum(tensor.bytes for tensor in self._tensors().values())

    @property
    def decided(self) -> Any:
        """The value that `decide` stored, in this process or an earlier one; None if there is none."""
        return processes.broadcast_from_leader(_parsed(self._folder.read(_DECIDED)) if processes.is_leader() else None)

    def decide(self, value: Any) -> None:
        """Stores a JSON value on which all blocks depend."""
        if processes.is_leader():
            self._folder.write(_DECIDED, json.dumps(value).encode())

    def block(self, index: int) -> Block | None:
        """A block that was finished before, asked for in order; None if there is none, or after one that is damaged."""
        if index >= self._blocks:
            return None
        self._wait()
        name = _shard("block", index)
        shard = weight_files.decode(self._folder.read(name)) if processes.is_leader() else None
        report = processes.broadcast_from_leader(None if shard is None else shard[1])
        if report is not None:
            return Block(self._layer(name, index, shard), report)
        self._blocks = index
        if processes.is_leader():
            self._folder.remove([_STATE, *(_shard("block", number) for number in range(index, self.config.layers))])
        return None

    def put(self, index: int, layer: Params, report: Json) -> None:
        """Writes a finished block, while the caller goes on; an error of writing is raised at the next call.

        A resumed run goes on from what is written: if that has another dtype, so should this one.

        Args:
            layer: Its parameters, padded to the config's widest layer.
        """
        self._write_layer("block", index, layer, report)
        self._blocks = max(self._blocks, index + 1)

    def replace(self, index: int, layer: Params) -> None:
        """Writes the final version of a block beside the one from which a resumed run goes on."""
        self._write_layer("joint", index, layer, {})
        self._changed.add(index)

    def layer(self, index: int) -> Params:
        """The parameters of a block as the output will have them, on the host, padded to the widest layer."""
        self._wait()
        processes.barrier()
        return self._layer(self._final(index), index)

    def outer(self, params: Params) -> None:
        """Writes the parameters outside of the blocks, arrays or `Stored`; others in the tree are ignored."""
        flat = flatten_dict(params, sep="/")
        arrays = {rule.ours: flat[rule.ours] for rule in self._rules(stacked=False)}
        on_devices = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
        self._begin(self._write_outer, arrays | mesh.to_process(on_devices))

    def save_state(self, tree: Any, checks: Sequence[Json]) -> None:
        """Saves the state of steps if some minutes have passed since the last one was saved, or since the first call.

        Call it before the first step, and after every check.

        Args:
            checks: All checks so far, as JSON values; there are more in every call.
        """
        if self._saved is None or not self._keeps_states():
            self._saved = time.monotonic()
            return
        if not processes.broadcast_from_leader(time.monotonic() - self._saved >= STATE_SECONDS):
            return
        from orbax.checkpoint import args

        arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
        items = args.Composite(state=args.StandardSave(arrays), checks=args.JsonSave({"checks": list(checks)}))
        self._states().save(len(checks), args=items)
        if platform() == "cpu":  # its arrays are on the host already, where the next steps take their place
            self._states().wait_until_finished()
        self._saved = time.monotonic()

    def restore_state(self, like: Any) -> tuple[Any, list[Json]] | None:
        """The state that was saved last, and the checks until then; None if there is none, or it is damaged.

        ``like`` has arrays of the same shapes, dtypes and shardings, or descriptions of them.
        """
        if not (self.found and self._keeps_states()):
            return None
        from orbax.checkpoint import args

        manager = self._states()
        last = manager.latest_step()
        if last is None:
            return None
        leaves, tree = jax.tree.flatten(like)
        described = {str(number): _described(leaf) for number, leaf in enumerate(leaves)}
        items = args.Composite(state=args.StandardRestore(described), checks=args.JsonRestore())
        try:
            found = manager.restore(last, args=items)
        except Exception:  # Orbax raises all kinds of exceptions for a damaged checkpoint
            manager.delete(last)
            return None
        return tree.unflatten([found["state"][name] for name in described]), found["checks"]["checks"]

    def kept(self) -> tuple[int, int]:
        """The number of finished blocks that are stored, and of the checks in the last state."""
        names = self._folder.sizes()
        states = [int(found[1]) for name in names if (found := re.match(rf"{_STATE}/(\d+)/", name))]
        return len([name for name in names if re.fullmatch(r"block-\d+\.safetensors", name)]), max(states, default=0)

    def settle(self) -> None:
        """Waits for pending writes, in a process that is about to end."""
        if self._writing is not None:
            self._writing.exception()
        if self._manager is not None:
            self._manager.wait_until_finished()

    def finish(self, files: Mapping[str, Text]) -> None:
        """Makes the output of what was written, and puts it in its place.

        ``files`` are additional text files by name, such as a report; those of the leading process count.

        Raises:
            UserError: The output's place is taken (a later call goes on from here), the disk is full, or the store
                fails.
        """
        self._wait()
        self._on_leader(lambda: self._put_in_place(self._staged(files)))
        self.finished = True

    def remove(self) -> None:
        """Removes the record of the finished run, once the whole command has succeeded."""
        processes.barrier()
        if processes.is_leader():
            self._tidy()
            self._folder.clear()

    def _open(self, fresh: bool) -> None:
        first, own = processes.broadcast_from_leader(self._identity) or {}, self._identity or {}
        differing = [name for name in first if first[name] != own.get(name)]
        if processes.all_gather_host(bool(differing)).any():
            raise UserError(
                f"the processes of this run differ from the first one{' in ' * bool(differing)}{', '.join(differing)}: "
                "give all of them the same command, model and data."
            )
        self.found, self.finished = self._on_leader(lambda: self._open_folder(fresh))
        if processes.all_gather_host(self._folder.read(RUN) is None).any():
            raise UserError(f"not all processes of this run see {self.place}: name an output that all of them see.")
        self._blocks = self.config.layers if self.found else 0

    def _open_folder(self, fresh: bool) -> tuple[bool, bool]:
        """Opens the folder; returns whether an earlier process left something, and whether the output is in place."""
        resume = self._identity is not None and not fresh
        begun = resume and self._folder.read(RUN) is not None
        # Weights that will be joined are there twice for a moment.
        needed = 0 if begun else self.bytes * (2 if self.bytes <= weight_files.JOINED_BYTES else 1)
        check_output(self._output, self._overwrite, needed, inputs={"the model": self._source.folder}, resume=resume)
        if isinstance(self._folder, LocalFolder):
            self._lock = _locked(self._folder.path)
        kept = _parsed(self._folder.read(RUN)) if resume else None
        if isinstance(kept, dict):
            _check_same(kept["identity"], self._identity or {}, self.place)
            plan = kept["made"]
            if plan is None:
                check_place(self._output, self._overwrite)
                return True, False
            if self._is_staged(plan):
                self._put_in_place(plan)
                return True, True
            if self._is_in_place(plan):
                self._tidy()
                return True, True
        check_place(self._output, self._overwrite)
        self._folder.remove(self._folder.entries())
        self._write_run(None)
        return False, False

    def _write_run(self, made: Json | None) -> None:
        """Writes the run's identity, and the list of the output's files once all of them are complete."""
        content = json.dumps({"identity": self._identity, "made": made}, indent=1)
        self._folder.write(RUN, content.encode())

    def _on_leader(self, work: Callable[[], Any]) -> Any:
        """Returns in every process the JSON value that the leading one computes, or raises its `UserError`."""
        if jax.process_count() == 1:
            return work()
        outcome: Json = {}
        if processes.is_leader():
            try:
                outcome = {"value": work()}
            except UserError as error:
                outcome = {"error": str(error)}
        outcome = processes.broadcast_from_leader(outcome)
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]

    def _is_useless(self) -> bool:
        """Whether nothing is kept that a later process could resume."""
        return not (self.finished or any(self.kept()) or _STAGED in self._folder.entries())

    def _begin(self, write: Callable[..., None], *arguments: Any) -> None:
        """Starts a write in the leading process's thread, once earlier ones have ended."""
        self._wait()
        if processes.is_leader():
            self._writing = self._thread.submit(write, *arguments)

    def _wait(self) -> None:
        """Waits for the thread, and raises its error once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _release(self) -> None:
        """Ends the threads, and releases the lock."""
        self._thread.shutdown()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # The shards

    def _rules(self, stacked: bool) -> list[Rule]:
        return [rule for rule in FAMILIES[self.config.family].rules_for(self.config) if rule.stacked == stacked]

    def _tensors(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor of the output."""
        expected = inventory.expected_tensors(self.config, self._source.head_stored)
        return inventory.planned(expected, self._dtypes, self._dtype)

    def _dtype_of(self, ours: str) -> np.dtype:
        return DTYPES[self._dtype or self._dtypes.get(ours, self._dtypes["layers/mlp/down"])]

    def _write_layer(self, role: str, index: int, params: Params, report: Json) -> None:
        flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
        on_devices = all(isinstance(array, jax.Array) for array in flat.values())
        with np.errstate(over="ignore"):
            for name, array in flat.items():
                flat[name] = (array if on_devices else np.asarray(array)).astype(self._dtype_of(f"layers/{name}"))
        params = unflatten_dict(flat, sep="/")
        if on_devices:
            params = layer_to_host(self.config, params)
        self._begin(self._write_block, role, index, flatten_dict({"layers": params}, sep="/"), report)

    def _write_block(self, role: str, index: int, arrays: Mapping[str, np.ndarray], report: Json) -> None:
        own = self.config.of_layer(index).axes
        tensors = {}
        for rule in self._rules(stacked=True):
            name, array = rule.theirs.format(i=index), arrays[rule.ours]
            cut = array[inventory.corner(rule.shapes(own)[1])]
            if array.shape != rule.shapes(self.config.axes)[1] or np.count_nonzero(cut) < np.count_nonzero(array):
                raise ValueError(f"{name} of an array {list(array.shape)} does not fit the config")
            tensors[name] = rule.write(_finite(name, cut), own)
        self._folder.write(_shard(role, index), weight_files.encode(tensors, report))

    def _write_outer(self, arrays: Mapping[str, Any]) -> None:
        tensors = {}
        for rule in self._rules(stacked=False):
            with np.errstate(over="ignore"):
                array = np.asarray(arrays[rule.ours]).astype(self._dtype_of(rule.ours), copy=False)
            tensors[rule.theirs] = rule.write(_finite(rule.theirs, array), self.config.axes)
            if rule.ours == "embed/tokens" and self._source.head_stored:
                tensors[HEAD] = tensors[rule.theirs]
        self._folder.write(_OUTER, weight_files.encode(tensors, None))

    def _layer(self, name: str, index: int, shard: tuple[Mapping[str, np.ndarray], Any] | None = None) -> Params:
        """The parameters of a block in a shard, with our axes, padded to the widest layer."""
        shard = shard or weight_files.decode(self._folder.read(name))
        if shard is None:
            raise UserError(f"{name} in {self.place} cannot be read: repeat the command.")
        own, room = self.config.of_layer(index).axes, self.config.axes
        arrays = {
            rule.ours: inventory.filled_up(rule.read(shard[0][rule.theirs.format(i=index)], own), rule.shapes(room)[1])
            for rule in self._rules(stacked=True)
        }
        return unflatten_dict(arrays, sep="/")["layers"]

    def _final(self, index: int) -> str:
        """Name of the shard that holds a block as it will be in the output."""
        return _shard("joint" if index in self._changed else "block", index)

    # The states

    def _keeps_states(self) -> bool:
        """Whether states are to be saved, and Orbax can write to where the run is kept."""
        if self._identity is None or re.search(r"\[.+\]", self.place):  # which it takes for a pattern
            return False
        return re.match(r"(gs|s3)://|/", self.place) is not None

    def _states(self) -> Any:
        """Orbax's manager of the states."""
        if self._manager is None:
            from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions

            options = CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
            self._manager = CheckpointManager(f"{self.place}/{_STATE}", options=options)
        return self._manager

    # The output

    def _staged(self, files: Mapping[str, Text]) -> Json:
        """Writes the output's files except shards, then the list of all files and of where shards go."""
        there = self._folder.sizes()
        parts = [_OUTER, *(self._final(index) for index in range(self.config.layers))]
        if lost := [name for name in parts if name not in there]:
            raise ValueError(f"{len(lost)} parts of the model were not written, such as {lost[0]}")
        self._folder.remove([_STAGED])
        texts: dict[str, Text] = {**files}
        texts["config.json"] = written_config_text(self._source, self.config, self._dtype)
        moved: dict[str, str] = {}
        if self.bytes > weight_files.JOINED_BYTES:
            moved = dict(zip(weight_files.final_names(len(parts)), parts, strict=True))
            texts[weight_files.INDEX] = self._index(list(moved))
        else:
            self._join(parts)
        beside = {name: file.read_bytes() for name, file in side_files(self._source.folder).items()}
        for name, content in (beside | texts).items():
            self._folder.write(f"{_STAGED}/{name}", content if isinstance(content, bytes) else content.encode())
        sizes = {name: there[source] for name, source in moved.items()}
        for name, size in self._folder.sizes().items():
            if name.startswith(f"{_STAGED}/"):
                sizes[name.removeprefix(f"{_STAGED}/")] = size
        self._folder.write(f"{_STAGED}/{MANIFEST}", manifest_text(sizes).encode())
        plan = {"files": sizes, "moved": moved}
        self._write_run(plan)
        return plan

    def _index(self, names: list[str]) -> str:
        """The index of shards: the file of each tensor outside of the blocks and of each block."""
        layers = range(self.config.layers)
        blocks = {r.theirs.format(i=i): names[i + 1] for i in layers for r in self._rules(stacked=True)}
        tensors = self._tensors()
        return weight_files.index_text({name: blocks.get(name, names[0]) for name in tensors}, self.bytes)

    def _join(self, parts: Sequence[str]) -> None:
        """Joins all shards to one file of the output."""
        with tempfile.TemporaryDirectory() as temporary:
            local = self._folder.path if isinstance(self._folder, LocalFolder) else Path(temporary)
            file = local / _STAGED / f"{weight_files.JOINED}{NEW}"
            file.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors(file):
                weight_files.join(file, self._tensors(), map(self._tensors_in, parts))
                self._folder.put(f"{_STAGED}/{weight_files.JOINED}", file)

    def _tensors_in(self, name: str) -> Mapping[str, np.ndarray]:
        shard = weight_files.decode(self._folder.read(name))
        if shard is None:
            raise UserError(f"{name} in {self.place} was damaged meanwhile: repeat the command.")
        return shard[0]

    def _put_in_place(self, plan: Json) -> None:
        """Puts the output in its place, and removes all else that was kept, except the file that says it was made."""
        if isinstance(self._folder, RemoteFolder):
            self._copy(self._folder, plan)
        else:
            path = self._folder.path
            for name, source in plan["moved"].items():
                if (path / source).exists():
                    (path / source).rename(path / _STAGED / name)
            sync(path / _STAGED)
            put_in_place(path / _STAGED, Path(self._output), path / "replaced", self._overwrite)
        self._tidy()

    def _copy(self, folder: RemoteFolder, plan: Json) -> None:
        """Copies all files to their place: the list of them first, and config.json last."""
        target = RemoteFolder(str(self._output))
        listed = parse_manifest(target.read(MANIFEST)) == plan["files"]  # an earlier process has begun to copy
        if not listed:
            check_place(self._output, self._overwrite)
        target.remove(["config.json"])
        if not listed:
            target.remove(target.sizes().keys() - {MANIFEST})
            folder.copy(f"{_STAGED}/{MANIFEST}", target, MANIFEST)
        for name in sorted(plan["files"], key=lambda name: name == "config.json"):
            folder.copy(plan["moved"].get(name, f"{_STAGED}/{name}"), target, name)

    def _tidy(self) -> None:
        self._folder.remove(self._folder.entries() - {RUN})

    def _is_staged(self, plan: Json) -> bool:
        """Whether all files of the output are still here."""
        there = self._folder.sizes()
        return all(f"{_STAGED}/{name}" in there or plan["moved"].get(name) in there for name in plan["files"])

    def _is_in_place(self, plan: Json) -> bool:
        target = folder_at(self._output)
        return parse_manifest(target.read(MANIFEST)) == plan["files"] and target.read("config.json") is not None


def _shard(role: str, index: int) -> str:
    return f"{role}-{index:05d}.safetensors"


def _parsed(content: bytes | None) -> Any:
    """A JSON value; None if there is none."""
    try:
        return json.loads(content or b"null")
    except ValueError:
        return None


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not is_finite(array):
        raise NotFiniteError(
            f"the weight {name} became NaN or infinity, or its values are too large for {array.dtype}, so the model is "
            "not written."
        )
    return array


def _described(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _check_same(theirs: Json, ours: Json, place: str) -> None:
    """Refuses what another run kept: raises UserError if the identities differ."""

    def words(name: str) -> str:  # a long text is a hash, which says nothing to anybody
        values = theirs.get(name), ours.get(name)
        return name if any(len(str(value)) > _LONG for value in values) else f"{name} ({values[0]}, now {values[1]})"

    if changed := [words(name) for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]:
        raise UserError(
            f"{place} holds a run that was interrupted and differs from this one in {', '.join(changed)}: repeat the "
            f"command as it was, or pass {option('resume', False)} to discard that run and start over."
        )


def _locked(path: Path) -> int:
    """Locks a folder, made if needed, until the handle is closed or the process ends; UserError if another has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): name another output.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process writes into {path}: wait for it, or end it.") from None
    except OSError:  # some network file systems have no locks
        pass
    if os.fstat(handle).st_nlink:
        return handle
    os.close(handle)  # who had the lock removed the folder after it was opened here
    return _locked(path)
