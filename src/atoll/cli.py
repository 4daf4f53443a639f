"""The command line: which commands there are, and what a mistake, Ctrl-C or a crash comes to.

0    done                       70    an error of Atoll's own: the traceback is in a file
1    a mistake one can mend     130   interrupted or stopped; `atoll resume` goes on
2    wrong usage
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
import typer.core

from atoll.commands import leak, learn, look, measure, network, use, work
from atoll.commands.output import Crashed, mendable, write_traceback
from atoll.errors import AtollError, Interrupted
from atoll.interrupts import interrupted, note_interrupts

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's, or that of the copy of click which later versions of typer bring."""

typer.core.HAS_RICH = False  # help without boxes, in half the time

COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "run": (work.run, "atoll run quickstart --set finetune.rounds=10"),
    "plan": (work.plan, "atoll plan mine.yaml --set model=smollm2-360m"),
    "resume": (work.resume, "atoll resume quickstart-1"),
    "stop": (work.stop, "atoll stop latest"),
    "runs": (look.runs, "atoll runs --json"),
    "show": (look.show_run, "atoll show latest"),
    "compare": (look.compare, "atoll compare quickstart-1 quickstart-2"),
    "ledger": (look.ledger, "atoll ledger quickstart-1 quickstart-2 --delta 0.01"),
    "card": (look.card, "atoll card quickstart-1"),
    "chat": (use.chat, 'atoll chat quickstart-1 "What is a reef?"'),
    "export": (use.export, "atoll export quickstart-1 --to adapter --out ./adapter"),
    "evaluate": (measure.evaluate, "atoll evaluate quickstart-1 --tasks boolq,openbookqa"),
    "leakage": (leak.leakage, "atoll leakage quickstart-1 --attack membership"),
    "data": (learn.data, "atoll data ./clinic --show 2"),
    "methods": (learn.methods, "atoll methods"),
    "parts": (learn.parts, "atoll parts transform"),
    "init": (learn.init, "atoll init mine.yaml --data ./sites"),
    "sweep": (
        work.sweep,
        "atoll sweep quickstart --method methods/fedavg-lora --grid finetune.optimizer.lr=1e-3,3e-3 --trials 2",
    ),
    "server": (network.server, "atoll server --listen 0.0.0.0:8000 --certs certs/server"),
    "join": (network.join, "atoll join server.example:8000 --data ./data --certs ./clinic --policy policy.yaml"),
    "clients": (network.clients, "atoll clients server.example:8000"),
}
"""Name -> the command, and an example for its help."""

INTERRUPTED = 130
"""The status of what was interrupted, as shells have it; typer's too."""

GROUPS = {"certs": network.certs, "audit": network.audit}
"""Commands that have commands of their own."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"atoll {version('atoll')}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """The application with all commands."""
    app = typer.Typer(
        help="Adapt language models on data that cannot be pooled. Start with: atoll run quickstart",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    for name, (command, example) in COMMANDS.items():
        app.command(name, epilog=f"Example: {example}")(command)
    for name, group in GROUPS.items():
        app.add_typer(group, name=name)
    return app


def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say the version.")
    ] = False,
) -> None:
    """Nothing but what stands before a command's name."""


def call(arguments: Sequence[str]) -> int:
    """Runs a command line; returns the exit status. Whatever happens, people see a message and never a traceback."""
    try:
        return _status(make_app()(list(arguments), standalone_mode=False))
    except AtollError as error:
        _tell(f"atoll: {error}")
        return INTERRUPTED if isinstance(error, Interrupted) else 1
    except UsageError as error:
        return _misused(error)
    except (typer.Abort, KeyboardInterrupt):
        return _tell_interrupted()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except Crashed as crash:
        return _crashed(crash)
    except Exception as error:
        if interrupted():
            return _tell_interrupted()
        note = write_traceback(error)
        if told := mendable(error, note, "try again"):
            _tell(f"atoll: {told}")
            return 1
        return _crashed(Crashed(error, note))


def _status(returned: Any) -> int:
    """Typer gives the status of an explicit exit, such as that of --help, or what the command returned."""
    status = returned if isinstance(returned, int) else 0
    return _tell_interrupted() if status == INTERRUPTED else status


def _tell_interrupted() -> int:
    _tell("atoll: interrupted")
    return INTERRUPTED


def _misused(error: Any) -> int:
    error.show()
    return int(error.exit_code)


def _crashed(crash: Crashed) -> int:
    reason = str(crash.error).strip().partition("\n")[0]
    where = f"the traceback is in {crash.note}" if crash.note else "the traceback could not be written"
    _tell(f"atoll: an error of its own: {type(crash.error).__name__}: {reason}; {where}")
    return 70


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The entry point: SIGTERM is treated as Ctrl-C."""
    note_interrupts()
    warnings.simplefilter("ignore", FutureWarning)  # libraries tell each other; people can do nothing about it
    status = call(sys.argv[1:])
    # CPython ends as if killed once an interrupt has met `exec` of a string, as in dataclasses; another exec clears that
    exec("")
    sys.exit(status)
