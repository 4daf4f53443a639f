"""`atoll init`: a commented recipe to start from, for the user's own folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

from atoll.cache import write_file
from atoll.errors import AtollError, placed

TEMPLATE = """\
# A run of Atoll. `atoll plan {file}` says what it will do, `atoll run {file}` does it.
recipe: 1                        # the version of this format
extends: methods/fedavg-lora     # a method to build on: `atoll methods` lists them
name: {name}

model: smollm2-135m              # a preset, a folder, or a hub id like org/name

# Where the clients' data lie: JSONL, CSV or Parquet with `messages`, or `prompt` and `completion`, or `text`.
# `atoll data PATH` shows what training would see of a file or folder.
{data}

finetune:
  rounds: 5                      # broadcast, local work at each client, aggregation
  local_steps: 10                # optimizer steps a client and round; `epochs: 1` in its place: all its own data once
  batch_size: 4
  context: 512                   # the longest sample, in tokens
  optimizer: {{use: adamw, lr: 1e-3}}
  # objective: causal-lm         # for plain text: the loss is on every token, not on answers alone
  # space: {{use: lora, rank: 8, alpha: 16}}      # what trains and travels; `full` for all parameters
  # schedule: {{use: synchronous, cohort: 2}}     # ask two clients a round instead of all
  # up: [int8]                   # smaller updates: `atoll parts transform` lists what there is

evaluate:
  every: 1                       # rounds between evaluations on held-out data
  samples: 64                    # of each client

baselines: [local, pooled]       # also train each site alone, and on everybody's data pooled, to compare
"""

OWN_PATHS = """\
data:
  use: clients
  paths:                         # one line a client: its file or folder
    clinic: ./data/clinic
    school: ./data/school.jsonl
  held_out: 0.1                  # the share kept for evaluation"""


def write_starter(path: Path, data: Path | None) -> Path:
    """Writes the recipe; with `data`, for the clients found in that folder.

    Raises:
        AtollError: there is a file already, or `data` holds no clients.
    """
    file = path / "atoll.yaml" if path.is_dir() else path
    if file.suffix not in (".yaml", ".yml"):
        raise AtollError("a recipe's name ends in .yaml", found=file, remedy=f"`atoll init {file}.yaml`")
    if file.exists():
        raise AtollError("the file is there already", where=str(file), remedy="choose another name, or remove it")
    section = OWN_PATHS if data is None else _found(data, file.absolute().parent)
    write_file(file.absolute(), TEMPLATE.format(file=file, name=_name(file), data=section).encode())
    return file


def _name(file: Path) -> str:
    """The run's name from the file's, in what suits a folder."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in file.stem).strip("-")[:100] or "run"


def _found(data: Path, folder: Path) -> str:
    """The section for the clients in `data`; a relative path as from the recipe's `folder`, where recipes are read from."""
    from atoll.data.sources import folders

    if data.is_file():
        raise AtollError(
            "this is a file", where=f"--data {data}", allowed="a folder with one subfolder or file a client",
            remedy=f"--data {data.parent} makes every file beside it a client",
        )  # fmt: skip
    if not data.is_dir():
        remedy = "give the folder that holds one subfolder or file a client"
        raise AtollError("there is no such folder", where=f"--data {data}", remedy=remedy)
    with placed("--data"):
        clients = ", ".join(folders(str(data)))
    written = str(data) if data.is_absolute() else f"./{os.path.relpath(data, folder)}"
    return f"data: {{use: folders, path: {json.dumps(written)}, held_out: 0.1}}\n# one client each: {clients}"
