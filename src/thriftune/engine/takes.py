"""Which models and recipes the engine computes, as far as a config and a recipe tell. No torch.

`read` asks the same of the model itself once it is there: what a config says is asked here, for both.
"""

from __future__ import annotations

from collections.abc import Iterable

from thriftune.engine.sizes import FP8_MULTIPLE
from thriftune.errors import InputError
from thriftune.recipe import LoraRecipe, Recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
QKV, OUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
FP8_FROM = (8, 9)  # compute capability
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256  # elements of a head that FlashAttention takes
LINEARS = (*QKV, *OUT, *GATE_UP, *DOWN)


def why_not_model(model_type: str, activation: str, rope_type: str) -> str | None:
    """What the engine cannot compute of such a model, in words; None when it can compute all of it."""
    if model_type not in FAMILIES:
        return f"it knows {', '.join(FAMILIES)}, and this model is of type {model_type}"
    if activation != "silu":
        return f"the MLP's activation is {activation}"
    if rope_type not in ROPE_TYPES:
        return f"rope of type {rope_type} depends on the rows' length"
    return None


def why_not_heads(size: int) -> str | None:
    """Why no attention kernel of a GPU takes heads of so many elements; None when one does."""
    if size % HEAD_MULTIPLE or size > LARGEST_HEAD:
        allowed = f"heads of multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD} elements"
        return f"its attention kernels take {allowed}, and this model's have {size}"
    return None


def why_not_fp8(capability: tuple[int, int] | None, sizes: Iterable[int]) -> str | None:
    """Why a model's linears, of these sizes, cannot be multiplied in 8-bit floats on a GPU of this compute capability
    (None: on a CPU, where the same numbers are computed slowly); None when they can."""
    if capability is not None and capability < FP8_FROM:
        return "this GPU has no products in 8-bit floats (Ada, Hopper and newer have)"
    odd = next((size for size in sizes if size % FP8_MULTIPLE), None)
    return (
        None if odd is None else f"a linear of this model has a side of {odd}, which is no multiple of {FP8_MULTIPLE}"
    )


def why_not_method(recipe: Recipe, method: str) -> str | None:
    """Why a run of this recipe, with its method decided, does not go through the engine; None when it may."""
    if recipe.engine == "off":
        return "the recipe says engine: off"
    if method == "full":
        return "full fine-tuning changes the weights that the engine takes to be frozen"
    return None


def why_not_adapter(lora: LoraRecipe, biases: bool) -> str | None:
    """What of an adapter's options the engine cannot compute, in words; None when it can compute all of them. `biases`:
    the model has some that `lora.bias` may train."""
    if lora.use_dora:
        return "a variant of LoRA"
    if lora.options.get("lora_bias"):
        return "a bias of the adapter"
    if (biases and lora.bias != "none") or lora.modules_to_save or lora.options.get("trainable_token_indices"):
        return "more than the adapter is trained"
    return None


def refuse_fp8(recipe: Recipe, reason: str) -> None:
    """Raise InputError when a run that the engine does not take, for this reason, asks for 8-bit products."""
    if recipe.precision == "fp8":
        raise InputError(
            given=f"precision=fp8, which only the engine has, and it does not take this run: {reason}",
            allowed="precision=fp8 where the engine runs on a GPU with products in 8-bit floats; auto everywhere",
            do="use precision=auto, or change what stands in the way",
        )
