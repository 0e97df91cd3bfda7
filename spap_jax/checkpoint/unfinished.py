"""The progress of an unfinished run, kept beside its output so that the same command resumes where it stopped.

`.NAME.resume` holds `run.json` (the identity of the run), `decided.json` (decisions before the first step, if any),
`steps/` (Orbax: a step is the weights of one block, or the state of steps on all of them, and its report), `output/`
(the partial output) and `lock`. It is removed when the run succeeds. For an output at an address it is a copy of the
folder there (`mirror.py`).

The first L steps of a run on L blocks store a block each, and all stay. Every later step stores a complete state, which
replaces the one before; training has no others. Orbax writes a step in the background and renames it when it is
complete: a process that is killed loses the step in progress. A step stores a hash of its weights: one that was damaged
later counts as lost.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers

from spap_jax.checkpoint.kept import (
    DECIDED,
    LOCK,
    NEW,
    OUTPUT,
    RUN,
    STEPS,
    check_resume_folder,
    clear_folder,
    resume_folder,
)
from spap_jax.errors import UserError
from spap_jax.models.decoder import Params

Json = dict[str, Any]


class Unfinished:
    """The progress of a run: created when it begins, or found as another process left it.

    Attributes:
        folder: Folder in which the progress is kept.
        found: Whether an earlier process of the same run left progress.
        lost: Whether some of it was damaged, and is not used.
        told: Reports of the steps that count, in order.
    """

    def __init__(self, output: str | Path, run: Mapping[str, Any], blocks: int, fresh: bool = False):
        """Opens the folder, or creates it.

        Args:
            output: Output folder of the run.
            run: Everything that its result depends on, by name, as JSON values.
            blocks: Number of steps that all stay, L.
            fresh: Whether to discard the progress of an earlier run.

        Raises:
            UserError: Another process uses the folder, or it belongs to another run or to none.
        """
        check_resume_folder(output)
        self.folder = resume_folder(output)
        self._run, self._blocks = dict(run), blocks
        self._lock = _locked(self.folder)
        self._writing = threading.Lock()
        self.lost = False
        self.told: list[Json] = []
        try:
            self._bring(fresh)
            self.found = (self.folder / RUN).exists() and not fresh
            if self.found:
                self._check()
            if not self.found:
                self._begin()
            self._manager = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Returns `self`."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Waits for pending writes and releases the lock; an error before the first step removes the run's files."""
        try:
            with contextlib.suppress(*[Exception] if raised[0] else ()):  # one error is enough
                self._manager.close()
        finally:
            if raised[0] and not self.told:
                clear_folder(self.folder)
            os.close(self._lock)

    @property
    def place(self) -> str:
        """Where the progress is kept, for messages."""
        return str(self.folder)

    @property
    def decided(self) -> Any:
        """The last argument of `decide`, in this process or an earlier one; None if there was none."""
        try:
            return json.loads((self.folder / DECIDED).read_bytes())
        except (OSError, ValueError):
            return None

    def decide(self, what: Any) -> None:
        """Stores a JSON value that all steps depend on; call it before the first step."""
        _write(self.folder / DECIDED, what)

    @property
    def output(self) -> Path:
        """The folder in which the output is written until it is complete."""
        return self.folder / OUTPUT

    @property
    def name(self) -> str:
        """Name of the run: a hash of everything that its result depends on."""
        return hashlib.sha256(json.dumps(self._run, sort_keys=True).encode()).hexdigest()

    def read(self, step: int) -> Params:
        """What a step stored, as numpy arrays; it must not have been replaced."""
        found: Any = self._manager.restore(step, args=ocp.args.Composite(layer=ocp.args.StandardRestore()))
        return found.layer

    def add(self, layer: Params, told: Json) -> None:
        """Stores the next step; its files are written in the background.

        Args:
            layer: The weights of the step's block, or a complete state.
            told: Report of the step, as a JSON value.
        """
        layer = jax.device_get(layer)
        step = len(self.told)
        about = {"told": [*self.told[self._blocks :], told], "sha256": _digest(layer)}
        args = ocp.args.Composite(layer=ocp.args.StandardSave(layer), about=ocp.args.JsonSave(about))
        with self._writing:
            self._manager.save(step, args=args)
            self.told.append(told)

    def count(self) -> int:
        """Waits for pending writes and returns the number of steps on disk."""
        with contextlib.suppress(Exception):  # raised again when the next step is added
            self._manager.wait_until_finished()
        numbers = [int(path.name) for path in (self.folder / STEPS).glob("*") if path.name.isdecimal()]
        return max(numbers, default=-1) + 1

    def settle(self) -> None:
        """Waits until all steps are on disk and blocks new ones, for a process that is about to end."""
        self._writing.acquire()
        self.count()

    def drop_steps(self) -> None:
        """Removes steps and partial output but not the run's identity, for a command with other outputs to make."""
        self._manager.wait_until_finished()
        for name in (STEPS, OUTPUT):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def forget(self) -> None:
        """Removes all steps, which cannot be resumed; the rest is removed at the end of the `with` block."""
        self.drop_steps()
        (self.folder / STEPS).mkdir()
        self.told.clear()

    def remove(self) -> None:
        """Removes everything, once the command has succeeded; call it after the `with` block."""
        clear_folder(self.folder)

    def _bring(self, fresh: bool) -> None:
        """Fetches progress from elsewhere before the folder is read; here there is none."""

    def _check(self) -> None:
        """Refuses the progress of another run; an unreadable `run.json` counts as none."""
        try:
            theirs = dict(json.loads((self.folder / RUN).read_bytes()))
        except (ValueError, TypeError):
            theirs = {}
        if not theirs:
            self.found, self.lost = False, True
            return
        changed = [name for name in self._run | theirs if self._run.get(name) != theirs.get(name)]
        if changed:
            raise UserError(
                f"{self.place} holds a run that was interrupted and differs from this one in "
                f"{', '.join(_difference(name, theirs.get(name), self._run.get(name)) for name in changed)}: "
                "repeat the command as it was, or pass --no-resume to discard that run and start over."
            )

    def _begin(self) -> None:
        clear_folder(self.folder, but=LOCK)
        _write(self.folder / RUN, self._run)

    def _open(self) -> ocp.CheckpointManager:
        """Opens Orbax's manager of the steps that count; others are removed."""
        steps = self.folder / STEPS
        steps.mkdir(exist_ok=True)
        with self._managed() as manager:
            there = {step: _intact(manager, step) for step in manager.all_steps()}
        count, self.told = _counting({step: told for step, told in there.items() if told}, self._blocks)
        self.lost = self.lost or any(step >= count or not there[step] for step in there)
        for entry in steps.iterdir():
            if entry.name not in map(str, _kept(count, self._blocks)):
                shutil.rmtree(entry)
        return self._managed()

    def _managed(self) -> ocp.CheckpointManager:
        # Only this process writes; those that only compute do not take part.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="resume"
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.CustomSteps(list(range(self._blocks))), checkpoint_managers.LatestN(1)]
            ),
            multiprocessing_options=alone,
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self.folder / STEPS, options=options)


