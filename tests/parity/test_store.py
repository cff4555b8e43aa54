"""The store of 4-bit layers: bitsandbytes' bytes, whole or not there, of these files and no others."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from thriftune.engine.host_memory import available_bytes, check_host_memory, lock_limit
from thriftune.errors import DiskFullError, DoesNotFitError, ModelError, OutputError
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.slab import ALIGNMENT, PAGE, Matrix, SlabLayout, Tables
from thriftune.models import load_model
from thriftune.models.store import DIGEST_BYTES, Store, cache_folder
from thriftune.recipe import ModelRecipe, QuantRecipe
from tiny import small_disk, tiny_model

CPU = torch.device("cpu")
LAYERS = 3
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=LAYERS, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def store_of(model: Path, quant: QuantRecipe | None = None, dtype: torch.dtype = torch.float32) -> Store:
    return Store.of(model, LAYERS, quant or QuantRecipe(), dtype, CPU)


def made(model: Path, quant: QuantRecipe | None = None, dtype: torch.dtype = torch.float32) -> Store:
    store = store_of(model, quant, dtype)
    store.make(lambda text: None)
    return store


def slab_of(store: Store, index: int) -> torch.Tensor:
    slab = torch.full((store.layouts[index].bytes,), 77, dtype=torch.uint8)
    store.read(index, slab, print)
    return slab


def same_bytes(one: FourBit, other: FourBit) -> bool:
    return all(
        (getattr(one, name) is None and getattr(other, name) is None)
        or torch.equal(getattr(one, name).flatten(), getattr(other, name).flatten())
        for name in ("packed", "values", "scales", "scale_values", "scale_scales", "scale_offset")
    ) and (one.block, one.rows, one.columns, one.scale_block) == (
        other.block,
        other.rows,
        other.columns,
        other.scale_block,
    )


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte_is_that_of_the_model_loaded_whole(model, quant_type, double_quant, dtype) -> None:
    quant = QuantRecipe(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant)
    whole = load_model(ModelRecipe(name=str(model)), device=CPU, dtype=dtype, quant=quant).model
    store = made(model, quant, dtype)
    for index in range(LAYERS):
        found = store.layouts[index].views(slab_of(store, index), store.tables(CPU))
        for part, weight in zip(PARTS, found, strict=True):
            wanted = FourBit.of(whole.get_submodule(f"model.layers.{index}.{part}").weight)
            assert same_bytes(weight, wanted), (index, part)
            unpacked = [torch.empty(weight.rows, weight.columns, dtype=dtype) for _ in range(2)]
            unpack_four_bit(weight, unpacked[0])
            unpack_four_bit(wanted, unpacked[1])
            assert torch.equal(*unpacked)


def test_the_layout_is_as_documented() -> None:
    layout = SlabLayout((Matrix("a", 6, 64), Matrix("b", 200, 192)), 64, True)
    slab = torch.arange(layout.bytes, dtype=torch.int64).to(torch.uint8)
    assert layout.bytes % PAGE == 0
    tables = Tables(torch.zeros(16), torch.zeros(256))
    start = slab.data_ptr()
    places = [
        (field.data_ptr() - start, field.numel() * field.element_size())
        for weight in layout.views(slab, tables)
        for field in (weight.packed, weight.scales, weight.scale_scales, weight.scale_offset)
        if field is not None
    ]
    assert all(place % ALIGNMENT == 0 for place, _ in places)
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(places))
    assert places[0] == (0, 192) and places[1] == (256, 6) and places[2] == (512, 4) and places[3] == (768, 4)
    assert places[4] == (1024, 19_200) and places[5][1] == 600 and places[6][1] == 12
    assert places[-1][0] + places[-1][1] <= layout.bytes


def test_a_file_is_the_slab_and_its_hash(model) -> None:
    store = made(model)
    content = store.path_of(1).read_bytes()
    assert content[:-DIGEST_BYTES] == slab_of(store, 1).numpy().tobytes()
    assert content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()
    assert store.bytes == sum(path.stat().st_size - DIGEST_BYTES for path in store.folder.glob("*.slab"))


# ---------------------------------------------------------------- when it is made


def test_it_is_made_once_and_goes_on_where_it_was_left(model, monkeypatch) -> None:
    store, done = store_of(model), []
    original = Store._quantised

    def counted(self: Store, index: int) -> Any:
        done.append(index)
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(Store, "_quantised", counted)
    with pytest.raises(KeyboardInterrupt):
        store.make(lambda text: None)
    assert store.missing() == [1, 2]
    said: list[str] = []
    store.make(said.append)
    assert done == [0, 1, 1, 2] and store.missing() == []
    assert "layer 2 of 2" in said[-1] and "/s" in said[-1] and "left" in said[-1]
    store.make(said.append)
    assert len(done) == 4


def test_a_layer_that_was_half_written_is_none(model) -> None:
    """What a killed write left aside is swept away by the next one; a file cut short counts as absent."""
    store = made(model)
    wanted = store.path_of(0).read_bytes()
    store.path_of(0).write_bytes(wanted[:-1])
    aside = store.folder / ".layer-0000.slab.999999999.writing"
    aside.write_bytes(b"half")
    own = store.folder / f".layer-0001.slab.{os.getpid()}.writing"
    own.write_bytes(b"of a process that lives")
    assert store.missing() == [0]
    store.make(lambda text: None)
    assert store.path_of(0).read_bytes() == wanted
    assert not aside.exists() and own.exists()


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_damaged_layer_is_made_again_and_it_is_said(model, place) -> None:
    store, said = made(model), []
    wanted = store.path_of(1).read_bytes()
    damaged = bytearray(wanted)
    damaged[place] ^= 1
    store.path_of(1).write_bytes(bytes(damaged))
    slab = torch.empty(store.layouts[1].bytes, dtype=torch.uint8)
    store.read(1, slab, said.append)
    assert slab.numpy().tobytes() == wanted[:-DIGEST_BYTES] and store.path_of(1).read_bytes() == wanted
    assert len(said) == 1 and "is damaged: made again" in said[0]


def test_a_disk_that_forgets_is_said_to(model, monkeypatch) -> None:
    store = made(model)
    monkeypatch.setattr(Store, "_read", lambda *_: False)
    with pytest.raises(OutputError, match="does not come back as it was written"):
        slab_of(store, 0)


# ---------------------------------------------------------------- of which files


def test_another_model_or_way_of_quantising_is_another_store(model, tmp_path) -> None:
    names = {store_of(model).folder.name}
    names.add(store_of(model, QuantRecipe(bnb_4bit_use_double_quant=False)).folder.name)
    names.add(store_of(model, QuantRecipe(bnb_4bit_quant_type="fp4")).folder.name)
    names.add(store_of(model, dtype=torch.bfloat16).folder.name)
    changed = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    names.add(store_of(changed).folder.name)
    assert len(names) == 5
    assert store_of(model).folder.name in names and store_of(model).folder.parent == cache_folder()


def test_a_model_without_those_matrices_is_refused(model, tmp_path) -> None:
    changed = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(changed / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model.layers.2.mlp.up_proj.weight"):
        store_of(changed)


# ---------------------------------------------------------------- where there is no room


def test_a_full_disk_is_refused_before_anything_is_written(model, tmp_path, monkeypatch) -> None:
    with small_disk(tmp_path / "small", 1) as folder:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        (folder / "full").write_bytes(bytes(1000 * 1024))
        store = store_of(model)
        with pytest.raises(DiskFullError, match="4-bit layers take"):
            store.make(lambda text: None)
        assert not store.folder.exists()


def test_host_memory_is_asked_for_first() -> None:
    available = available_bytes()
    assert available is None or available > 10**6
    assert lock_limit() is None or lock_limit() >= 0
    if available is not None:
        with pytest.raises(DoesNotFitError, match="are available"):
            check_host_memory(available + 1, "the test's slabs")
