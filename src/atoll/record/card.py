"""The card: what a finished run says of itself, in Markdown with plots.

Reads the record, what public tasks said, what tests of leakage found, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atoll.record.events import RecordsLeftOut
from atoll.record.folder import RunFolder
from atoll.record.leakage import COLUMNS, NOTHING_TESTED, Findings, cells, read_findings
from atoll.record.measured import Cell, Table, measured
from atoll.record.plots import Lines, accuracies, plot_bytes, plot_losses, plot_stages
from atoll.record.story import Story, read_story
from atoll.record.tasks import Score, read_scores
from atoll.record.tasks import columns as task_columns
from atoll.record.tasks import rows as task_rows
from atoll.schema import HARNESS, origin


def write_card(folder: RunFolder) -> None:
    """card.md and its plots."""
    story = read_story(folder)
    if story is None:
        return
    scores = read_scores(folder)
    plot_losses(story, folder.path / "loss.svg")
    plot_bytes(story, folder.path / "bytes.svg")
    plot_stages(story, accuracies(story, scores), folder.path / "stages.svg")
    text = markdown(folder.name, story, read_findings(folder), scores)
    folder.card.write_text(text, encoding="utf-8")


def markdown(name: str, story: Story, leaks: Findings = NOTHING_TESTED, scores: Sequence[Score] = ()) -> str:
    """The card's text."""
    s = story.started
    lines = [
        f"# {name}",
        "",
        f"{counted(len(s.clients), 'client')}, {len(story.rounds)} of {counted(s.rounds, 'round')}, seed {s.seed}, "
        f"plan `{s.plan}`. {s.trains:,} of {s.of:,} parameters trained and travelled ({s.trains / s.of:.1%}).",
        "",
        *_recipe_section(s.recipe),
        *_loss_section(story),
        *_draws_section(story),
        *_tasks_section(scores),
        *_stages_section(accuracies(story, scores)),
        "## What moved",
        "",
        f"This run: {_moved(story)}.",
        *(
            f"\nBefore that, {stage}: {_moved(one)}. [Its own card](stages/{stage}/card.md) has its settings and losses."
            for stage, one in story.before.items()
        ),
        "",
        "![bytes](bytes.svg)",
        "",
        *_faults_section(story),
        *_leakage_section(leaks),
        "## Made with",
        "",
        ", ".join(f"{package} {number}" for package, number in s.versions.items()),
        "",
        *privacy_section(story),
    ]
    return "\n".join(lines) + "\n"


def _moved(story: Story) -> str:
    """Bytes and seconds of a run, or of a stage."""
    return (
        f"down {human_bytes(story.bytes_down)}, up {human_bytes(story.bytes_up)} in {counted(len(story.rounds), 'round')}, "
        f"and {human_bytes(story.bytes_to_evaluate)} down for evaluation; "
        f"{sum(r.seconds for r in story.rounds):.0f} s in rounds"
    ) + (f", {story.ended.seconds:.0f} s with evaluation" if story.ended else "")


def privacy_section(story: Story) -> list[str]:
    """What was promised, and what was spent of it in fact; of several stages each that had a round."""
    stages = {**story.before, "": story}
    told = {
        name: one for name, one in stages.items() if one.started.privacy and (one.started.rounds or len(stages) == 1)
    }
    if not told:
        return ["## Privacy", "", "None claimed. Updates were aggregated in the clear."]
    each = {name: privacy_in_words(one.started.privacy) for name, one in told.items()}
    alike = len({tuple(words) for words in each.values()}) == 1
    lines = [f"- {line}" for line in next(iter(each.values()))] if alike else [
        f"- {f'stage {name}' if name else 'this stage'}: {line}" for name, words in each.items() for line in words
    ]  # fmt: skip
    if spent := [one for stage in stages.values() for one in stage.spent[-1:]]:
        last, where = spent[-1], "the ledgers of all stages" if story.before else "the ledger (ledger.jsonl)"
        lines.append(f"- spent: epsilon {last.epsilon:.4g} at delta {last.delta:g}, by {where}")
    return ["## Privacy", "", *lines]


def privacy_in_words(said: Mapping[str, Any]) -> list[str]:
    """What a plan says of privacy (statement.py), in sentences."""
    sees = f"the server sees {said['server_sees']}"
    promise = said["guarantee"]
    if promise is None:
        return [sees, "no differential privacy: what is released may tell of any one's data"]
    known = promise["epsilon"] is not None
    budget = f"; the run stops before it passes {promise['budget']:g}" if promise.get("budget") else ""
    about = "by the number of records about " if promise.get("about") else ""
    epsilon = f"{about}epsilon {promise['epsilon']:.3g}" if known else "epsilon, known once the data are read,"
    of = f", the most of any client, {promise['most_told_of']}" if promise.get("most_told_of") else ""
    amplified = f", rate {promise['rate']:.3g}" if known and promise["sampling"] != "everyone" else ""
    lines = [
        sees,
        f"{epsilon} at delta {promise['delta']:g} if all {promise['rounds']} rounds are run{budget}, of"
        f" {UNITS[promise['unit']]} ({promise['adjacency']}){of}; against {promise['holds_against']}",
        f"{promise['mechanism']}: clip {promise['clip']:g}, noise multiplier {promise['noise_multiplier']:.3g};"
        f" sampling: {promise['sampling']}{amplified}",
    ]
    return [*lines, f"not covered: {promise['not_covered']}"] if promise.get("not_covered") else lines


