"""What the commands share: how help looks, and options that several of them have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
DIRECTORY = click.Path(path_type=Path)


def db_option(command: Command) -> Command:
    """Add --db to a command."""
    return click.option(
        "--db",
        type=DIRECTORY,
        default="tuning_logs",
        show_default=True,
        metavar="FOLDER",
        help="The record store's folder.",
    )(command)


def debug_option(command: Command) -> Command:
    """Add --debug to a command; `main` looks for it, the command need not."""
    option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
    return option(command)
