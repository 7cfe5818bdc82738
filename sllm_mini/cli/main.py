"""`sllm-mini`: puts the commands together, and turns errors into sentences and exit codes.

0 done, 1 failed (one sentence on stderr), 2 wrong usage, 130 interrupted; a reader that goes away (`| head`) ends a
command quietly. An error that is none of ours is a bug and keeps its traceback. Costs the import of typer and rich.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sllm_mini import __version__
from sllm_mini.cli import (
    bench,
    checkpoints,
    deployments,
    inspection,
    kernels,
    machine,
    models,
    records,
    serve,
    simulate,
    store,
    terminal,
    tour,
    traces,
)
from sllm_mini.errors import SllmError

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141

_EPILOG = (
    "With --json a command prints one JSON document on stdout and nothing else there. If it fails, stdout stays empty and the last line "
    'of stderr is {"error": {"type", "message", "path", "offset"}}; without --json, that line is a sentence. '
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."
)


class _Commands(TyperGroup):
    """All commands; the one place where an error that was raised on purpose becomes a sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _let_go_of_stdout()
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            terminal.stderr_console().print("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (SllmError, OSError) as error:
            terminal.print_error(error, as_json=terminal.wants_json(ctx))
            raise typer.Exit(EXIT_FAILED) from None


def _let_go_of_stdout() -> None:
    """Points stdout at nothing, so that what is still buffered for the reader that left fails nobody at exit."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


app = typer.Typer(
    name="sllm-mini",
    cls=_Commands,
    help="Start large language models fast, and see where every second of a cold start goes.",
    epilog=_EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sllm-mini {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("tour")(tour.tour)
app.command("record")(records.record)
app.command("compare")(records.compare)
app.command("doctor")(machine.doctor)
app.command("make-model")(checkpoints.make_model)
app.command("convert")(checkpoints.convert)
app.command("export")(checkpoints.export)
app.command("inspect")(inspection.inspect)
app.command("verify")(checkpoints.verify)
app.command("load")(models.load)
app.command("kernels")(kernels.kernels)
app.command("generate")(models.generate)
app.command("serve")(serve.serve)
app.command("deploy")(deployments.deploy)
app.command("delete")(deployments.delete)
app.command("ps")(deployments.ps)
app.command("unload")(deployments.unload)
app.command("pin")(deployments.pin)
app.command("simulate", cls=simulate.NamesPolicies)(simulate.simulate)
app.command("replay")(traces.replay)
app.add_typer(bench.app, name="bench")
app.add_typer(store.app, name="store")
app.add_typer(traces.app, name="trace")


def main(args: Sequence[str] | None = None) -> None:
    """The `sllm-mini` script. Always ends in SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name or a token need not fit the terminal's encoding; it is shown escaped, never a crash.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=None if args is None else list(args), prog_name="sllm-mini")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