def _write(path: Path, what: Any) -> None:
    """Writes a JSON file that is complete or absent."""
    written = path.with_name(f"{path.name}{NEW}")
    with written.open("w", encoding="utf-8") as file:
        json.dump(what, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    written.rename(path)


def _kept(count: int, blocks: int) -> list[int]:
    """The steps that stay of the first ``count``."""
    return [*range(min(count, blocks)), *([count - 1] if count > blocks else [])]


def _counting(intact: Mapping[int, list[Json]], blocks: int) -> tuple[int, list[Json]]:
    """The number of steps that count, the most of which those that stay are intact, and the reports of all."""
    for count in range(max(intact, default=-1) + 1, 0, -1):
        if all(step in intact for step in _kept(count, blocks)):
            told = [intact[step][-1] for step in range(min(count, blocks))]
            return count, told + (intact[count - 1] if count > blocks else [])
    return 0, []


def _intact(manager: ocp.CheckpointManager, step: int) -> list[Json] | None:
    """The reports of a step's block, of this step and earlier ones; None if the step is damaged."""
    both = ocp.args.Composite(layer=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
    try:
        found: Any = manager.restore(step, args=both)
        return found.about["told"] if _digest(found.layer) == found.about["sha256"] else None
    except Exception:  # Orbax raises all kinds of exceptions for a damaged step
        return None


def _digest(layer: Params) -> str:
    total = hashlib.sha256()
    for name, array in sorted(flatten_dict(layer, sep="/").items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """Describes a changed part of a run; hashes, which mean nothing to users, are left out."""
    long = any(isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2 for value in (theirs, ours))
    return name if long else f"{name} ({theirs}, now {ours})"


def _locked(folder: Path) -> int:
    """Takes a lock, which ends with the process however that ends, and returns its handle."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process writes into the folder of {folder}: wait for it, or end it.") from None
    except OSError:  # some network file systems have no locks
        pass
    return handle
