"""Entry point of `tune`: finds the command, turns every error into one line and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click
from click_default_group import DefaultGroup

from gpu_aware_tune import __version__
from gpu_aware_tune.cli.options import CONTEXT
from gpu_aware_tune.errors import TuneError, printable

INTERRUPTED = 130

COMMANDS = {
    "tune": ("gpu_aware_tune.cli.tune", "Tune an ONNX model (the default: `tune MODEL`)."),
    "run": ("gpu_aware_tune.cli.run", "Run a tuned library and time it."),
    "profile": ("gpu_aware_tune.cli.profile", "Measure a tuned library at each share; the knee."),
    "plan": (
        "gpu_aware_tune.cli.plan",
        "Plan which model gets which share, when, in which batches.",
    ),
    "serve": ("gpu_aware_tune.cli.serve", "Serve tuned models that share a device by a plan."),
    "load": ("gpu_aware_tune.cli.load", "Send a server requests; goodput and latencies."),
    "records": ("gpu_aware_tune.cli.records", "List, export, import and prune measurements."),
    "report": ("gpu_aware_tune.cli.report", "Write a page of a run: figures, tables, environment."),
    "watch": ("gpu_aware_tune.cli.watch", "Follow a run, or a server, in another process."),
    "doctor": ("gpu_aware_tune.cli.doctor", "Show what this machine offers and what it lacks."),
}


class Interrupted(TuneError):
    """Ctrl-C, as an error like the others: click would print an empty line for it."""

    exit_code = INTERRUPTED


class LazyGroup(DefaultGroup):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        known = cmd_name if cmd_name in COMMANDS else self.default_cmd_name
        if known not in self.commands:
            self.add_command(getattr(import_module(COMMANDS[known][0]), known), known)
        command: click.Command | None = super().get_command(ctx, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Command.format_options(self, ctx, formatter)
        with formatter.section("Commands (tune COMMAND --help for more)"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])
        default = self.get_command(ctx, self.default_cmd_name)
        assert default is not None
        records = [item.get_help_record(ctx) for item in default.params if item.name != "model"]
        with formatter.section("Options of tune MODEL"):
            formatter.write_dl([record for record in records if record is not None])


@click.group(
    cls=LazyGroup,
    default="tune",
    context_settings=CONTEXT,
    no_args_is_help=True,
)
@click.version_option(__version__, prog_name="tune")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks; any command.")
def cli() -> None:
    """Tune a neural network for the share of the device it will really get.

    \b
    tune model.onnx --gpu-pct 30     search on 30 % of the device, write model.tuned/
    tune run model.tuned             run the library and time it
    tune doctor                      what this machine offers
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 (a defect), 2 (user error), 3 (set-up error) or 130."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        result = cli.main(args=args, prog_name="tune", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2, debug)
    except TuneError as error:
        return _fail(" ".join(str(error).split()), error.exit_code, debug)
    except click.Abort:  # Ctrl-C while click reads the arguments
        return _fail("interrupted", INTERRUPTED, debug)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _defect(error, debug)
        where = f" in {error.filename!r}" if error.filename else ""
        return _fail(
            f"the disk is full{where} ({error.strerror}): free space, or set TMPDIR for temporary"
            " files; what was measured is in the record store",
            3,
            debug,
        )
    except Exception as error:
        return _defect(error, debug)


def _defect(error: Exception, debug: bool) -> int:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    hint = "" if debug else "; this is a defect: run again with --debug and report it"
    return _fail(f"{text}{hint}", 1, debug)


def _fail(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {printable(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
