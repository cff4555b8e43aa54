"""A model's files: from a name to a folder, and checked before anything is loaded. No torch here.

A model is a folder with `config.json`, a tokenizer and safetensors weights. Pickle weights are refused: loading one
executes whatever its author wrote.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import re
from pathlib import Path
from typing import Any

from thriftune.errors import InputError, ModelError, first_line
from thriftune.hub import ensure_hub_reachable, hub_is_offline
from thriftune.recipe import ModelRecipe

_HUB_WORD = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"{_HUB_WORD}(/{_HUB_WORD})?")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BITS_OF_DTYPE = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "U16 I16 F16 BF16",
        32: "U32 I32 F32",
        64: "U64 I64 F64 C64",
    }.items()
    for dtype in dtypes.split()
}
ALLOWED_MODEL = "a folder with config.json and safetensors weights, a hub id such as meta-llama/Llama-3.1-8B, or pocket"


def find_model_folder(model: ModelRecipe) -> Path:
    """The folder that holds the model's files, downloaded first when `name` is a hub id.

    Raises ModelError when there is no such folder, the name is no hub id, or the hub cannot be reached (within 3 s).
    """
    if model.name == "pocket":
        return Path(str(importlib.resources.files("thriftune.pocket")))
    folder = local_path(model.name)
    if folder is not None and folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                given=f"{folder} is an adapter's folder, not a model's",
                allowed=ALLOWED_MODEL,
                do=f"name the adapter's base; for the tuned model as a base: thriftune merge {folder} --output FOLDER",
            )
        return folder
    if folder is not None and folder.is_file():
        raise ModelError(given=f"model {model.name} is a file", allowed=ALLOWED_MODEL, do="name the folder it is in")
    if not is_hub_id(model.name):
        shown = model.name if len(model.name) <= 100 else model.name[:97] + "..."
        raise ModelError(
            given=f"model {shown!r} is neither a folder here (looked from {Path.cwd()}) nor a hub id",
            allowed=ALLOWED_MODEL,
            do="correct the path",
        )
    if model.revision is not None and (not REVISION.fullmatch(model.revision) or ".." in model.revision):
        raise ModelError(
            given=f"revision {model.revision!r} of {model.name}",
            allowed="a branch, a tag or a commit of the model's repository",
            do="correct model.revision",
        )
    return _download(model)


def is_hub_id(name: str) -> bool:
    """Whether the hub would take `name` for a repository: 'name' or 'organisation/name' of at most 96 characters."""
    odd = "--" in name or ".." in name or name.endswith(".git") or len(name) > 96
    return HUB_ID.fullmatch(name) is not None and not odd


def local_path(name: str) -> Path | None:
    """The path `name` may stand for, or None when it can be none (a null byte, too long, the home of nobody)."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        return path
    except (OSError, ValueError, RuntimeError):
        return None
    return path


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
    transport_error: Any = HfHubHTTPError.__bases__[0]  # httpx or its successor, by the hub library's version
    try:
        return Path(snapshot_download(**arguments))
    except (HfHubHTTPError, LocalEntryNotFoundError, transport_error, OSError) as error:
        raise ModelError(
            given=f"the hub did not give {model.name}: {first_line(error)}",
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

    One model.safetensors goes before shards with an index, as in transformers. Raises ModelError naming the file for
    pickle weights, missing shards, odd names, truncated or damaged files.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        names = [single.name]
    elif index.exists():
        names = _shard_names(index)
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ModelError(
                given=f"{folder} holds its weights as pickle ({pickles[0]}), which can execute code when loaded",
                allowed="safetensors weights",
                do="convert them on a machine you trust, or take a safetensors revision",
            )
        raise ModelError(
            given=f"{folder} holds no weights",
            allowed="model.safetensors or shards with an index",
            do="download the model again",
        )
    files = [folder / name for name in names]
    for path in files:
        tensor_shapes(path)
    return files


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = list(weight_map.values())
        if not found:
            raise ValueError("no shards")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(
            given=f"{index} is damaged", allowed="a safetensors index with a weight_map", do="download it again"
        ) from None
    for name in found:
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ModelError(
                given=f"{index} names the weight file {name!r}",
                allowed="plain names of safetensors files in the same folder",
                do="do not use this model: its index is no ordinary one",
            )
    return sorted(set(found))


def tensor_shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape) from a safetensors file's header, every entry and the file's size checked.

    Raises ModelError when the file is missing or is no whole safetensors file.
    """

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
        data_bytes = _data_bytes(tensors)
    except FileNotFoundError:
        raise ModelError(
            given=f"{path} is missing", allowed="every file that belongs to the model", do="download the model again"
        ) from None
    except OSError as error:
        raise ModelError(
            given=f"{path} cannot be read: {error.strerror or error}",
            allowed="a file that you may read",
            do="check its permissions",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        why = str(error) if isinstance(error, _OddEntryError) else "its header is not readable"
        raise damaged(why) from None
    if size != 8 + header_bytes + data_bytes:
        raise damaged(f"it has {size} bytes, its header says {8 + header_bytes + data_bytes}")
    return {name: (entry["dtype"], list(entry["shape"])) for name, entry in tensors.items()}


class _OddEntryError(ValueError):
    """A header's entry that contradicts itself or its neighbours."""


def _data_bytes(tensors: dict[str, Any]) -> int:
    """Bytes of all tensors, which must follow one another without gaps. Raises ValueError, TypeError or KeyError."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][1]):
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
            raise _OddEntryError(f"the shape or place of {name} is not in whole numbers")
        if entry["dtype"] not in BITS_OF_DTYPE:
            raise _OddEntryError(f"{name} has the unknown type {entry['dtype']!r}")
        first, last = offsets
        if first != end or (last - first) * 8 != math.prod(shape) * BITS_OF_DTYPE[entry["dtype"]]:
            raise _OddEntryError(f"the place of {name} does not fit its type and shape")
        end = last
    return end
