"""`cryospire <stage>`: argument parsing only; a stage is imported when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cryospire import config as configuration
from cryospire.conventions import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Heterogeneous cryo-EM by a part-aware Gaussian mixture.")

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML configuration", show_default=False)]
Output = Annotated[Path, typer.Option("--output", help="what this stage writes", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="replace a complete output")]


def main() -> None:
    """Entry point: bad input ends with one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"cryospire: error: {error}", file=sys.stderr)
        sys.exit(2)
