"""Writes something while the next thing is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self


class Behind:
    """Makes one call after the other in a thread, while the caller goes on; at most one call is not finished."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "writing")
        self._call: Future[Any] | None = None

    def __enter__(self) -> Self:
        """Returns `self`."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Waits for the last call, and raises its error unless the block raised one."""
        self._thread.shutdown()
        if not raised[0]:
            self.wait()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begins a call once the one before has ended, and raises the error of that one."""
        self.wait()
        self._call = self._thread.submit(function, *arguments)

    @property
    def busy(self) -> bool:
        """Whether the last call has not ended."""
        return self._call is not None and not self._call.done()

    @property
    def failed(self) -> bool:
        """Whether the last call has ended with an error."""
        return self._call is not None and self._call.done() and self._call.exception() is not None

    def wait(self) -> None:
        """Waits for the last call, and raises its error, every time."""
        if self._call is not None:
            self._call.result()
