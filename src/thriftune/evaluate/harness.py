"""Tasks of lm-evaluation-harness (the package lm-eval, extra `eval`), asked of a model that is loaded here.

    lm_eval:arc_easy             a task by its name
    lm_eval:path/to/task.yaml    a task of one's own, in the harness's format

The harness builds the prompts, asks the model and marks the answers by its own rules, so that its number is what comes
out: greedy, without a chat template, and with `limit` the first rows and not a drawn part. Only the interval is ours
where every row is right or wrong (Wilson's, as everywhere), and the answers go into a file like those of other tasks.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from thriftune.data import load_file, load_rows
from thriftune.errors import DataError, DoesNotFitError, InputError, ThriftuneError, first_line
from thriftune.evaluate.intervals import Z_95
from thriftune.evaluate.score import Asked, Score, share
from thriftune.infer.batching import Progress, answering
from thriftune.recipe import DataRecipe, did_you_mean

HARNESS = "lm_eval:"
YAML_SUFFIXES = (".yaml", ".yml")


def check_harness_task(task: str) -> None:
    """Raises InputError when the package is missing, or it has no such task."""
    _config(task)


def score_with_harness(task: str, asked: Asked) -> Score:
    """The first score that the harness reports for the task; the others, with their standard errors, in the details."""
    if asked.split not in (None, "test"):
        raise InputError(
            given=f"split {asked.split!r} of {task}",
            allowed="the split that the task itself names",
            do="leave the split out, or change it in a task file of your own",
        )
    config = _config(task)
    name = str(config["task"])
    if asked.data.path is not None:
        named = dict(config)
        config["custom_dataset"] = lambda **_: _local_splits(asked.data, named)
    with _quiet_and_seeded():
        loaded = _task_object(config, name)
        found, longest = _run(loaded, name, asked)
    samples = found["samples"][name]
    rows = len({sample["doc_id"] for sample in samples})
    asked.progress(Progress(rows, rows, None))
    return _score(found, name, samples, longest, asked)


def _config(task: str) -> dict[str, Any]:
    """The task's configuration, its functions resolved. Raises InputError."""
    _ensure_installed(task)
    from lm_eval.tasks._yaml_loader import load_yaml

    name = task.removeprefix(HARNESS)
    if name.endswith(YAML_SUFFIXES):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(
                given=f"the task file {name} does not exist (looked from {Path.cwd()})",
                allowed="a YAML file in the harness's format, or the name of one of its tasks",
                do="correct the path",
            )
    else:
        path = _known_task(name)
    with _foreign(name):
        named = dict(load_yaml(path, resolve_func=False))
    if not isinstance(named.get("task"), str):
        raise InputError(
            given=f"{path} defines no single task", allowed="a file with `task: NAME`", do="name a file of one task"
        )
    if named.get("unsafe_code"):
        raise InputError(
            given=f"the task {name}, which runs code that the model writes",
            allowed="tasks that do not",
            do="run it with lm-evaluation-harness itself, in a place where that can do no harm",
        )
    with _foreign(name):
        return dict(load_yaml(path, resolve_func=True))


def _known_task(name: str) -> Path:
    manager = _manager()
    entry = manager.task_index.get(name)
    if entry is None:
        raise InputError(
            given=f"the task {HARNESS}{name}{did_you_mean(name, manager.all_tasks)}",
            allowed=f"one of the {len(manager.all_subtasks):,} tasks of lm-evaluation-harness, or a YAML file",
            do="choose one; `lm-eval ls tasks` lists them",
        )
    if name not in manager.all_subtasks or entry.yaml_path is None:
        members = [part for part in manager.all_subtasks if part.startswith(f"{name}_")][:5]
        raise InputError(
            given=f"{HARNESS}{name}, which is a group of tasks",
            allowed="one task at a time, so that methods can be compared row by row",
            do=f"name one of its tasks{', such as ' + ', '.join(members) if members else ''}",
        )
    return Path(entry.yaml_path)


@functools.cache
def _manager() -> Any:
    """Reading the harness's 14,000 task files takes some ten seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _ensure_installed(task: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            given=f"the task {task} needs lm-evaluation-harness, which is not installed",
            allowed="any other task, or this one with the extra `eval`",
            do="pip install 'thriftune[eval]', or pip install 'lm-eval>=0.4.13'",
        )


def _task_object(config: dict[str, Any], name: str) -> Any:
    from lm_eval.tasks import TaskManager

    with _foreign(name):
        return TaskManager(include_defaults=False).load([config])["tasks"][name]


def _local_splits(data: DataRecipe, config: dict[str, Any]) -> dict[str, Any]:
    """The task's splits from `data.path`: a folder with a file for each, or one file for the split that is asked.

    Splits that the task names and does not use may be missing.
    """
    import datasets

    asked = config.get("test_split") or config.get("validation_split")
    needed = {asked}
    if config.get("num_fewshot"):
        needed.add(config.get("fewshot_split") or config.get("training_split") or config.get("validation_split"))
    is_file = Path(str(data.path)).expanduser().is_file()
    if is_file and needed != {asked}:
        raise DataError(
            given=f"{data.path} is one file, and {config['task']} shows rows of another split before each question",
            allowed=f"a folder with a file for each of {', '.join(sorted(map(str, needed)))}",
            do="give the folder",
        )
    if is_file:
        return {str(asked): datasets.Dataset.from_list(load_file(str(data.path), "--data").rows)}
    splits = {}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = config.get(key)
        if split is None or split in splits:
            continue
        try:
            splits[split] = datasets.Dataset.from_list(load_rows(data, split).rows)
        except DataError:
            if split in needed:
                raise
    return splits


def _run(loaded: Any, name: str, asked: Asked) -> tuple[dict[str, Any], int]:
    """What the harness finds, and the tokens that prompt and answer may have together.

    These are the steps of its `simple_evaluate`, without what that looks up about the machine.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.huggingface import HFLM

    with _foreign(name), answering(asked.model):
        loaded.set_config(key="num_fewshot", value=loaded.get_config("num_fewshot") or 0)
        loaded.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        # The harness gives a tokenizer without a pad token one; a copy leaves the caller's as it is.
        model = HFLM(
            pretrained=asked.model, tokenizer=copy.deepcopy(asked.tokenizer), batch_size=asked.settings.batch_size
        )
        tasks = {"tasks": {name: loaded}, "groups": {}, "group_map": {}}
        return evaluate(model, tasks, limit=asked.limit, log_samples=True), int(model.max_length)


