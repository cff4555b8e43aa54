"""Every recipe that is shipped loads, and the page about recipes says what the schema says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from thriftune.recipe import dump_yaml, read_recipe
from thriftune.recipe.read import ALIASES, INVERTED
from thriftune.recipe.schema import known_places

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 6
    assert {"pocket_lora_cpu", "pocket_full_cpu", "pocket_qlora_cpu"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_is_what_its_name_says(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    model, method, _hardware = path.stem.split("_")
    assert recipe.method == method
    assert recipe.model.name.split("/")[-1].lower() == model
    assert recipe.output is not None
    text = path.read_text(encoding="utf-8")
    assert f"--config recipes/{path.name}" in text, "say how it is run"
    assert text.startswith("# "), "say what it is for"
    (tmp_path / "dumped.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "dumped.yaml") == recipe


def test_recipes_named_in_pages_exist() -> None:
    names = {path.name for path in RECIPES}
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"recipes/([\w.-]+\.yaml)", text))
    assert named
    assert named <= names


def page_maker() -> ModuleType:
    path = REPOSITORY / "docs" / "make_recipe_page.py"
    spec = importlib.util.spec_from_file_location("make_recipe_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_about_recipes_is_up_to_date() -> None:
    maker = page_maker()
    text = maker.PAGE.read_text(encoding="utf-8")
    assert text == maker.page(), "run: .venv/bin/python docs/make_recipe_page.py"
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(known_places()) > 60
    assert not [name for name in [*known_places(), *ALIASES, *INVERTED] if f"`{name}`" not in text]
