"""What docs/claims.md counts with: exact sizes from configs, the catalogue's prices, records, and the planner."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from thriftune.catalog.gpus import find_gpu
from thriftune.catalog.models import all_models, find_model
from thriftune.catalog.prices import prices_for
from thriftune.catalog.rows import Gpu, Price
from thriftune.catalog.user import UserRows
from thriftune.plan.adapter import adapter_of
from thriftune.plan.memory import memory_of, setup_of
from thriftune.plan.time import time_of
from thriftune.plan.values import Memory, Time, Work
from thriftune.plan.work import Rows, work_of
from thriftune.recipe import read_recipe
from thriftune.shapes import ModelShape, from_config, lora_parameters
from thriftune.units import GIB

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = REPOSITORY / "benchmarks" / "results" / "gsm8k-8b"
OWN_ROWS = UserRows()  # no price or GPU of the person who runs this

# Public data, counted with Llama 3's tokenizer: GSM8K's training rows as question and answer, IMDb's training reviews.
GSM8K_ROWS, GSM8K_TOKENS, GSM8K_LONGEST = 7_473, 1_220_227, 462
IMDB_ROWS, IMDB_TOKENS = 25_000, 7_424_878
# Their rows by length: the mean of each fiftieth of GSM8K, of each twenty-fifth of IMDb.
GSM8K_LENGTHS = [
    *(
        76,
        84,
        89,
        93,
        97,
        100,
        104,
        106,
        109,
        112,
        115,
        117,
        120,
        122,
        125,
        127,
        130,
        133,
        135,
        138,
        140,
        143,
        146,
        148,
    ),
    *(
        152,
        154,
        157,
        160,
        163,
        166,
        170,
        173,
        177,
        181,
        184,
        188,
        192,
        196,
        200,
        205,
        210,
        216,
        223,
        230,
        238,
        248,
        259,
    ),
    *(274, 295, 343),
]
IMDB_LENGTHS = [
    *(59, 87, 116, 136, 146, 153, 160, 168, 176, 186, 196, 208, 220, 235, 252, 271, 295, 322, 353, 392, 439, 500, 587),
    *(723, 1047),
]
IMDB_TARGETS = 3  # a label of a token or two and the end token

NF4 = 0.5 + 1 / 64 + 4 / 16384  # bytes a weight: 4 bits, a byte a block of 64, float32 for 256 blocks
NF4_SINGLE = 0.5 + 4 / 64  # the same with a float32 scale a block
ADAM_8BIT = 2 + 8 / 256  # bytes a parameter: two moments, and the scales of blocks of 256
RANKS = [2**power for power in range(9)]


@functools.cache
def shape_of(name: str) -> ModelShape:
    model = find_model(name)
    assert model is not None, name
    return from_config(model.config, name=model.name)


@functools.cache
def catalogue_shapes() -> tuple[ModelShape, ...]:
    return tuple(from_config(model.config, name=model.name) for model in all_models())


def built_in(gpu: str) -> Gpu:
    return find_gpu(gpu, OWN_ROWS.gpus)


def on_demand(gpu: str) -> list[Price]:
    """Cheapest first."""
    return [price for price in prices_for(gpu, OWN_ROWS) if price.kind == "on-demand"]


def adapter(model: str, r: int, targets: str | list[str] = "all-linear") -> int:
    return lora_parameters(shape_of(model), r, targets)


def nf4_bytes(shape: ModelShape, per_weight: float = NF4) -> float:
    """Decoder linears in NF4; embedding, head and norms in 16 bits, as bitsandbytes loads a model."""
    return shape.linear_weights * per_weight + (shape.total_parameters - shape.linear_weights) * 2


def flops_a_token(shape: ModelShape, frozen: bool) -> float:
    """Products only, with full recomputation: 2 a weight forward, 2 again, 2 for the input's gradient, and 2 for the
    weight's own where it trains. Attention and the adapter add less than 5 % at the lengths used here."""
    return shape.active_weights * (6 if frozen else 8) + shape.head.weights * (4 if frozen else 6)


