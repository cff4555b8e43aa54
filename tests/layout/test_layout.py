"""The house rules that a machine can check: who imports whom, what loads torch, how long a file is, what is unused.

The sources are read, not run, so an import inside a function counts as well. The table below says in a machine's words
what docs/layout.md says in a person's.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "src" / "thriftune"
PACKAGE = "thriftune"

# Room -> what it may import besides itself and EVERYWHERE: a room, or one module of it.
EVERYWHERE = {"errors", "units"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "recipe": set(),
    "records": {"recipe"},
    "hub": set(),
    "pocket": set(),
    "model_files": {"recipe", "hub", "pocket"},
    "data": {"recipe", "records", "hub"},
    "models": {"recipe", "model_files", "shapes", "kernels"},
    "methods": {"recipe", "model_files", "models", "shapes"},
    "lowrank": set(),
    "kernels": set(),
    "engine": {"recipe", "data", "kernels"},
    "train": {"recipe", "records", "data", "methods.base"},
    "infer": {"recipe", "model_files", "data", "models", "methods"},
    "evaluate": {"recipe", "records", "data", "infer"},
    "console": {"recipe", "records"},
    "machine": set(),
    "shapes": set(),
    "catalog": set(),
    "plan": {"recipe", "records", "shapes", "catalog", "engine.sizes", "engine.takes", "engine.offload"},
    "target": {"recipe", "records", "data", "models", "methods", "hub"},
    "merging": {"recipe", "records", "data", "models", "methods", "engine", "infer", "run_path", "target"},
    "shrinking": {"recipe", "lowrank", "methods", "infer", "target"},
    "planning": {"recipe", "records", "hub", "model_files", "data", "shapes", "catalog", "plan"},
    "measure": {
        *{"recipe", "records", "data", "shapes", "catalog", "plan", "planning", "models", "methods", "train"},
        *{"machine", "engine"},
    },
    "run_path": {"recipe", "records", "model_files", "data", "models", "methods", "engine", "train"},
    "run": {
        *{"recipe", "records", "hub", "data", "models", "methods", "train", "infer", "evaluate", "pocket", "machine"},
        *{"planning", "plan", "shapes", "catalog", "engine", "model_files", "run_path"},
    },
    "opening": {"recipe", "data", "plan", "models", "engine", "run_path", "target"},
    "serving": {"recipe", "records", "data", "infer", "evaluate", "target", "opening", "machine"},
    "demo": {"records", "report", "compare"},
    "doctor": {"hub", "machine"},
    "report": {"recipe", "records", "shapes", "catalog", "plan"},
    "compare": {
        *{"recipe", "records", "data", "infer", "evaluate", "models", "methods", "train", "target", "run", "serving"},
        *{"planning", "plan", "catalog", "report", "console", "machine", "opening"},
    },
    "federated": {
        *{"recipe", "records", "data", "models", "methods", "train", "evaluate", "target", "run", "console"},
        *{"lowrank", "machine", "run_path"},
    },
}
WAITING: set[str] = set()  # rooms on the page whose issue is still open
ALLOWED["cli"] = set(ALLOWED)
TORCH_FREE = {
    *{"errors", "units", "recipe", "records", "hub", "pocket", "model_files", "data", "console", "doctor", "cli"},
    *{"shapes", "catalog", "plan", "planning", "report"},
}
HEAVY = {"torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
MAX_LINES = 400
LONG_FILES: dict[str, str] = {  # path under src/thriftune -> why one file of that length reads better than two
    "recipe/schema.py": "the one home of every option and default",
}


def sources() -> dict[str, Path]:
    """Dotted module name -> file; packages go by their own name."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join((PACKAGE, *parts))] = path
    return found


