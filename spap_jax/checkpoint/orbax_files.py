"""The files of an Orbax folder, which can be recognised without Orbax."""

from pathlib import Path

PARAMS, SOURCE = "params", "spap_source.json"
"""Names of the folder of the parameters, and of the file that says where they came from."""


def is_orbax(folder: Path) -> bool:
    """Whether a folder was written by `save_orbax`."""
    return (folder / PARAMS).is_dir() and (folder / SOURCE).is_file()


def params_files(folder: Path) -> list[Path]:
    """The files that hold the parameters of an Orbax folder."""
    return sorted(file for file in (folder / PARAMS).rglob("*") if file.is_file())
