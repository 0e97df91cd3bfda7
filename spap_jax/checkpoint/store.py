"""Keeps an unfinished run beside its output, and makes the output of what it kept.

A finished block is written once, as a shard of the output: tensors under Hugging Face names in the output's dtype, its
report in the metadata. At the end the shards are renamed, or joined if they are small. What is kept of a run into the
folder `pruned` lies in `.pruned.resume`:

    run.json           everything that the result depends on; and the output's files, once nothing is left to compute
    decided.json       what was decided before the first block
    outer.safetensors  block-00000.safetensors ...  joint-00011.safetensors ...
    beside-00000.safetensors ...
    state/             an Orbax checkpoint of the state of steps
    output/            files of the output, while it is made
    replaced/          the folder that was in the output's place

A process that is killed loses the block in progress, and the steps since the last state.

In a run of several processes, each has a store and makes all calls; the leading one writes, and all read. So the output
has to be in a place that all of them see.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from flax.traverse_util import flatten_dict

from spap_jax.checkpoint import staging, weight_files
from spap_jax.checkpoint.beside import Beside
from spap_jax.checkpoint.config_text import check_describable, written_config_text
from spap_jax.checkpoint.folders import LocalFolder, folder_at
from spap_jax.checkpoint.output import RUN, check_output, check_place, resume_folder
from spap_jax.checkpoint.shards import OUTER, Shards, block_file
from spap_jax.checkpoint.side_files import side_files
from spap_jax.checkpoint.states import States
from spap_jax.checkpoint.tensors import DTYPES
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import DecoderConfig, Params
from spap_jax.models.model import Source
from spap_jax.parallel import mesh, processes
from spap_jax.storage.location import beside, check_name, is_address, real_path

Json = dict[str, Any]
Text = str | bytes

_DECIDED, _STATE = "decided.json", "state"

_LONG = 60
"""Length from which a value in an identity is not shown in messages."""


class FinishedBlock(NamedTuple):
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
        self._beside = Beside(source, config)
        self._output = output if is_address(output) else real_path(output)
        self._overwrite = overwrite
        self._identity = None if identity is None else json.loads(json.dumps(identity))
        role = processes.broadcast_from_leader(f"partial-{os.urandom(4).hex()}")
        self._folder = resume_folder(output) if identity is not None else folder_at(beside(self._output, role))
        self.place = self._folder.address
        self.found = self.finished = False
        self._blocks = 0  # number of the first block that is not there, or has not been looked for
        self._changed: set[int] = set()
        keeps_states = identity is not None and States.can_be_at(self.place)
        self._states = States(f"{self.place}/{_STATE}") if keeps_states else None
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
    def output_bytes(self) -> int:
        """Number of bytes of the output's weights."""
        return self._shards.total_bytes() + self._beside.bytes

    @property
    def decided(self) -> Any:
        """The value that `decide` stored, in this process or an earlier one; None if there is none."""
        return processes.broadcast_from_leader(_parsed(self._folder.read(_DECIDED)) if processes.is_leader() else None)

    def decide(self, value: Any) -> None:
        """Stores a JSON value on which all blocks depend."""
        if processes.is_leader():
            self._folder.write(_DECIDED, json.dumps(value).encode())

    def block(self, index: int) -> FinishedBlock | None:
        """A block that was finished before, asked for in order; None if there is none, or after one that is damaged."""
        if index >= self._blocks:
            return None
        self._wait()
        name = block_file("block", index)
        shard = weight_files.decode(self._folder.read(name)) if processes.is_leader() else None
        report = processes.broadcast_from_leader(None if shard is None else shard[1])
        if report is not None:
            return FinishedBlock(self._layer(name, index, shard), report)
        self._blocks = index
        if processes.is_leader():
            self._folder.remove([_STATE, *(block_file("block", number) for number in range(index, self.config.layers))])
        return None

    def put(self, index: int, layer: Params, report: Json) -> None:
        """Writes a finished block, padded to the widest layer, while the caller goes on.

        An error of writing is raised at the next call. A resumed run goes on from what is written: if that has another
        dtype, so should this one.
        """
        self._write_block("block", index, layer, report)
        self._blocks = max(self._blocks, index + 1)

    def replace(self, index: int, layer: Params) -> None:
        """Writes the final version of a block beside the one from which a resumed run goes on."""
        self._write_block("joint", index, layer, {})
        self._changed.add(index)

    def layer(self, index: int) -> Params:
        """The parameters of a block as the output will have them, on the host, padded to the widest layer."""
        self._wait()
        processes.barrier()
        return self._layer(self._final(index), index)

    def outer(self, params: Params) -> None:
        """Writes the parameters outside of the blocks, arrays or `Stored`; others in the tree are ignored."""
        flat = flatten_dict(params, sep="/")
        arrays = {rule.ours: flat[rule.ours] for rule in self._shards.rules(stacked=False)}
        on_devices = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
        on_host = arrays | mesh.to_process(on_devices)
        self._begin(OUTER, lambda: self._shards.encode_outer(on_host))

    def save_state(self, tree: Any, checks: Sequence[Json]) -> None:
        """Saves the state of steps from time to time, as `States.save`: call it before them, and after every check."""
        if self._states is not None:
            self._states.save(tree, checks)

    def restore_state(self, like: Any) -> tuple[Any, list[Json]] | None:
        """The state that an earlier process saved last, and the checks until then, as `States.restore`."""
        return self._states.restore(like) if self.found and self._states is not None else None

    def kept(self) -> tuple[int, int]:
        """The number of finished blocks that are stored, and of the checks in the last state."""
        names = self._folder.sizes()
        states = [int(found[1]) for name in names if (found := re.match(rf"{_STATE}/(\d+)/", name))]
        return len([name for name in names if re.fullmatch(r"block-\d+\.safetensors", name)]), max(states, default=0)

    def settle(self) -> None:
        """Waits for pending writes, in a process that is about to end."""
        if self._writing is not None:
            self._writing.exception()
        if self._states is not None:
            self._states.wait()

    def finish(self, files: Mapping[str, Text]) -> None:
        """Makes the output of what was written, and puts it in its place.

        ``files`` are additional text files by name, such as a report; those of the leading process count.

        Raises:
            UserError: The output's place is taken (a later call goes on from here), the disk is full, or the store
                fails.
        """
        self._wait()
        self._on_leader(lambda: self._make(files))
        self.finished = True

    def remove(self) -> None:
        """Removes the record of the finished run, once the whole command has succeeded."""
        processes.barrier()
        if processes.is_leader():
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
        needed = 0 if begun else self.output_bytes * (2 if self.output_bytes <= weight_files.JOINED_BYTES else 1)
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
            if staging.is_staged(self._folder, plan):
                staging.place(self._folder, plan, self._output, self._overwrite)
                return True, True
            if staging.is_in_place(plan, self._output):
                staging.tidy(self._folder)
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
        return not (self.finished or any(self.kept()) or staging.STAGED in self._folder.entries())

    def _begin(self, name: str, content: Callable[[], bytes]) -> None:
        """Writes a file in the leading process's thread, once earlier ones are written."""
        self._wait()
        if processes.is_leader():
            self._writing = self._thread.submit(lambda: self._folder.write(name, content()))

    def _wait(self) -> None:
        """Waits for the thread, and raises its error once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _release(self) -> None:
        """Ends the threads, and releases the lock."""
        self._thread.shutdown()
        if self._states is not None:
            self._states.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _shards(self) -> Shards:
        return Shards(self.config, self._source.head_stored, self._dtypes, self._dtype)

    def _write_block(self, role: str, index: int, layer: Params, report: Json) -> None:
        on_host = self._shards.cast_to_host(layer)
        self._begin(block_file(role, index), lambda: self._shards.encode_block(index, on_host, report))

    def _layer(self, name: str, index: int, shard: tuple[weight_files.Arrays, Any] | None = None) -> Params:
        """The parameters of a block in a file, whose content may have been read already."""
        shard = shard or weight_files.decode(self._folder.read(name))
        if shard is None:
            raise UserError(f"{name} in {self.place} cannot be read: repeat the command.")
        return self._shards.decode_block(index, shard[0])

    def _final(self, index: int) -> str:
        """Name of the file that holds a block as it will be in the output."""
        return block_file("joint" if index in self._changed else "block", index)

    def _make(self, files: Mapping[str, Text]) -> None:
        """Makes the output and puts it in its place."""
        copied = {name: file.read_bytes() for name, file in side_files(self._source.folder).items()}
        texts = {**copied, **files, "config.json": written_config_text(self._source, self.config, self._dtype)}
        parts = [OUTER, *map(self._final, range(self.config.layers))]
        for name, content in self._beside.contents():
            self._folder.write(name, content)
        plan = staging.stage(self._folder, self._shards, parts, self._beside, texts)
        self._write_run(plan)
        staging.place(self._folder, plan, self._output, self._overwrite)


def _parsed(content: bytes | None) -> Any:
    """A JSON value; None if there is none."""
    try:
        return json.loads(content or b"null")
    except ValueError:
        return None


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