def room_of(module: str) -> str:
    """'' for the package itself and for `python -m thriftune`, which only calls the command line."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


def rooms_found() -> set[str]:
    return {room_of(module) for module in sources()} - {""}


def imports(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that one import statement names, relative ones made whole."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            yield node.lineno, f"{base}.{alias.name}"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            yield node.lineno, str(first.value)


def all_imports(text: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    return [found for node in ast.walk(ast.parse(text)) for found in imports(node, module, is_package)]


def import_time_imports(text: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """What runs when the module is imported: everything but functions' bodies and `if TYPE_CHECKING`."""
    found: list[tuple[int, str]] = []
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += getattr(node, "decorator_list", []) + [default for default in node.args.defaults if default]
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        found += imports(node, module, is_package)
        waiting += ast.iter_child_nodes(node)
    return found


def forbidden(module: str, text: str, is_package: bool = False) -> list[str]:
    """The imports in a module's text that its room may not have."""
    room = room_of(module)
    allowed = ALLOWED.get(room, set()) | EVERYWHERE
    found = []
    for line, name in all_imports(text, module, is_package):
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) == 1 or (room and parts[1] == room):
            continue
        place = ".".join(parts[1:])
        if room == "" and parts[1] == "cli":  # thriftune/__main__.py
            continue
        if not parts[1].startswith("__") and not any(place == way or place.startswith(f"{way}.") for way in allowed):
            found.append(f"{module}:{line} imports {name}")
    return found


def heavy_at_import(module: str, text: str) -> list[str]:
    return [
        f"{module}:{line} imports {name} when it is imported"
        for line, name in import_time_imports(text, module)
        if name.split(".")[0] in HEAVY
    ]


def test_imports_only_go_where_the_table_allows() -> None:
    checked, wrong = 0, []
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        checked += len([name for _, name in all_imports(text, module) if name.startswith(PACKAGE)])
        wrong += forbidden(module, text, is_package=path.name == "__init__.py")
    assert checked > 20
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_table_and_on_the_page() -> None:
    found = rooms_found()
    assert {"errors", "units", "recipe", "records"} <= found
    assert found <= set(ALLOWED), f"add {sorted(found - set(ALLOWED))} to ALLOWED here and to docs/layout.md"
    rows = re.findall(r"^\| ([^|]*) \|", (REPOSITORY / "docs" / "layout.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)} & set(ALLOWED)
    assert len(documented) > 15
    assert found <= documented, f"docs/layout.md has no row for {sorted(found - documented)}"


def test_rooms_said_to_be_waiting_are() -> None:
    assert set(ALLOWED) >= WAITING
    assert not rooms_found() & WAITING, "they exist: take them out of WAITING and out of the brackets in docs/layout.md"


def test_the_table_names_known_rooms_and_has_no_cycle() -> None:
    ways = {room: {way.split(".")[0] for way in allowed} for room, allowed in ALLOWED.items()}
    assert not {way for allowed in ways.values() for way in allowed} - set(ALLOWED)
    above: set[str] = set()
    while len(above) < len(ways):
        ready = {room for room, allowed in ways.items() if room not in above and allowed - {room} <= above}
        assert ready, f"a cycle among {sorted(set(ways) - above)}"
        above |= ready


def test_nothing_imports_the_outermost_rooms() -> None:
    outermost = {"cli", "compare", "federated", "merging", "doctor", "demo"}
    wrong = {room: allowed & outermost for room, allowed in ALLOWED.items() if room != "cli" and allowed & outermost}
    assert wrong == {"demo": {"compare"}}


def test_torch_free_rooms_import_no_torch() -> None:
    checked, wrong = 0, []
    for module, path in sources().items():
        if room_of(module) in TORCH_FREE | {""}:
            checked += 1
            wrong += heavy_at_import(module, path.read_text(encoding="utf-8"))
    assert checked > 6
    assert not wrong, "\n".join(wrong)


def test_torch_free_rooms_stay_so_in_a_fresh_interpreter() -> None:
    """What the sources cannot show: a library of ours that imports torch by itself."""
    modules = [module for module in sources() if room_of(module) in TORCH_FREE - {"cli"}]
    assert len(modules) > 6
    assert loaded_by(*modules) == []


def test_the_command_line_starts_without_torch() -> None:
    assert loaded_by("thriftune.cli") == []


def loaded_by(*modules: str) -> list[str]:
    """The heavy libraries in memory after a fresh interpreter has imported these modules."""
    script = f"import sys, {', '.join(modules)}\nprint(*sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(SOURCES)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources().values()
    }
    assert len(lengths) > 6
    long = {name: length for name, length in lengths.items() if length > MAX_LINES and name not in LONG_FILES}
    assert not long, f"more than {MAX_LINES} lines: {long}; split them or give the reason in LONG_FILES"
    assert not [name for name in LONG_FILES if lengths.get(name, 0) <= MAX_LINES], "no reason is needed any more"


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [module for module in sources() if module.split(".")[-1] in drawers]


def test_every_module_is_used() -> None:
    modules = sources()
    used = {PACKAGE, f"{PACKAGE}.__main__", f"{PACKAGE}.cli"}  # the entry points of pyproject.toml and of `python -m`
    for module, path in modules.items():
        text = path.read_text(encoding="utf-8")
        named = {name for _, name in all_imports(text, module, is_package=path.name == "__init__.py")}
        named |= {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) if is_name(node)}
        for name in named:
            parts = name.split(".")
            parents = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            used |= {parent for parent in parents if parent != module}
    unused = sorted(set(modules) - used)
    assert len(modules) > 6
    assert not unused, f"nothing imports {unused}"


