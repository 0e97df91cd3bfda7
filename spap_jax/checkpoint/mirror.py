"""Unfinished runs whose output is at an address: what `unfinished.py` keeps locally is also copied beside the output.

There `.NAME.resume` holds `run.json`, `decided.json` and the steps: a store shows a file only once it is complete. Spot
instances lose their disks when they are preempted, so the copy in the store is authoritative: each run starts from it.
"""

import contextlib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from spap_jax import devices
from spap_jax.checkpoint.kept import (
    DECIDED,
    LOCK,
    RUN,
    STEPS,
    check_resume_folder,
    clear_folder,
    resume_folder,
    resume_role,
)
from spap_jax.checkpoint.step_file import SUFFIX, Json
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.models import Params
from spap_jax.places import beside
from spap_jax.remote import Folder, hub_id, is_address


def is_unfinished(output: str | Path) -> bool:
    """Whether a run into `output` was interrupted.

    Raises:
        UserError: The output is at an address, and its store fails; or the resume folder is a file or was not made by a
            run.
    """
    check_resume_folder(output)
    if _in_store(output):
        return _copies(output).read(RUN) is not None
    return (resume_folder(output) / RUN).exists()


def unfinished(output: str | Path, run: Mapping[str, Any], blocks: int, fresh: bool = False) -> Unfinished:
    """Opens the progress of a run, with a copy in the store if the output is at an address; see `Unfinished`."""
    return (Mirrored if _in_store(output) else Unfinished)(output, run, blocks, fresh)


class Mirrored(Unfinished):
    """The progress of a run, with a copy of each step beside the output's address.

    A step counts as stored once its copy has arrived. If that fails, adding the next step raises the error.
    """

    def __init__(self, output: str | Path, run: Mapping[str, Any], blocks: int, fresh: bool = False):
        """See `Unfinished`; `output` is the address of a folder in a store.

        Raises:
            UserError: As in `Unfinished`; or the store fails.
        """
        self._copies = _copies(output, jax.process_index())
        super().__init__(output, run, blocks, fresh)
        self._arrived = len(self.told)

    @property
    def place(self) -> str:
        """Where the progress is kept, for messages."""
        return self._copies.address

    def __exit__(self, *raised: Any) -> None:
        """See `Unfinished`; after an error, the local copy is of no further use and is removed."""
        super().__exit__(*raised)
        if raised[0]:
            clear_folder(self.folder)
            with contextlib.suppress(Exception):  # one error is enough
                if not self.told:
                    _clear(self._copies)

    def decide(self, what: Any) -> None:
        """Stores what all steps depend on, in both places."""
        super().decide(what)
        self._copies.put({DECIDED: self.folder / DECIDED}, quietly=True)

    def count(self) -> int:
        """Waits for a running upload and returns the number of steps that have arrived."""
        super().count()
        return self._arrived

    def remove(self) -> None:
        """Removes everything, in both places."""
        super().remove()
        _clear(self._copies)

    def _bring(self, fresh: bool) -> None:
        clear_folder(self.folder, but=LOCK)
        if fresh or self._copies.read(RUN) is None:
            return
        found = _steps(self._copies)
        self._copies.get([name for name in (RUN, DECIDED) if self._copies.read(name) is not None], self.folder)
        self._copies.get(found, self.folder / STEPS, sum(found.values()))

    def _begin(self) -> None:
        super()._begin()
        _clear(self._copies)
        further = (_copies(self._output, process) for process in itertools.count(jax.process_count()))
        if devices.leads():  # an earlier run may have had more processes
            for copies in itertools.takewhile(lambda copies: copies.read(RUN) is not None, further):
                _clear(copies)
        self._copies.put({RUN: self.folder / RUN}, quietly=True)

    def _open(self) -> None:
        super()._open()
        counting = {path.name for path in (self.folder / STEPS).iterdir()}
        self._copies.remove(_steps(self._copies).keys() - counting)

    def _write(self, step: int, layer: Params, reports: list[Json]) -> None:
        super()._write(step, layer, reports)
        file = self._file(step)
        self._copies.put({file.name: file}, quietly=True)
        self._arrived = step + 1

    def _discard(self, step: int) -> None:
        super()._discard(step)
        self._copies.remove([self._file(step).name])

    def _drop(self) -> None:
        super()._drop()
        self._copies.remove(_steps(self._copies))
        self._arrived = 0


def _in_store(output: str | Path) -> bool:
    """Whether an output is at an address other than the hub's, which keeps only finished models."""
    return is_address(output) and hub_id(output) is None


def _copies(output: str | Path, process: int = 0) -> Folder:
    return Folder(beside(output, resume_role(process)))


def _clear(copies: Folder) -> None:
    """Removes what this module wrote, and the folder if nothing else is in it."""
    ours = {RUN, DECIDED, *_steps(copies)}
    if copies.files().keys() <= ours:
        copies.clear()
    else:
        copies.remove(ours & copies.files().keys())


def _steps(copies: Folder) -> dict[str, int]:
    """The names of the files of steps, and their sizes."""
    step = re.compile(rf"\d+{re.escape(SUFFIX)}")
    return {name: about["size"] for name, about in copies.files().items() if step.fullmatch(name)}
