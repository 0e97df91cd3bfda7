"""The state of steps of a run, saved now and then as an Orbax checkpoint."""

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from spap_jax.backend import platform
from spap_jax.parallel import processes

SECONDS = 180
"""Seconds of steps between two saved states."""


class States:
    """The states in a folder, of which the last one is kept; each has the checks that were made until then."""

    def __init__(self, folder: str):
        """Names the folder, a path or an address; nothing is made before there is a state."""
        self._folder = folder
        self._saved: float | None = None
        self._made: Any = None

    @staticmethod
    def can_be_at(place: str) -> bool:
        """Whether Orbax can write to a place; it takes brackets for a pattern."""
        return re.match(r"(gs|s3)://|/", place) is not None and not re.search(r"\[.+\]", place)

    def save(self, tree: Any, checks: Sequence[Any]) -> None:
        """Saves a state if some minutes have passed since the last one, or since the first call.

        Args:
            checks: All checks so far, as JSON values; there are more in every call.
        """
        if self._saved is None:
            self._saved = time.monotonic()
            return
        if not processes.broadcast_from_leader(time.monotonic() - self._saved >= SECONDS):
            return
        from orbax.checkpoint import args

        arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
        items = args.Composite(state=args.StandardSave(arrays), checks=args.JsonSave({"checks": list(checks)}))
        self._manager().save(len(checks), args=items)
        if platform() == "cpu":  # its arrays are on the host already, where the next steps take their place
            self.wait()
        self._saved = time.monotonic()

    def restore(self, like: Any) -> tuple[Any, list[Any]] | None:
        """The last state and its checks; None if there is none, or it is damaged.

        ``like`` has arrays of the same shapes, dtypes and shardings, or descriptions of them.
        """
        from orbax.checkpoint import args

        manager = self._manager()
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

    def wait(self) -> None:
        """Waits until the last state is complete."""
        if self._made is not None:
            self._made.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        if self._made is not None:
            self._made.close()
            self._made = None

    def _manager(self) -> Any:
        if self._made is None:
            from orbax.checkpoint import (
                CheckpointManager,
                CheckpointManagerOptions,
                JsonCheckpointHandler,
                StandardCheckpointHandler,
            )

            # OCDBT, the default, holds all arrays in memory once more until they are written. Without it, Orbax warns
            # at every save that there are no such files to merge.
            logging.getLogger("absl").addFilter(_is_not_of_ocdbt)
            handlers = {"state": StandardCheckpointHandler(use_ocdbt=False), "checks": JsonCheckpointHandler()}
            options = CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
            self._made = CheckpointManager(self._folder, options=options, item_handlers=handlers)
        return self._made


def _is_not_of_ocdbt(record: logging.LogRecord) -> bool:
    return "OCDBT" not in record.getMessage()


def _described(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
