"""Every page does what it says: files are written, code runs, recipes build, and the commands of the guides work."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from pages import GUIDES, PAGES, ROOT, Block, blocks, lines, name

from atoll import parts, policy, recipe, run
from atoll.cli import call
from atoll.transforms.chain import Chain


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_does_what_it_says(page: Path, desk: Path):
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        follow(block, page, namespace)


def follow(block: Block, page: Path, namespace: dict[str, object]) -> None:
    """What a reader would do with the block, in the current folder."""
    if block.title:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.text, encoding="utf-8")
        if block.title == "policy.yaml":
            assert policy.read(Path(block.title)) != policy.Policy()
        elif block.title.endswith(".yaml"):
            builds(block.title)
    elif block.language == "python":
        exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    elif block.language == "sh" and page in GUIDES:
        for words in lines(block):
            assert words[0] == "atoll", f"{name(page)}:{block.line}: a guide's commands are all run; {words[0]} is not"
            assert call(words[1:]) == 0, f"{name(page)}:{block.line}: {' '.join(words)}"


def builds(path: str) -> None:
    """The recipe becomes a plan; on a tiny model, because a preset's shapes would have to be fetched."""
    ready = run.plan(path, [] if "use: assembled" in Path(path).read_text(encoding="utf-8") else ["model=tiny:llama"])
    assert ready.trains
    assert ready.clients


def test_the_transform_of_the_guide_keeps_the_contract(desk: Path):
    import test_transforms as contract  # of tests/contract

    guide = next(page for page in GUIDES if page.name == "own-parts.md")
    follow(next(block for block in blocks(guide) if block.title == "sign.py"), guide, {})
    chain = Chain((parts.make("transform", "sign:scaled_sign", "up"),))
    checks = [
        check
        for check in vars(contract).values()
        if inspect.isfunction(check) and list(inspect.signature(check).parameters) == ["chain"]
    ]
    assert len(checks) >= 9
    for check in checks:
        check(chain)


def test_readme_shows_fedprox_as_it_is_shipped():
    shown = next(block.text for block in blocks(ROOT / "README.md") if "proximal" in block.text)
    shipped = recipe.shipped()["methods/fedprox"].read_text(encoding="utf-8")
    assert recipe.parse(shown, "README").items() <= recipe.parse(shipped, "fedprox").items()
    assert shown in shipped


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_recipe_that_is_shown_is_built_or_shipped(page: Path):
    shipped = [path.read_text(encoding="utf-8") for path in recipe.shipped().values()]
    for block in blocks(page):
        if block.language == "yaml":
            assert block.title or any(block.text in text for text in shipped), f"{name(page)}:{block.line}"


def test_readme_is_short_to_a_finished_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert next(n for n, line in enumerate(text, 1) if line.startswith("make setup")) <= 20
    assert next(n for n, line in enumerate(text, 1) if line.startswith("atoll run quickstart")) <= 30


def test_the_six_files_are_there():
    listed = [line.split("`")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `src")]
    assert len(listed) == 6
    assert all((ROOT / path).is_file() for path in listed)
