"""Files that a command reads, fetched before its work begins, and before a spinner disrupts a download's bar."""

from spap_jax import checkpoint
from spap_jax.data.sources import data_file, local_file, read_file, shares_of


def fetch_models(*names: str | None) -> None:
    """Downloads checkpoints that are not in the cache.

    Raises:
        UserError: One is not there, or cannot be downloaded.
    """
    for name in filter(None, names):
        checkpoint.locate(name)


def fetch_data(*names: str | None) -> None:
    """Downloads data files into the cache, copies named as c4:FILE among them; data sets of the hub are skipped.

    Raises:
        UserError: A file cannot be downloaded, is missing or empty, or is of an unsupported type.
    """
    for data, _ in [part for name in names if name for part in shares_of(name)]:
        if file := data_file(data):
            read_file(local_file(file))  # which opens it, and reads nothing
