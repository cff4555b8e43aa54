"""A model's files: from a name to a folder, and checked before anything is loaded. No torch here.

A model is a folder with `config.json`, a tokenizer and safetensors weights. Pickle weights are refused: loading one
executes whatever its author wrote.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from thriftune.errors import InputError, ModelError
from thriftune.hub import ensure_hub_reachable, hub_is_offline
from thriftune.recipe import ModelRecipe

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ALLOWED_MODEL = "a folder with config.json and safetensors weights, a hub id such as meta-llama/Llama-3.1-8B, or pocket"


def find_model_folder(model: ModelRecipe) -> Path:
    """The folder that holds the model's files, downloaded first when `name` is a hub id.

    Raises ModelError when there is no such folder, the name is no hub id, or the hub cannot be reached (within 3 s).
    """
    if model.name == "pocket":
        return Path(str(importlib.resources.files("thriftune.pocket")))
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(given=f"model {model.name} is a file", allowed=ALLOWED_MODEL, do="name the folder it is in")
    if not HUB_ID.fullmatch(model.name) or ".." in model.name:
        raise ModelError(
            given=f"model {model.name!r} is neither a folder here nor a hub id", allowed=ALLOWED_MODEL,
            do="correct the path",
        )
    return _download(model)


def _download(model: ModelRecipe) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
    if model.trust_remote_code:
        patterns.append("*.py")
    arguments: dict[str, Any] = {"repo_id": model.name, "revision": model.revision, "allow_patterns": patterns}
    unreachable = None
    try:
        ensure_hub_reachable(f"model {model.name}")
    except InputError as error:
        unreachable = error.given
    if unreachable is not None or hub_is_offline():
        try:
            return Path(snapshot_download(**arguments, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            raise ModelError(
                given=unreachable or f"model {model.name} is not in the local cache, and HF_HUB_OFFLINE is set",
                allowed=ALLOWED_MODEL,
                do="give a local folder, or run once with a network so that it is cached (HF_HOME)",
            ) from None
    try:
        return Path(snapshot_download(**arguments))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            given=f"the hub refused {model.name}: {str(error).splitlines()[0]}",
            allowed=ALLOWED_MODEL,
            do="check the name and revision; for a gated model accept its licence and set HF_TOKEN",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ModelError when it is missing or no JSON object with a model type."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            given=f"{folder} has no config.json", allowed=ALLOWED_MODEL, do="name a model's folder"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(
            given=f"{path} is not readable JSON: {error}", allowed=ALLOWED_MODEL, do="download it again"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(
            given=f"{path} names no model_type", allowed="a transformers config.json", do="name a model's folder"
        )
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, each checked: named plainly, present, header sound, size as the header says.

    Raises ModelError naming the file for pickle weights, missing shards, odd names, truncated or damaged files.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        names = _shard_names(index)
    elif single.exists():
        names = [single.name]
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ModelError(
                given=f"{folder} holds its weights as pickle ({pickles[0]}), which can execute code when loaded",
                allowed="safetensors weights", do="convert them on a machine you trust, or take a safetensors revision",
            )
        raise ModelError(given=f"{folder} holds no weights", allowed="model.safetensors or shards with an index",
                         do="download the model again")
    files = [folder / name for name in names]
    for path in files:
        tensor_shapes(path)
    return files


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(given=f"{index} is damaged", allowed="a safetensors index with a weight_map",
                         do="download it again") from None
    for name in names:
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ModelError(given=f"{index} names the weight file {name!r}",
                             allowed="plain names of safetensors files in the same folder",
                             do="do not use this model: its index points outside its folder")
    return names


def tensor_shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape) from a safetensors file's header, with the file's size checked against it."""

    def damaged(why: str) -> ModelError:
        return ModelError(given=f"{path} is damaged: {why}", allowed="a whole safetensors file", do="download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, 100_000_000):
                raise damaged(f"{size} bytes are fewer than its header needs")
            header = json.loads(file.read(header_bytes))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: (entry["dtype"], list(entry["shape"])) for name, entry in tensors.items()}
    except FileNotFoundError:
        raise ModelError(given=f"{path} is missing", allowed="every shard that the index names",
                         do="download the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise damaged("its header is not readable") from None
    if size != 8 + header_bytes + end:
        raise damaged(f"it has {size} bytes, its header says {8 + header_bytes + end}")
    return shapes
