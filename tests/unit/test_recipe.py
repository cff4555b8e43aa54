"""The recipe: defaults, every way to write an option, what is refused and how, and that writing and reading agree."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftune.errors import InputError, RecipeError
from thriftune.recipe import (
    DataRecipe,
    DynamicRecipe,
    FederatedRecipe,
    GenerationRecipe,
    LoraRecipe,
    ModelRecipe,
    QuantRecipe,
    Recipe,
    TrainRecipe,
    did_you_mean,
    dump_yaml,
    read_recipe,
)
from thriftune.recipe.read import ALIASES, AMBIGUOUS, FLAT, FOUR_BIT_SWITCHES, INVERTED, SECTIONS
from thriftune.recipe.schema import known_places, shown
from thriftune.recipe.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, parse_yaml, write_yaml

# A value for every option that differs from its default, so that a test sees whether it arrived.
OTHER_VALUES: dict[str, Any] = {
    "method": "qlora",
    "engine": "off",
    "precision": "fp8",
    "offload": "off",
    "max_memory": "24GiB",
    "model.name": "org/model",
    "model.revision": "abc",
    "model.trust_remote_code": True,
    "model.dtype": "float32",
    "model.attn_implementation": "eager",
    "data.name": "imdb",
    "data.path": "folder",
    "data.subset": "main",
    "data.split": "other",
    "data.eval_split": "test",
    "data.eval_path": "rows.jsonl",
    "data.eval_fraction": 0.25,
    "data.max_samples": 7,
    "data.max_eval_samples": 7,
    "data.max_length": 77,
    "data.cut_prompt": "end",
    "data.train_on_prompt": True,
    "data.chat_template": "none",
    "data.columns": {"prompt": "question"},
    "data.shuffle": False,
    "train.learning_rate": 1e-4,
    "train.num_train_epochs": 2.5,
    "train.max_steps": 7,
    "train.per_device_train_batch_size": 7,
    "train.gradient_accumulation_steps": 7,
    "train.per_device_eval_batch_size": 7,
    "train.optim": "adamw_8bit",
    "train.weight_decay": 0.1,
    "train.adam_beta1": 0.8,
    "train.adam_beta2": 0.95,
    "train.adam_epsilon": 1e-6,
    "train.max_grad_norm": 0.5,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 7,
    "train.warmup_ratio": 0.1,
    "train.gradient_checkpointing": "on",
    "train.logging_steps": 7,
    "train.eval_strategy": "no",
    "train.eval_steps": 7,
    "train.save_strategy": "no",
    "train.save_steps": 7,
    "train.save_total_limit": 7,
    "train.load_best_model_at_end": False,  # true asks for other options: see the contradictions below
    "train.resume_from_checkpoint": "auto",
    "lora.r": 7,
    "lora.alpha": 7.5,
    "lora.dropout": 0.1,
    "lora.target_modules": ["q_proj", "v_proj"],
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init_lora_weights": "gaussian",
    "lora.bias": "all",
    "lora.modules_to_save": ["lm_head"],
    "lora.options": {"layers_to_transform": [0, 1]},
    "quant.bnb_4bit_quant_type": "fp4",
    "quant.bnb_4bit_use_double_quant": False,
    "dynamic.r_start": 32,
    "dynamic.keep": 0.25,
    "dynamic.first_cut": 0.2,
    "dynamic.last_cut": 0.6,
    "dynamic.n_cuts": 2,
    "dynamic.round_to": 4,
    "dynamic.min_rank": 8,
    "dynamic.score": "random",
    "generation.max_new_tokens": 7,
    "generation.temperature": 0.7,
    "generation.top_p": 0.9,
    "generation.batch_size": 7,
    "federated.rounds": 7,
    "federated.local_steps": 7,
    "federated.aggregation": "rolora",
    "federated.quorum": 0.7,
    "federated.round_timeout_s": 7.5,
    "federated.send_dtype": "float32",
    "federated.largest_change": 7.5,
    "federated.clip_norm": 0.7,
    "federated.noise_multiplier": 0.7,
    "federated.delta": 1e-3,
    "output": "runs/mine",
    "seed": 7,
    "report_to": ["tensorboard"],
}


def at(recipe: Recipe, place: str) -> Any:
    value: Any = recipe
    for part in place.split("."):
        value = getattr(value, part)
    return value


def problems_of(*words: str, file: Path | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, words)
    return caught.value.problems


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# What is there


def test_defaults() -> None:
    recipe = read_recipe()
    assert recipe == Recipe() == Recipe.build({}, source="nothing")
    assert (recipe.method, recipe.model.name, recipe.data.name, recipe.seed) == ("auto", "pocket", "reviews", 42)
    assert recipe.train.learning_rate is None
    for method, rate in (("lora", 2e-4), ("qlora", 2e-4), ("full", 2e-5)):
        assert read_recipe(overrides=[f"method={method}"]).learning_rate == rate
    assert read_recipe(overrides=["method=full", "lr=3e-3"]).learning_rate == 3e-3


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1  # type: ignore[misc]


def test_every_option_is_covered_here_and_explained() -> None:
    assert set(OTHER_VALUES) == set(known_places())
    assert len(OTHER_VALUES) > 60
    kinds = [
        *(Recipe, ModelRecipe, DataRecipe, TrainRecipe, LoraRecipe, QuantRecipe, DynamicRecipe, GenerationRecipe),
        FederatedRecipe,
    ]
    assert len(SECTIONS) == len(kinds) - 1
    silent = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if not field.description and name not in SECTIONS
    ]
    assert not silent, f"no description: {silent}"


# The ways to write an option


@pytest.mark.parametrize("place", OTHER_VALUES)
def test_every_option_dotted_nested_and_in_yaml(place: str, tmp_path: Path) -> None:
    value = OTHER_VALUES[place]
    nested = value
    for part in reversed(place.split(".")):
        nested = {part: nested}
    recipes = [
        read_recipe(values={place: value}),
        read_recipe(values=nested),
        read_recipe(overrides=[f"{place}={json.dumps(value)}"]),
        read_recipe(written(tmp_path, yaml.safe_dump(nested))),
        read_recipe(written(tmp_path, write_yaml({place: value}))),
    ]
    assert all(at(recipe, place) == value for recipe in recipes)
    if place != "train.load_best_model_at_end":
        assert at(Recipe(), place) != value


@pytest.mark.parametrize("leaf", FLAT)
def test_every_unique_leaf_flat(leaf: str) -> None:
    place = FLAT[leaf]
    assert at(read_recipe(values={leaf: OTHER_VALUES[place]}), place) == OTHER_VALUES[place]


def test_the_usual_names_of_hugging_face_are_flat() -> None:
    usual = (
        "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps warmup_ratio "
        "warmup_steps lr_scheduler_type weight_decay logging_steps save_steps save_total_limit eval_steps max_length "
        "eval_strategy save_strategy gradient_checkpointing optim resume_from_checkpoint target_modules use_rslora "
        "use_dora bnb_4bit_quant_type bnb_4bit_use_double_quant max_new_tokens r"
    )
    assert set(usual.split()) <= set(FLAT)
    assert {"seed", "method", "output", "report_to"} <= set(known_places())


@pytest.mark.parametrize("alias", ALIASES)
def test_every_name_of_another_tool(alias: str) -> None:
    place = ALIASES[alias]
    assert at(read_recipe(values={alias: OTHER_VALUES[place]}), place) == OTHER_VALUES[place]
    section, _, leaf = place.rpartition(".")
    if leaf and section:
        inside = read_recipe(values={section: {alias: OTHER_VALUES[place]}})
        assert at(inside, place) == OTHER_VALUES[place]
        assert inside == read_recipe(values={f"{section}.{alias}": OTHER_VALUES[place]})


def test_names_are_known_once_and_lead_somewhere() -> None:
    places = set(known_places())
    assert len(ALIASES) > 30
    assert set(ALIASES.values()) | set(INVERTED.values()) | set(FLAT.values()) <= places
    groups = [set(ALIASES), set(INVERTED), set(FOUR_BIT_SWITCHES), set(AMBIGUOUS), set(FLAT), set(SECTIONS)]
    assert len(set().union(*groups)) == sum(len(group) for group in groups)
    assert not places & set().union(*groups[:4])


@pytest.mark.parametrize("name", INVERTED)
def test_names_that_mean_the_opposite(name: str) -> None:
    assert read_recipe(overrides=[f"{name}=true"]).data.train_on_prompt is False
    assert read_recipe(overrides=[f"{name}=false"]).data.train_on_prompt is True
    assert read_recipe(values={"data": {name: False}}).data.train_on_prompt is True
    assert problems_of(f"{name}=maybe") == [f"{name}: expects true or false, got 'maybe'"]


@pytest.mark.parametrize("switch", ["load_in_4bit=true", "quantization_bit=4", "load_in_4bit=1"])
@pytest.mark.parametrize("beside", [[], ["adapter=lora"], ["finetuning_type=lora"], ["method=qlora"], ["method=auto"]])
def test_four_bit_switches_make_qlora_in_every_order(switch: str, beside: list[str], tmp_path: Path) -> None:
    for words in ([switch, *beside], [*beside, switch]):
        assert read_recipe(overrides=words).method == "qlora"
        lines = [word.replace("=", ": ") for word in words]
        assert read_recipe(written(tmp_path, "\n".join(lines))).method == "qlora"


def test_four_bit_switches_that_are_off_or_contradict(tmp_path: Path) -> None:
    assert read_recipe(overrides=["load_in_4bit=false"]).method == "auto"
    assert read_recipe(overrides=["load_in_4bit=false", "method=lora"]).method == "lora"
    assert read_recipe(overrides=["quantization_bit=null", "method=full"]).method == "full"
    assert "asks for method qlora" in problems_of("method=full", "load_in_4bit=true")[0]
    assert "asks for method qlora" in problems_of("load_in_4bit=true", "method=full")[0]
    assert "is off" in problems_of("load_in_4bit=false", "method=qlora")[0]
    assert "only 4 is supported" in problems_of("quantization_bit=8")[0]
    assert "only True is supported" in problems_of("load_in_4bit=[]")[0]
    file = written(tmp_path, "load_in_4bit: true")
    assert read_recipe(file, values={"method": "lora"}).method == "lora"


def test_layers_file_then_values_then_words(tmp_path: Path) -> None:
    file = written(
        tmp_path, "train:\n  max_steps: 1\n  learning_rate: 1e-3\nlora: {r: 4}\ndata: {columns: {text: a}}\n"
    )
    recipe = read_recipe(file, ["lora_r=8", "max_steps=3", "max_steps=4", "data.columns.prompt=q"], {"max_steps": 2})
    assert (recipe.train.max_steps, recipe.train.learning_rate, recipe.lora.r) == (4, 1e-3, 8)
    assert recipe.data.columns == {"text": "a", "prompt": "q"}
    assert read_recipe(values={"model": None, "method": None}) == Recipe()


def test_short_forms() -> None:
    recipe = read_recipe(values={"model": "org/m", "data": "rows.jsonl"}, overrides=["model.revision=main"])
    assert (recipe.model.name, recipe.model.revision, recipe.data.name) == ("org/m", "main", "rows.jsonl")
    assert read_recipe(overrides=["lora=", "model="]) == Recipe()
    assert read_recipe(overrides=["report_to=none"]).report_to == []
    assert read_recipe(overrides=["report_to=wandb,tensorboard"]).report_to == ["wandb", "tensorboard"]
    assert read_recipe(overrides=["eval_steps=5"]).train.eval_strategy == "steps"
    assert read_recipe(overrides=["save_steps=5"]).train.save_strategy == "steps"
    assert read_recipe(overrides=["save_steps=5", "save_strategy=no"]).train.save_strategy == "no"
    assert read_recipe(overrides=["target_modules=all"]).lora.target_modules == "all-linear"
    assert read_recipe(overrides=["target_modules=q_proj, v_proj"]).lora.target_modules == ["q_proj", "v_proj"]
    regular = r"model\.layers\.\d{1,2}\.self_attn\.(q|v)_proj"
    assert read_recipe(values={"lora.target_modules": regular}).lora.target_modules == regular
    assert read_recipe(overrides=["modules_to_save=lm_head,embed_tokens"]).lora.modules_to_save == [
        "lm_head",
        "embed_tokens",
    ]
    assert read_recipe(overrides=["modules_to_save=[]"]).lora.modules_to_save is None
    for word, kept in (("true", "on"), ("false", "off"), ("on", "on"), ("off", "off"), ("auto", "auto")):
        assert read_recipe(overrides=[f"gradient_checkpointing={word}"]).train.gradient_checkpointing == kept
    assert read_recipe(overrides=["resume=true"]).train.resume_from_checkpoint == "auto"
    assert read_recipe(overrides=["resume=false"]).train.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("word", "place", "value"),
    [
        ("learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("learning_rate=1E-4", "train.learning_rate", 1e-4),
        ("learning_rate=.001", "train.learning_rate", 1e-3),
        ("learning_rate='1e-4'", "train.learning_rate", 1e-4),
        ("lora_alpha=16", "lora.alpha", 16.0),
        ("seed=010", "seed", 10),
        ("seed=0x10", "seed", 16),
        ("r=16.0", "lora.r", 16),
        ("eval_strategy=no", "train.eval_strategy", "no"),
        ("save_strategy=no", "train.save_strategy", "no"),
        ("data.subset=no", "data.subset", "no"),
        ("output=2024-05-01", "output", "2024-05-01"),
        ("output=2024-99-99", "output", "2024-99-99"),
        ("data.split=1:30", "data.split", "1:30"),
        ("data.split=train[:10%]", "data.split", "train[:10%]"),
        ("data.name=C:\\rows.jsonl", "data.name", "C:\\rows.jsonl"),
        ("output=a=b", "output", "a=b"),
        ("model.revision='12e4'", "model.revision", "12e4"),
        (" seed = 5", "seed", 5),
        ("use_dora=true", "lora.use_dora", True),
        ("use_dora=yes", "lora.use_dora", True),
    ],
)
def test_words_mean_what_they_say(word: str, place: str, value: Any) -> None:
    found = at(read_recipe(overrides=[word]), place)
    assert found == value
    assert type(found) is type(value)


# What is refused


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lerning_rate=1", "did you mean train.learning_rate?"),
        ("train.lerning_rate=1", "did you mean train.learning_rate?"),
        ("lora_rnk=1", "did you mean lora_rank?"),
        ("load_in_4bits=true", "did you mean load_in_4bit?"),
        ("sed=1", "did you mean seed?"),
        ("model.nme=x", "did you mean model.name?"),
    ],
)
def test_an_unknown_key_names_the_nearest(word: str, hint: str) -> None:
    (problem,) = problems_of(word)
    assert problem == f"{word.partition('=')[0]}: unknown key ({hint})"


@pytest.mark.parametrize(
    "key", ["zzzzzzzz", "train.", ".", "train.x.y", "train.lora_r", "quant.load_in_4bit", "columns.a"]
)
def test_an_unknown_key_without_a_near_one_or_in_the_wrong_place(key: str) -> None:
    assert problems_of(f"{key}=1")[0].startswith(f"{key}: unknown key")


def test_did_you_mean() -> None:
    assert did_you_mean("Learning_Rate", ["train.learning_rate"]) == " (did you mean train.learning_rate?)"
    assert did_you_mean("qqq", ["train.learning_rate"]) == ""
    assert did_you_mean("", []) == ""


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "trian: {}\nlora: 3\nseed: -1\nmethod: QLORA\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, ["nonsense", "=3", "r=0", "output=[", "batch_size=4", "target_modules=5"])
    problems = caught.value.problems
    assert len(problems) == 10
    for start in ("trian: unknown", "lora: expects", "seed:", "method:", "'nonsense'", "'=3'", "lora.r:", "'output=['"):
        assert len([problem for problem in problems if problem.startswith(start)]) == 1, start
    text = str(caught.value)
    assert str(file) in text
    assert "has 10 problems" in text
    assert all(problem in text for problem in problems)


def test_a_name_with_two_readings_is_not_guessed() -> None:
    (problem,) = problems_of("batch_size=4")
    assert "train.per_device_train_batch_size or generation.batch_size" in problem
    assert read_recipe(overrides=["generation.batch_size=4"]).generation.batch_size == 4


def test_one_option_under_two_names(tmp_path: Path) -> None:
    (problem,) = problems_of(file=written(tmp_path, "lr: 1e-4\nlearning_rate: 2e-4\n"))
    assert problem == "train.learning_rate is given twice, as lr and as learning_rate; keep one of them"
    assert read_recipe(written(tmp_path, "lr: 1e-4\nlearning_rate: 1e-4\n")).train.learning_rate == 1e-4
    (problem,) = problems_of(file=written(tmp_path, "model: a\nbase_model: b\n"))
    assert problem.startswith("model.name is given twice, as model and as base_model")
    (problem,) = problems_of(file=written(tmp_path, "train_on_inputs: true\nmask_prompt: true\n"))
    assert problem.startswith("data.train_on_prompt is given twice")
    assert read_recipe(overrides=["lr=1e-4", "learning_rate=2e-4"]).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval_split=test", "eval_fraction=0.1"], "data.eval_split and data.eval_fraction"),
        (["eval_path=x", "eval_fraction=0.1"], "data.eval_path and data.eval_fraction"),
        (["eval_split=test", "eval_path=x"], "data.eval_split and data.eval_path"),
        (["eval_split=train"], "are both 'train'"),
        (["load_best_model_at_end=true"], "needs eval rows"),
        (["load_best_model_at_end=true", "eval_split=test", "eval_strategy=no"], "needs eval rows"),
        (["load_best_model_at_end=true", "eval_split=test", "save_strategy=no"], "needs train.save_strategy"),
        (["method=full", "lora_r=8"], "no effect with method full"),
        (["method=full", "precision=fp8"], "method full freezes none"),
        (["method=dynamic", "precision=fp8"], "not built in for a rank that changes"),
    ],
)
def test_contradictions(words: list[str], said: str) -> None:
    (problem,) = problems_of(*words)
    assert said in problem


def test_options_that_go_together() -> None:
    assert read_recipe(overrides=["load_best_model_at_end=true", "eval_split=test"]).train.load_best_model_at_end
    assert read_recipe(overrides=["method=full"]).method == "full"


NUMBERS = [place for place, value in OTHER_VALUES.items() if type(value) in (int, float)]


@pytest.mark.parametrize("place", NUMBERS)
@pytest.mark.parametrize("value", ["nan", ".nan", "inf", ".inf", "1e999", "true", "-7", "[1]", "abc", '""'])
def test_numbers_are_numbers(place: str, value: str) -> None:
    assert len(NUMBERS) > 25
    (problem,) = problems_of(f"{place}={value}")
    assert problem.startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("eval_fraction=1", "less than 1"),
        ("seed=4294967296", "less than or equal to 4294967295"),
        ("output=''", "at least 1 character"),
        ("model.name=''", "at least 1 character"),
        ("r=1.5", "valid integer"),
        ("target_modules=[]", "expects all-linear"),
        ("target_modules=[1]", "expects all-linear"),
        ("modules_to_save=[1]", "expects a list of names"),
        ("init_lora_weights=3", "expects true, false or the name"),
        ("report_to=wandb,foo", "'trackio', got 'foo'"),
        ("report_to=[none]", "got 'none'"),
        ("method=null", "got None"),
        ("model=[1]", "expects keys and values"),
        ("columns={a: 1}", "data.columns.a: input should be a valid string, got 1 (to mean the text, quote it"),
        ("output=2024", 'to mean the text, quote it: "2024", on a command line \'"2024"\''),
        ("lora.options=3", "valid dictionary"),
    ],
)
def test_values_that_are_refused(word: str, said: str) -> None:
    (problem,) = problems_of(word)
    assert said in problem


def test_messages_stay_short() -> None:
    assert all(len(problem) < 250 for problem in problems_of("x" * 5000, f"seed={'y' * 5000}", f"{'z' * 5000}=1"))
    assert len(shown("a" * 1000)) == 60


# Files


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n", "null\n", "{}\n", "\ufeff"])
def test_an_empty_file_is_the_default_recipe(text: str, tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, text)) == Recipe()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice (line 2)"),
        ("train:\n  max_steps: 1\n  max_steps: 1\n", "given twice (line 3)"),
        ("data: {columns: {a: x, a: y}}", "given twice"),
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds a str"),
        ("42", "holds a int"),
        ("1: a", "key 1 is not a text"),
        ("true: a", "key True is not a text"),
        ("? [a]\n: b", "is not a text"),
        ("a: b: c", "line 1"),
        ("a: [", "line 1"),
        ("\tseed: 1", "line 1"),
        ("seed: 1\n---\nseed: 2", "line 2"),
        ("seed: !!int '1'", "tags"),
        ("seed: !!python/object:os.system x", "tags"),
        ("a: &x [1]\nb: *x", "aliases (*name) are not supported"),
        ("base: &b {seed: 1}\n<<: *b", "aliases"),
        ("seed: \x07", "unacceptable character"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_recipe(written(tmp_path, text))
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe("a\0b")
    for content in ("seed: 1".encode("utf-16"), b"\xff\xfe\x00", "output: größe".encode("latin-1")):
        (tmp_path / "wrong.yaml").write_bytes(content)
        with pytest.raises(InputError, match="not UTF-8"):
            read_recipe(tmp_path / "wrong.yaml")


def hostile_texts() -> dict[str, str]:
    """Texts that make a careless reader hang, crash or fill the memory."""
    laughs = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    laughs += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    return {
        "a billion laughs": "\n".join(laughs),
        "laughs in merge keys": "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a]}\nc: {<<: [*b, *b, *b]}",
        "a value that holds itself": "&a [*a]",
        "deep lists": "options: " + "[" * 50_000,
        "deep lists, closed": "options: " + "[" * 5_000 + "]" * 5_000,
        "deep mappings": "\n".join(" " * level + "a:" for level in range(500)),
        "just too deep": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "too long": "# " + "x" * MAX_CHARACTERS,
        "too long, a list": "a: [" + "1," * MAX_CHARACTERS,
        "a long number": "seed: " + "9" * 5_000,
        "a long number in hex": "seed: 0x" + "f" * 5_000,
    }


@pytest.mark.parametrize("name", hostile_texts())
def test_hostile_yaml_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text = hostile_texts()[name]
    began = time.monotonic()
    with pytest.raises(InputError):
        read_recipe(written(tmp_path, text))
    with pytest.raises(RecipeError):
        read_recipe(overrides=[f"lora.options={text}"])
    assert time.monotonic() - began < 5


def test_the_longest_yaml_that_is_read_is_read_soon(tmp_path: Path) -> None:
    text = "data:\n  columns:\n" + "\n".join(f"    name{number:05}: column{number:05}" for number in range(5_000))
    assert 100_000 < len(text) < MAX_CHARACTERS
    began = time.monotonic()
    assert len(read_recipe(written(tmp_path, text)).data.columns) == 5_000
    assert time.monotonic() - began < 15


def test_depth_and_length_that_are_allowed() -> None:
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_yaml(" " * MAX_CHARACTERS) is None
    with pytest.raises(ValueError, match="longer than"):
        parse_yaml(" " * (MAX_CHARACTERS + 1))


# Writing and changing


def test_replace_and_resolved() -> None:
    recipe = read_recipe(overrides=["lora_r=8"])
    changed = recipe.replace(train={"max_steps": 3}, seed=1, model="org/m")
    assert (changed.train.max_steps, changed.seed, changed.model.name, changed.lora.r) == (3, 1, "org/m", 8)
    assert recipe.train.max_steps == -1
    with pytest.raises(RecipeError, match="did you mean train"):
        recipe.replace(trian={"max_steps": 3})
    with pytest.raises(RecipeError, match="max_stps"):
        recipe.replace(train={"max_stps": 3})
    resolved = recipe.resolved("qlora", "runs/x")
    assert (resolved.method, resolved.output, resolved.train.learning_rate) == ("qlora", "runs/x", 2e-4)
    assert resolved.resolved("qlora", "runs/x") == resolved


def test_everything_at_once_survives_writing(tmp_path: Path) -> None:
    tree = {
        place: value for place, value in OTHER_VALUES.items() if place not in ("data.eval_fraction", "data.eval_path")
    }
    recipe = read_recipe(values=tree)
    assert read_recipe(written(tmp_path, dump_yaml(recipe))) == recipe
    assert Recipe.build(recipe.dump(), source="its dump") == recipe
    assert list(yaml.safe_load(dump_yaml(recipe))) == list(Recipe.model_fields)


# Texts that YAML could take for something else, beside any text at all.
TRICKY = [
    "no",
    "on",
    "null",
    "~",
    "1e4",
    "12e4",
    "0x10",
    "0o7",
    "010",
    "1:30",
    "2024-05-01",
    ".5",
    "-",
    "<<",
    "=",
    "+1",
]
texts = st.sampled_from([*TRICKY, "a b", "#x", "a: b", "'", '"', "\n", " x ", "\x85", "größe", "😀"]) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
)
positive = st.integers(1, 10**6)
rates = st.floats(0, 0.99)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
recipes = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"name": texts}, optional={"revision": texts | st.none()}),
        "data": st.fixed_dictionaries(
            {"name": texts},
            optional={
                "path": texts,
                "eval_fraction": rates,
                "max_samples": positive | st.none(),
                "max_length": st.integers(8, 10**6),
                "columns": st.dictionaries(texts, texts, max_size=3),
                "shuffle": st.booleans(),
                "chat_template": texts,
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-30, 10) | st.none(),
                "num_train_epochs": st.floats(1e-6, 1e12),
                "max_steps": st.integers(-1, 10**9),
                "adam_epsilon": st.floats(5e-324, 1),
                "weight_decay": st.floats(0, 1e300),
                "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
                "eval_steps": positive,
                "gradient_checkpointing": st.sampled_from(["auto", "on", "off", True, False]),
                "resume_from_checkpoint": texts | st.booleans() | st.none(),
            },
        ),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "r": positive,
                "dropout": rates,
                "target_modules": texts | st.lists(texts, min_size=1, max_size=3),
                "init_lora_weights": st.booleans() | texts,
                "options": st.dictionaries(texts, plain, max_size=3),
            },
        ),
        "method": st.sampled_from(["auto", "lora", "qlora"]),
        "output": texts | st.none(),
        "seed": st.integers(0, 2**32 - 1),
        "report_to": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2) | st.just("none"),
    },
)


@settings(max_examples=150)
@given(recipes)
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    recipe = Recipe.build(tree, source="the example")
    assert Recipe.build(recipe.dump(), source="its dump") == recipe
    assert read_recipe(written(tmp_path_factory.getbasetemp(), dump_yaml(recipe))) == recipe


names = [*known_places(), *ALIASES, *INVERTED, *FOUR_BIT_SWITCHES, *AMBIGUOUS, *SECTIONS]
keys = st.sampled_from(names) | st.text(max_size=8)
pieces = [*"[]{}:,&*!|>%@`'\"#?-.\n\t ~=\0", "!!int ", "<<: ", "1e5", "no", "true", "null", "- "]
scraps = (
    st.text(max_size=12)
    | st.lists(st.sampled_from(pieces), max_size=8).map("".join)
    | plain.map(lambda value: write_yaml({"v": value})[3:])
)


@settings(max_examples=300)
@given(st.lists(st.builds("{}={}".format, keys, scraps) | scraps, max_size=5))
def test_no_word_escapes_as_another_error(words: list[str]) -> None:
    try:
        recipe = read_recipe(overrides=words)
    except InputError as error:
        assert isinstance(error, RecipeError)
        assert error.problems
    else:
        assert isinstance(recipe, Recipe)


@settings(max_examples=150)
@given(st.lists(st.builds("{}: {}".format, keys, scraps) | scraps, max_size=5).map("\n".join))
def test_no_file_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "scrap.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(read_recipe(path), Recipe)
    except InputError as error:
        assert error.exit_code == 2
