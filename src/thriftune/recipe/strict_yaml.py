"""YAML as recipes use it: one mapping of plain values, read without surprises and written so that it reads back.

PyYAML follows YAML 1.1, where `no` is false, `010` is eight, `1:30` is ninety and `1e-4` is a text. Here words mean
what YAML 1.2's core schema says: only `true` and `false` are switches, and 1e-4 is a number. Keys given twice, tags
and aliases are refused; the last of these also keeps a few lines from standing for billions.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from thriftune.errors import first_line

MAX_CHARACTERS = 200_000  # a recipe is a page or two; PyYAML reads this much in about two seconds
MAX_DEPTH = 20
MAX_DIGITS = 400  # more than the largest float has; Python itself refuses to read integers from 4,300 digits on

_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"
_BASES = {"0x": 16, "0o": 8}
# Integers before floats: every integer is also written like a float, and the first match is taken.
_CORE_SCHEMA: list[tuple[str, re.Pattern[str], list[str]]] = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(rf"(?:{_INT.pattern})\Z"), list("-+0123456789")),
    ("float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), list("-+.0123456789")),
]


def _refusal(problem: str, where: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, where.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML declares it)
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*name) are not supported, write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _refusal(f"tags ({event.tag}) are not supported", event)
        if self.depth >= MAX_DEPTH:
            raise _refusal(f"values are nested more than {MAX_DEPTH} deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(f"key {key!r} is not a text, quote it", key_node)
            if key in found:
                raise _refusal(f"key {key!r} is given twice", key_node)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def _int(self, node: ScalarNode) -> int:
        text = node.value
        if len(text) > MAX_DIGITS:
            raise _refusal(f"a number has more than {MAX_DIGITS} digits", node)
        return int(text, _BASES.get(text[:2], 10))


for _name, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)
_Loader.add_constructor(f"{_TAG}map", _Loader._mapping)
_Loader.add_constructor(f"{_TAG}int", _Loader._int)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the core schema above would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, text: str) -> ScalarNode:
        """Quoted with escapes where it holds what YAML takes for the end of a line beside \\n."""
        style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _Dumper._text)
for _name, _pattern, _first in _CORE_SCHEMA:
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with one line that says what is wrong and in which line."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_in_one_line(error)) from None


def write_yaml(content: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to an equal value; keys keep their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _in_one_line(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or first_line(error)
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)
