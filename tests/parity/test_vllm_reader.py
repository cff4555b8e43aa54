"""Adapters of many ranks read by vLLM's own `PEFTHelper`, from the source of a released package.

Where vLLM is installed its file is taken from there; else THRIFTUNE_VLLM may name its wheel, which needs no installing:

    pip download vllm --no-deps -d /tmp && THRIFTUNE_VLLM=/tmp/vllm-*.whl pytest tests/parity/test_vllm_reader.py

Only that one file runs. tests/parity/test_dynamic_rank.py has its rules for machines without it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from thriftune.methods import METHODS
from thriftune.models import load_model
from thriftune.shrinking import shrink
from tiny import tiny_model, tiny_recipe

READER = "vllm/lora/peft_helper.py"
STEM = "base_model.model."


def source_of_the_reader() -> str | None:
    wheel = os.environ.get("THRIFTUNE_VLLM")
    if wheel:
        with zipfile.ZipFile(wheel) as files:
            return files.read(READER).decode("utf-8")
    found = importlib.util.find_spec("vllm")
    place = Path(found.origin).parent.parent / READER if found and found.origin else None
    return place.read_text(encoding="utf-8") if place and place.exists() else None


@pytest.fixture(scope="module")
def reader() -> Any:
    """The class `PEFTHelper`. What its file imports of vLLM is a logger and a type in an annotation."""
    source = source_of_the_reader()
    if source is None:
        pytest.skip("vLLM is not installed, and THRIFTUNE_VLLM names no wheel of it")
    logger = logging.getLogger("vllm")
    logger.info_once = logger.info  # type: ignore[attr-defined]
    around = {
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.config.lora": {"LoRAConfig": object},
        "vllm.config": {"LoRAConfig": object},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vllm", "vllm.config", *around):
            module = types.ModuleType(name)
            vars(module).update(around.get(name, {}))
            patch.setitem(sys.modules, name, module)
        module = types.ModuleType("the_reader")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, READER, "exec"), vars(module))
    return module.PEFTHelper


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def cut(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """An adapter as method dynamic saves it, and all its modules' ranks: several, and some 0. Each module's update is
    larger than that of the one before it."""
    folder = tmp_path_factory.mktemp("vllm")
    dynamic = {"r_start": 8, "keep": 0.4, "round_to": 1}
    lora = {"alpha": 8.0, "use_rslora": True}
    recipe = tiny_recipe(model, folder / "rows.jsonl", folder / "run", method="dynamic", dynamic=dynamic, lora=lora)
    loaded = load_model(recipe.model, device=torch.device("cpu"), dtype=torch.float32, quant=None)
    method = METHODS["dynamic"]
    attached = method.attach(loaded, recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for place, name in enumerate(name for name, _ in attached.named_parameters() if ".lora_B." in name):
            attached.get_parameter(name).normal_(0.0, 0.01 * (1 + place))
    ranks = method.between_steps(recipe, 1, 1)(attached).ranks
    (folder / "adapter").mkdir()
    method.save(attached, folder / "adapter")
    return folder / "adapter", ranks


def limits(rank: int) -> Any:
    return types.SimpleNamespace(max_lora_rank=rank)


@pytest.mark.parametrize("kind", ["cut", "shrunk"])
def test_every_module_is_read_with_its_rank_and_its_scale(
    reader: Any, model: Path, cut: tuple[Path, dict[str, int]], tmp_path: Path, kind: str
) -> None:
    """What vLLM would add to each weight, scale * B A, is what PEFT adds."""
    folder, wanted = cut
    if kind == "shrunk":
        wanted = shrink(str(folder), tmp_path / "smaller", 0.5, 1)["ranks"]
        folder = tmp_path / "smaller"
    found = reader.from_local_dir(str(folder), 128)
    found.validate_legal(limits(8))
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removeprefix(STEM).removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    assert {name: found.get_rank_and_scaling(name)[0] for name in names} == {n: r for n, r in wanted.items() if r}
    assert len({rank for rank in wanted.values() if rank}) > 2
    in_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder)
    for name in names:
        b, a = (tensors[f"{STEM}{name}.lora_{side}.weight"] for side in "BA")
        rank, scale = found.get_rank_and_scaling(name)
        assert a.shape[0] == b.shape[1] == rank
        layer = in_peft.get_base_model().get_submodule(name)
        torch.testing.assert_close(scale * (b @ a), layer.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_a_rank_beyond_the_servers_limit_is_refused_by_its_number(
    reader: Any, cut: tuple[Path, dict[str, int]]
) -> None:
    folder, ranks = cut
    largest = max(ranks.values())
    found = reader.from_local_dir(str(folder), 128)
    found.validate_legal(limits(largest))
    with pytest.raises(ValueError, match=f"LoRA rank {largest}"):
        found.validate_legal(limits(largest - 1))


def test_a_module_of_rank_0_would_be_refused(reader: Any, cut: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    """Why the export leaves such modules out."""
    folder, ranks = cut
    gone = next(name for name, rank in ranks.items() if rank == 0)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["rank_pattern"][gone] = 0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="must be a positive integer"):
        reader.from_local_dir(str(tmp_path), 128)
