"""Sites of mixed ranks on a GPU: each part's optimizer is the recipe's own, 8-bit and paged ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from federation import Federation, recipe_of
from tiny import tiny_model, tiny_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_parts_train_with_every_optimizer(tmp_path: Path, method: str, optim: str) -> None:
    model, rows = tiny_model(tmp_path / "model"), tiny_rows(tmp_path / "rows.jsonl", 48)
    recipe = recipe_of(model, rows, tmp_path / "run", rounds=4, method=method, train={"optim": optim})
    federation = Federation(recipe, {"small": 2, "large": 4})
    sites = {name: federation.site(name, keeps=True) for name in ("small", "large")}
    for number in range(4):
        if number == 2:  # the states come back from files
            sites["small"] = federation.site("small", keeps=True)
        before = federation.coordinator.current
        for name, site in sites.items():
            federation.coordinator.take(name, site.answer(federation.coordinator.offer(name)))
        done = federation.coordinator.close(lambda: None)
        assert done.updates == 2
        moved = [float((part.b_OR - before[name].b_OR).norm()) for name, part in federation.coordinator.current.items()]
        assert min(moved) > 0.0