def _score(found: dict[str, Any], name: str, samples: list[dict[str, Any]], longest: int, asked: Asked) -> Score:
    import lm_eval

    results = {key: value for key, value in found["results"][name].items() if "," in key}
    main = next(key for key in results if "_stderr," not in key)
    metric, chosen = main.split(",", 1)
    answers = [_answer(sample, metric) for sample in samples if sample["filter"] == chosen]
    answers.sort(key=lambda answer: int(answer["row"]))
    value, error = float(results[main]), results.get(f"{metric}_stderr,{chosen}")
    low, high, interval = _interval(value, error, answers)
    details = {
        "harness": f"lm-evaluation-harness {lm_eval.__version__}",
        "interval": interval,
        "metrics": results,
        "filter": chosen,
        "shots": found["n-shot"].get(name),
        "task_version": found["versions"].get(name),
        "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
        "chat_template": "not applied, as is the harness's default",
        "data": asked.data.path or "the task's own",
        "rows_of_split": found["n-samples"][name]["original"],
        "max_length": longest,
        "batch_size": asked.settings.batch_size,
    }
    return Score(metric, value, low, high, answers, details)


def _interval(value: float, error: Any, answers: list[dict[str, Any]]) -> tuple[float, float, str]:
    scores = [answer["score"] for answer in answers]
    if all(score in (0, 1) for score in scores) and abs(sum(scores) / len(scores) - value) < 1e-9:
        of_rows = share([score == 1 for score in scores])
        return of_rows["low"], of_rows["high"], "Wilson's, of a share"
    if isinstance(error, float):
        return value - Z_95 * error, value + Z_95 * error, "normal, by the harness's standard error"
    return value, value, "none: the harness gives no standard error for this metric"


def _answer(sample: dict[str, Any], metric: str) -> dict[str, Any]:
    """One of the harness's samples as a row of ours. `score` is its metric, None where that is not a number."""
    target, arguments = sample["target"], sample["arguments"]
    score = sample.get(metric)
    score = float(score) if isinstance(score, bool | int | float | numpy.number | numpy.bool_) else None
    answer: dict[str, Any] = {"row": sample["doc_id"], "prompt": arguments[0][0]}
    if len(arguments) > 1:
        choices = [str(continuation) for _, continuation in arguments]
        chances = [float(response[0][0]) for response in sample["resps"]]
        likeliest = choices[chances.index(max(chances))]
        wanted = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
        answer |= {"answer": likeliest.strip(), "prediction": likeliest.strip(), "target": str(wanted).strip()}
        answer["log_likelihoods"] = dict(zip(choices, chances, strict=True))
    else:
        text = sample["resps"][0][0]
        answer |= {"answer": text if isinstance(text, str) else None}
        answer |= {"prediction": sample["filtered_resps"][0], "target": str(target)}
    return {**answer, "score": score, "correct": score == 1}


@contextmanager
def _foreign(name: str) -> Iterator[None]:
    """Errors of the harness, of a task's own code or of its data, as errors of ours that say whose they are."""
    import datasets

    try:
        yield
    except ThriftuneError:
        raise
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            given=f"out of memory in the harness's task {name}",
            allowed="batches that fit beside the model",
            do="lower generation.batch_size",
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            given=f"the data of the harness's task {name} do not load: {first_line(error)}",
            allowed="data on this machine or on a hub that answers",
            do="connect, or give a folder with the task's splits (train.jsonl, test.jsonl) as --data",
        ) from error
    except Exception as error:
        raise InputError(
            given=f"lm-evaluation-harness stopped in the task {name}: {type(error).__name__}: {first_line(error)}",
            allowed="a task and a model that the harness can bring together",
            do="look at the first line; a prompt may be too long for the model, or a task file wrong",
        ) from error


@contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """The harness's own seeds for Python, numpy and torch, and no log; afterwards everything is as it was."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    log = logging.getLogger("lm_eval")
    level, states = log.level, (random.getstate(), numpy.random.get_state())
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            random.seed(DEFAULT_RANDOM_SEED)
            numpy.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
