"""Which elements an adapter's dropout keeps: the generator against its published answers, and the masks it gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from thriftune.kernels import dropout
from thriftune.kernels.dropout import Draw, add_dropped, drop, kept_reference, threshold_and_factor

SIZE = 1003  # no multiple of the eight columns that one call of the generator gives


def draw(key: tuple[int, int] = (5, 6), row: int = 3, tokens: int = 200) -> Draw:
    return Draw(key, torch.full((tokens,), row), torch.arange(tokens))


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_gives_the_answers_that_its_authors_published(counter, key, wanted) -> None:
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    words = dropout._philox(tuple(torch.tensor([part]) for part in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == wanted


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_stays_and_the_mean_of_what_stays(rate: float) -> None:
    kept, (threshold, factor) = kept_reference(draw(), 4, rate, SIZE), threshold_and_factor(rate)
    number, chance = kept.numel(), threshold / 65536
    spread = (chance * (1 - chance) / number) ** 0.5
    assert chance == pytest.approx(1 - rate, abs=1e-5) and chance * factor == 1
    assert abs(float(kept.double().mean()) - chance) < 4 * spread
    for by_row_or_column in (0, 1):  # no column and no token has a rate of its own
        means = kept.double().mean(by_row_or_column)
        wanted = (chance * (1 - chance) / kept.shape[by_row_or_column]) ** 0.5
        assert float((means - chance).square().mean().sqrt()) == pytest.approx(wanted, rel=0.2)


def test_masks_of_other_linears_steps_rows_and_tokens_have_nothing_in_common() -> None:
    rate = 0.3
    masks: dict[str, Tensor] = {
        "itself": kept_reference(draw(), 4, rate, SIZE),
        "the next linear": kept_reference(draw(), 5, rate, SIZE),
        "the same of the next layer": kept_reference(draw(), 4 + 7, rate, SIZE),
        "the next step": kept_reference(draw((6, 6)), 4, rate, SIZE),
        "a step whose key has the halves changed over": kept_reference(draw((6, 5)), 4, rate, SIZE),
        "the next row": kept_reference(draw(row=4), 4, rate, SIZE),
        "one token on": kept_reference(draw(tokens=201), 4, rate, SIZE)[1:],
        "one column on": kept_reference(draw(), 4, rate, SIZE).roll(1, 1),
    }
    spread = 1 / masks["itself"].numel() ** 0.5
    for (first, one), (second, other) in itertools.combinations(masks.items(), 2):
        both = torch.stack((one.flatten(), other.flatten())).double()
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 * spread, (first, second)
    eighths = masks["itself"][:, : SIZE // 8 * 8].unflatten(1, (8, -1)).double().transpose(0, 1).flatten(1)
    apart = torch.corrcoef(eighths) - torch.eye(8)  # of columns that one call gives
    assert float(apart.abs().max()) < 5 / eighths.shape[1] ** 0.5


def test_a_mask_is_one_of_its_token_wherever_that_lies() -> None:
    """In a row of many examples or alone, in a wide batch or cut out of it."""
    whole = Draw((1, 2), torch.tensor([8, 8, 3, 3, 3]), torch.tensor([0, 1, 0, 1, 2]))
    alone = Draw((1, 2), torch.tensor([3, 3, 3]), torch.tensor([0, 1, 2]))
    assert torch.equal(kept_reference(whole, 0, 0.5, 99)[2:], kept_reference(alone, 0, 0.5, 99))


def test_what_stays_is_scaled_and_added_in_place() -> None:
    x, out = torch.randn(200, SIZE, dtype=torch.float64), torch.randn(200, SIZE, dtype=torch.float64)
    mask = kept_reference(draw(), 4, 0.1, SIZE).double() * threshold_and_factor(0.1)[1]
    wanted = out + x * mask
    add_dropped(x, draw(), 4, 0.1, out)
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-15)
    wanted = x * mask
    drop(x, draw(), 4, 0.1, x)
    torch.testing.assert_close(x, wanted, rtol=1e-13, atol=1e-15)


def test_a_rate_of_nothing_changes_nothing() -> None:
    x = torch.randn(200, SIZE)
    found = torch.empty_like(x)
    drop(x, draw(), 4, 0.0, found)
    assert torch.equal(found, x)
