"""Claim: `atoll --help` answers in 0.3 s, and `atoll plan quickstart` in 3 s once the model's shapes are cached."""

from __future__ import annotations

from benchmarks.harness import Bar, Case, Contestant

COMMANDS = {"help": (["--help"], 0.3), "plan": (["plan", "quickstart"], 3.0)}
BARS = [
    Bar("cli", f"cli-{name}", "seconds", "atoll", at_most=seconds, unit="s") for name, (_, seconds) in COMMANDS.items()
]


def cases(tiny: bool) -> list[Case]:
    """Each command is a process of its own."""
    return [
        Case(f"cli-{name}", (Contestant("atoll", "benchmarks.ours.command", config={"arguments": arguments}),))
        for name, (arguments, _) in COMMANDS.items()
    ]
