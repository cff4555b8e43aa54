"""How a recipe is read: YAML files, `key=value` words, and the names other tools use for the same options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.errors import InputError
from thriftune.recipe.nearest import did_you_mean
from thriftune.recipe.schema import Recipe, known_places, shown
from thriftune.recipe.strict_yaml import MAX_CHARACTERS, parse_yaml, write_yaml

# Names of axolotl, LLaMA-Factory, TRL and transformers -> where the option lives here.
ALIASES = {
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "base": "model.name",
    "model_id": "model.name",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "torch_dtype": "model.dtype",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "dataset_config": "data.subset",
    "dataset_config_name": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "val_set_size": "data.eval_fraction",
    "max_train_samples": "data.max_samples",
    "train_on_inputs": "data.train_on_prompt",
    "adapter": "method",
    "finetuning_type": "method",
    "lr": "train.learning_rate",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "gradient_clipping": "train.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "evaluation_strategy": "train.eval_strategy",
    "resume": "train.resume_from_checkpoint",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_use_rslora": "lora.use_rslora",
    "peft_use_dora": "lora.use_dora",
    "double_quantization": "quant.bnb_4bit_use_double_quant",
    "quantization_type": "quant.bnb_4bit_quant_type",
    "output_dir": "output",
}

# Names whose meaning is the opposite of ours.
INVERTED = {
    "completion_only_loss": "data.train_on_prompt",
    "assistant_only_loss": "data.train_on_prompt",
    "mask_prompt": "data.train_on_prompt",
}

# Switches that other tools use to say "the base in four bits": they make lora qlora here, wherever `method` is written.
FOUR_BIT_SWITCHES = {"load_in_4bit": True, "quantization_bit": 4}

# Unique leaves that a person could mean otherwise: these are not guessed.
AMBIGUOUS = {"batch_size": "train.per_device_train_batch_size or generation.batch_size"}

SECTIONS = ("model", "data", "train", "lora", "quant", "dynamic", "generation", "federated")
OPEN_OPTIONS = ("data.columns", "lora.options")  # options that are mappings themselves


def _flat_places() -> dict[str, str]:
    """Leaf name -> dotted place, for the leaves whose name is unique, no section's and not ambiguous."""
    places: dict[str, list[str]] = {}
    for place in known_places():
        places.setdefault(place.split(".")[-1], []).append(place)
    unique = {leaf: found[0] for leaf, found in places.items() if len(found) == 1}
    return {leaf: place for leaf, place in unique.items() if leaf not in SECTIONS and leaf not in AMBIGUOUS}


FLAT = _flat_places()
_PLACES = frozenset(known_places())
_NAMES = [*known_places(), *SECTIONS, *ALIASES, *INVERTED, *FOUR_BIT_SWITCHES]


def read_recipe(
    file: str | Path | None = None, overrides: Sequence[str] = (), values: dict[str, Any] | None = None
) -> Recipe:
    """The recipe of a YAML file, changed by `values` (dotted or flat keys) and then by `key=value` words.

    Raises InputError when the file cannot be read and RecipeError with every problem of the content.
    """
    reading = _Reading()
    if file is not None:
        reading.lay(_parse_yaml_file(Path(file)))
    reading.lay({key: value for key, value in (values or {}).items() if value is not None})
    reading.lay_words(overrides)
    source = str(file) if file is not None else "the recipe"
    return Recipe.build(reading.tree, source=source, found=reading.problems)


def dump_yaml(recipe: Recipe) -> str:
    """YAML that `read_recipe` reads back to an equal recipe."""
    return write_yaml(recipe.dump())