UNITS = {"client": "a whole client", "example": "one example of a client"}


def _recipe_section(recipe: Mapping[str, Any]) -> list[str]:
    """Model, method and settings. Where the data lie is nobody's business who reads the card."""
    if not recipe:
        return []
    data = recipe["data"]
    facts = {
        "model": recipe["model"],
        "method": recipe["reference"],
        "data": data["use"] if isinstance(data, Mapping) else data,
        "begins with": named(recipe.get("start")),
        "fused by": recipe["fuse"]["by"] if isinstance(recipe.get("start"), list) else None,
        "judge": named(recipe.get("judge")),
        **recipe["finetune"],
    }
    if facts.get("local_steps"):
        facts.pop("epochs", None)
    rows = [f"| {name.replace('_', ' ')} | {in_words(value)} |" for name, value in facts.items() if value or value == 0]
    return ["## Made from", "", "| setting | value |", "|---|---|", *rows, ""]


def named(references: Any) -> str:
    """Runs and stages by their names alone: where they lie is nobody's business.

    >>> named(["stage:finetune", "/home/ann/runs/align-1"])
    'finetune, align-1'
    """
    each = references if isinstance(references, list) else [references] if references else []
    return ", ".join(origin(one).name for one in each)


def in_words(value: Any) -> str:
    """A setting as people read it.

    >>> in_words({"use": "error-feedback", "chain": [{"use": "topk", "fraction": 0.1}]})
    'error-feedback (chain: topk (fraction: 0.1))'
    """
    if isinstance(value, Mapping):
        rest = ", ".join(f"{name}: {in_words(each)}" for name, each in value.items() if name != "use")
        return f"{value['use']} ({rest})" if "use" in value and rest else str(value.get("use", rest))
    return ", ".join(map(in_words, value)) if isinstance(value, list | tuple) else str(value)


def _loss_section(story: Story) -> list[str]:
    found = measured(story)
    if found.loss is None:
        return []
    if not found.loss.rows:
        return ["## Held-out loss", "", *found.loss.notes, ""]
    shown = ["## Held-out loss", "", *_shown(found.loss), LOSS_NOTE, ""]
    if found.loss_by_modality:
        shown += [BY_MODALITY, "", *_shown(found.loss_by_modality)]
    shown += ["![loss per site](loss.svg)", ""] if story.rounds else []
    if found.accuracy:
        shown += ["## Accuracy", "", *_shown(found.accuracy), ACCURACY_NOTE, ""]
    if found.accuracy_by_modality:
        shown += [BY_MODALITY, "", *_shown(found.accuracy_by_modality)]
    if found.reward_accuracy:
        shown += ["## Reward accuracy", "", *_shown(found.reward_accuracy), REWARD_NOTE, ""]
    return shown


LOSS_NOTE = (
    "Mean over held-out samples of each one's loss, for language that of its tokens on average, ± its standard error; "
    "the mean over sites counts each once."
)
ACCURACY_NOTE = (
    "Share of held-out questions with choices of which the right one is the likeliest, ± its standard error; "
    "chance is what guessing comes to. Of a preference the chosen answer counts as right; a short answer is likelier than a "
    "long one before anything is learned."
)
REWARD_NOTE = (
    "Share of held-out preferences whose chosen answer has the greatest reward. A judge's is its score; DPO's is how much "
    "likelier the model finds an answer than the reference does, which is the model before the first round: for that all "
    "answers are equal. Of a run without rounds the reference is the base."
)
BY_MODALITY = "By what samples hold, over all sites, each sample counting once:"


def _shown(table: Table) -> list[str]:
    return [*markdown_table(table), ""]


def markdown_table(table: Table) -> list[str]:
    """The table's lines in Markdown."""
    head = f"| {table.measure.name} | " + " | ".join([*table.columns, table.mean_name]) + " |"
    rule = "|---" * (len(table.columns) + 2) + "|"
    rows = [f"| {row[0]} | " + " | ".join(map(format_cell, [*row[1], table.mean(row)])) + " |" for row in table.rows]
    return [*([head, rule, *rows] if rows else []), *(f"\n{note}" for note in table.notes)]