def recorded_tokens_per_s(who: str, method: str, recompute: str) -> float:
    rows = json.loads((RECORDS / "table.json").read_text(encoding="utf-8"))
    wanted = (who, method, recompute)
    return next(float(row["tokens_per_s"]) for row in rows if (row["who"], row["method"], row["recompute"]) == wanted)


def recorded_peak(record: str) -> float:
    """Bytes in PyTorch's allocator."""
    content = json.loads((RECORDS / f"{record}.json").read_text(encoding="utf-8"))
    return float(content["peak_bytes"] if "peak_bytes" in content else content["peak_gib"] * GIB)


def target_lists(shape: ModelShape) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every list of up to seven of the model's linears, with its adapter's parameters at rank 1."""
    sizes: dict[str, int] = {}
    for _, linear, repeats in shape.linears():
        if linear.is_module:
            sides = repeats * linear.copies * (linear.in_features + linear.out_features)
            sizes[linear.name] = sizes.get(linear.name, 0) + sides
    for length in range(1, min(7, len(sizes)) + 1):
        for names in itertools.combinations(sizes, length):
            yield names, sum(sizes[name] for name in names)


def ways_to_count(shape: ModelShape) -> dict[str, int]:
    """Parameters of the base as a program may see them: whole, or with 4-bit weights two to an element."""
    head = 0 if shape.tied else shape.head.weights
    return {
        "whole": shape.total_parameters,
        "packed": shape.total_parameters - shape.linear_weights // 2,
        "packed with the head": shape.total_parameters - (shape.linear_weights + head) // 2,
        "all packed": shape.total_parameters // 2,
    }


def sources_of_total(total: int) -> list[str]:
    """Every model, way to count, target list and rank where base and adapter together are exactly `total`."""
    return [
        f"{shape.name}, {way}, {', '.join(names)}, r={r}"
        for shape in catalogue_shapes()
        for way, base in ways_to_count(shape).items()
        for names, size in target_lists(shape)
        for r in RANKS
        if base + size * r == total
    ]


def models_with(trainable: int) -> list[str]:
    """Models of the catalogue with an adapter of exactly so many parameters, for some target list and usual rank."""
    wanted = {trainable / r for r in RANKS}
    return [shape.name for shape in catalogue_shapes() if any(size in wanted for _, size in target_lists(shape))]


def nearest_adapter(model: str, trainable: int) -> tuple[int, tuple[str, ...], int]:
    """(parameters, targets, rank) of the adapter nearest in size; of equals the shorter list, then the higher rank."""
    tried = [(size * r, names, r) for names, size in target_lists(shape_of(model)) for r in RANKS]
    return min(tried, key=lambda one: (abs(one[0] - trainable), len(one[1]), -one[2]))


def gsm8k() -> Rows:
    """Every token a target but the first. The longest row is there once: it decides the peak."""
    lengths = [*GSM8K_LENGTHS * 10, GSM8K_LONGEST]
    return Rows(lengths, [length - 1 for length in lengths], GSM8K_ROWS, "GSM8K")


def imdb(count: int) -> Rows:
    return Rows([min(length, 1024) for length in IMDB_LENGTHS], [IMDB_TARGETS] * len(IMDB_LENGTHS), count, "IMDb")


def planned(
    model: str, method: str, gpu: str, rows: Rows, overrides: Sequence[str] = (), recompute: bool = True
) -> tuple[Memory, Time, Work]:
    """The planner's prediction for the generic path, as others train: default recipe, rank 16 on all linears, 4 rows
    x 4."""
    shape, card = shape_of(model), built_in(gpu)
    recipe = read_recipe(overrides=[f"method={method}", *overrides])
    trained = adapter_of(shape, recipe.lora, method)
    setup, work = setup_of(recipe, method, recompute, True), work_of(rows, recipe)
    return memory_of(shape, trained, setup, work, card), time_of(shape, trained, setup, work, card, 1), work
