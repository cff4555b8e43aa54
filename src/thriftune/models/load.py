"""From a model's name to a model on its device: checked files, 16-bit or NF4, nothing left uninitialised in silence."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from thriftune.errors import DoesNotFitError, ModelError, first_line
from thriftune.model_files import ALLOWED_MODEL, find_model_folder, read_config, tensor_shapes, weight_files
from thriftune.models.surgery import keep_four_bit_weights_as_they_are
from thriftune.recipe import ModelRecipe, QuantRecipe

# Parts of the names of matrices that stay as they are in a 4-bit model: embeddings and heads.
NOT_QUANTISED = ("embed", "lm_head", "wte", "wpe")
WHOLE_NUMBERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model before it is loaded.

    `linear_parameters` counts what NF4 would quantise; `linear_sides` is the sum of (in + out) features over the same
    matrices, so a rank-r adapter on all of them has r * linear_sides parameters.
    """

    folder: Path
    model_type: str
    total_parameters: int
    linear_parameters: int
    linear_sides: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    stored_dtype: str | None


@dataclass(frozen=True)
class LoadedModel:
    """`model` is in eval mode, frozen, on `device`; `base_dtype` is the type of its unquantised weights."""

    model: nn.Module
    tokenizer: Any
    description: ModelDescription
    device: torch.device
    base_dtype: torch.dtype
    four_bit: bool
    load_s: float


