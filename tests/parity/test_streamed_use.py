"""eval, predict and chat of a run whose layers are streamed, against the same model loaded whole in 4 bits."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streaming import EarlyLane, LateLane

from adapter_runs import CPU, IDS_BT, make_run
from small_host import SmallHost, disk_readers
from small_models import make_model
from thriftune import opening, serving
from thriftune.compare import cell
from thriftune.compare.jobs import CellJob, Question
from thriftune.engine import hosted, passing
from thriftune.engine.passing import bytes_of_token, share_out
from thriftune.errors import DoesNotFitError, InputError, ModelError
from thriftune.infer.choices import score_choices
from thriftune.infer.generate import generate
from thriftune.infer.merge import probe_logits
from thriftune.models.shell import load_shell
from thriftune.models.store import Store
from thriftune.opening import open_for_use
from thriftune.recipe import GenerationRecipe
from thriftune.target import OpenedTarget, find_target, open_target
from tiny import tiny_rows

LAYERS = 5
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"layer_types": ["full_attention"] * LAYERS},
    "qwen2": {"layer_types": ["full_attention"] * LAYERS},
    "mistral": {"sliding_window": 6},
    "llama tied": {"tied": True},
    "llama bf16": {"dtype": torch.bfloat16},
}
PROMPTS = [[5, 80, 99], [104, 81, 7, 33, 12, 9, 9], [200], [3, 2, 60, 61, 0, 7]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: make_model(root / name.replace(" ", "-"), name.split()[0], num_hidden_layers=LAYERS, **changes)
        for name, changes in FAMILIES.items()
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run_of(folder: Path, base: Path, resident: int | None, lora: dict[str, Any] | None = None) -> Path:
    """A run of qlora; `resident` layers stay, None: its recipe leaves it to the device."""
    run = make_run(folder, base, "qlora", lora=lora)
    if resident is not None:
        text = (run / "recipe.yaml").read_text()
        assert text.count("offload: auto") == 1
        (run / "recipe.yaml").write_text(text.replace("offload: auto", f"offload: {{resident_layers: {resident}}}"))
    return run


def opened(run: Path, said: list[str] | None = None, alone: bool = False) -> OpenedTarget:
    target = find_target(str(run))
    return open_for_use(target, target.recipe, CPU, alone=alone, say=(said if said is not None else []).append)


def whole(run: Path) -> OpenedTarget:
    return open_target(find_target(str(run)), CPU)


def quiet(_: Any) -> None: ...


def answers(found: OpenedTarget, **settings: Any) -> list[list[int]]:
    chosen = GenerationRecipe(max_new_tokens=12, batch_size=3, **settings)
    return generate(found.model, PROMPTS, chosen, [0], 1, seed=3, on_progress=quiet)


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    ("family", "resident"), [("llama", 0), ("qwen3", 0), ("llama", 5), *((family, 2) for family in FAMILIES)]
)
def test_logits_and_answers_are_those_of_the_whole_model(family, resident, folders, tmp_path) -> None:
    """In float32 the weights are the same numbers and the products the same calls, so nothing differs by a bit."""
    run, said = run_of(tmp_path / "run", folders[family], resident), []
    streamed, resident_one = opened(run, said), whole(run)
    assert said[-1].startswith(f"offload: {resident} of {LAYERS} layers stay on the device")
    assert torch.equal(probe_logits(streamed.model, IDS_BT.tolist()), probe_logits(resident_one.model, IDS_BT.tolist()))
    assert answers(streamed) == answers(resident_one)
    assert any(len(answer) == 12 for answer in answers(streamed))
    assert answers(streamed, temperature=1.0) == answers(resident_one, temperature=1.0)
    with resident_one.model.disable_adapter():
        assert answers(streamed) != answers(resident_one), "the test needs an adapter that shows"


@pytest.mark.parametrize("choices", [[[5], [80]], [[5, 9], [80, 7, 3]]])
def test_scores_of_choices_are_those_of_the_whole_model(choices, folders, tmp_path) -> None:
    run = run_of(tmp_path / "run", folders["qwen3"], 1)
    found = [score_choices(one.model, PROMPTS, choices, 3, 1, quiet) for one in (opened(run), whole(run))]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"options": {"rank_pattern": {"q_proj": 8}}},
    ],
    ids=str,
)
def test_adapters_that_streaming_does_not_train_are_used_all_the_same(lora, folders, tmp_path) -> None:
    """As of a run on a larger GPU."""
    run = run_of(tmp_path / "run", folders["llama"], 1, lora)
    found = [probe_logits(one.model, IDS_BT.tolist()) for one in (opened(run), whole(run))]
    assert torch.equal(*found)


@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
def test_copies_at_the_earliest_and_the_latest_moment(lane, folders, tmp_path, monkeypatch) -> None:
    """With rubbish in the slots before each copy."""
    made: list[Any] = []

    def stream_layers(*arguments: Any) -> Any:
        streaming = stream(*arguments)
        streaming.lane = lane()
        made.append(streaming)
        return streaming

    stream = passing.stream_layers
    monkeypatch.setattr(passing, "stream_layers", stream_layers)
    run = run_of(tmp_path / "run", folders["llama"], 1)
    assert answers(opened(run)) == answers(whole(run))
    assert len(made) == 1 and made[0].lane.times().bytes > 0


def test_the_planted_bug_is_noticed(folders, tmp_path, monkeypatch) -> None:
    """The positive control: weights that are unpacked without waiting for their copy."""
    run = run_of(tmp_path / "run", folders["llama"], 0)
    found = opened(run)
    expected = answers(whole(run))
    streaming = _streaming_of(found)

    class Careless(LateLane):
        def wait(self, arrival: Any) -> None: ...

    streaming.lane = Careless()
    for slot in streaming.slots:
        slot.owner = None
    assert answers(found) != expected


def _streaming_of(found: OpenedTarget) -> Any:
    return found.rows_at_once.__self__.streaming  # type: ignore[union-attr]


# ---------------------------------------------------------------- what is sent, and what is left behind


def test_each_token_sends_each_streamed_layer_once_and_the_next_ones_first_layers_ahead(folders, tmp_path) -> None:
    """Two slots: what a pass ends with are the first layers of the next one."""
    found = opened(run_of(tmp_path / "run", folders["llama"], 0))
    streaming = _streaming_of(found)
    lane = streaming.lane = EarlyLane()
    number_of = {slab.data_ptr(): index for index, slab in streaming.streamed.items()}
    for _ in range(3):
        probe_logits(found.model, [[5, 6, 7]])
    assert [number_of[source] for source in lane.sent] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    of_a_pass = sum(slab.numel() for slab in streaming.streamed.values())
    assert lane.times().bytes == of_a_pass, "a CUDA event for every copy of every token would be a leak"


def test_linears_are_without_weights_but_while_their_layer_runs(folders, tmp_path) -> None:
    found = opened(run_of(tmp_path / "run", folders["llama"], 1))
    layers = found.loaded.model.model.layers
    seen: list[bool] = []
    layers[2].mlp.register_forward_pre_hook(
        lambda *_: seen.append(bool(layers[2].mlp.up_proj.base_layer.weight.isfinite().all()))
    )
    probe_logits(found.model, [[5, 6]])
    assert seen == [True]
    for layer in layers:
        assert layer.mlp.up_proj.base_layer.weight.isnan().all()
        assert layer.mlp.up_proj.base_layer.weight.untyped_storage().nbytes() == 4


def test_an_answer_that_was_broken_off_leaves_nothing_behind(folders, tmp_path) -> None:
    run = run_of(tmp_path / "run", folders["llama"], 1)
    found, expected = opened(run), answers(whole(run))
    layer = found.loaded.model.model.layers[3]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    hook = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        probe_logits(found.model, [[5, 6]])
    hook.remove()
    assert layer.mlp.up_proj.base_layer.weight.isnan().all()
    assert answers(found) == expected


def test_a_shell_for_use_takes_no_memory_for_its_layers(folders) -> None:
    model = find_target(str(folders["llama"])).base
    shell = load_shell(model, device=CPU, dtype=torch.float32, quant=None).model
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in shell.parameters()}
    others = sum(p.numel() * 4 for name, p in shell.named_parameters() if "proj" not in name)
    assert sum(held.values()) == others + 4 * 7 * LAYERS
    assert probe_logits(shell, [[5, 6]]).isnan().all(), "without its weights it gives no number"


# ---------------------------------------------------------------- the verbs, and what decides


def test_the_verbs_stream_what_the_recipe_says(folders, tmp_path, monkeypatch, capsys) -> None:
    run = run_of(tmp_path / "run", folders["llama"], 2)
    rows = tiny_rows(tmp_path / "rows.jsonl", 7)
    (tmp_path / "text.txt").write_text("It was a long film, and a good one, with music that was never dull. " * 20)

    def use(folder: str) -> tuple[Any, ...]:
        output = tmp_path / folder
        words = ["generation.max_new_tokens=8"]
        serving.predict_with_target(str(run), words, input_file=rows, output=output / "answers.jsonl")
        result = serving.evaluate_target(
            str(run),
            ["data.max_length=32"],
            task="perplexity",
            data_path=str(tmp_path / "text.txt"),
            split="test",
            limit=None,
            answers=output / "eval.jsonl",
        )
        assert result.details.get("layers_streamed") == (LAYERS - 2 if folder == "streamed" else None)
        lines = iter(["good", "/exit"])
        monkeypatch.setattr("builtins.input", lambda *_: next(lines))
        capsys.readouterr()
        serving.chat_with_target(str(run), words)
        return (output / "answers.jsonl").read_text(), result.value, capsys.readouterr().out

    streamed = use("streamed")
    assert len(list(Path(tmp_path / "cache" / "thriftune" / "four-bit").rglob("*.slab"))) == LAYERS
    monkeypatch.setattr(opening, "_streams", lambda *_: False)
    monkeypatch.setattr(Store, "of", lambda *_: pytest.fail("it was streamed again"))
    assert use("whole") == streamed
    assert len(streamed[0].splitlines()) == 7 and json.loads(streamed[0].splitlines()[0])["prediction"] is not None


@pytest.mark.parametrize("fails", [False, True])
def test_verbs_let_go_of_the_hosts_memory(folders, tmp_path, monkeypatch, fails) -> None:
    """And end the thread that reads from the disk: what follows in the process may need what they held."""
    rows = tiny_rows(tmp_path / "rows.jsonl", 2)
    run = run_of(tmp_path / "run", folders["llama"], 0)
    slab = Store.of(folders["llama"], LAYERS, find_target(str(run)).recipe.quant, torch.float32, CPU).layouts[0].bytes
    host, before = SmallHost((1 + hosted.STAGED) * slab), disk_readers()
    host.watch(monkeypatch)

    def held(*_: Any, **__: Any) -> Any:
        assert host.mapped == host.bytes and disk_readers() == before + 1
        if fails:
            raise DoesNotFitError(given="one row", allowed="a row that fits", do="lower it")
        return iter([])

    for place, name in [
        (serving, "evaluate_opened"),
        (serving, "predict_rows"),
        (serving, "chat_loop"),
        (cell, "_evaluated"),
    ]:
        monkeypatch.setattr(place, name, held)
    monkeypatch.setattr(serving, "write_record", lambda *_: None)
    question = Question("reviews", "test", None, None)
    recipe = find_target(str(run)).recipe
    job = CellJob(run, "qlora", "qlora", 1, {}, recipe, None, question, False, "", 1, 0)
    uses = [
        lambda: serving.predict_with_target(str(run), [], input_file=rows, output=tmp_path / "answers.jsonl"),
        lambda: serving.evaluate_target(
            str(run), [], task="perplexity", data_path=str(rows), split="test", limit=None, answers=None
        ),
        lambda: serving.chat_with_target(str(run), []),
        *([lambda: cell._score(job)] if fails else []),
    ]
    for use in uses:
        with pytest.raises(DoesNotFitError) if fails else nullcontext():
            use()
        assert host.mapped == 0 and disk_readers() == before


def test_where_memory_is_short_layers_are_streamed_and_it_is_said(folders, tmp_path, monkeypatch) -> None:
    """As on a GPU, whose free memory is known."""
    run = run_of(tmp_path / "run", folders["llama"], None)
    target, said = find_target(str(run)), []
    assert opened(run, said).rows_at_once is None and not said
    description = opening.describe_model(target.base)
    needed = opening.four_bit_bytes(target, description)
    for module in (opening, passing):
        monkeypatch.setattr(module, "free_bytes", lambda _: needed)
    assert opened(run, said).rows_at_once is None and not said
    monkeypatch.setattr(opening, "free_bytes", lambda _: needed - 1)
    found = opened(run, said)
    assert found.rows_at_once is not None and "layers stay on the device" in said[-1]
    assert answers(found) == answers(whole(run))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("offload: auto", "offload: off"))
    assert opened(run).rows_at_once is None


def test_a_comparison_does_not_merge_what_does_not_fit(folders, tmp_path) -> None:
    waited_s, note = cell._merged_first_token_s(opened(run_of(tmp_path / "run", folders["llama"], 0)), [[5]], CPU)
    assert waited_s is None and "layers are streamed" in note


def test_the_command_line_changes_what_stays(folders, tmp_path, capsys) -> None:
    run = run_of(tmp_path / "run", folders["llama"], None)
    rows = tiny_rows(tmp_path / "rows.jsonl", 2)
    words = ["generation.max_new_tokens=2", "offload={resident_layers: 3}", "max_memory=24GiB"]
    serving.predict_with_target(str(run), words, input_file=rows, output=tmp_path / "answers.jsonl")
    assert f"3 of {LAYERS} layers stay on the device, 2 are streamed" in capsys.readouterr().err


def test_a_model_that_cannot_be_streamed_is_refused_where_the_recipe_streams(tmp_path) -> None:
    base = make_model(tmp_path / "base", "phi3")
    with pytest.raises(InputError, match="a model of type phi3"):
        opened(run_of(tmp_path / "run", base, 1))


def test_sizes_that_are_not_the_configs_are_refused(folders, tmp_path, monkeypatch) -> None:
    found = opened(run_of(tmp_path / "run", folders["llama"], 0))
    layouts = _streaming_of(found).layouts
    layer = found.loaded.model.model.layers[0]
    layer.mlp.up_proj.base_layer.out_features = 127
    with pytest.raises(ModelError, match=r"up_proj of layer 0 is 128 x 64 .* and 127 x 64"):
        passing._linears(layer, layouts[0], 0)


# ---------------------------------------------------------------- rows and layers share what is free


GIB = 1024**3


def test_half_of_what_is_free_is_for_rows_unless_there_is_only_one() -> None:
    many = share_out(20 * GIB, GIB // 2, 80, None, None)
    usable = int(20 * GIB * 0.97) - 256 * 1024**2 - 2 * (GIB // 2)
    assert many.resident == (usable - usable // 2) // (GIB // 2) == 18
    assert many.rows_have == usable - 18 * (GIB // 2) and many.rows_have >= usable // 2
    one = share_out(20 * GIB, GIB // 2, 80, None, GIB)
    assert one.resident == (usable - GIB) // (GIB // 2) and one.rows_have >= GIB
    assert share_out(20 * GIB, GIB // 2, 10, None, GIB).resident == 10
    asked = share_out(20 * GIB, GIB // 2, 80, 4, None)
    assert asked.resident == 4 and asked.rows_have == usable - 4 * (GIB // 2)
    none = share_out(GIB, GIB // 2, 80, None, None)
    assert none.resident == 0 and none.rows_have == 0
    assert share_out(None, GIB, 80, None, None) == passing.Shares(0, None)


def test_rows_are_chosen_where_the_recipe_leaves_them_and_never_below_one(folders, tmp_path, capsys) -> None:
    found = opened(run_of(tmp_path / "run", folders["llama"], 0))
    data, settings = found.target.recipe.data, GenerationRecipe(max_new_tokens=56)
    held = found.rows_at_once.__self__  # type: ignore[union-attr]
    assert serving.with_rows(found, data, settings) == settings, "a CPU's memory is not counted"
    tokens = min(data.max_length + 56, 256)
    held.rows_have = 100 * tokens * held.row_bytes
    assert serving.with_rows(found, data, settings).batch_size == 100
    assert "100 rows at once" in capsys.readouterr().err
    assert serving.with_rows(found, data, settings.model_copy(update={"batch_size": 4})).batch_size == 4
    held.rows_have = 10**15
    assert serving.with_rows(found, data, settings).batch_size == serving.MOST_ROWS
    held.rows_have = 1
    assert serving.with_rows(found, data, settings).batch_size == 1


def test_bytes_of_a_token(folders) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folders["llama"])
    cache = 2 * LAYERS * 2 * 16
    assert bytes_of_token(config, 2) == 2 * (cache + 3 * 128 + 4 * 64 + 2 * 4 * 16)
