"""What is named by an address comes to this machine before a spinner runs, which would tear the bar of its download."""

from spap_jax import checkpoint
from spap_jax.remote import fetch_file, hub_id, is_address


def fetch_models(*names: str | None) -> None:
    """Brings checkpoints into the cache; paths, hub ids and None are passed over."""
    for name in names:
        if name and is_address(name) and not hub_id(name):
            checkpoint.locate(name)


def fetch_data(*names: str | None) -> None:
    """Brings data files into the cache, also those that are named as a copy, c4:ADDRESS; others are passed over."""
    for name in names:
        address = name if name and is_address(name) else (name or "").partition(":")[2]
        if is_address(address):
            fetch_file(address)
