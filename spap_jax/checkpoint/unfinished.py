"""The progress of an unfinished run, kept beside its output so that the same command resumes where it stopped.

`.NAME.resume` holds `run.json` (the identity of the run), `decided.json` (decisions before the first step, if any),
`steps/` (a step is the weights of one block, or the state of steps on all of them, and its report), `output/` (the
partial output) and `lock`. It is removed when the run succeeds.

The first L steps of a run on L blocks store a block each, and all stay. A later step stores a complete state, which
replaces the one before; training has no others. A step is written in the background and renamed when it is complete: a
process that is killed loses the step in progress. A step stores a hash of its weights: if it was damaged later, it
counts as lost.

A state is several times as large as the result, and steps on accelerators may be faster than a disk. So a step whose
state would have to wait for the one before, would leave too little room for the result, or has no place in the host's
memory, stores none: a process that goes on makes these steps again.

Of several processes, the leading one stores the blocks, and each stores its own part of a state, as its devices hold
it, in a folder of its own, `.NAME.resume-PROCESS`: no host holds a whole state, and disks need not be shared. A state
counts if all processes have their parts, so each keeps the one before until the others have the newest too.

For an output in a store, `run.json`, `decided.json` and the steps are also copied beside the output there, where a file
shows only once it is complete. Spot instances lose their disks when they are preempted, so the copy is authoritative:
each run starts from it, a step counts as stored once its copy has arrived, and if that fails, adding the next step
raises the error.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from spap_jax import memory
from spap_jax.backend import platform
from spap_jax.checkpoint.behind import Behind
from spap_jax.checkpoint.lock import locked, take_lock
from spap_jax.checkpoint.step_file import NEW, SUFFIX, Json, read_step, renamed, told_if_intact, write_step
from spap_jax.errors import UserError, option, warn
from spap_jax.models import Params
from spap_jax.parallel import processes
from spap_jax.parallel.placement import bytes_of
from spap_jax.quantities import bytes_text
from spap_jax.storage.files import Folder
from spap_jax.storage.location import beside, is_address, real_path, working_folder

_RUN, _DECIDED, _STEPS, _LOCK, _OUTPUT = "run.json", "decided.json", "steps", "lock", "output"

_LEFT = 2
"""How many times the room that the finished blocks take is left for the result, which holds more than the blocks."""


def resume_folder(output: str | Path, process: int = 0) -> Path:
    """The local folder in which a process of a run into `output` keeps its progress."""
    place = working_folder(str(output)) if is_address(output) else real_path(output)
    return Path(beside(place, _role(process)))


def check_resume_folder(output: str | Path, process: int = 0) -> None:
    """Checks that an existing resume folder was made by a run, since the run removes files in it.

    Raises:
        UserError: It is a file, or a folder that no run made.
    """
    folder = resume_folder(output, process)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, where the finished blocks of the run would be kept: move it away.")
    if any(folder.iterdir()) and not (folder / _LOCK).exists():
        raise UserError(
            f"{folder}, where the finished blocks of the run would be kept, holds files that no run left: move them "
            "away, or name another output."
        )


def is_unfinished(output: str | Path) -> bool:
    """Whether a run into `output` was interrupted.

    Raises:
        UserError: The output is at an address, and its store fails; or the resume folder is a file or was not made by a
            run.
    """
    check_resume_folder(output)
    if _in_store(output):
        return _copies(output).read(_RUN) is not None
    return (resume_folder(output) / _RUN).exists()


def begun_with(output: str | Path) -> dict[str, Any]:
    """What a run into `output` depends on that was interrupted; empty if there is none, or if that cannot be read.

    Raises:
        UserError: The output is at an address, and its store fails.
    """
    if not _in_store(output):
        return _read_run(resume_folder(output))
    try:
        return dict(json.loads(_copies(output).read(_RUN) or b"{}"))
    except (TypeError, ValueError):
        return {}


class Unfinished:
    """The progress of a run: created when it begins, or found as an earlier run left it.

    Every process has one. All of them have to open it, and to make the calls of which this is said.

    Attributes:
        folder: Folder in which the progress is kept.
        found: Whether an earlier process of the same run left progress.
        lost: Whether some of it was damaged, and is not used.
        told: Reports of the steps that count, in order.
    """

    def __init__(self, output: str | Path, run: Mapping[str, Any], blocks: int, fresh: bool = False, result: int = 0):
        """Opens the folder, or creates it.

        Args:
            output: Output folder of the run: a path, or an address.
            run: Everything that its result depends on, by name, as JSON values.
            blocks: Number of steps that all stay, L.
            fresh: Whether to discard the progress of an earlier run.
            result: Number of bytes that this process will write if it keeps no blocks, which say how many otherwise.

        Raises:
            UserError: Another process uses the folder, it belongs to another run or to none, the disk is full, the
                store fails, or the processes of this run would make different ones.
        """
        self._process = jax.process_index()
        _check_alike(run)
        check_resume_folder(output, self._process)
        self._output = output
        self._copies = _copies(output, self._process) if _in_store(output) else None
        self.folder = resume_folder(output, self._process)
        self._run, self._blocks, self._result = dict(run), blocks, result
        self._lock = take_lock(self.folder / _LOCK, _writes_into(self.folder))
        self._writing = threading.Lock()
        self._behind = Behind()
        self.lost = self._full = False
        self.told: list[Json] = []
        try:
            if self._copies:
                self._bring(self._copies, fresh)
            processes.meet()  # the first one may have had all blocks to download
            found = (self.folder / _RUN).exists() and not fresh
            self.found = processes.told_to_all(found) and found  # what the first one lost, the others cannot go on from
            if self.found:
                self._check()
            if not self.found:
                self._begin()
            self._open()
            self._sharers = processes.on_this_host()
        except BaseException:
            if not (self.folder / _RUN).exists():
                _clear_folder(self.folder)
            os.close(self._lock)
            raise
        self._arrived = len(self.told)

    def __enter__(self) -> Self:
        """Returns `self`."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Waits for pending writes and releases the lock; an error before a run's first step removes its files.

        After any error, files of which the store has a copy are of no further use here and are removed.
        """
        try:
            self._behind.__exit__(*raised)
        finally:
            useless = not (self.told or self.found)
            if raised[0] and (self._copies or useless):
                _clear_folder(self.folder)
            os.close(self._lock)
        if raised[0] and self._copies and useless:
            with contextlib.suppress(Exception):  # one error is enough
                _clear_copies(self._copies)

    @property
    def place(self) -> str:
        """Where the progress is kept, for messages."""
        return self._copies.address if self._copies else str(self.folder)

    @property
    def decided(self) -> Any:
        """The last argument of `decide`, in this process or an earlier one; None if there was none."""
        try:
            return json.loads((self.folder / _DECIDED).read_bytes())
        except (OSError, ValueError):
            return None

    def decide(self, what: Any) -> None:
        """Stores a JSON value that all steps depend on; call it before the first step."""
        _write_json(self.folder / _DECIDED, what)
        self._copy(self.folder / _DECIDED)

    @property
    def output(self) -> Path:
        """The folder in which the output is written until it is complete."""
        return self.folder / _OUTPUT

    @property
    def name(self) -> str:
        """Name of the run: a hash of everything that its result depends on."""
        return hashlib.sha256(json.dumps(self._run, sort_keys=True).encode()).hexdigest()

    def read(self, step: int) -> Params:
        """What a step was given, as numpy arrays; it must not have been replaced. All processes have to call this."""
        found = read_step(self._file(step)) if self._stores(step) else {}
        return found if step >= self._blocks else processes.broadcast_from_leader(found)

    def add(self, kept: Callable[[], Params], told: Json) -> None:
        """Stores the next step; its files are written in the background. All processes have to call this.

        Args:
            kept: Returns the weights of the step's block, which all processes have; or this process's part of a state,
                on its devices or on the host.
            told: Report of the step, as a JSON value, the same in all processes.
        """
        step = len(self.told)
        if step <= self._blocks or self._is_free():
            self._behind.wait()
            reports = [*self.told[self._blocks :], told]
            given = kept()  # in all processes, as a block may be gathered from them
            with self._writing:
                if self._stores(step) and (step < self._blocks or self._fits_host(given)):
                    self._behind(self._store, step, jax.device_get(given), reports)
                self.told.append(told)
        else:
            self.told.append(told)
        if step >= self._blocks and platform() == "cpu":
            self._behind.wait()  # a CPU's arrays are on the host: the next steps cannot change in place what is read

    def _is_free(self) -> bool:
        """Whether all processes have written what they were given, so that they can take another state."""
        mine = [] if self._behind.busy or self._behind.failed or self._full else [0]
        free = bool(processes.known_to_all(mine))
        if self._behind.failed:
            self._behind.wait()  # raises: this process ends, and the others keep the state that all have
        return free

    def _stores(self, step: int) -> bool:
        """Whether this process stores a part of a step."""
        return step >= self._blocks or processes.leads()

    def _store(self, step: int, layer: Params, reports: list[Json]) -> None:
        """Writes a step, and removes the states that it makes useless; a state only that leaves room for the result."""
        states = self._states()
        if step < self._blocks:
            write_step(self._file(step), layer, reports)
        elif not self._write_state(step, layer, reports):
            self._keep_no_state(f"the disk of {self.folder.parent} has no room for it beside the result", layer)
            return
        self._copy(self._file(step))
        self._arrived = step + 1
        still = min(2, jax.process_count()) - 1  # others may not have written this one yet
        for useless in states[: len(states) - still]:
            self._discard(useless)

    def _fits_host(self, state: Params) -> bool:
        """Whether the host has memory for the arrays of a state that are on devices; a CPU's are on the host.

        What is on the host are the best weights, and better ones may come before the state is written. Other processes
        on the host have parts of their own at the same moment.
        """
        size = bytes_of(state)
        if platform() == "cpu" or size <= memory.left() / self._sharers:
            return True
        self._keep_no_state("this host has no memory for it", state)
        return False

    def _keep_no_state(self, why: str, state: Params) -> None:
        self._full = True
        size = bytes_text(bytes_of(state))
        warn(
            f"the state of the steps ({size}) is not kept, as {why}: a run that is interrupted makes these steps again."
        )

    def _write_state(self, step: int, state: Params, reports: list[Json]) -> bool:
        """Writes a state, in place of the one before if there is no room for both; False if there is none for one."""
        free, needed = memory.free_disk(self.folder), self._needed(state)
        before = [self._file(number) for number in self._states()[-1:]]
        if free + sum(file.stat().st_size for file in before) < needed:
            return False
        for file in before if free < needed else ():
            file.unlink()  # here: what the store has of it stays until the new one has arrived
        write_step(self._file(step), state, reports)
        return True

    def _needed(self, state: Params) -> int:
        """Bytes of a state and of the result."""
        blocks = (self._file(n).stat().st_size for n in _numbers(self.folder / _STEPS) if n < self._blocks)
        return bytes_of(state) + (_LEFT * sum(blocks) or self._result)

    def _states(self) -> list[int]:
        """The numbers of the states on the disk, in order."""
        return sorted(number for number in _numbers(self.folder / _STEPS) if number >= self._blocks)

    def _discard(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)
        if self._copies:
            self._copies.remove([self._file(step).name])

    def _file(self, step: int) -> Path:
        return self.folder / _STEPS / f"{step}{SUFFIX}"

    def count(self) -> int:
        """Waits for pending writes and returns the number of steps on disk, or that have arrived in the store."""
        with contextlib.suppress(Exception):  # raised again when the next step is added
            self._behind.wait()
        return self._arrived if self._copies else max(_numbers(self.folder / _STEPS), default=-1) + 1

    def settle(self) -> None:
        """Waits until all steps are on disk and blocks new ones, for a process that is about to end."""
        self._writing.acquire()
        self.count()

    def drop_steps(self) -> None:
        """Removes steps and partial output but not the run's identity, for a command with other outputs to make.

        All processes have to call this; none removes anything before all do, as the result is not complete before.
        """
        processes.meet()
        self._drop()

    def _drop(self) -> None:
        self._behind.wait()
        for name in (_STEPS, _OUTPUT):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if self._copies:
            self._copies.remove(_steps(self._copies))
        self._arrived = 0

    def forget(self) -> None:
        """Removes all steps, which cannot be resumed; the rest is removed at the end of the `with` block."""
        self._drop()
        (self.folder / _STEPS).mkdir()
        self.told.clear()
        self.found = False

    def remove(self) -> None:
        """Removes everything, once the command has succeeded; call it after the `with` block, in all processes.

        What another run has begun there since stays.
        """
        processes.meet()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.folder / _LOCK, _writes_into(self.folder)))
            except UserError:
                return
            if _read_run(self.folder) in ({}, self._run):
                _clear_folder(self.folder)
                if self._copies:
                    _clear_copies(self._copies)

    def _copy(self, file: Path) -> None:
        """Copies a file into the store, if the output is there."""
        if self._copies:
            self._copies.put({file.name: file}, quietly=True)

    def _bring(self, copies: Folder, fresh: bool) -> None:
        """Fetches the progress from the store, in place of what is here."""
        _clear_folder(self.folder, but=_LOCK)
        if fresh or copies.read(_RUN) is None:
            return
        found = _steps(copies)
        copies.get({name: None for name in (_RUN, _DECIDED) if copies.read(name) is not None}, self.folder)
        copies.get(found, self.folder / _STEPS)

    def _check(self) -> None:
        """Refuses the progress of another run; an unreadable `run.json` counts as none."""
        theirs = _read_run(self.folder)
        if not theirs:
            self.found, self.lost = False, True
            return
        changed = [name for name in self._run | theirs if self._run.get(name) != theirs.get(name)]
        if changed:
            raise UserError(
                f"{self.place} holds a run that was interrupted and differs from this one in "
                f"{', '.join(_difference(name, theirs.get(name), self._run.get(name)) for name in changed)}: "
                f"repeat the command as it was, or pass {option('resume', False)} to discard that run and start over."
            )

    def _begin(self) -> None:
        _clear_folder(self.folder, but=_LOCK)
        if processes.leads():  # an earlier run may have had more processes
            folders = (resume_folder(self._output, process) for process in itertools.count(jax.process_count()))
            for folder in itertools.takewhile(lambda folder: (folder / _LOCK).exists(), folders):
                _clear_folder(folder)
        _write_json(self.folder / _RUN, self._run)
        if self._copies:
            _clear_copies(self._copies)
            if processes.leads():
                others = (_copies(self._output, process) for process in itertools.count(jax.process_count()))
                for copies in itertools.takewhile(lambda copies: copies.read(_RUN) is not None, others):
                    _clear_copies(copies)
        self._copy(self.folder / _RUN)

    def _open(self) -> None:
        """Finds the steps that count, the same in all processes, and removes others."""
        steps = self.folder / _STEPS
        steps.mkdir(exist_ok=True)
        there = {step: told_if_intact(self._file(step)) for step in _numbers(steps)}
        processes.meet()  # the first one has all blocks to check
        states = processes.known_to_all(step for step, told in there.items() if told and step >= self._blocks)
        usable = {step: told for step, told in there.items() if told and (step < self._blocks or step in states)}
        count, self.told = processes.told_to_all(_counting(usable, self._blocks))
        # A process may be killed before the others have written the state that it has.
        self.lost = self.lost or any(step > count or not there[step] for step in there)
        kept = {self._file(step) for step in _kept(count, self._blocks)}
        for entry in set(steps.iterdir()) - kept:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if self._copies:
            self._copies.remove(_steps(self._copies).keys() - {path.name for path in steps.iterdir()})


def _check_alike(run: Mapping[str, Any]) -> None:
    """Refuses processes that read other files, or have other settings, than the first one.

    Raises:
        UserError: In every process, if one does.
    """
    first = processes.told_to_all(dict(run))
    differing = [name for name in run if run[name] != first.get(name)]
    if not processes.known_to_all([] if differing else [0]):
        what = f": here {', '.join(differing)} differ{'s' * (len(differing) == 1)}" if differing else ""
        raise UserError(
            f"the processes of this run differ in what they read, or in their settings, from the first{what}; give all "
            "of them the same command, model and data."
        )


def _role(process: int) -> str:
    """The role of a process's resume folder; see `places.beside`."""
    return f"resume-{process}" if process else "resume"


