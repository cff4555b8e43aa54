"""A model's layers in 4 bits on disk, one file a layer, made once and read in seconds after that.

Each file is the layer's slab (`kernels.slab` says how it is laid out) and behind it the 32 bytes of its SHA-256. It is
written aside and renamed, so a file that is there is whole; whoever is killed goes on with the first layer that is
missing. What is read is checked, and a layer that was damaged is made again. The bytes are bitsandbytes' own.

The folder's name is a hash of the model's files, of the way of quantising, of what bitsandbytes means by the bytes, and
of the kind of device that quantised (a GPU and a CPU do not round alike): of another model, or a changed one, nothing
is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thriftune.errors import DiskFullError, ModelError, OutputError
from thriftune.kernels.four_bit import FourBit
from thriftune.kernels.slab import Matrix, SlabLayout, Tables
from thriftune.model_files import tensor_shapes, weight_files
from thriftune.recipe import QuantRecipe
from thriftune.units import format_bytes, format_seconds

VERSION = 1  # of the layout; another one is another folder
DIGEST_BYTES = 32
BLOCK = 64  # weights that share a scale, bitsandbytes' own choice
READ_BYTES = 16 * 1024**2
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where a layer's matrices are read: their names, files and shapes, layer by layer, and the files' fingerprint."""

    layers: list[list[tuple[Path, str, Matrix]]]
    fingerprint: str

    @classmethod
    def of(cls, folder: Path, num_layers: int) -> Source:
        """Raises ModelError when a matrix is missing."""
        places: dict[str, tuple[Path, list[int]]] = {}
        digest = hashlib.sha256()
        for path in weight_files(folder):
            facts = path.stat()
            with path.open("rb") as file:
                header = file.read(8)
                header += file.read(int.from_bytes(header, "little"))
            digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns} ".encode() + header)
            places |= {name: (path, shape) for name, (_, shape) in tensor_shapes(path).items()}
        layers = []
        for index in range(num_layers):
            names = [f"model.layers.{index}.{linear}.weight" for linear in LINEARS]
            absent = [name for name in names if name not in places or len(places[name][1]) != 2]
            if absent:
                raise ModelError(
                    given=f"{folder} lacks {', '.join(absent[:3])}, or has it in another form than a matrix",
                    allowed="a model whose layers have the matrices of a Llama",
                    do="use offload=off",
                )
            layers.append([(places[name][0], name, Matrix(name, *places[name][1])) for name in names])
        return cls(layers, digest.hexdigest())


