"""A person's own GPUs, prices and electricity price: every YAML file in ~/.config/thriftune.

    gpus:
      my-card: {name: ..., memory: 24GiB, ...}     the fields of catalog/gpus.json
    prices:
      - {gpu: my-card, provider: us, ...}          the fields of catalog/prices.json
    electricity_usd_per_kwh: 0.31

THRIFTUNE_CONFIG_DIR names another folder, XDG_CONFIG_HOME another place for ~/.config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from thriftune.catalog.fields import MOST_USD_PER_KWH, RowReader, did_you_mean, gpu_of, price_of, shown
from thriftune.catalog.rows import Gpu, Price
from thriftune.errors import InputError, first_line

SECTIONS = ("gpus", "prices", "electricity_usd_per_kwh")
MAX_CHARACTERS = 500_000
MAX_DEPTH = 10


@dataclass(frozen=True, slots=True)
class UserRows:
    """What the files in `folder` add. `notes` are sentences to print: which built-in rows they replace."""

    gpus: dict[str, Gpu] = field(default_factory=dict)
    prices: tuple[Price, ...] = ()
    electricity_usd_per_kwh: float | None = None
    electricity_file: Path | None = None
    notes: tuple[str, ...] = ()


def config_folder() -> Path:
    """Where the user's files are looked for; it need not exist."""
    chosen = os.environ.get("THRIFTUNE_CONFIG_DIR")
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))  # the XDG rules: a path that is not absolute is ignored
    return (base if base.is_absolute() else Path("~/.config")) / "thriftune"


def read_user_rows(built_in: Mapping[str, Gpu], today: date | None = None) -> UserRows:
    """The rows of all the user's files, empty when there are none.

    `built_in` are the package's GPUs, which prices may name and rows may replace. Raises InputError with every problem
    of every file at once; `today` (default: the clock's) bounds the dates.
    """
    reading = _Reading(built_in, today or date.today())
    contents = {path: _content(path, reading.problems) for path in _files()}
    for path, content in contents.items():
        reading.read_gpus(path, content.get("gpus"))
    for path, content in contents.items():  # after all GPUs: a price may name one of another file
        reading.refuse_unknown_sections(path, content)
        reading.read_prices(path, content.get("prices"))
        reading.read_electricity(path, content)
    if reading.problems:
        listed = "".join(f"\n    - {problem}" for problem in reading.problems)
        count = len(reading.problems)
        raise InputError(
            given=f"your own GPUs and prices have {count} problem{'s' if count != 1 else ''}:{listed}",
            allowed="gpus, prices and electricity_usd_per_kwh, with the fields of thriftune/catalog/gpus.json and "
            "prices.json",
            do=f"correct each line above, or move the file out of {config_folder()}",
        )
    return UserRows(
        gpus=reading.gpus,
        prices=tuple(reading.prices),
        electricity_usd_per_kwh=reading.electricity_usd_per_kwh,
        electricity_file=reading.electricity_file,
        notes=tuple(reading.notes),
    )


