"""Kinds of parameters that several commands have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

Resume = Annotated[bool, Parameter(negative="--no-resume")]
"""What is on unless it is switched off: cli/app.py gives no switch a negative of its own."""

if TYPE_CHECKING:
    ModelName = Data = Place = str
else:
    # What is typed stays a string, a hub id or an address perhaps. That it may be a path tells shells to complete it.
    ModelName, Data, Place = (Annotated[str | Path, Parameter(metavar=word)] for word in ("MODEL", "DATA", "FOLDER"))
