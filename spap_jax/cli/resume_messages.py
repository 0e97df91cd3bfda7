"""Messages about a run that a command resumes, and about one that it leaves unfinished."""

import contextlib
from collections.abc import Callable, Iterator

from spap_jax.checkpoint.store import FolderStore
from spap_jax.cli import console
from spap_jax.errors import NotFiniteError
from spap_jax.parallel.processes import is_leader


@contextlib.contextmanager
def telling(
    store: FolderStore, before_end: list[Callable[[], str]], amount: Callable[[int, int], str]
) -> Iterator[None]:
    """Says what an interrupted process left, and what this one leaves if it ends early.

    Args:
        store: What is kept of the run; open it outside.
        before_end: List to which an action before a termination by SIGTERM is added.
        amount: Returns a clause on how far a run is, from the numbers of finished blocks and of checks that are kept.
    """

    def words() -> str:
        kept = store.kept()
        if not any(kept):
            return "nothing is kept yet."
        return f"{amount(*kept)}, kept in {store.place}: the same command goes on from there, --no-resume starts over."

    def end() -> str:
        store.settle()
        console.err.show_cursor()  # a progress bar has hidden it
        return words() if is_leader() else "what is kept is said by the first process."

    if store.found and any(store.kept()):
        console.err.print(f"going on: {amount(*store.kept())}, kept in {store.place}")
    before_end.append(end)
    try:
        yield
    except NotFiniteError:  # which is not resumed
        raise
    except BaseException:
        store.settle()  # the last block may not be on the disk yet
        if any(store.kept()):
            console.err.print(words())
        raise
    finally:
        before_end.remove(end)
