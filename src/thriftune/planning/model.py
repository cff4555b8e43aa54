"""A model's shape by the model's name: from its folder, the hub's cache, the catalogue or the hub."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thriftune.catalog.models import CatalogModel, find_model, near_models
from thriftune.errors import ModelError, first_line
from thriftune.hub import ensure_hub_reachable
from thriftune.model_files import (
    ALLOWED_MODEL,
    find_model_folder,
    is_hub_id,
    local_path,
    read_config,
    tensor_shapes,
)
from thriftune.recipe import ModelRecipe
from thriftune.shapes import ModelShape, from_config


@dataclass(frozen=True, slots=True)
class FoundModel:
    """`name` is what `train` would take, `source` says where the sizes come from; `config` is its config.json, and
    `folder` has the model's files, when they are on this machine."""

    name: str
    shape: ModelShape
    config: Mapping[str, Any]
    source: str
    folder: Path | None
    notes: tuple[str, ...] = ()


def find_planned_model(model: ModelRecipe) -> FoundModel:
    """The model's shape from its folder, the hub's cache on this machine, the catalogue, or the hub, in this order.

    Only config.json is read, and of weights that are there their headers. Raises ModelError for a model that is nowhere
    (with the nearest names of the catalogue) and for a config that lacks a field.
    """
    folder = _local_folder(model)
    if folder is not None:
        return _of_folder(model.name, folder, str(folder / "config.json"))
    cached = _cached_folder(model)
    if cached is not None:
        return _of_folder(model.name, cached, f"the hub's cache on this machine, {cached / 'config.json'}")
    row = find_model(model.name)
    if row is not None:
        return _of_catalogue(row)
    path = _download_config(model)
    return _of_folder(model.name, path.parent, f"config.json of {model.name} from the hub", check_weights=False)


def _local_folder(model: ModelRecipe) -> Path | None:
    """A path that is there, as training would take it; None for other names."""
    path = local_path(model.name)
    if model.name == "pocket" or (path is not None and (path.is_dir() or path.is_file())):
        return find_model_folder(model)
    if model.name.startswith(("/", "./", "../", "~")):
        return find_model_folder(model)  # which refuses it: there is no such folder
    return None


def _cache() -> Path:
    """Where the hub's library keeps its files, by the variables it reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or default).expanduser() / "hub"


def _cached_folder(model: ModelRecipe) -> Path | None:
    """The snapshot of the revision asked for that has a config.json, or the newest such one when refs do not say."""
    if not is_hub_id(model.name):
        return None
    place = _cache() / f"models--{model.name.replace('/', '--')}"
    revision = model.revision or "main"
    try:
        snapshots = {path.name: path for path in (place / "snapshots").iterdir() if (path / "config.json").is_file()}
        reference = place / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    except (OSError, ValueError):
        return None
    if commit in snapshots or model.revision is not None:
        return snapshots.get(commit)
    return max(snapshots.values(), key=lambda path: path.stat().st_mtime, default=None)


def _of_folder(name: str, folder: Path, source: str, check_weights: bool = True) -> FoundModel:
    config = read_config(folder)
    shape = from_config(config, name)
    notes = _weight_notes(shape, folder) if check_weights else ()
    return FoundModel(name, shape, config, source, folder, notes)


def _of_catalogue(row: CatalogModel) -> FoundModel:
    source = f"{row.name} in the catalogue ({row.source}, seen {row.date})"
    shape = from_config(row.config, row.name)
    if row.hub_ids:
        return FoundModel(row.hub_ids[0], shape, row.config, source, None)
    note = f"{row.name} is on no hub under a name that we know: to train it, name its folder"
    return FoundModel(row.name, shape, row.config, source, None, (note,))


def _weight_notes(shape: ModelShape, folder: Path) -> tuple[str, ...]:
    """Whether the weights' headers hold as many parameters as the config makes; nothing where no weights are."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return ()
    try:
        stored = sum(math.prod(sizes) for path in files for _, sizes in tensor_shapes(path).values())
    except ModelError as error:
        return (f"the weights could not be counted: {error.given}",)
    tied_twice = shape.total_parameters + (shape.head.weights if shape.tied else 0)
    if abs(stored - shape.total_parameters) <= 0.001 * stored or stored == tied_twice:
        return ()
    return (
        f"config.json makes {shape.total_parameters:,} parameters, the weights in {folder} hold {stored:,}: the plan "
        "goes by config.json",
    )


def _download_config(model: ModelRecipe) -> Path:
    near = near_models(model.name)
    hint = f"did you mean {' or '.join(near)}? Else " if near else ""
    if not is_hub_id(model.name):
        raise ModelError(
            given=f"model {model.name[:100]!r} is no folder here, no model of the catalogue and no hub id",
            allowed=ALLOWED_MODEL,
            do=f"{hint}correct the name",
        )
    try:
        ensure_hub_reachable(f"model {model.name}", ModelError)
    except ModelError as error:
        given = f"{error.given}; nor is it in the catalogue"
        raise ModelError(given=given, allowed=error.allowed, do=f"{hint}{error.do}") from None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    transport_error: Any = HfHubHTTPError.__bases__[0]  # httpx or its successor, by the hub library's version
    try:
        return Path(hf_hub_download(model.name, "config.json", revision=model.revision))
    except (HfHubHTTPError, transport_error, OSError) as error:
        reason = first_line(error).split(". ")[0]
        raise ModelError(
            given=f"the hub did not give config.json of {model.name}, and the catalogue does not have it: {reason}",
            allowed=ALLOWED_MODEL,
            do=f"{hint}check the name and revision; for a gated model accept its licence and set HF_TOKEN",
        ) from None
