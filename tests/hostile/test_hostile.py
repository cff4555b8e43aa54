"""Broken, odd and malicious input through the command line: an error of three parts that names the place, exit code 2,
no traceback, no file that was not there before. Each test ends in seconds, whatever the input says of its size."""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Outcome, runner
from small_models import make_model
from tiny import tiny_recipe, tiny_rows, train_tiny

GOOD = '{"prompt": "what?", "completion": " that"}'


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """A run with checkpoints at steps 1 and 2, made once; tests copy it."""
    root = tmp_path_factory.mktemp("trained")
    train = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train_tiny(tiny_recipe(base, tiny_rows(root / "rows.jsonl", 8), root / "run", train=train))
    return root


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(f"{GOOD}\n" * 4)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Outcome]:
    return runner(monkeypatch, capsys)


@pytest.fixture
def train(run, base, here):
    def of(*words: object, data: str = "good.jsonl", model: object = None) -> Outcome:
        name = base if model is None else model
        return run(
            "train", name, "--data", data, "--method", "lora", "max_steps=1", "max_length=64", "lora_r=2", *words
        )

    return of


def contents(folder: Path) -> dict[str, object]:
    """Every file with its bytes' fingerprint and every folder, so that 'untouched' means untouched."""
    return {
        str(path.relative_to(folder)): hash(path.read_bytes()) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(here: Path, act: Callable[[], Outcome], *says: str, code: int = 2) -> str:
    before, started = contents(here), time.perf_counter()
    message = act().refused(*says, code=code)
    assert contents(here) == before, "something was written"
    assert time.perf_counter() - started < 20
    assert len(message) < 20_000, "an error is for reading"
    return message


# ---------------------------------------------------------------- data files

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.jsonl", b"", "x.jsonl is empty"),
    "white space only": ("x.jsonl", b" \n\n\t\n", "x.jsonl is empty"),
    "latin-1": ("x.jsonl", f"{GOOD}\n{GOOD}\n".encode() + '{"prompt": "café"}'.encode("latin-1"), "x.jsonl row 3"),
    "utf-16": ("x.jsonl", f"{GOOD}\n".encode("utf-16"), "x.jsonl"),
    "zeros": ("x.jsonl", b"\0" * 5000, "x.jsonl"),
    "random bytes": ("x.jsonl", bytes(range(256)) * 20, "x.jsonl"),
    "missing key": ("x.jsonl", f'{GOOD}\n{{"prompt": "what?"}}\n'.encode(), "x.jsonl row 2"),
    "key misspelt": ("x.jsonl", f'{GOOD}\n{{"promt": "a", "completion": "b"}}\n'.encode(), "x.jsonl row 2"),
    "a list": ("x.jsonl", f"{GOOD}\n[1, 2]\n".encode(), "x.jsonl row 2"),
    "a number": ("x.jsonl", f"{GOOD}\n7\n".encode(), "x.jsonl row 2"),
    "a text": ("x.jsonl", f'{GOOD}\n"what"\n'.encode(), "x.jsonl row 2"),
    "null": ("x.jsonl", f"{GOOD}\nnull\n".encode(), "x.jsonl row 2"),
    "duplicate keys": ("x.jsonl", f'{GOOD}\n{{"prompt": "a", "prompt": "b", "completion": "c"}}\n'.encode(), "row 2"),
    "a cut row": ("x.jsonl", f'{GOOD}\n{GOOD[:20]}\n'.encode(), "x.jsonl row 2"),
    "two rows in one line": ("x.jsonl", f"{GOOD}{GOOD}\n".encode(), "x.jsonl row 1"),
    "nested deeply": ("x.jsonl", f"{GOOD}\n{'[' * 200_000}\n".encode(), "x.jsonl row 2"),
    "a number for a text": ("x.jsonl", f'{GOOD}\n{{"prompt": 1, "completion": "b"}}\n'.encode(), "x.jsonl row 2"),
    "a mapping for a text": ("x.jsonl", f'{GOOD}\n{{"prompt": {{}}, "completion": "b"}}\n'.encode(), "x.jsonl row 2"),
    "half a character": ("x.jsonl", f'{GOOD}\n{{"prompt": "\\ud800", "completion": "b"}}\n'.encode(), "x.jsonl row 2"),
    "json that is cut": ("x.json", b'[{"prompt": "a", "comp', "x.json"),
    "json of a number": ("x.json", b"7", "x.json"),
    "csv without columns": ("x.csv", b"a,b\n1,2\n", "x.csv"),
    "csv with a short row": ("x.csv", b"prompt,completion\na,b\nc\n", "x.csv row 2"),
    "parquet that is none": ("x.parquet", b"PAR1" + b"\0" * 100, "x.parquet"),
    "gzip that is none": ("x.jsonl.gz", b"hello", "x.jsonl.gz"),
    "gzip that is cut": ("x.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 100)[:-9], "x.jsonl.gz"),
    "an unknown suffix": ("x.exe", b"MZ", "x.exe"),
    "pickle": ("x.pkl", b"\x80\x04N.", "x.pkl"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_data_file_is_named_with_its_row(train, here, case):
    name, content, says = BAD_FILES[case]
    (here / name).write_bytes(content)
    refused(here, lambda: train("-o", "out", data=name), says)


@pytest.mark.parametrize("case", ["empty", "latin-1", "a list", "nested deeply", "gzip that is cut"])
def test_a_bad_file_to_answer_is_named_with_its_row(run, base, here, case):
    name, content, says = BAD_FILES[case]
    (here / name).write_bytes(content)
    refused(here, lambda: run("predict", base, "--input", name, "-o", "out.jsonl", "max_new_tokens=2"), says)


def test_a_file_to_answer_that_is_none_is_named_by_its_option(run, base, here):
    refused(here, lambda: run("predict", base, "--input", "nope.jsonl"), "--input 'nope.jsonl' does not exist")
    refused(here, lambda: run("predict", base, "--input", here), "is a folder")


@pytest.mark.parametrize("case", ["a list", "empty"])
def test_a_bad_file_to_evaluate_on_is_named(train, here, case):
    name, content, says = BAD_FILES[case]
    (here / name).write_bytes(content)
    refused(here, lambda: train(f"eval_path={name}", "-o", "out"), says)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "/etc", "..", "../..", "~nobody-here/x.jsonl", "a/../../b.jsonl", "/dev/zero",
     "/dev/stdin", "/proc/self/mem", "x" * 400, "org/../../x", "file:///etc/passwd", "http://127.0.0.1:9/x.jsonl",
     "C:\\\\x.jsonl", "org/name\nx", "fifo.jsonl", "zero.jsonl", "loop.jsonl"],
    ids=lambda name: repr(name[:24]),
)  # fmt: skip
def test_data_names_that_are_no_data_are_refused(train, here, name):
    os.mkfifo(here / "fifo.jsonl")  # a reader of it would wait for ever
    (here / "zero.jsonl").symlink_to("/dev/zero")
    (here / "loop.jsonl").symlink_to("loop.jsonl")
    done = train("-o", "out", data=name)
    done.refused(repr(Path(name).name[:20])[1:-1])
    assert sorted(path.name for path in here.iterdir()) == ["fifo.jsonl", "good.jsonl", "loop.jsonl", "zero.jsonl"]
    assert "root:" not in done.err, "an error does not quote other people's files"


@pytest.mark.parametrize(("key", "megabytes"), [("prompt", 10), ("completion", 1)])
def test_a_row_of_megabytes_is_cut_and_told(train, here, key, megabytes):
    """A prompt is read where it is cut; an answer is read whole, to count what it loses."""
    row = {"prompt": "what?", "completion": " that"} | {key: " word" * (megabytes * 200_000)}
    (here / "x.jsonl").write_text(f"{json.dumps(row)}\n{GOOD}\n")
    started = time.perf_counter()
    done = train("--dry-run", "--json", data="x.jsonl").ok()
    assert time.perf_counter() - started < 20
    data = done.json["data"]
    assert data["token_lengths"]["max"] <= 64
    assert data["prompts_cut"] == 1 and data["answers_cut"]["rows"] == (1 if key == "completion" else 0)
    assert len(done.err) < 20_000
    assert ("WARN" in done.err) == (key == "completion")


def test_many_bad_rows_make_one_short_message(train, here):
    (here / "x.jsonl").write_text("\n".join([GOOD, *['{"no": 1}'] * 5000]))
    assert len(refused(here, lambda: train("-o", "out", data="x.jsonl"), "x.jsonl row 2")) < 3000


# ---------------------------------------------------------------- recipes and words

BAD_RECIPES: dict[str, bytes] = {
    "binary": bytes(range(256)) * 10,
    "zeros": b"\0" * 1000,
    "utf-16": "model: pocket\n".encode("utf-16"),
    "huge": b"# comment\n" * 2_000_000,
    "nested deeply": b"[" * 100_000,
    "nested mappings": b"a: " + b"{b: " * 5000,
    "a list": b"- model\n- data\n",
    "a text": b"hello",
    "aliases that grow": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "a tag that runs code": b"model: !!python/object/apply:os.system ['touch executed']\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "a tab": b"model:\n\tname: x\n",
    "an unknown key": b"modle: x\n",
    "a section as a number": b"train: 7\n",
    "a huge number": b"seed: " + b"9" * 100_000 + b"\n",
    "not a number": b"learning_rate: .nan\n",
    "infinite": b"num_train_epochs: .inf\n",
    "a mapping as a name": b"model: {name: {a: b}}\n",
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_named(run, here, case):
    (here / "mine.yaml").write_bytes(BAD_RECIPES[case])
    refused(here, lambda: run("train", "--config", "mine.yaml", "-o", "out"), "mine.yaml")


@pytest.mark.parametrize("name", ["nope.yaml", ".", "/etc/shadow-", "/dev/zero", "x" * 400 + ".yaml"])
def test_a_recipe_that_is_no_file_is_named(run, here, name):
    refused(here, lambda: run("train", "--config", name, "-o", "out"), "recipe")


@pytest.mark.parametrize(
    "word",
    ["=", "=x", "x=", "seed=", "seed=[", "seed={a: *b}", "seed=!!python/name:os.system", "seed=99999999999999999999",
     "seed=" + "9" * 100_000, "lora_r=0", "lora_r=-1", "lora_r=1e400", "lora_r=true", "learning_rate=nan",
     "learning_rate=inf", "learning_rate=-1", "max_length=7", "num_train_epochs=0", "target_modules=[]",
     "target_modules=(", "data.columns=x", "data.columns={prompt: nope, completion: nope}",
     "lora.options={__class__: 1}", "lora.options.r=3", "model.trust_remote_code=perhaps", "chat_template=nope.jinja",
     "chat_template=/etc/passwd", "init_lora_weights=nope", "attn_implementation=nope", "a.b.c.d=1", "train.lora.r=1",
     "max_memory=24", "max_memory=0GiB", "max_memory=-3GiB", "max_memory=GiB", "max_memory=true", "max_memory=2GiB",
     "precision=fp16", "offload=yes", "offload={resident_layers: 1}"],
    ids=lambda word: word[:40],
)  # fmt: skip
def test_a_bad_word_is_refused(train, here, word):
    refused(here, lambda: train(word, "-o", "out"))


def test_a_rank_beyond_all_memory_exits_3(train, here):
    refused(here, lambda: train("lora_r=1000000000000", "-o", "out"), "rank 1000000000000", code=3)


@pytest.mark.parametrize("path", ["../../x", "..", "/etc/passwd", ".*", "train"])
def test_a_split_is_a_name_in_the_folder(train, here, path):
    refused(here, lambda: train(f"split={path}", "-o", "out", data="."), "no files for split", "good.jsonl")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{{ nope() }}",
    ],
)
def test_a_chat_template_cannot_do_harm(train, here, template):
    (here / "mine.jinja").write_text(template)
    refused(here, lambda: train("chat_template=mine.jinja", "-o", "out"))


