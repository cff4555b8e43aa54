"""Row lengths for a plan: equal to what training makes of the rows, without torch; else it is said."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from small_models import FAMILIES, config_of, make_tokenizer
from thriftune.data import RowLengths, measure_lengths, prepare
from thriftune.data import lengths as lengths_module
from thriftune.errors import DataError, ModelError
from thriftune.models import load_tokenizer
from thriftune.recipe import ModelRecipe, Recipe

POCKET = Path(str(importlib.resources.files("thriftune.pocket")))
WORDS = ["the", "film", "was", "good", "and", "12", "+", "30", "=", "42", "made", "it", "a", "long,", "day", "\u00eb"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
opened_once = cache(lengths_module.open_tokenizer)
# The classes of transformers that take tokenizer.json as it stands.
GENERIC = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend")


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(words))


def rows_of(shape: str, count: int = 40) -> list[dict[str, Any]]:
    """Rows of very different lengths, one of them empty."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt, answer = text(number, 1 + number * number % 97), text(number + 1, 1 + number % 13)
        if number == 5:
            answer = prompt = " "
        if shape == "messages":
            turns = [("system", "Be brief."), ("user", prompt), ("assistant", answer)]
            turns += [("user", text(number, 9)), ("assistant", answer)] if number % 3 == 0 else []
            rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
        elif shape == "prompt":
            rows.append({"prompt": prompt, "completion": answer})
        elif shape == "alpaca":
            rows.append({"instruction": prompt, "input": text(number, number % 4), "output": answer})
        else:
            rows.append({"text": prompt})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(name: Path | str, **data: Any) -> Recipe:
    return Recipe.model_validate({"data": {"name": str(name), **data}})


@cache
def training_tokenizer(folder: Path) -> Any:
    return load_tokenizer(ModelRecipe(name=str(folder)), folder)


def assert_as_in_training(wanted: Recipe, folder: Path) -> RowLengths:
    """All rows measured: the same numbers, row by row, as `prepare` makes with the tokenizer that training loads."""
    found = measure_lengths(wanted, folder, sample_rows=10**9)
    examples = prepare(wanted, training_tokenizer(folder)).train
    assert found.tokens == tuple(len(example) for example in examples)
    assert found.targets == tuple(example.num_targets for example in examples)
    assert found.rows == len(examples) > 0
    return found


def llama3_folder(folder: Path, pieces: Path) -> Path:
    """A model's folder with Llama 3's vocabulary and merges, its special tokens and the begin token it writes."""
    vocabulary = json.loads((pieces / "vocab.derived.json").read_text(encoding="utf-8"))
    lines = (pieces / "merges.derived.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1]).save_pretrained(
        folder
    )
    config_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["pocket", "reader-16m", "llama3"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "pocket":
        return POCKET
    shared: Path = request.getfixturevalue("shared")
    if request.param == "reader-16m":
        return shared / "models" / "reader-16m"
    return llama3_folder(tmp_path_factory.mktemp("llama3"), shared / "tokenizers" / "llama3")


@pytest.mark.parametrize("shape", ["messages", "prompt", "alpaca", "text"])
def test_lengths_are_those_of_training(
    tokenizer_folder: Path, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths_module, "open_tokenizer", opened_once)  # a second for 128,000 tokens
    path = written(tmp_path / "rows.jsonl", rows_of(shape))
    (tmp_path / "chat.jinja").write_text(CHAT, encoding="utf-8")
    (tmp_path / "marked.jinja").write_text(MARKED_CHAT, encoding="utf-8")
    for template in ("auto", "none", str(tmp_path / "chat.jinja"), str(tmp_path / "marked.jinja")):
        found = assert_as_in_training(recipe(path, chat_template=template), tokenizer_folder)
        assert found.exact
        assert len(found.tokens) == 39  # without the empty row
    for options in ({"max_length": 48}, {"max_length": 48, "cut_prompt": "middle"}, {"train_on_prompt": True}):
        found = assert_as_in_training(recipe(path, **options), tokenizer_folder)
        assert max(found.tokens) == 48 or "max_length" not in options


@pytest.mark.parametrize("options", [{"eval_fraction": 0.25}, {"max_samples": 11}])
def test_held_out_and_drawn_rows_are_those_of_training(options: dict[str, Any], tmp_path: Path) -> None:
    assert_as_in_training(recipe(written(tmp_path / "rows.jsonl", rows_of("prompt")), **options), POCKET)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "named", [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"]
)
def test_the_tokenizer_is_of_the_class_that_training_takes(family: str, named: str | None, tmp_path: Path) -> None:
    """Where nothing names a class, the file as it stands may be another: then it is said."""
    config_of(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer, is_certain = lengths_module.open_tokenizer(tmp_path)
    trained = load_tokenizer(ModelRecipe(name=str(tmp_path)), tmp_path)
    assert is_certain or named is None
    if is_certain:
        assert type(tokenizer) is type(trained)
        assert tokenizer.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_the_rules_are_those_of_transformers() -> None:
    """A new transformers that reads some model's tokenizer by another class fails here."""
    registered = tokenization_auto.TOKENIZER_MAPPING_NAMES
    overruled = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for model_type, name in lengths_module._CLASS_BY_MODEL_TYPE.items():
        generic = registered[model_type] in GENERIC
        assert name == (lengths_module._GENERIC if generic else registered[model_type]), model_type
        assert generic or model_type in overruled, model_type
    for model_type in lengths_module._NAMED_CLASS_TYPES:
        assert registered.get(model_type) not in GENERIC, model_type
        assert model_type not in overruled, model_type


def test_a_class_that_is_not_known_is_a_guess(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["code.T", None]}}), encoding="utf-8"
    )
    found = measure_lengths(recipe(written(tmp_path / "rows.jsonl", rows_of("prompt"))), tmp_path, 100)
    assert not found.exact
    assert "as it stands" in found.source


