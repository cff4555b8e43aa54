"""`evaluate` from rows to record, with models whose answers are known; perplexity against its definition."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chain_model import byte_tokenizer, chain_model, says
from thriftune.data import load_rows
from thriftune.errors import DataError, InputError, ModelError
from thriftune.evaluate import TASKS, evaluate
from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.evaluate.perplexity import cut_windows, measure_perplexity
from thriftune.evaluate.score import draw_subset
from thriftune.infer.batching import Progress
from thriftune.recipe import DataRecipe, GenerationRecipe
from thriftune.records import EvalResult, read_record, write_record

SETTINGS = GenerationRecipe(batch_size=16)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(words=("positive", "negative", "#### 12", "#### 1"))


def ask(task, model, tokenizer, **changes) -> EvalResult:
    options = {
        "data": DataRecipe(name=task or "sums"),
        "settings": SETTINGS,
        "limit": 40,
        "split": None,
        "answers_path": None,
        "model_name": "chain",
        "adapter_name": None,
        "on_progress": lambda progress: None,
    }
    return evaluate(task, model, tokenizer, **{**options, **changes})


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_labels_are_scored_by_likelihood_and_by_what_is_written(tokenizer, tmp_path):
    model = chain_model(tokenizer, says(tokenizer, "positive"))
    path = tmp_path / "new" / "answers.jsonl"
    result = ask("reviews", model, tokenizer, answers_path=path, adapter_name="adapter")
    answers = lines_of(path)
    rows = load_rows(DataRecipe(name="reviews"), "test").rows
    wanted = [rows[answer["row"]]["label"] for answer in answers]
    right = wanted.count("positive")
    assert 0 < right < 40
    assert (result.value, result.rows, result.metric) == (right / 40, 40, "accuracy")
    assert (result.low, result.high) == wilson(right, 40, Z_95)
    assert (result.model, result.adapter, result.answers) == ("chain", "adapter", str(path))
    assert result.details["generated_accuracy"] == {"value": result.value, "low": result.low, "high": result.high}
    assert result.details["settings"]["max_new_tokens"] == TASKS["reviews"].max_new_tokens
    assert [answer["target"] for answer in answers] == wanted
    assert [answer["correct"] for answer in answers] == [target == "positive" for target in wanted]
    first = answers[0]
    assert first["prompt"].startswith("<|user|>") and first["prompt"].endswith("one word.<|assistant|>")
    assert first["place"] == f"reviews test row {first['row'] + 1}"
    assert first["answer"] == first["prediction"] == first["generated_prediction"] == "positive"
    assert first["log_likelihoods"]["positive"] == pytest.approx(0, abs=1e-4)
    assert first["log_likelihoods"]["negative"] == pytest.approx(-20, abs=0.1)
    assert [file.name for file in path.parent.iterdir()] == ["answers.jsonl"], "nothing half written is left"
    write_record(tmp_path / "eval.json", result)
    assert read_record(tmp_path / "eval.json", EvalResult) == result


def test_likelihood_has_an_opinion_where_nothing_is_written(tokenizer):
    chain = {3: tokenizer.convert_tokens_to_ids("negative")} | says(tokenizer, "hm")
    model = chain_model(tokenizer, chain)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("negative"), 3] = 0.1
    result = ask("reviews", model, tokenizer)
    assert result.details["unparsed"] == 40 and result.details["generated_accuracy"]["value"] == 0
    assert 0 < result.value < 1


def test_numbers_are_scored_by_the_answer_written(tokenizer, tmp_path):
    model = chain_model(tokenizer, says(tokenizer, "#### 12"))
    path = tmp_path / "answers.jsonl"
    result = ask("sums", model, tokenizer, limit=None, answers_path=path)
    answers = lines_of(path)
    right = sum(answer["target"] == "12" for answer in answers)
    assert result.rows == len(answers) == 300 and 0 < right < 300
    assert result.value == right / 300
    assert result.details["unparsed"] == 0 and result.details["reached_max_new_tokens"] == 0
    assert [answer["row"] for answer in answers] == list(range(300))


def test_an_answer_that_never_ends_is_cut_and_counted(tokenizer):
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    result = ask("sums", chain_model(tokenizer, {3: a, a: b, b: a}), tokenizer, limit=5)
    assert result.details["reached_max_new_tokens"] == result.details["unparsed"] == 5
    few = ask("sums", chain_model(tokenizer, {3: a}), tokenizer, limit=5, settings=GenerationRecipe(max_new_tokens=4))
    assert few.details["settings"]["max_new_tokens"] == 4


def test_a_limit_draws_the_same_rows_for_every_model(tokenizer, tmp_path):
    drawn = []
    for word in ("positive", "negative"):
        path = tmp_path / f"{word}.jsonl"
        ask("reviews", chain_model(tokenizer, says(tokenizer, word)), tokenizer, limit=10, answers_path=path)
        drawn.append([answer["row"] for answer in lines_of(path)])
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 10
    assert drawn[0] != list(range(10))
    assert draw_subset(5, 5) == draw_subset(5, 9) == draw_subset(5, None) == [0, 1, 2, 3, 4]


def test_progress_never_goes_back_and_ends_at_the_total(tokenizer):
    seen: list[Progress] = []
    ask("reviews", chain_model(tokenizer, says(tokenizer, "positive")), tokenizer, on_progress=seen.append)
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[-1].done, seen[-1].total) == (40, 40)


def test_memory_that_ran_out_is_in_the_record(tokenizer):
    model = chain_model(tokenizer, says(tokenizer, "#### 12"))

    def check(module, inputs):
        if inputs[0].shape[0] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory (test)")

    model.get_input_embeddings().register_forward_pre_hook(check)
    result = ask("sums", model, tokenizer)
    assert result.details["events"] == ["out of memory with 16 rows at once; went on with 8"]


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("gsm8", {}, r"did you mean gsm8k\?.*\n.*gsm8k, imdb, reviews, sums, gsm8k_5shot, perplexity, general"),
        ("", {}, "the task ''"),
        ("sums", {"data": DataRecipe(name="gsm8k")}, "task sums on the data set gsm8k"),
        ("sums", {"limit": 0}, "a limit of 0"),
        ("sums", {"split": "tset"}, "tset"),
        ("perplexity", {"data": DataRecipe(name="nothing.txt")}, "nothing.txt cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(tokenizer, task, changes, words):
    with pytest.raises(InputError, match=words):
        ask(task, chain_model(tokenizer, {}), tokenizer, **changes)


def test_a_file_of_ones_own_rows_can_be_evaluated(tokenizer, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in (12, 13)))
    model = chain_model(tokenizer, says(tokenizer, "#### 12"))
    result = ask("gsm8k", model, tokenizer, data=DataRecipe(name=str(path)), split="train")
    assert (result.value, result.rows) == (0.5, 2)


# --------------------------------------------------------------------------------------------------------- perplexity

TEXT = "The cat sat on the mat. Gr\u00fc\u00dfe aus K\u00f6ln! " * 12


@pytest.fixture(scope="module")
def random_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def plain_losses(model, windows) -> list[float]:
    """The definition, window by window: -log p of each scored token given those before it."""
    losses = []
    with torch.no_grad():
        for window in windows:
            log_chances = model(input_ids=torch.tensor([window.ids])).logits[0].log_softmax(-1)
            places = range(len(window.ids) - window.scored, len(window.ids))
            losses.append(-sum(float(log_chances[place - 1, window.ids[place]]) for place in places))
    return losses


@pytest.mark.parametrize("batch_size", [1, 7])
def test_perplexity_is_exp_of_the_mean_loss_of_the_scored_tokens(tokenizer, random_model, batch_size):
    windows = cut_windows(TEXT, tokenizer, 32)
    found = measure_perplexity(
        random_model, windows, batch_size=batch_size, pad_token_id=1, on_progress=lambda progress: None
    )
    losses = plain_losses(random_model, windows)
    assert found.losses == pytest.approx(losses, abs=1e-3)
    assert found.tokens == sum(window.scored for window in windows) == len(TEXT.encode()) - len(windows)
    assert found.value == pytest.approx(math.exp(sum(losses) / found.tokens), rel=1e-5)
    assert found.low < found.value < found.high
    assert found.loss == pytest.approx(math.log(found.value))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokenizer):
    model = chain_model(tokenizer, {})
    windows = cut_windows(TEXT, tokenizer, 32)
    found = measure_perplexity(model, windows, batch_size=8, pad_token_id=1, on_progress=lambda progress: None)
    vocabulary = model.config.vocab_size
    assert (found.value, found.low, found.high) == pytest.approx((vocabulary,) * 3, rel=1e-5)
    # One token is one byte here; two-byte letters cut by a window count by their characters' places.
    assert found.bits_per_byte == pytest.approx(math.log2(vocabulary), rel=0.01)


def test_windows_hold_every_token_once_and_score_all_that_have_a_context(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    windows = cut_windows(TEXT, tokenizer, 50)
    assert [token for window in windows for token in window.ids] == ids
    assert all(window.scored == len(window.ids) - 1 for window in windows)
    assert {len(window.ids) for window in windows[:-1]} == {50}
    lonely = cut_windows("a" * 51, tokenizer, 50)
    assert len(lonely) == 1, "a last window of one token has nothing to score"


def test_a_begin_token_stands_once_before_every_window_and_is_not_scored():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert tokenizer("a")["input_ids"][0] == begin
    for text in ("abcdefgh", "<|begin|>abcdefgh"):
        windows = cut_windows(text, tokenizer, 5)
        assert [window.ids.count(begin) for window in windows] == [1, 1]
        assert [(window.ids[0], window.scored, window.scored_bytes) for window in windows] == [(begin, 4, 4)] * 2


def test_perplexity_of_a_file_is_recorded(tokenizer, random_model, tmp_path):
    plain, packed = tmp_path / "text.txt", tmp_path / "text.txt.xz"
    plain.write_text(TEXT, encoding="utf-8")
    packed.write_bytes(lzma.compress(TEXT.encode()))
    path = tmp_path / "windows.jsonl"
    by_name = ask(
        "perplexity", random_model, tokenizer, data=DataRecipe(name=str(plain)), limit=None, answers_path=path
    )
    by_path = ask("perplexity", random_model, tokenizer, data=DataRecipe(path=str(packed)), limit=None)
    assert by_name.value == by_path.value and by_name.metric == "perplexity"
    assert by_name.details["max_length"] == 64, "the model has fewer positions than max_length"
    assert by_name.rows == len(lines_of(path)) == by_name.details["windows_of_text"]
    few = ask("perplexity", random_model, tokenizer, data=DataRecipe(path=str(plain)), limit=4)
    assert few.rows == 4 and few.value != by_name.value


def test_too_little_text_bytes_that_are_no_text_and_nan_are_errors(tokenizer, random_model, tmp_path):
    short, wrong = tmp_path / "short.txt", tmp_path / "wrong.txt"
    short.write_text("abc")
    wrong.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="1 window of text"):
        ask("perplexity", random_model, tokenizer, data=DataRecipe(path=str(short)))
    with pytest.raises(DataError, match=r"wrong\.txt cannot be read"):
        ask("perplexity", random_model, tokenizer, data=DataRecipe(path=str(wrong)))
    model = chain_model(tokenizer, {})
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelError, match="window 1 of the text is nan"):
        measure_perplexity(
            model, cut_windows(TEXT, tokenizer, 32), batch_size=4, pad_token_id=1, on_progress=lambda progress: None
        )


@pytest.mark.shared
def test_a_small_real_model_is_near_chance_on_imdb_before_training(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = DataRecipe(name="imdb", path=str(shared / "data" / "imdb"), max_length=128)
    result = ask("imdb", model, AutoTokenizer.from_pretrained(folder), data=data)
    assert 0.3 < result.value < 0.7 and result.rows == 40
