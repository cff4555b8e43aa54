"""lm-evaluation-harness's own run of a task against ours on the same model: numbers and answers, digit by digit.

Its own run is `simple_evaluate` with the model loaded by the harness from a folder, as its command line does it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import thriftune.pocket
from chain_model import byte_tokenizer, chain_model
from thriftune.data import load_rows
from thriftune.errors import DataError, InputError
from thriftune.evaluate import GSM8K_FEW_SHOT, check_task, evaluate
from thriftune.evaluate.few_shot import few_shot_texts, flexible_extract, is_right, strict_match
from thriftune.recipe import DataRecipe, GenerationRecipe

pytest.importorskip("lm_eval")

POCKET = Path(thriftune.pocket.__file__).parent

CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: %s/test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
WRITE_TASK = """
task: local_write
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: %s/test.jsonl, train: %s/train.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{question}} Answer:"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: true}]
metadata: {version: 1.0}
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: %s/test.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The harness's own run reads rows by way of a cache on the disk."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def folder(tmp_path) -> Path:
    draw = random.Random(0)
    for split, count in (("test", 21), ("train", 9)):
        rows = []
        for _ in range(count):
            one, two = draw.randint(1, 60), draw.randint(1, 60)
            choices = [str(one + two), str(one * two + 7), f"{two} and some more"]
            order = draw.sample(range(3), 3)
            question = f"Tom has {one} apples and finds {two}. How many has he?"
            rows.append(
                {
                    "question": question,
                    "choices": [choices[place] for place in order],
                    "gold": order.index(0),
                    "written": choices[0],
                }
            )
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE_TASK), ("write", WRITE_TASK), ("text", TEXT_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("%s", str(tmp_path)))
    return tmp_path


def harness_run(model_folder: Path, task, *, batch_size: int, limit: int | None = None, adapter: Path | None = None):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "dtype": "float32", **({"peft": str(adapter)} if adapter else {})},
        tasks=[task],
        device="cpu",
        batch_size=batch_size,
        limit=limit,
        task_manager=TaskManager(include_defaults=False),
    )
    (name,) = found["results"]
    return {key: value for key, value in found["results"][name].items() if "," in key}, found["samples"][name]


def our_run(task: str, model, tokenizer, answers_path: Path, **changes):
    options = {
        "data": DataRecipe(name=task),
        "settings": GenerationRecipe(batch_size=5),
        "limit": None,
        "split": "test",
        "answers_path": answers_path,
        "model_name": "m",
        "adapter_name": None,
        "on_progress": lambda progress: None,
    }
    result = evaluate(task, model, tokenizer, **{**options, **changes})
    return result, [json.loads(line) for line in answers_path.read_text().splitlines()]