def is_name(node: ast.Constant) -> bool:
    """A module named in a text, as `importlib.resources.files("thriftune.pocket")` does."""
    return isinstance(node.value, str) and re.fullmatch(rf"{PACKAGE}(\.\w+)+", node.value) is not None


def test_the_readme_names_targets_that_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_of(readme))))
    defined = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= defined, f"the Makefile has no {sorted(named - defined)}"


def code_of(page: str) -> list[str]:
    """What stands between backticks, and the indented lines."""
    return re.findall(r"`([^`\n]+)`", page) + re.findall(r"^ {4}.+", page, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "text", "count"),
    [
        ("thriftune.recipe.read", "from thriftune.errors import InputError", 0),
        ("thriftune.recipe.read", "from thriftune.records import RunRecord", 1),
        ("thriftune.recipe.read", "def f():\n    import thriftune.train.loop", 1),
        ("thriftune.recipe.read", "from ..records import RunRecord", 1),
        ("thriftune.recipe.read", "from . import schema", 0),
        ("thriftune.recipe.read", "from thriftune import records", 1),
        ("thriftune.recipe.read", "from thriftune import __version__", 0),
        ("thriftune.recipe.read", "import importlib\nimportlib.import_module('thriftune.train')", 1),
        ("thriftune.train.loop", "from thriftune.methods.base import Method", 0),
        ("thriftune.train.loop", "from thriftune.methods import METHODS", 1),
        ("thriftune.train.loop", "from thriftune.models import LoadedModel", 1),
        ("thriftune.newroom.x", "from thriftune.recipe import Recipe", 1),
        ("thriftune.__main__", "from thriftune.cli import main", 0),
        ("thriftune", "from thriftune.cli import main", 0),
    ],
)
def test_the_checker_sees_what_it_should(module: str, text: str, count: int) -> None:
    assert len(forbidden(module, text)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import torch", 1),
        ("from torch.nn import functional", 1),
        ("try:\n    import peft\nexcept ImportError:\n    pass", 1),
        ("class A:\n    import datasets", 1),
        ("def f():\n    import torch", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("import torchvision_like_name", 0),
    ],
)
def test_the_checker_sees_torch(text: str, count: int) -> None:
    assert len(heavy_at_import("thriftune.units", text)) == count