@dataclass(frozen=True)
class Store:
    """Slabs by the number of their layer. `device` is what quantises."""

    folder: Path
    source: Source
    layouts: list[SlabLayout]
    quant: QuantRecipe
    dtype: torch.dtype
    device: torch.device
    known: Tables

    @classmethod
    def of(
        cls, model_folder: Path, num_layers: int, quant: QuantRecipe, dtype: torch.dtype, device: torch.device
    ) -> Store:
        """The store of these files, quantised so; nothing is made yet."""
        source = Source.of(model_folder, num_layers)
        nested = quant.bnb_4bit_use_double_quant
        layouts = [
            SlabLayout(tuple(Matrix(_leaf(m.name), m.rows, m.columns) for _, _, m in matrices), BLOCK, nested)
            for matrices in source.layers
        ]
        sample = _quantise(torch.ones(1, BLOCK), quant, device)  # for the meaning of the bytes
        known = Tables(sample.values, sample.scale_values)
        meaning = [None if table is None else table.tolist() for table in (known.values, known.scale_values)]
        parts = [VERSION, source.fingerprint, quant.model_dump(), str(dtype), device.type, meaning]
        key = json.dumps(parts, sort_keys=True)
        name = f"{model_folder.name[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        return cls(cache_folder() / name, source, layouts, quant, dtype, device, known)

    @property
    def bytes(self) -> int:
        return sum(layout.bytes for layout in self.layouts)

    def path_of(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.slab"

    def missing(self) -> list[int]:
        """Layers that are not there, or not of the size they must have."""
        sizes = [layout.bytes + DIGEST_BYTES for layout in self.layouts]
        return [index for index, size in enumerate(sizes) if _size_of(self.path_of(index)) != size]

    def make(self, say: Say) -> None:
        """Quantise what is missing, one matrix at a time. Raises DiskFullError, OutputError and ModelError."""
        missing = self.missing()
        if not missing:
            return
        _sweep(self.folder)
        self._refuse_full_disk(sum(self.layouts[index].bytes for index in missing))
        started, said = time.perf_counter(), 0.0
        slab = torch.zeros(max(layout.bytes for layout in self.layouts), dtype=torch.uint8)
        for done, index in enumerate(missing, 1):
            self._make_layer(index, slab[: self.layouts[index].bytes])
            elapsed = time.perf_counter() - started
            if elapsed - said > 1.0 or done == len(missing):
                said = elapsed
                rate = done * self.layouts[index].bytes / elapsed
                left = format_seconds(elapsed / done * (len(missing) - done))
                say(f"quantising: layer {done} of {len(missing)}, {format_bytes(rate)}/s, {left} left")

    def tables(self, device: torch.device) -> Tables:
        return self.known.to(device)

    def read(self, index: int, slab: Tensor, say: Say) -> None:
        """Copy a layer's slab into host memory, checked; one that is damaged is made again."""
        for attempt in range(2):
            if self._read(index, slab):
                return
            if attempt == 0:
                say(f"{self.path_of(index)} is damaged: made again")
                self.path_of(index).unlink(missing_ok=True)
                self._make_layer(index, torch.zeros(self.layouts[index].bytes, dtype=torch.uint8))
        raise OutputError(
            given=f"{self.path_of(index)} does not come back as it was written",
            allowed="a disk that keeps what is written",
            do=f"delete {self.folder}, check the disk, or set XDG_CACHE_HOME to another one",
        )

    def read_again(self, index: int, slab: Tensor) -> None:
        """The same, of a layer that was checked before: files are never changed."""
        np.copyto(slab.numpy(), self.map(index)[: slab.numel()])

    def map(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The file of a layer mapped into memory, its slab first."""
        return np.memmap(self.path_of(index), dtype=np.uint8, mode="r")

    def _read(self, index: int, slab: Tensor) -> bool:
        mapped, place = self.map(index), slab.numpy()
        size, digest = self.layouts[index].bytes, hashlib.sha256()
        for start in range(0, size, READ_BYTES):
            end = min(start + READ_BYTES, size)
            np.copyto(place[start:end], mapped[start:end])
            digest.update(place[start:end])
        return digest.digest() == mapped[size:].tobytes()

    def _make_layer(self, index: int, slab: Tensor) -> None:
        slab.zero_()
        for place, weight in enumerate(self._quantised(index)):
            self.layouts[index].write(slab, place, weight)
        content = slab.numpy()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self.path_of(index), content, hashlib.sha256(content).digest())
        except OSError as error:
            raise OutputError(
                given=f"{self.folder} cannot be written to: {error.strerror or error}",
                allowed="a folder you may write to, on a disk with room",
                do="mend that, or set XDG_CACHE_HOME to another disk",
            ) from None

    def _quantised(self, index: int) -> Iterator[FourBit]:
        """The layer's matrices, quantised as bitsandbytes does for a model that is loaded whole."""
        from safetensors import safe_open

        for path, name, _ in self.source.layers[index]:
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor(name).to(self.dtype)
            yield _quantise(weight, self.quant, self.device)

    def _refuse_full_disk(self, needed: int) -> None:
        folder = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DiskFullError(
                given=f"the 4-bit layers take {format_bytes(needed)}, and {folder} has {format_bytes(free)} left",
                allowed="a disk with room",
                do="free some, or set XDG_CACHE_HOME to another disk",
            )


def _quantise(weight: Tensor, quant: QuantRecipe, device: torch.device) -> FourBit:
    from bitsandbytes.nn import Params4bit

    packed = Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=quant.bnb_4bit_use_double_quant,
        quant_type=quant.bnb_4bit_quant_type,
    )
    return FourBit.of(packed._quantize(device))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thriftune" / "four-bit"


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sweep(folder: Path) -> None:
    """Delete what processes that are gone were writing when they were killed."""
    for path in folder.glob(".*.writing"):
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except PermissionError:  # another user's, and alive
            continue


def _write_whole(path: Path, *contents: Any) -> None:
    """All of it or nothing, whenever the power goes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with aside.open("wb") as file:
            for content in contents:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
