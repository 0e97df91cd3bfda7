"""Switches that several commands have."""

from typing import Annotated

from cyclopts import Parameter

Resume = Annotated[bool, Parameter(negative="--no-resume")]
"""What is on unless it is switched off: cli/app.py gives no switch a negative of its own."""