def loaded(model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize("limit", [None, 8])
def test_a_choice_tasks_numbers_and_likelihoods_are_the_harnesss(folder, limit):
    task = folder / "choice.yaml"
    theirs, samples = harness_run(POCKET, str(task), batch_size=5, limit=limit)
    model, tokenizer = loaded(POCKET)
    result, answers = our_run(f"lm_eval:{task}", model.train(), tokenizer, folder / "answers.jsonl", limit=limit)
    assert model.training, "the model's mode comes back"
    assert result.metric == "acc" and result.value == theirs["acc,none"]
    assert result.details["metrics"] == theirs and "acc_norm_stderr,none" in theirs
    assert result.rows == len(answers) == len(samples) == (limit or 21)
    assert 0 < result.low < result.value and (limit or 0 < result.value < result.high < 1)
    for answer, sample in zip(answers, samples, strict=True):
        assert list(answer["log_likelihoods"].values()) == [response[0][0] for response in sample["resps"]]
        assert (answer["row"], answer["correct"]) == (sample["doc_id"], sample["acc"] == 1)
        assert answer["target"] == sample["doc"]["written"]
        assert answer["correct"] == (answer["prediction"] == answer["target"])
    assert result.details["chat_template"].startswith("not applied")


def test_a_writing_tasks_number_and_answers_are_the_harnesss_with_shots_and_an_adapter(folder):
    task = folder / "write.yaml"
    torch.manual_seed(1)
    base, tokenizer = loaded(POCKET)
    adapter = folder / "adapter"
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(adapter)
    texts = []
    for peft in (None, adapter):
        theirs, samples = harness_run(POCKET, str(task), batch_size=5, adapter=peft)
        model, _ = loaded(POCKET)
        model = model if peft is None else PeftModel.from_pretrained(model, peft)
        result, answers = our_run(f"lm_eval:{task}", model, tokenizer, folder / "answers.jsonl")
        assert result.metric == "exact_match" and result.value == theirs["exact_match,none"]
        assert result.details["metrics"] == theirs and result.details["shots"] == 2
        assert [answer["answer"] for answer in answers] == [sample["resps"][0][0] for sample in samples]
        assert [answer["prompt"] for answer in answers] == [sample["arguments"][0][0] for sample in samples]
        assert answers[0]["prompt"].count("Answer:") == 3
        texts.append([answer["answer"] for answer in answers])
    assert texts[0] != texts[1], "the adapter must have a say"


def test_a_text_tasks_perplexity_is_the_harnesss_with_its_interval(folder):
    task = folder / "text.yaml"
    theirs, _ = harness_run(POCKET, str(task), batch_size=5)
    result, answers = our_run(f"lm_eval:{task}", *loaded(POCKET), folder / "answers.jsonl")
    assert (result.metric, result.value) == ("word_perplexity", theirs["word_perplexity,none"])
    assert result.details["higher_is_better"] is False
    assert result.low <= result.value <= result.high and result.details["interval"] != "Wilson's, of a share"
    assert {answer["score"] for answer in answers} == {None}


def test_rows_of_ones_own_stand_in_for_a_tasks_and_nothing_else_changes(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    rows = (folder / "test.jsonl").read_text().splitlines()[:6]
    (other / "test.jsonl").write_text("\n".join(rows))
    (other / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    model, tokenizer = loaded(POCKET)
    pad, states = tokenizer.pad_token, (random.getstate(), torch.get_rng_state())
    for name in ("choice", "write"):
        task = f"lm_eval:{folder / name}.yaml"
        result, answers = our_run(
            task, model, tokenizer, folder / "a.jsonl", data=DataRecipe(name=task, path=str(other))
        )
        first, whole = our_run(task, model, tokenizer, folder / "b.jsonl", limit=6)
        assert answers == whole and result.value == first.value
        assert (result.details["rows_of_split"], first.details["rows_of_split"]) == (6, 21)
    assert tokenizer.pad_token == pad
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    alone = DataRecipe(name="x", path=str(other / "test.jsonl"))
    assert our_run(f"lm_eval:{folder}/choice.yaml", model, tokenizer, folder / "a.jsonl", data=alone)[0].rows == 6
    with pytest.raises(DataError, match="one file, and local_write shows rows of another split"):
        our_run(f"lm_eval:{folder}/write.yaml", model, tokenizer, folder / "a.jsonl", data=alone)
    (other / "train.jsonl").unlink()
    with pytest.raises(DataError, match="no files for split 'train'"):
        our_run(f"lm_eval:{folder}/write.yaml", model, tokenizer, folder / "a.jsonl", data=DataRecipe(path=str(other)))


def test_tasks_that_are_not_there_are_refused_with_the_nearest_and_without_the_package_with_the_way_to_it(
    folder, monkeypatch
):
    for task, words in [
        ("arc_esy", r"did you mean arc_easy\?"),
        ("mmlu", "group of tasks(.|\n)*mmlu_abstract_algebra"),
        (f"{folder}/nothing.yaml", "does not exist"),
    ]:
        with pytest.raises(InputError, match=words):
            check_task(f"lm_eval:{task}", DataRecipe())
    check_task("lm_eval:arc_easy", DataRecipe())
    (folder / "unsafe.yaml").write_text((folder / "choice.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match="runs code that the model writes"):
        check_task(f"lm_eval:{folder}/unsafe.yaml", DataRecipe())
    with pytest.raises(InputError, match="split 'train'"):
        our_run(f"lm_eval:{folder}/choice.yaml", None, None, folder / "a.jsonl", split="train")
    monkeypatch.chdir(folder)
    model, tokenizer = loaded(POCKET)
    with pytest.raises(DataError, match=r"task arc_easy do not load(.|\n)*--data"):
        our_run("lm_eval:arc_easy", model, tokenizer, folder / "a.jsonl", data=DataRecipe(path=None))
    broken = (folder / "choice.yaml").read_text().replace("doc_to_target: gold", 'doc_to_target: "{{1 / 0}}"')
    (folder / "choice.yaml").write_text(broken)
    with pytest.raises(InputError, match=r"lm-evaluation-harness stopped in the task(.|\n)*ZeroDivisionError"):
        our_run("lm_eval:choice.yaml", model, tokenizer, folder / "a.jsonl")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"not installed(.|\n)*pip install 'thriftune\[eval\]'"):
        check_task("lm_eval:arc_easy", DataRecipe())


# -------------------------------------------------------------------------------------------------- gsm8k in its form


def gsm8k_of_the_harness(folder: Path) -> dict:
    """The harness's own gsm8k with the rows of a folder in place of the hub's."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml", resolve_func=True)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    config.pop("tag")
    return {**config, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def write_problems(folder: Path) -> None:
    draw = random.Random(3)
    for split, count in (("train", 12), ("test", 30)):
        rows = []
        for number in range(count):
            answer = draw.choice(["12", "12", "$12", "1,2", "13", "-12"])
            rows.append({"question": f"{number}: how many?", "answer": f"It is {number}.\n#### {answer}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare_gsm8k(model_folder: Path, rows: Path, where: Path, limit: int | None = None):
    theirs, samples = harness_run(model_folder, gsm8k_of_the_harness(rows), batch_size=6, limit=limit)
    by_filter: dict = {"strict-match": [], "flexible-extract": []}
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    if limit is not None:
        few = where / "few"
        few.mkdir()
        (few / "train.jsonl").write_text((rows / "train.jsonl").read_text())
        (few / "test.jsonl").write_text("\n".join((rows / "test.jsonl").read_text().splitlines()[:limit]))
        rows = few
    data = DataRecipe(name="gsm8k", path=str(rows))
    model, tokenizer = loaded(model_folder)
    settings = GenerationRecipe(batch_size=6)
    result, answers = our_run(GSM8K_FEW_SHOT, model, tokenizer, where / "a.jsonl", data=data, settings=settings)
    assert result.value == theirs["exact_match,strict-match"]
    assert result.details["flexible_extract"]["value"] == theirs["exact_match,flexible-extract"]
    strict, flexible = by_filter["strict-match"], by_filter["flexible-extract"]
    assert [answer["answer"] for answer in answers] == [sample["resps"][0][0] for sample in strict]
    for ours, one, other in zip(answers, strict, flexible, strict=True):
        assert (ours["prediction"] or "[invalid]") == one["filtered_resps"][0]
        assert (ours["flexible_prediction"] or "[invalid]") == other["filtered_resps"][0]
        assert ours["correct"] == (one["exact_match"] == 1)
        assert ours["flexible_correct"] == (other["exact_match"] == 1)
    return result, answers


def test_gsm8k_in_the_harnesss_form_gives_the_harnesss_number(tmp_path):
    write_problems(tmp_path)
    tokenizer = byte_tokenizer(words=(" 7 #### 12", " Question:"), template=None)
    answer, stop = (tokenizer.convert_tokens_to_ids(word) for word in (" 7 #### 12", " Question:"))
    (colon,) = tokenizer(":")["input_ids"]
    model = chain_model(tokenizer, {colon: answer, answer: stop, stop: stop})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result, answers = compare_gsm8k(tmp_path / "model", tmp_path, tmp_path)
    assert 0.2 < result.value < 0.8 and result.rows == 30
    assert {answer["answer"] for answer in answers} == {" 7 #### 12 "}
    assert answers[0]["prompt"].count("Question:") == 6


@pytest.mark.shared
def test_gsm8ks_own_rows_are_answered_as_by_the_harness(shared, tmp_path):
    rows = shared / "data" / "gsm8k"
    result, answers = compare_gsm8k(shared / "models" / "stories260K", rows, tmp_path, limit=18)
    assert result.rows == 18 and len({answer["answer"] for answer in answers}) > 3
    assert result.details["prompts_cut"] == 18, "the model has 512 positions"


@pytest.mark.shared
def test_every_prompt_of_gsm8k_is_the_harnesss_and_a_drawn_part_keeps_its_shots(shared):
    from lm_eval.tasks import TaskManager

    folder = shared / "data" / "gsm8k"
    task = TaskManager(include_defaults=False).load([gsm8k_of_the_harness(folder)])["tasks"]["gsm8k"]
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    data = DataRecipe(name="gsm8k", path=str(folder))
    texts = few_shot_texts(load_rows(data, "test"), load_rows(data, "train"))
    assert len(texts) == 1319
    assert texts == [instance.args[0] for instance in task.instances]


ANSWERS = [
    "#### 18", "so\n#### 18.", "#### 1,234", "#### 1,234.50", "#### -5", "#### $5", "#### -$5", "####5",
    "#### 5 apples", "18", "The answer is 18.", "It costs $18.50.", "3 #### 4 #### 5", "#### four", "", "-", "$",
    "...", "1/2", "12:30", "a 7, b 8", "#### .5", "#### 5,", "#### 5.\n\nQuestion", "####  5", "x = -3", "#### 1.2.3",
    "5 %", "#### 007", "\u0663", "#### 5\n7", "$$", "cost: $ 5", "2.", "#### ,", "-$1,000", "1e3",
]  # fmt: skip


@pytest.mark.parametrize("target", ["#### 18", "#### 5", "so\n#### 1,234", "#### -5", "#### 7", "1\n#### 8"])
def test_every_answer_is_parsed_and_marked_as_the_harness_does(tmp_path, target):
    from lm_eval.tasks import TaskManager

    write_problems(tmp_path)
    rows = [{"question": "?", "answer": target}] * len(ANSWERS)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskManager(include_defaults=False).load([gsm8k_of_the_harness(tmp_path)])["tasks"]["gsm8k"]
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for instance, text in zip(task.instances, ANSWERS, strict=True):
        instance.resps = [text]
    task.apply_filters()
    for instance, text in zip(task.instances, ANSWERS, strict=True):
        for name, parse in (("strict-match", strict_match), ("flexible-extract", flexible_extract)):
            theirs = instance.filtered_resps[name]
            assert (parse(text) or "[invalid]") == theirs, (text, name)
            marked = task.process_results(instance.doc, [theirs])["exact_match"]
            assert is_right(parse(text), target) == (marked == 1), (text, name)


@pytest.mark.shared
def test_gsm8ks_own_solutions_are_all_right_and_shuffled_ones_hardly_ever(shared):
    rows = load_rows(DataRecipe(name="gsm8k", path=str(shared / "data" / "gsm8k")), "test").rows
    solutions = [row["answer"] for row in rows]
    shuffled = random.Random(0).sample(solutions, len(solutions))
    for parse in (strict_match, flexible_extract):
        assert sum(is_right(parse(text), text) for text in solutions) == 1319
        right = sum(is_right(parse(text), target) for text, target in zip(shuffled, solutions, strict=True))
        assert right / 1319 < 0.03
