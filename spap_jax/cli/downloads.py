"""Downloads of files named by an address, made before a spinner starts, which would disrupt the download's bar."""

from spap_jax import checkpoint
from spap_jax.data.mixtures import shares_of
from spap_jax.remote import fetch_file, hub_id, is_address


def fetch_models(*names: str | None) -> None:
    """Downloads checkpoints into the cache; paths, hub ids and None are skipped."""
    for name in names:
        if name and is_address(name) and not hub_id(name):
            checkpoint.locate(name)


def fetch_data(*names: str | None) -> None:
    """Downloads data files into the cache, including copies named as c4:ADDRESS; other names are skipped."""
    parts = [part for name in names if name for part in shares_of(name)]
    for data, _ in parts:
        address = data if is_address(data) else data.partition(":")[2]
        if is_address(address):
            fetch_file(address)