@dataclass
class _Reading:
    """The rows found so far, and the problems."""

    built_in: Mapping[str, Gpu]
    today: date
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gpus: dict[str, Gpu] = field(default_factory=dict)
    gpu_keys: dict[str, Path] = field(default_factory=dict)  # also of rows with problems: where each was first given
    prices: list[Price] = field(default_factory=list)
    price_places: dict[tuple[str, str, str], str] = field(default_factory=dict)
    electricity_usd_per_kwh: float | None = None
    electricity_file: Path | None = None

    def refuse_unknown_sections(self, path: Path, content: Mapping[str, Any]) -> None:
        for name in content:
            if name not in SECTIONS:
                self.problems.append(f"{path}: unknown key {shown(name)}{did_you_mean(name, SECTIONS)}")

    def read_gpus(self, path: Path, section: object) -> None:
        if section is None:
            return
        if not isinstance(section, dict):
            self.problems.append(f"{path}, gpus: expects one `key:` a GPU with its fields below, got {shown(section)}")
            return
        for key, fields in section.items():
            where = f"{path}, gpus.{key[:60]}"
            earlier = self.gpu_keys.setdefault(key, path)
            if earlier != path:
                self.problems.append(f"{where}: is in {earlier} as well; keep one of them")
            elif not isinstance(fields, dict):
                self.problems.append(f"{where}: expects fields such as name and memory, got {shown(fields)}")
            elif (gpu := gpu_of(key, RowReader(where, fields, self.problems, self.today))) is not None:
                self.gpus[key] = gpu
                if key in self.built_in:
                    self.notes.append(f"{key} is taken from {path}, not from the built-in catalogue")

    def read_prices(self, path: Path, section: object) -> None:
        if section is None:
            return
        if not isinstance(section, list):
            self.problems.append(f"{path}, prices: expects a list, one `- gpu: ...` a price, got {shown(section)}")
            return
        for number, fields in enumerate(section, start=1):
            where = f"{path}, prices row {number}"
            if not isinstance(fields, dict):
                self.problems.append(f"{where}: expects fields such as gpu and usd_per_hour, got {shown(fields)}")
                continue
            row = RowReader(where, fields, self.problems, self.today)
            price = price_of(row, [*self.built_in, *self.gpu_keys])
            if price is None:
                continue
            earlier = self.price_places.setdefault(offer_of(price), where)
            if earlier != where:
                self.problems.append(f"{where}: the same GPU, provider and kind are in {earlier}; keep one of them")
            self.prices.append(price)

    def read_electricity(self, path: Path, content: Mapping[str, Any]) -> None:
        name = "electricity_usd_per_kwh"
        if content.get(name) is None:
            return
        row = RowReader(str(path), content, self.problems)
        value = row.number(name, "US dollars per kWh", MOST_USD_PER_KWH, zero=True)
        if self.electricity_file is not None:
            row.fail(f"{name} is in {self.electricity_file} as well; keep one of them")
        self.electricity_usd_per_kwh, self.electricity_file = value, path


def offer_of(price: Price) -> tuple[str, str, str]:
    """What two rows of the same offer have in common: GPU, provider (whatever its capitals) and kind."""
    return price.gpu, price.provider.casefold(), price.kind


def _files() -> list[Path]:
    folder = config_folder()
    try:
        folder = folder.expanduser()
        return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: there is no home
        chosen = os.environ.get("THRIFTUNE_CONFIG_DIR")
        if not chosen:
            return []
        given = f"THRIFTUNE_CONFIG_DIR names {shown(chosen)}, and there is no such folder ({error})"
    except OSError as error:
        given = f"{folder}, the folder of your own GPUs and prices, cannot be read: {error}"
    raise InputError(
        given=given,
        allowed="a folder of YAML files that you may read",
        do="create it, make it readable, or unset THRIFTUNE_CONFIG_DIR",
    )


def _content(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_CHARACTERS + 1).decode("utf-8")
        content = _parsed_yaml(text)
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {error}")
    else:
        if content is None or isinstance(content, dict):
            return content or {}
        problems.append(f"{path}: expects the keys {', '.join(SECTIONS)}, got {shown(content)}")
    return {}


def _parsed_yaml(text: str) -> Any:
    """The value of a YAML text; days stay texts. Raises ValueError in one line. PyYAML is imported only here, so that
    people without files of their own do not wait for it."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML declares it)
            first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            keys: set[str] = set()
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is not a text", key_node.start_mark)
                if key_node.value in keys:
                    problem = f"key {shown(key_node.value)} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                keys.add(key_node.value)
            pairs = [(key.value, self.construct_object(value, deep=True)) for key, value in node.value]
            return dict(pairs)

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        _refuse_tricks(text, base)
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or first_line(error)
        raise ValueError(f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)) from None


def _refuse_tricks(text: str, loader: Any) -> None:
    """Raises ValueError on what a table of facts does not need and can make a few lines very large: aliases, tags, deep
    nesting, several documents."""
    import yaml

    depth = documents = 0
    for event in yaml.parse(text, Loader=loader):
        line = getattr(event.start_mark, "line", 0) + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases (*name) are not supported, write the value out (line {line})")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"tags ({tag}) are not supported (line {line})")
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise ValueError(f"a second document begins (line {line}); keep one a file")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"values are nested more than {MAX_DEPTH} deep (line {line})")