def _in_store(output: str | Path) -> bool:
    """Whether an output is at an address."""
    return is_address(output)


def _copies(output: str | Path, process: int = 0) -> Folder:
    return Folder(beside(output, _role(process)))


def _clear_folder(folder: Path, but: str | None = None) -> None:
    """Removes what a run writes, and the folder if nothing else is in it."""
    for name in (_STEPS, _OUTPUT, _RUN, _RUN + NEW, _DECIDED, _DECIDED + NEW, _LOCK):
        path = folder / name
        if name == but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _clear_copies(copies: Folder) -> None:
    """Removes what a run copied into a store, and the folder if nothing else is in it."""
    ours, there = {_RUN, _DECIDED, *_steps(copies)}, copies.files().keys()
    if there <= ours:
        copies.clear()
    else:
        copies.remove(ours & there)


def _steps(copies: Folder) -> dict[str, int]:
    """The names of the files of steps in a store, and their sizes."""
    step = re.compile(rf"\d+{re.escape(SUFFIX)}")
    return {name: about["size"] for name, about in copies.files().items() if step.fullmatch(name)}


def _read_run(folder: Path) -> dict[str, Any]:
    """What the run in a resume folder depends on; empty if there is none, or if that cannot be read."""
    try:
        return dict(json.loads((folder / _RUN).read_bytes()))
    except (OSError, TypeError, ValueError):
        return {}


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


def _writes_into(folder: Path) -> str:
    return f"writes into the folder of {folder}"