def choose_dtype(model: ModelRecipe, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU, unless the recipe says."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[model.dtype]


def describe_model(model: ModelRecipe) -> ModelDescription:
    """Read config.json and the weights' headers: milliseconds, no tensor is loaded. Raises ModelError."""
    folder = find_model_folder(model)
    config = read_config(folder)
    _refuse_quantised(config, folder)
    total = linear = sides = 0
    dtypes: dict[str, int] = {}
    for path in weight_files(folder):
        for name, (dtype, shape) in tensor_shapes(path).items():
            count = 1
            for size in shape:
                count *= size
            total += count
            dtypes[dtype] = dtypes.get(dtype, 0) + count
            if dtype in WHOLE_NUMBERS and name.endswith(".weight"):
                raise ModelError(
                    given=f"{name} in {path} is stored as {dtype}, in whole numbers",
                    allowed="weights in bfloat16, float16 or float32",
                    do="download the model again, or name its unquantised version",
                )
            if len(shape) == 2 and not any(part in name for part in NOT_QUANTISED):
                linear += count
                sides += sum(shape)
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, dict) else config
    hidden_size = _whole(sizes, "hidden_size", "n_embd", "d_model")
    return ModelDescription(
        folder=folder,
        model_type=str(config["model_type"]),
        total_parameters=total,
        linear_parameters=linear,
        linear_sides=sides,
        hidden_size=hidden_size,
        intermediate_size=_whole(sizes, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden_size,
        num_layers=_whole(sizes, "num_hidden_layers", "n_layer", "num_layers"),
        vocab_size=_whole(sizes, "vocab_size"),
        max_positions=_whole(sizes, "max_position_embeddings", "n_positions") or None,
        stored_dtype=max(dtypes, key=lambda dtype: dtypes[dtype]) if dtypes else None,
    )


def _whole(config: dict[str, Any], *names: str) -> int:
    """The first of these keys that holds a whole number; 0 when none does (families spell them differently)."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _refuse_quantised(config: dict[str, Any], folder: Path) -> None:
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        how = part.get("quantization_config")
        if how:
            kind = how.get("quant_method", "an unknown way") if isinstance(how, dict) else how
            raise ModelError(
                given=f"the weights in {folder} are quantised already ({kind})",
                allowed="weights in bfloat16, float16 or float32; method qlora quantises them on the way in",
                do="name the unquantised model",
            )


def load_tokenizer(model: ModelRecipe, folder: Path) -> Any:
    """The model's own tokenizer, offline, from its folder. Raises ModelError when there is none or it is damaged."""
    from transformers import AutoTokenizer

    _check_config(model, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelError(
            given=f"no tokenizer can be loaded from {folder}: {first_line(error)}",
            allowed="tokenizer.json and tokenizer_config.json beside the model",
            do="download the model again; for code that a repository ships, set trust_remote_code=true if you trust it",
        ) from None


def _check_config(model: ModelRecipe, folder: Path) -> None:
    """Raise ModelError when transformers makes no configuration of config.json."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
    except Exception as error:  # a wrong value raises whatever its model's configuration stumbles over
        ships_code = "custom code" in str(error)
        raise ModelError(
            given=f"{folder / 'config.json'} describes no model that can be built: {first_line(error)}",
            allowed="a config.json of a kind of model that transformers knows",
            do="the repository ships code of its own: set trust_remote_code=true if you have read it and trust it"
            if ships_code
            else "download the model again, or update transformers if its kind is newer",
        ) from None


def load_model(
    model: ModelRecipe, *, device: torch.device, dtype: torch.dtype, quant: QuantRecipe | None
) -> LoadedModel:
    """Load a causal language model, its linears quantised to 4 bits on the way when `quant` is given.

    Raises ModelError for anything wrong with the files (missing, pickle, damaged, weights that the architecture needs
    and the files lack) and DoesNotFitError when the device's memory does not hold it.
    """
    started = time.perf_counter()
    description = describe_model(model)
    tokenizer = load_tokenizer(model, description.folder)
    network, loading_info = _from_pretrained(model, description, device, dtype, quant)
    refuse_unfilled(loading_info, description)
    network.requires_grad_(False)
    network.eval()
    if quant is not None:
        keep_four_bit_weights_as_they_are(network)
    check_vocabulary(network, tokenizer, description.folder)
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        description=description,
        device=device,
        base_dtype=dtype,
        four_bit=quant is not None,
        load_s=time.perf_counter() - started,
    )


def _from_pretrained(
    model: ModelRecipe,
    description: ModelDescription,
    device: torch.device,
    dtype: torch.dtype,
    quant: QuantRecipe | None,
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported and refused by `refuse_unfilled`, which names them
    }
    if device.type == "cuda":
        arguments["device_map"] = {"": device.index or 0}
    elif quant is not None:  # without a map 4-bit weights go to a GPU where there is one, whatever was asked for
        arguments["device_map"] = {"": "cpu"}
    if quant is not None:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quant.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            network, loading_info = AutoModelForCausalLM.from_pretrained(description.folder, **arguments)
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(model, description, device, error) from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError, MemoryError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise _does_not_fit(model, description, device, error) from None
        raise ModelError(
            given=f"{description.folder} cannot be loaded as a causal language model: {first_line(error)}",
            allowed=ALLOWED_MODEL,
            do="check model_type in config.json and that the files belong together",
        ) from None
    return network, _as_dict(loading_info)


def _does_not_fit(
    model: ModelRecipe, description: ModelDescription, device: torch.device, error: BaseException
) -> DoesNotFitError:
    return DoesNotFitError(
        given=f"{model.name} ({description.total_parameters:,} parameters) does not fit on {device}: "
        f"{first_line(error)}",
        allowed="a model whose weights fit in free memory",
        do="use method qlora, close other programs on this device, or take a smaller model",
    )


def _as_dict(loading_info: Any) -> dict[str, Any]:
    return loading_info if isinstance(loading_info, dict) else vars(loading_info)


def refuse_unfilled(loading_info: dict[str, Any], description: ModelDescription) -> None:
    """Raise ModelError for tensors that the architecture has and the files do not have, or have in another shape."""
    missing = sorted(loading_info.get("missing_keys") or [])
    mismatched = sorted(loading_info.get("mismatched_keys") or [])
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} tensors ({', '.join(missing[:5])})")
    if mismatched:
        listed = ", ".join(f"{name}: {list(found)}, needed {list(needed)}" for name, found, needed in mismatched[:5])
        faults.append(f"has {len(mismatched)} tensors of another shape ({listed})")
    if faults:
        raise ModelError(
            given=f"{description.folder} {' and '.join(faults)}; the {description.model_type} model of its config.json "
            "would have started them from random values",
            allowed="weights that match config.json",
            do="download the model again",
        )


def check_vocabulary(network: nn.Module, tokenizer: Any, folder: Path) -> None:
    rows = network.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ModelError(
            given=f"the tokenizer in {folder} has ids up to {highest}, the model's embedding {rows} rows",
            allowed="a tokenizer whose ids all have an embedding",
            do="use the tokenizer that belongs to the model",
        )