def _parse_yaml_file(path: Path) -> dict[str, Any]:
    allowed = "a YAML file of recipe keys, such as those in recipes/"
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_CHARACTERS + 1).decode("utf-8")  # a character takes at most four bytes
    except FileNotFoundError:
        raise InputError(given=f"recipe {path} does not exist", allowed=allowed, do="correct the path") from None
    except UnicodeDecodeError as error:
        given = f"recipe {path} is not UTF-8 text: {error}"
        raise InputError(given=given, allowed=allowed, do="save it as UTF-8 text") from None
    except (OSError, ValueError) as error:
        given = f"recipe {str(path)!r} cannot be read: {error}"
        raise InputError(given=given, allowed=allowed, do="name a file that you may read") from None
    try:
        content = parse_yaml(text)
    except ValueError as error:
        given = f"recipe {path} is not a recipe's YAML: {error}"
        raise InputError(given=given, allowed=allowed, do="correct that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        given = f"recipe {path} holds a {type(content).__name__}, not keys and values"
        raise InputError(given=given, allowed=allowed, do="write one `key: value` a line")
    return content


@dataclass
class _Reading:
    """A tree of sections that layers (a file, values, words) are laid over, and the problems seen on the way."""

    tree: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    given: dict[str, tuple[str, Any]] = field(default_factory=dict)  # in this layer: place -> (name, value)
    switches: dict[str, Any] = field(default_factory=dict)  # in this layer: four-bit switches, which wait for `method`

    def lay(self, layer: dict[str, Any]) -> None:
        """One mapping, in which an option may stand once, by whichever of its names."""
        self.given.clear()
        self._merge(layer, prefix="", once=True)
        self._apply_switches()

    def lay_words(self, words: Sequence[str]) -> None:
        """`key=value` words, of which the last counts, as on any command line."""
        for word in words:
            key, equals, text = word.partition("=")
            if not equals or not key.strip():
                self.problems.append(f"{shown(word)} is not of the form key=value")
                continue
            try:
                value = parse_yaml(text)
            except ValueError as error:
                self.problems.append(f"{shown(word)}: the value is not valid YAML: {error}")
                continue
            self._merge({key.strip(): value}, prefix="", once=False)
        self._apply_switches()

    def _merge(self, changes: dict[str, Any], prefix: str, once: bool) -> None:
        """Bring each key to its dotted place; what cannot be placed goes to `problems`."""
        for key, value in changes.items():
            section, dot, rest = key.partition(".")
            if dot and not prefix and section in SECTIONS:
                self._merge({rest: value}, prefix=f"{section}.", once=once)
                continue
            name = f"{prefix}{key}"
            if name in SECTIONS:
                self._merge_section(name, value, once)
            elif name in FOUR_BIT_SWITCHES:
                self.switches[name] = value
            elif (place := _inside(prefix, INVERTED.get(key))) is not None:
                if isinstance(value, bool):
                    self._set(place, not value, name, once)
                else:
                    self.problems.append(f"{name}: expects true or false, got {shown(value)}")
            elif (place := _place(name, key, prefix)) is not None:
                self._set(place, value, name, once)
            elif name in AMBIGUOUS:
                self.problems.append(f"{name}: could be {AMBIGUOUS[name]}; write the one you mean")
            else:
                self.problems.append(f"{shown(name, quote=False)}: unknown key{did_you_mean(key, _NAMES)}")

    def _merge_section(self, section: str, value: Any, once: bool) -> None:
        if isinstance(value, dict):
            self._merge(value, prefix=f"{section}.", once=once)
        elif section in ("model", "data") and isinstance(value, str):
            self._set(f"{section}.name", value, section, once)
        elif value is not None:  # a section whose keys are all commented out is empty
            self.problems.append(f"{section}: expects keys and values, got {shown(value)}")

    def _set(self, place: str, value: Any, name: str, once: bool) -> None:
        earlier, earlier_value = self.given.setdefault(place, (name, value))
        if once and earlier_value != value:
            self.problems.append(f"{place} is given twice, as {earlier} and as {name}; keep one of them")
        *path, leaf = place.split(".", 2)
        below = self.tree
        for part in path:
            if not isinstance(below.get(part), dict):
                below[part] = {}
            below = below[part]
        below[leaf] = value

    def _apply_switches(self) -> None:
        """`load_in_4bit: true` beside `adapter: lora` is qlora in every order; beside full it is a contradiction."""
        for name, value in self.switches.items():
            method = self.tree.get("method")
            if value == FOUR_BIT_SWITCHES[name]:
                if method in (None, "auto", "lora", "qlora"):
                    self.tree["method"] = "qlora"
                else:
                    self.problems.append(f"{name} asks for method qlora, and method is {shown(method)}; drop one")
            elif value in (False, None):
                if method == "qlora":
                    self.problems.append(f"{name} is off and method is qlora, which is in four bits; write method lora")
            else:
                self.problems.append(f"{name}: only {FOUR_BIT_SWITCHES[name]} is supported, got {shown(value)}")
        self.switches.clear()


def option_place(key: str) -> str | None:
    """The dotted place of the option that a person means by `key`, in any spelling that a recipe takes; None for an
    unknown one."""
    section, dot, rest = key.partition(".")
    if dot and section in SECTIONS:
        return _place(key, rest, f"{section}.")
    return INVERTED.get(key) or _place(key, key, "")


def _place(name: str, key: str, prefix: str) -> str | None:
    """The dotted place of a key as written: in full, by another tool's name, flat, or inside an open option."""
    if name in _PLACES:
        return name
    if name.startswith(tuple(f"{option}." for option in OPEN_OPTIONS)) and not name.endswith("."):
        return name
    return _inside(prefix, ALIASES.get(key) or FLAT.get(key))


def _inside(prefix: str, place: str | None) -> str | None:
    """`place` when it lies in the section that is being read (`prefix` is '' at the top, where every place does)."""
    return place if place is not None and place.startswith(prefix) else None
