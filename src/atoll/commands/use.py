"""Commands that use a run's result: chat, export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from atoll.commands.output import RunName, say
from atoll.errors import AtollError


def chat(
    run: RunName = "latest",
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, as it was before the run.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="Above 0, answers are drawn at random.")] = 0.0,
    image: Annotated[list[Path] | None, typer.Option(help="A picture for the first question; may be repeated.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound for the first question; may be repeated.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose own parts, of a run with `finetune.personal`.")] = None,
) -> None:
    """Talk to a run's result. In a conversation /base switches to the base model and back."""
    from atoll.record.folder import find

    folder = find(run)
    attached = [(name, path) for name, paths in (("image", image), ("audio", audio)) for path in paths or ()]
    for name, path in attached:  # told before the model is loaded
        if not path.is_file():
            raise AtollError("there is no such file", where=f"--{name}", found=path, allowed="a file on this machine")
    from atoll.chat import Chat, converse, refuse_judge
    from atoll.outcome import outcome
    from atoll.result import load_result

    refuse_judge(outcome(folder))
    talk = Chat(load_result(folder, say, client), max_tokens, temperature, base)
    if early := talk.result.outcome.early:
        say(f"{folder.name} is not finished: this is the model {early}")
    if (words := talk.result.outcome.recipe.finetune.personal) and client is None:
        say(f"clients have parts of their own ({', '.join(words)}): this is the model before any; --client names one")
    for name, path in attached:
        talk.attach(name, path)
    if prompt is not None:
        talk.answer(prompt, _write)
        _write("\n")
        return
    say(f"{folder.name} after round {talk.result.outcome.rounds}; {talk.help}")
    converse(talk, _typed(), _write, say)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Lines as they are typed, until the end of input."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401 - gives input() a history
    while True:
        try:
            yield input("> " if asks else "")
        except EOFError:
            return


def export(
    run: RunName = "latest",
    to: Annotated[
        Literal["adapter", "merged"],
        typer.Option(help="adapter: a folder that `peft` loads; merged: a whole model for `transformers`."),
    ] = "adapter",
    out: Annotated[
        Path | None,
        typer.Option(help="The new folder; by default RUN-adapter or RUN-merged, RUN-CLIENT-... with --client."),
    ] = None,
    client: Annotated[str | None, typer.Option(help="Whose own parts, of a run with `finetune.personal`.")] = None,
) -> None:
    """Export a run's result for use elsewhere, checked against its checkpoint."""
    from atoll.record.folder import find

    folder = find(run)
    from atoll.export import export_adapter, export_merged
    from atoll.outcome import outcome

    if early := outcome(folder).early:
        say(f"{folder.name} is not finished: this is its result {early}")
    write = {"adapter": export_adapter, "merged": export_merged}[to]
    name = "-".join([folder.path.name, *([client] if client else []), to])
    print(write(folder, out or Path(name), say, client))
    say("its README.md says how it is loaded")
