"""How a run ends for people: the table, what did not count, what it took, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from atoll import recipe
from atoll.commands.output import say, show, show_json
from atoll.record import tables, views
from atoll.record.card import human_bytes, human_seconds
from atoll.record.events import Missing
from atoll.record.folder import RunFolder
from atoll.record.measured import measured
from atoll.record.story import Story, refuse_fruitless
from atoll.record.tasks import not_asked
from atoll.terminal import counted

SHOWN = 10
"""Lines on what did not count, at most."""


def conclude(folder: RunFolder, as_json: bool) -> None:
    """What the run was made for.

    Raises:
        AtollError: nothing was learned, since no update was ever accepted.
    """
    story = views.need_story(folder)
    data = views.details(folder)
    if as_json:
        show_json(data)
        refuse_fruitless(folder, story)
        return
    for number, table in enumerate(measured(story)):
        if number:
            show("")
        show(tables.compared(table))
    if lines := [*not_counted(story)]:
        more = [f"and {len(lines) - SHOWN} more: `atoll show {folder.name}`"] if len(lines) > SHOWN else []
        show("\n" + "\n".join(lines[:SHOWN] + more))
    refuse_fruitless(folder, story)
    beside = f", and {human_seconds(data['seconds_in_baselines'])} for the baselines" if data["baselines"] else ""
    show(
        f"\n{human_bytes(data['bytes_down'])} down, {human_bytes(data['bytes_up'])} up, "
        f"{human_seconds(data['seconds'])}{beside}\n\n"
        f"atoll chat {folder.name}      talk to the result\n"
        f"atoll card {folder.name}      what the run says of itself\n"
        f"atoll export {folder.name} --to adapter"
    )


def not_counted(story: Story) -> Iterator[str]:
    """A line for each client that was left out, and for each whose replies were refused or dropped."""
    for one in story.left_out:
        yield f"{one.client} was left out: {'; '.join(one.report.splitlines())}"

    def kind(one: Missing) -> tuple[str, bool]:
        return one.client, one.refused

    for (client, refused), group in groupby(sorted(story.missing, key=kind), key=kind):
        lost = [*group]
        happened = "refused" if refused else "dropped"
        times = counted(len(lost), "reply").replace("replys", "replies")
        yield f"{client}: {times} {happened}, first in round {lost[0].round + 1}: {lost[0].reason}"


def told_if_finished(folder: RunFolder, as_json: bool) -> bool:
    """Whether a run, its baselines and its card are all done; says so in one line, or as JSON."""
    summary = views.summarize(folder)
    if summary.state != "finished" or not (folder.adapter.exists() and folder.card.exists()):
        return False
    if folder.recipe.exists() and not_asked(recipe.read(folder.recipe)[0], folder):
        return False
    say(f"{folder.name} has finished already, after {summary.round} of {summary.rounds} rounds")
    if as_json:
        show_json(views.details(folder))
    return True
