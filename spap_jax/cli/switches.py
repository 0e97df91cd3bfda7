"""Parameter types that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

Resume = Annotated[bool, Parameter(negative="--no-resume")]
"""A switch that is on by default; it needs its own --no-resume, since cli/app.py disables negative forms."""

Bos = Annotated[bool | None, Parameter(negative="--no-bos")]
"""A switch whose default depends on the model."""

if TYPE_CHECKING:
    ModelName = Data = OutputPath = str
else:
    # The value stays a string, since it may be a hub id or an address. `Path` makes shells complete it as a path.
    ModelName, Data, OutputPath = (
        Annotated[str | Path, Parameter(metavar=word)] for word in ("MODEL", "DATA", "FOLDER")
    )
