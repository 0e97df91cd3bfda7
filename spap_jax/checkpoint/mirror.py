"""Unfinished runs whose output is at an address: what `unfinished.py` keeps locally is also copied beside the output.

There `.NAME.resume` holds `run.json`, `decided.json` and each step as one archive: a store shows a file only once it is
complete. Spot instances lose their disks when they are preempted, so the copy in the store is authoritative: each run
starts from it.
"""

import contextlib
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from spap_jax.checkpoint.kept import (
    COPIES,
    DECIDED,
    LOCK,
    RUN,
    STEPS,
    check_resume_folder,
    clear_folder,
    resume_folder,
)
from spap_jax.checkpoint.unfinished import Json, Unfinished
from spap_jax.models.decoder import Params
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

    A copy is uploaded while the next step is made. If that fails, adding the next step raises the error.
    """

    def __init__(self, output: str | Path, run: Mapping[str, Any], blocks: int, fresh: bool = False):
        """See `Unfinished`; `output` is the address of a folder in a store.

        Raises:
            UserError: As in `Unfinished`; or the store fails.
        """
        self._copies = _copies(output)
        self._sender = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None
        super().__init__(output, run, blocks, fresh)
        self._arrived = len(self.told)

    @property
    def place(self) -> str:
        """Where the progress is kept, for messages."""
        return self._copies.address

    def __exit__(self, *raised: Any) -> None:
        """Also waits for a running upload; after an error, the local copy is of no further use and is removed."""
        quietly = contextlib.suppress(*[Exception] if raised[0] else ())  # one error is enough
        try:
            with quietly:
                self._arrive()
        finally:
            self._sender.shutdown()
            super().__exit__(*raised)
        if raised[0]:
            clear_folder(self.folder)
            with quietly:
                if not self.told:
                    _clear(self._copies)

    def decide(self, what: Any) -> None:
        """Stores what all steps depend on, in both places."""
        super().decide(what)
        self._copies.put({DECIDED: self.folder / DECIDED}, quietly=True)

    def add(self, layer: Params, told: Json) -> None:
        """Stores the next step; its copy is uploaded in the background."""
        self._arrive()
        super().add(layer, told)
        self._sending = self._sender.submit(self._send, len(self.told) - 1)

    def count(self) -> int:
        """Waits for a running upload and returns the number of steps that have arrived."""
        super().count()
        with contextlib.suppress(Exception):  # raised again when the next step is added
            self._arrive()
        return self._arrived

    def drop_steps(self) -> None:
        """Removes the steps and the partial output, not the identity of the run, in both places."""
        self._arrive()
        super().drop_steps()
        self._copies.remove(_archives(self._copies))
        self._arrived = 0

    def remove(self) -> None:
        """Removes everything, in both places."""
        super().remove()
        _clear(self._copies)

    def _bring(self, fresh: bool) -> None:
        clear_folder(self.folder, but=LOCK)
        if fresh or self._copies.read(RUN) is None:
            return
        found = _archives(self._copies)
        arrived, steps = self.folder / COPIES, self.folder / STEPS
        self._copies.get([name for name in (RUN, DECIDED) if self._copies.read(name) is not None], self.folder)
        self._copies.get(found, arrived, sum(found.values()))
        for name in found:
            with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(arrived / name) as archive:
                archive.extractall(steps, filter="data")
            (arrived / name).unlink()

    def _begin(self) -> None:
        super()._begin()
        _clear(self._copies)
        self._copies.put({RUN: self.folder / RUN}, quietly=True)

    def _open(self) -> ocp.CheckpointManager:
        manager = super()._open()
        counting = {f"{path.name}.tar" for path in (self.folder / STEPS).iterdir()}
        self._copies.remove(_archives(self._copies).keys() - counting)
        return manager

    def _arrive(self) -> None:
        """Waits for a running upload and raises its error, if any."""
        if self._sending is not None:
            self._sending.result()

    def _send(self, step: int) -> None:
        """Uploads a step once it is on disk, and then removes the one that it replaces."""
        self._manager.wait_until_finished()
        file = self.folder / COPIES / f"{step}.tar"
        file.parent.mkdir(exist_ok=True)
        with tarfile.open(file, "w") as archive:
            archive.add(self.folder / STEPS / str(step), str(step))
        self._copies.put({file.name: file}, quietly=True)
        file.unlink()
        self._arrived = step + 1
        if step > self._blocks:
            self._copies.remove([f"{step - 1}.tar"])


def _in_store(output: str | Path) -> bool:
    """Whether an output is at an address other than the hub's, which keeps only finished models."""
    return is_address(output) and hub_id(output) is None


def _copies(output: str | Path) -> Folder:
    return Folder(beside(output, "resume"))


def _clear(copies: Folder) -> None:
    """Removes what this module wrote, and the folder if nothing else is in it."""
    ours = {RUN, DECIDED, *_archives(copies)}
    if copies.files().keys() <= ours:
        copies.clear()
    else:
        copies.remove(ours & copies.files().keys())


def _archives(copies: Folder) -> dict[str, int]:
    """The names of the steps' archives, and their sizes."""
    return {name: about["size"] for name, about in copies.files().items() if re.fullmatch(r"\d+\.tar", name)}
