"""Every shipped recipe builds; every method that states a number gives it on real texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll import recipe, run, schema
from atoll.build import build
from atoll.record.folder import create
from atoll.record.story import read_story

SHIPPED = list(recipe.shipped())
METHODS = [name for name in SHIPPED if name.startswith("methods/")]
RUNS = [name for name in SHIPPED if name.startswith("runs/")]


def on_its_bench(name: str) -> schema.Tree:
    """The method laid over the run that its number is stated for."""
    method = recipe.resolve(name)
    tree = recipe.with_method(recipe.resolve(method["checked"]["run"]), name) | {"name": method["name"]}
    for setting in method["checked"].get("set", []):
        tree = recipe.apply(tree, setting)
    return tree


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_is_from(name):
    tree = recipe.resolve(name)
    assert "arXiv" in tree["reference"]
    assert tree["name"] == Path(name).name


@pytest.mark.real
@pytest.mark.parametrize("name", RUNS)
def test_a_run_builds(name):
    plan = run.plan(name)
    assert plan.trains
    assert plan.clients


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in METHODS if recipe.resolve(name).get("checked")])
def test_a_method_gives_the_number_it_states(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path))
    tree = on_its_bench(name)
    plan = build(schema.validate(tree, name), tree)
    folder = create(plan.recipe.name)
    run.write_recipe(folder, plan)
    run.execute(plan, folder, (), lambda line: None)
    final = read_story(folder).final
    stated = schema.validate(tree | {"checked": recipe.resolve(name)["checked"]}, name).checked
    assert final.mean == pytest.approx(stated.loss, rel=stated.within)
