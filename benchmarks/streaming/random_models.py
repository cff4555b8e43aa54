"""Models at real shapes whose 4-bit layers are random bytes: made in seconds, without a 16-bit model anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thriftune.engine.host_memory import PinnedBlock, pinned_block
from thriftune.engine.hosted import read_scales
from thriftune.engine.lanes import Lane
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.residency import Streaming, new_slots
from thriftune.engine.sizes import rank_multiple
from thriftune.kernels.slab import Matrix, SlabLayout, Tables
from thriftune.methods import METHODS
from thriftune.models import LoadedModel
from thriftune.models.load import ModelDescription
from thriftune.models.shell import empty_shell, fill, finish_shell
from thriftune.recipe import QuantRecipe, read_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan_points"))
from shapes_measured import SHAPES as MEASURED

SHAPES: dict[str, dict[str, Any]] = {
    "8B": MEASURED["Llama-3-8B"],
    "70B": MEASURED["Llama-3-70B"],
    "123B": {  # Mistral-Large-Instruct-2407
        "model_type": "mistral",
        "vocab_size": 32_768,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "hidden_size": 12_288,
        "intermediate_size": 28_672,
        "num_hidden_layers": 88,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "tiny": {**MEASURED["tiny"], "num_hidden_layers": 6},
}
PIECE = 64 * 1024**2
SCALE, SPREAD = 0.035, 0.015  # a block's scale is about the first, give or take the second: weights of about 0.02
FILLERS = 4


@dataclass
class RandomModel:
    """A shell with its adapter, the program read from it, and its layers' slabs in pinned memory."""

    loaded: LoadedModel
    model: Any
    program: Program
    layout: SlabLayout
    tables: Tables
    blocks: list[PinnedBlock] = field(default_factory=list)

    @property
    def slabs(self) -> list[Tensor]:
        return [block.bytes for block in self.blocks]

    def streaming(self, resident: Sequence[int], slots: int, lane: Lane) -> Streaming:
        """As `engine.hosted.stream`, with slabs that are there already."""
        device, layers = self.loaded.device, self.program.layers
        stays = set(resident)
        others = {index: slab for index, slab in enumerate(self.slabs) if index not in stays}
        found = Streaming(
            layers=layers,
            layouts=[self.layout] * len(layers),
            tables=self.tables,
            resident={index: self.slabs[index].to(device, copy=True) for index in stays},
            streamed=others,
            slots=new_slots(slots, [self.layout], device) if others else [],
            lane=lane,
        )
        if self.program.fp8:
            read_scales(self.program, found)
        return found

    def products_in(self, fp8: bool) -> None:
        """Have the program's frozen products in 8-bit floats, or in 16 bits."""
        if fp8 != self.program.fp8:
            longest = self.program.angles.cos_PC.shape[0]
            multiple = rank_multiple(self.loaded.device.type, fp8)
            self.program = read_program(self.model, longest, multiple, fp8)

    def release(self) -> None:
        for block in self.blocks:
            block.release()
        self.blocks.clear()


def make_model(
    name: str,
    device: torch.device,
    longest: int,
    *,
    layers: int | None = None,
    extra: Sequence[str] = (),
    **changes: Any,
) -> RandomModel:
    """`changes` are of the config; `extra` are words of the recipe. Slabs are made by `make_slabs`."""
    from transformers import AutoConfig

    config = {**SHAPES[name], **changes} | ({"num_hidden_layers": layers} if layers else {})
    kind = config.pop("model_type")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    built = AutoConfig.for_model(kind, **config)
    network = empty_shell(built, device=device, dtype=dtype, attention="sdpa", quant=QuantRecipe())
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in list(network.named_parameters()):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            values = values.normal_(0.0, 0.02, generator=generator) if parameter.ndim > 1 else values.fill_(1.0)
            fill(network, path, values, device, embedding_on_device=False)
    finish_shell(network, device)
    loaded = LoadedModel(
        model=network,
        tokenizer=None,
        description=ModelDescription(Path(name), kind, 0, 0, 0, config["hidden_size"], config["intermediate_size"],
                                     config["num_hidden_layers"], config["vocab_size"], None, None),
        device=device,
        base_dtype=dtype,
        four_bit=True,
        load_s=0.0,
    )  # fmt: skip
    model = METHODS["qlora"].attach(loaded, read_recipe(None, ["method=qlora", *extra], {}))
    program = read_program(model, longest, rank_multiple(device.type, False), fp8=False)
    return RandomModel(loaded, model, program, _layout(program), _tables(device))


def make_slabs(model: RandomModel, say: Callable[[str], None]) -> None:
    """A slab of its own for each layer, from the layer's number."""
    device, size = model.loaded.device, model.layout.bytes
    count = len(model.program.layers)
    model.blocks = [pinned_block(size, device, "random slabs") for _ in range(count)]

    def make(index: int) -> None:
        generator = torch.Generator(device).manual_seed(index)
        slab = model.blocks[index].bytes
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8, device=device)
            slab[start : start + PIECE].copy_(piece.random_(0, 256, generator=generator))
        for weight in model.layout.views(slab, model.tables):
            assert weight.scale_scales is not None and weight.scale_offset is not None
            weight.scale_scales.fill_(SPREAD)
            weight.scale_offset.fill_(SCALE)

    with ThreadPoolExecutor(FILLERS) as fillers:
        list(fillers.map(make, range(count)))
    say(f"{count} slabs of {size / 2**20:.0f} MiB")


def _layout(program: Program) -> SlabLayout:
    parts = [part.linear for stack in program.layers[0].stacks for part in stack.parts]
    return SlabLayout(tuple(Matrix("", linear.out_features, linear.in_features) for linear in parts), 64, True)


def _tables(device: torch.device) -> Tables:
    """As bitsandbytes makes them for any weight."""
    import bitsandbytes.functional as bnb

    _, state = bnb.quantize_4bit(torch.randn(64, 64, device=device), quant_type="nf4", compress_statistics=True)
    return Tables(state.code.float(), state.state2.code.float())