def test_a_sample_has_the_longest_row_and_knows_the_whole(tmp_path: Path) -> None:
    rows = rows_of("prompt", 400)
    rows[77]["prompt"] = text(77, 200)  # the others have at most 97 words
    path = written(tmp_path / "rows.jsonl", rows)
    whole = measure_lengths(recipe(path), POCKET, 400)
    sample = measure_lengths(recipe(path), POCKET, 60)
    assert 60 <= len(sample.tokens) <= 60 + lengths_module.LONGEST_ROWS + 1
    assert (sample.rows, max(sample.tokens)) == (399, max(whole.tokens))
    assert "399" not in whole.source
    assert f"{len(sample.tokens)} of them measured" in sample.source
    assert sample == measure_lengths(recipe(path), POCKET, 60)
    assert sum(sample.tokens) / len(sample.tokens) == pytest.approx(sum(whole.tokens) / len(whole.tokens), rel=0.2)


def test_a_sample_has_the_shape_of_the_whole(tmp_path: Path) -> None:
    """The first row decides: later rows that could be of another shape too are read as it is."""
    rows = [{"text": text(number, 9)} for number in range(200)]
    rows[1:] = [{**row, "messages": [{"role": "user", "content": "?"}]} for row in rows[1:]]
    path = written(tmp_path / "rows.jsonl", rows)
    sample, whole = (measure_lengths(recipe(path), POCKET, sample_rows) for sample_rows in (20, 200))
    assert set(sample.tokens) <= set(whole.tokens)


@pytest.mark.parametrize("shape", ["messages", "prompt", "alpaca", "text"])
def test_without_a_tokenizer_lengths_are_estimated(shape: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", rows_of(shape))
    found = measure_lengths(recipe(path), None, 1000)
    assert not found.exact
    assert "4.2 characters a token" in found.source
    assert (len(found.tokens), found.rows) == (39, 39)
    assert all(0 < targets < tokens for tokens, targets in zip(found.tokens, found.targets, strict=True))
    cut = measure_lengths(recipe(path, max_length=48), tmp_path, 1000)  # a folder without tokenizer.json
    assert max(cut.tokens) == 48
    assert sum(cut.targets) <= sum(found.targets)


def test_an_estimate_by_hand(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a" * 420, "completion": "b" * 42}])
    found = measure_lengths(recipe(path), None, 10)
    assert (found.tokens, found.targets) == ((110 + 2 * 5,), (10 + 1,))
    assert measure_lengths(recipe(path, train_on_prompt=True), None, 10).targets == (119,)


def test_the_estimate_is_near_on_prose(shared: Path, tmp_path: Path) -> None:
    folder = llama3_folder(tmp_path, shared / "tokenizers" / "llama3")
    reviews = recipe("imdb", path=str(shared / "data" / "imdb"), max_length=4096)
    estimated, counted = (measure_lengths(reviews, each, 300) for each in (None, folder))
    assert sum(estimated.tokens) / sum(counted.tokens) == pytest.approx(1.0, abs=0.12)
    assert estimated.rows == counted.rows == 25_000


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"prompt": "a"',
        '{"prompt": "a", "completion": 5}\n',
        '{"a": 1}\n',
        '{"prompt": " ", "completion": "b"}\n',
        '{"messages": [{"role": "nobody", "content": "a"}]}\n',
        '{"messages": [{"role": "assistant", "content": "a"}]}\n',
    ],
)
def test_broken_rows_are_refused_as_in_training(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    tokenizer = load_tokenizer(ModelRecipe(name="pocket"), POCKET)
    said = set()
    for attempt in (
        lambda: prepare(recipe(path), tokenizer),
        lambda: measure_lengths(recipe(path), POCKET, 100),
        lambda: measure_lengths(recipe(path), None, 100),
    ):
        with pytest.raises(DataError) as caught:
            attempt()
        said.add(str(caught.value))
    assert len(said) == 1


def test_what_only_encoding_finds_is_refused_too(tmp_path: Path) -> None:
    rows = [{"prompt": text(number, 5), "completion": text(number, 5)} for number in range(30)]
    (tmp_path / "picky.jinja").write_text("{{ raise_exception('not me') }}", encoding="utf-8")
    picky = recipe(written(tmp_path / "rows.jsonl", rows), chat_template=str(tmp_path / "picky.jinja"))
    for sample_rows in (5, 100):
        with pytest.raises(DataError, match="not me"):
            measure_lengths(picky, POCKET, sample_rows)


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(broken: str, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    config_of("llama").save_pretrained(tmp_path)
    (tmp_path / broken).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        measure_lengths(recipe(written(tmp_path / "rows.jsonl", rows_of("prompt"))), tmp_path, 100)


def test_nothing_here_loads_torch(tmp_path: Path) -> None:
    """In a fresh interpreter, with a generic tokenizer class and one of a family's own."""
    config_of("qwen2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = written(tmp_path / "rows.jsonl", rows_of("messages"))
    script = f"""
import sys
from functools import cache
from pathlib import Path
import thriftune.data, thriftune.model_files
from thriftune.recipe import ModelRecipe, Recipe
heavy = {{"torch", "transformers", "datasets", "pyarrow"}}
print(sorted(heavy & sys.modules.keys()))
recipe = Recipe.model_validate({{"data": {str(path)!r}}})
pocket = thriftune.model_files.find_model_folder(ModelRecipe(name="pocket"))
for folder in (None, pocket, Path({str(tmp_path)!r})):
    assert len(thriftune.data.measure_lengths(recipe, folder, 2000).tokens) == 39
    print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]", "['transformers']", "['transformers']"]
    assert not done.stderr