def _draws_section(story: Story) -> list[str]:
    """What completions that were drawn to be rewarded were worth, and where the time went; nothing where none were."""
    drawn = [one for one in story.replies if {"reward", "tokens", "seconds_in_steps"} <= one.metrics.keys()]
    if not drawn:
        return []
    rows = []
    for number in dict.fromkeys(one.round for one in drawn):
        each = [one.metrics for one in drawn if one.round == number]
        reward, tokens = (sum(one[name] for one in each) / len(each) for name in ("reward", "tokens"))
        whole = sum(one["seconds_in_steps"] for one in each) or math.inf
        shares = [sum(one.get(f"seconds_{what}", 0.0) for one in each) / whole for what in PHASES]
        said = " | ".join(f"{share:.0%}" for share in [*shares, 1 - sum(shares)])
        rows.append(f"| {number + 1} | {reward:.3f} | {tokens:.1f} | {said} |")
    names = ["round", "reward", "tokens", *(name.replace("_", " ") for name in PHASES), "learning"]
    return [
        "## Completions drawn",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
        *rows,
        "",
        DRAWS_NOTE,
        "",
    ]


PHASES = ("drawing", "rewarding", "of_the_reference")
DRAWS_NOTE = "Mean reward and tokens of a completion, over clients; and each phase's share of the local steps' time."


def _tasks_section(scores: Sequence[Score]) -> list[str]:
    """What public tasks said; nothing where none was asked."""
    if not scores:
        return []
    names = task_columns(scores)
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines = [f"| {' | '.join(row)} |" for row in task_rows(scores)]
    note = TASKS_NOTE + (f" {HARNESS_NOTE}" if any(one.task.startswith(HARNESS) for one in scores) else "")
    return ["## Public tasks", "", *head, *lines, "", note, ""]


TASKS_NOTE = (
    "± standard error. Accuracy: the share of questions of which the right choice is the likeliest; loss: the right "
    "choice's mean token loss. Exact match and ROUGE-L: of the answer that the model writes, with the nearest right one."
)

HARNESS_NOTE = "Tasks of lm-eval are asked as it asks them: their first questions, also those that were trained on."


def _stages_section(found: Lines) -> list[str]:
    """How what is asked of all models moves from stage to stage; nothing where no two of them were asked the same."""
    return (
        ["## From the base to the result", "", STAGES_NOTE, "", "![accuracy over stages](stages.svg)", ""]
        if found
        else []
    )


STAGES_NOTE = "Accuracy by site, and on public tasks (dashed), of every model that was asked, ± its standard error:"


def _faults_section(story: Story) -> list[str]:
    lines = ["- **nothing was learned: every round came to nothing**"] if story.fruitless else []
    lines += [f"- {one.client}: no usable data ({one.report.splitlines()[0]})" for one in story.left_out]
    lines += [f"- {records_in_words(one)}" for one in story.records]
    lines += [
        f"- round {m.round + 1}, {m.client}: {'refused' if m.refused else 'dropped'}: {m.reason}"
        for m in story.missing[:20]
    ]
    if len(story.missing) > 20:
        lines.append(f"- and {len(story.missing) - 20} more replies refused or dropped")
    lines += [f"- warning: {warning}" for warning in story.started.warnings]
    return ["## What went wrong or might", "", *lines, ""] if lines else []


def _leakage_section(leaks: Findings) -> list[str]:
    """What attacks on the result found; nothing where none was made."""
    if not leaks.rows:
        return []
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = [f"| {' | '.join(cells(row))} |" for row in leaks.rows]
    notes = [line for name, why in leaks.skipped.items() for line in (f"{name}: {why}", "")]
    return ["## Leakage", "", *head, *rows, "", *notes]


def records_in_words(event: RecordsLeftOut) -> str:
    """`clinic: 28 of 30 records used: 2 no answer, first at clinic.jsonl:7`."""
    reasons = [f"{count} {why}, first at {place}" for why, (count, place) in event.reasons.items()]
    return f"{event.client}: {event.kept} of {counted(event.read, 'record')} used: {'; '.join(reasons)}"


def format_cell(cell: Cell | None) -> str:
    """`0.321 ± 0.012`.

    >>> format_cell((0.3214, 0.012)), format_cell((0.3214, math.nan)), format_cell(None), format_cell((math.nan, 1.0))
    ('0.321 ± 0.012', '0.321 ± n/a', '-', '-')
    """
    if cell is None or math.isnan(cell[0]):
        return "-"
    return f"{cell[0]:.3f} ± " + ("n/a" if math.isnan(cell[1]) else f"{cell[1]:.3f}")


def counted(count: int, what: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def human_bytes(count: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`.

    >>> human_seconds(42.4), human_seconds(200), human_seconds(7500)
    ('42 s', '3 min 20 s', '2 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
