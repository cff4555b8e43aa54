"""From row lengths and a recipe to the work of a step: the fullest micro-batch for memory, the means for time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thriftune.plan.values import Packed, Work
from thriftune.recipe import Recipe

SIMULATED_STEPS = 400  # steps drawn to find the means and the extremes; fewer when the run has fewer


@dataclass(frozen=True, slots=True)
class Rows:
    """Token counts of a sample of the rows, `count` rows in all. `targets` are positions whose next token is trained;
    they are taken to stand at each row's end, as answers do."""

    tokens: Sequence[int]
    targets: Sequence[int]
    count: int
    source: str


def assumed_rows(recipe: Recipe, count: int = 1000) -> Rows:
    """Without data: every row as long as the recipe allows, every token trained. The most that a run can ask for."""
    length, count = recipe.data.max_length, min(count, recipe.data.max_samples or count)
    return Rows((length,), (length - 1,), count, f"no data named: {count:,} rows of {length:,} tokens assumed")


def work_of(rows: Rows, recipe: Recipe, gpus: int = 1) -> Work:
    """Draw steps as the loop does (rows at random, micro-batches longest first) and look at what they ask of each GPU.

    Exact for rows of equal length. The largest micro-batch is the longest row's, filled with its step's next longest.
    """
    settings = recipe.train
    at_once = settings.per_device_train_batch_size
    a_step = min(at_once * settings.gradient_accumulation_steps, max(1, math.ceil(rows.count / gpus)))
    steps_an_epoch = math.ceil(rows.count / (a_step * gpus))
    steps = settings.max_steps if settings.max_steps > 0 else 0
    steps = steps or max(1, math.ceil(round(settings.num_train_epochs * steps_an_epoch, 6)))
    drawn = random.Random(recipe.seed)
    sums: list[int] = []
    targets = squares = 0
    pairs = list(zip(rows.tokens, rows.targets, strict=True))
    longest = max(pairs)
    simulated = min(steps, SIMULATED_STEPS)
    padded = positions = 0
    first = (longest[0], longest[1])
    later = (0, 0)
    for number in range(simulated):
        step = [drawn.choice(pairs) for _ in range(a_step)]
        if number == 0:
            step[0] = longest  # it is in some step of an epoch; taking the first leaves the means as they are
        step.sort(reverse=True)
        for start in range(0, a_step, at_once):
            batch = step[start : start + at_once]
            length = batch[0][0]
            reach = length - 1 - min(row - 1 - min(targets, row - 1) for row, targets in batch)
            padded += length * len(batch)
            positions += reach * len(batch)
            if start == 0:
                first = (max(first[0], length), max(first[1], reach))
            else:
                later = (max(later[0], length), max(later[1], reach))
        sums.append(sum(row for row, _ in step))
        targets += sum(min(wanted, row - 1) for row, wanted in step)
        squares += sum(row * row for row, _ in step)
    tokens = sum(sums)
    mean_tokens = sum(rows.tokens) / len(rows.tokens)
    return Work(
        rows=min(at_once, a_step),
        length=first[0],
        target_positions=first[1],
        later_length=later[0],
        later_positions=later[1],
        micro_batches=math.ceil(a_step / at_once),
        tokens_per_step=tokens / simulated * gpus,
        padded_tokens_per_step=padded / simulated,
        targets_per_step=positions / simulated,
        steps=steps,
        tokens=round(mean_tokens * min(steps * a_step * gpus, rows.count * steps / steps_an_epoch)),
        source=rows.source,
        packed=Packed(
            largest=_largest(sums, min(steps, steps_an_epoch), longest[0] * a_step),
            longest=longest[0],
            tokens=tokens / simulated,
            targets=targets / simulated,
            squares=squares / simulated,
        ),
    )


def _largest(sums: Sequence[int], steps: int, most: int) -> int:
    """Tokens of the fullest of so many steps, by those that were drawn; of more steps than these, as far above the mean
    as a normal distribution reaches."""
    if len(sums) < 2 or steps <= len(sums):
        return max(sums)
    reach = statistics.fmean(sums) + statistics.stdev(sums) * math.sqrt(2 * math.log(steps))
    return min(most, max(*sums, math.ceil(reach)))