# ---------------------------------------------------------------- models


def spoil(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(bytes(content))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), "config.json"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "holds no weights"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer"),
    "weights cut": (lambda model: os.truncate(model / "model.safetensors", 5000), "model.safetensors is damaged"),
    "weights empty": (lambda model: os.truncate(model / "model.safetensors", 0), "model.safetensors is damaged"),
    "header beyond the file": (
        lambda model: spoil(model / "model.safetensors", 0, struct.pack("<Q", 2**60)), "safetensors is damaged",
    ),
    "header spoiled": (lambda model: spoil(model / "model.safetensors", 40, b"\xff\xff"), "safetensors is damaged"),
    "pickle": (lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"), "can execute code"),
    "config of another": (lambda model: spoil(model / "config.json", 0, b"["), "config.json"),
    "tokenizer spoiled": (lambda model: spoil(model / "tokenizer.json", 0, b"["), "tokenizer"),
    "index elsewhere": (
        lambda model: (
            (model / "model.safetensors").rename(model.parent / "x.safetensors"),
            (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        ),
        "'../x.safetensors'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused(train, here, case):
    model = make_model(here / "model")
    change, says = BAD_MODELS[case]
    change(model)
    refused(here, lambda: train("-o", "out", model="model"), says)


@pytest.mark.parametrize(
    "name", ["../..", "a/b/c", "/nope", "C:\\x", "~nobody-here", "x" * 400, "/dev/zero", "good.jsonl"]
)
def test_a_name_that_is_no_model_is_refused(train, here, name):
    refused(here, lambda: train("-o", "out", model=name), "model")


@pytest.mark.parametrize("part", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize(
    "verb", [["eval"], ["predict", "--input", "good.jsonl"], ["merge", "-o", "merged"], ["chat"]], ids=str
)
def test_a_spoiled_adapter_is_refused_by_every_verb(run, trained, here, verb, part):
    copy_of(trained, here)
    os.truncate(here / "run" / "adapter" / part, 300)
    refused(here, lambda: run(verb[0], "run", *verb[1:]), part)


# ---------------------------------------------------------------- checkpoints


def copy_of(trained: Path, here: Path) -> None:
    import shutil

    shutil.copytree(trained / "run", here / "run")


PARTS = ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "optimizer.json"]


def go_on(run, which: str, trained: Path) -> Outcome:
    config = trained / "run" / "recipe.yaml"
    return run("train", "--config", config, "-o", "run", f"resume_from_checkpoint={which}")


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_with_a_flipped_byte_is_refused_by_name(run, trained, here, part):
    copy_of(trained, here)
    path = here / "run" / "checkpoint-2" / part
    content = path.read_bytes()
    spoil(path, len(content) // 2, bytes([content[len(content) // 2] ^ 0xFF]))
    refused(here, lambda: go_on(run, "run/checkpoint-2", trained), "checkpoint-2", part)


@pytest.mark.parametrize("part", PARTS)
def test_auto_passes_over_a_spoiled_checkpoint_aloud(run, trained, here, part):
    copy_of(trained, here)
    os.truncate(here / "run" / "checkpoint-2" / part, 10)
    done = go_on(run, "auto", trained).ok()
    assert "passed over" in done.err and "resumed from run/checkpoint-1 at step 1" in done.err


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "..", "sub/x"])
def test_a_manifest_that_names_other_places_is_refused(run, trained, here, name):
    copy_of(trained, here)
    path = here / "run" / "checkpoint-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {name: {"bytes": 1, "sha256": "0" * 64}}))
    refused(here, lambda: go_on(run, "run/checkpoint-2", trained), "manifest.json")


@pytest.mark.parametrize("which", ["run/checkpoint-3", "run/adapter", "/etc", "run", ".."])
def test_a_folder_that_is_no_checkpoint_is_refused(run, trained, here, which):
    copy_of(trained, here)
    refused(here, lambda: go_on(run, which, trained))


def test_a_checkpoint_of_another_recipe_is_refused(run, trained, here):
    copy_of(trained, here)
    config = trained / "run" / "recipe.yaml"
    words = ["-o", "run", "resume_from_checkpoint=run/checkpoint-2", "seed=99"]
    refused(here, lambda: run("train", "--config", config, *words), "belongs to another run", "seed was 7, is 99")


# ---------------------------------------------------------------- outputs


def test_an_output_that_cannot_be_written_to_is_refused(train, here):
    (here / "file").write_text("mine")
    for output in ("file", "file/below", "/proc/nope", "/dev/null/x"):
        refused(here, lambda output=output: train("-o", output))
    assert (here / "file").read_text() == "mine"


def test_an_output_with_other_peoples_files_keeps_them(train, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    train("-o", "out").ok()
    assert (here / "out" / "notes.txt").read_text() == "mine"
