"""`atoll init`: a commented recipe to start from, for the user's own folders."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

from atoll.cache import write_file
from atoll.errors import AtollError, placed

TEMPLATE = """\
# A run of Atoll. `atoll plan {file}` says what it will do, `atoll run {file}` does it.
recipe: 1                        # the version of this format
extends: methods/fedavg-lora     # a method to build on: `atoll methods` lists them
name: {name}

{model}

# Where the clients' data lie: JSONL, CSV or Parquet with `messages`, or `prompt` and `completion`, or `text`.
# `atoll data PATH` shows what training would see of a file or folder.
{data}

{stages}finetune:
  rounds: 5                      # broadcast, local work at each client, aggregation
  local_steps: 10                # optimizer steps a client and round; `epochs: 1` in its place: all its own data once
  batch_size: 4
  context: 512                   # the longest sample, in tokens
  optimizer: {{use: adamw, lr: 1e-3}}
{objective}
{space}
  # schedule: {{use: synchronous, cohort: 2}}     # ask two clients a round instead of all
  # up: [int8]                   # smaller updates: `atoll parts transform` lists what there is

{align}evaluate:
  every: 1                       # rounds between evaluations on held-out data
  samples: 64                    # of each client

baselines: [local, pooled]       # also train each site alone, and on everybody's data pooled, to compare
"""

OF_TEXT = "model: smollm2-135m              # a preset, a folder, or a hub id like org/name"
SPACE = "  # space: {use: lora, rank: 8, alpha: 16}      # what trains and travels; `full` for all parameters"

STAGES = "stages: [finetune, align]        # the preferred answers are learned, then what is preferred to what\n\n"
ALIGN = """\
align:                           # what it does not say is as in `finetune`
  objective: {use: dpo, beta: 0.1}
  optimizer: {use: adamw, lr: 5e-4}

"""
OBJECTIVES: dict[str, str] = {
    "text": "  objective: causal-lm           # the data are plain text: the loss is on every token",
    "": "  # objective: causal-lm         # for plain text: the loss is on every token, not on answers alone",
}
"""By the format of the data."""

OF_MEDIA = """\
model:
  use: assembled                 # a language model, with an encoder and a connector for each modality: see the guide
  language: smollm2-135m         # a preset, a folder, or a hub id like org/name"""
ENCODER_LINES = {
    "image": "  image: {encoder: efficientnet-lite0, connector: {use: mlp, pool: 7}}    # or a folder, or a hub id",
    "audio": "  audio: {encoder: whisper-tiny.en, connector: {use: mlp, pool: 75}, seconds: 30}    # the longest sound",
}
WITH_CONNECTORS = "  space: {use: lora, rank: 8, alpha: 16, modules: [connectors]}  # what trains and travels"

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
    section, held, form = (OWN_PATHS, [], "") if data is None else _found(data, file.absolute().parent)
    model, space = (
        ("\n".join([OF_MEDIA, *(ENCODER_LINES[name] for name in held)]), WITH_CONNECTORS) if held else (OF_TEXT, SPACE)
    )
    stages, align = (STAGES, ALIGN) if form == "preference" else ("", "")
    text = TEMPLATE.format(
        file=file, name=_name(file), model=model, space=space, data=section,
        stages=stages, align=align, objective=OBJECTIVES.get(form, OBJECTIVES[""]),
    )  # fmt: skip
    write_file(file.absolute(), text.encode())
    return file


def _name(file: Path) -> str:
    """The run's name from the file's, in what suits a folder."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in file.stem).strip("-")[:100] or "run"


def _found(data: Path, folder: Path) -> tuple[str, list[str], str]:
    """The section for the clients in `data`, the modalities that they hold beside text, and their format.

    A relative path is as from the recipe's `folder`, where recipes are read from.
    """
    from atoll.data.files import rows
    from atoll.data.formats import form_of
    from atoll.data.media import MODALITIES
    from atoll.data.read import media_of
    from atoll.data.sources import FIRST, folders

    if data.is_file():
        raise AtollError(
            "this is a file", where=f"--data {data}", allowed="a folder with one subfolder or file a client",
            remedy=f"--data {data.parent} makes every file beside it a client",
        )  # fmt: skip
    if not data.is_dir():
        remedy = "give the folder that holds one subfolder or file a client"
        raise AtollError("there is no such folder", where=f"--data {data}", remedy=remedy)
    with placed("--data"):
        found = folders(str(data))
        files = [file for client in found.values() for file, _ in client.source.files]
        first = (form_of(row) for file in files for _, row in islice(rows(file), FIRST))
        form = next(filter(None, first), "")
        held = {medium.modality for file in files for medium in islice(media_of(file), FIRST)}
    clients = ", ".join(found)
    written = str(data) if data.is_absolute() else f"./{os.path.relpath(data, folder)}"
    section = f"data: {{use: folders, path: {json.dumps(written)}, held_out: 0.1}}\n# one client each: {clients}"
    return section, [name for name in MODALITIES if name in held], form
