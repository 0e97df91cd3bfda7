"""The progress of an unfinished run, kept beside its output so that the same command resumes where it stopped.

`.NAME.resume` holds `run.json` (the identity of the run), `decided.json` (decisions before the first step, if any),
`steps/` (a step is the weights of one block, or the state of steps on all of them, and its report), `output/` (the
partial output) and `lock`. It is removed when the run succeeds. For an output at an address it is a copy of the folder
there (`mirror.py`).

The first L steps of a run on L blocks store a block each, and all stay. A later step stores a complete state, which
replaces the one before; training has no others. A step is written in the background and renamed when it is complete: a
process that is killed loses the step in progress. A step stores a hash of its weights: if it was damaged later, it
counts as lost.

A state is several times as large as the result, and steps on accelerators may be faster than a disk. So a step whose
state would have to wait for the one before, or would leave too little room for the result, stores none: a process that
goes on makes these steps again.

Of several processes, the leading one stores the blocks, and each stores its own part of a state, as its devices hold
it, in a folder of its own, `.NAME.resume-PROCESS`: no host holds a whole state, and disks need not be shared. A state
counts if all processes have their parts, so each keeps the one before until the others have the newest too.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from spap_jax import devices
from spap_jax.backend import platform
from spap_jax.checkpoint.behind import Behind
from spap_jax.checkpoint.kept import (
    DECIDED,
    LOCK,
    OUTPUT,
    RUN,
    STEPS,
    check_resume_folder,
    clear_folder,
    resume_folder,
)
from spap_jax.checkpoint.step_file import SUFFIX, Json, read_step, renamed, told_if_intact, write_step
from spap_jax.errors import UserError, warn
from spap_jax.models import Params
from spap_jax.quantities import bytes_text

_LEFT = 2
"""How many times the room that the finished blocks take is left for the result, which holds more than the blocks."""


class Unfinished:
    """The progress of a run: created when it begins, or found as an earlier run left it.

    Every process has one. All of them have to open it, and to make the calls of which this is said.

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
            UserError: Another process uses the folder, it belongs to another run or to none, or the disk is full.
        """
        self._process = jax.process_index()
        check_resume_folder(output, self._process)
        self._output = output
        self.folder = resume_folder(output, self._process)
        self._run, self._blocks = dict(run), blocks
        self._lock = _locked(self.folder)
        self._writing = threading.Lock()
        self._behind = Behind()
        self.lost = self._full = False
        self.told: list[Json] = []
        try:
            self._bring(fresh)
            self.found = (self.folder / RUN).exists() and not fresh
            if self.found:
                self._check()
            if not self.found:
                self._begin()
            self._open()
        except BaseException:
            if not (self.folder / RUN).exists():
                clear_folder(self.folder)
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Returns `self`."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Waits for pending writes and releases the lock; an error before the first step removes the run's files."""
        try:
            self._behind.__exit__(*raised)
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
        _write_json(self.folder / DECIDED, what)

    @property
    def output(self) -> Path:
        """The folder in which the output is written until it is complete."""
        return self.folder / OUTPUT

    @property
    def name(self) -> str:
        """Name of the run: a hash of everything that its result depends on."""
        return hashlib.sha256(json.dumps(self._run, sort_keys=True).encode()).hexdigest()

    def read(self, step: int) -> Params:
        """What a step was given, as numpy arrays; it must not have been replaced. All processes have to call this."""
        found = read_step(self._file(step)) if self._stores(step) else {}
        return found if step >= self._blocks else devices.broadcast_from_leader(found)

    def add(self, kept: Callable[[], Params], told: Json) -> None:
        """Stores the next step; its files are written in the background. All processes have to call this.

        Args:
            kept: Returns the weights of the step's block, which all processes have; or this process's part of a state.
            told: Report of the step, as a JSON value, the same in all processes.
        """
        step = len(self.told)
        if step <= self._blocks or self._is_free():
            self._behind.wait()
            reports = [*self.told[self._blocks :], told]
            given = jax.device_get(kept())  # in all processes, as a block may be gathered from them
            with self._writing:
                if self._stores(step):
                    self._behind(self._store, step, given, reports)
                self.told.append(told)
        else:
            self.told.append(told)
        if step >= self._blocks and platform() == "cpu":
            self._behind.wait()  # a CPU's arrays are on the host: the next steps cannot change in place what is read

    def _is_free(self) -> bool:
        """Whether all processes have written what they were given, so that they can take another state."""
        mine = [] if self._behind.busy or self._full else [0]
        return bool(devices.known_to_all(mine))

    def _stores(self, step: int) -> bool:
        """Whether this process stores a part of a step."""
        return step >= self._blocks or devices.leads()

    def _store(self, step: int, layer: Params, reports: list[Json]) -> None:
        """Writes a step, and removes the states that it makes useless; a state only that leaves room for the result."""
        states = sorted(number for number in _numbers(self.folder / STEPS) if number >= self._blocks)
        if step >= self._blocks:
            needed = sum(array.nbytes for array in jax.tree.leaves(layer)) + _LEFT * self._stored_blocks()
            if self._free() < needed and states:
                self._discard(states.pop())
            if self._free() < needed:
                self._full = True
                warn(
                    f"the disk of {self.folder.parent} has no room for the state of the steps beside the result "
                    f"({bytes_text(needed)}), so it is not kept: a run that is interrupted makes all steps again."
                )
                return
        self._write(step, layer, reports)
        still = min(2, jax.process_count()) - 1  # others may not have written this one yet
        for useless in states[: len(states) - still]:
            self._discard(useless)

    def _free(self) -> float:
        disk = shutil.disk_usage(self.folder)
        return disk.free if disk.total else math.inf  # some network file systems report a size of 0

    def _stored_blocks(self) -> int:
        """Bytes of the finished blocks on this disk."""
        return sum(self._file(step).stat().st_size for step in _numbers(self.folder / STEPS) if step < self._blocks)

    def _write(self, step: int, layer: Params, reports: list[Json]) -> None:
        write_step(self._file(step), layer, reports)

    def _discard(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / STEPS / f"{step}{SUFFIX}"

    def count(self) -> int:
        """Waits for pending writes and returns the number of steps on disk."""
        with contextlib.suppress(Exception):  # raised again when the next step is added
            self._behind.wait()
        return max(_numbers(self.folder / STEPS), default=-1) + 1

    def settle(self) -> None:
        """Waits until all steps are on disk and blocks new ones, for a process that is about to end."""
        self._writing.acquire()
        self.count()

    def drop_steps(self) -> None:
        """Removes steps and partial output but not the run's identity, for a command with other outputs to make.

        All processes have to call this; none removes anything before all do, as the result is not complete before.
        """
        devices.meet()
        self._drop()

    def _drop(self) -> None:
        self._behind.wait()
        for name in (STEPS, OUTPUT):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def forget(self) -> None:
        """Removes all steps, which cannot be resumed; the rest is removed at the end of the `with` block."""
        self._drop()
        (self.folder / STEPS).mkdir()
        self.told.clear()

    def remove(self) -> None:
        """Removes everything, once the command has succeeded; call it after the `with` block, in all processes."""
        devices.meet()
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
        further = (resume_folder(self._output, process) for process in itertools.count(jax.process_count()))
        if devices.leads():  # an earlier run may have had more processes
            for folder in itertools.takewhile(lambda folder: (folder / LOCK).exists(), further):
                clear_folder(folder)
        _write_json(self.folder / RUN, self._run)

    def _open(self) -> None:
        """Finds the steps that count, and removes others."""
        steps = self.folder / STEPS
        steps.mkdir(exist_ok=True)
        there = {step: told_if_intact(self._file(step)) for step in _numbers(steps)}
        count, self.told = self._agreed({step: told for step, told in there.items() if told})
        # A process may be killed before the others have written the state that it has.
        self.lost = self.lost or any(step > count or not there[step] for step in there)
        kept = {self._file(step) for step in _kept(count, self._blocks)}
        for entry in set(steps.iterdir()) - kept:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _agreed(self, intact: dict[int, list[Json]]) -> tuple[int, list[Json]]:
        """The number of steps that count, and their reports, in all processes."""
        states = devices.known_to_all(step for step in intact if step >= self._blocks)
        there = {step: told for step, told in intact.items() if step < self._blocks or step in states}
        count, told = devices.told_to_all(_counting(there, self._blocks))
        return count, told


def _write_json(path: Path, what: Any) -> None:
    """Writes a JSON file that is complete or absent."""
    with renamed(path) as written:
        written.write_text(json.dumps(what, indent=1), encoding="utf-8")


def _numbers(steps: Path) -> list[int]:
    """The numbers of the steps in a folder."""
    return [int(path.stem) for path in steps.glob(f"*{SUFFIX}") if path.stem.isdecimal()]


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
