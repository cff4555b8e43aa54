"""What a LoRA adapter adds to a shape: the matrices that PEFT would adapt, each with its rank, and their parameters.

Names follow PEFT: `all-linear` is every linear but the head, those of a part for images too; a list's name stands for
each module whose full path is that name or ends with it after a dot; any other text is a regular expression for whole
paths. A text that matches no path is read as a comma-separated list, as the `lora` method reads it. Experts that are
stacked into one tensor have rules of their own (stacked.py).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from thriftune.errors import InputError
from thriftune.shapes.shape import Linear, ModelShape
from thriftune.shapes.stacked import GATE_UP, RENAMED, last_names, split_names, tensors

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Adapted:
    """One linear with an adapter of `rank`, in `repeats` layers. For an embedding, in_features are its rows; stacked
    experts have an adapter of that rank each."""

    linear: Linear
    rank: int
    repeats: int

    @property
    def parameters(self) -> int:
        """Elements of both factors over all repeats."""
        sides = self.linear.in_features + self.linear.out_features
        return self.repeats * self.rank * self.linear.copies * sides

    @property
    def magnitudes(self) -> int:
        """Elements that DoRA adds: one for each output."""
        return self.repeats * self.linear.out_features


@dataclass(frozen=True, slots=True)
class Place:
    """One module that an adapter can sit on, by its full path."""

    path: str
    linear: Linear
    in_decoder: bool


def adapted_linears(
    shape: ModelShape,
    r: int,
    target_modules: str | Sequence[str],
    *,
    rank_pattern: Mapping[str, int] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> tuple[Adapted, ...]:
    """The linears that an adapter of rank `r` sits on, equal ones of equal rank together.

    The keyword arguments are PEFT's options of the same names. Raises InputError when a name or expression matches
    nothing, with the nearest name; or when an option cannot be used.
    """
    places = list(_places(shape))
    named, wanted_tensors = _named(shape, places, target_modules)
    chosen = [place for place in places if place.path in named]
    if layers_to_transform is not None and layers_to_transform != []:
        if isinstance(target_modules, str):
            raise _refusal(
                f"layers_to_transform beside target_modules {target_modules!r}",
                "layers_to_transform beside a list of names",
                "name the modules in a list, such as [q_proj, v_proj]",
            )
        numbers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        chosen = [place for place in chosen if _layer_index(place.path) in numbers]
    chosen = [place for place in chosen if not _is_left_out(place.path, exclude_modules, modules_to_save)]
    pattern = _checked_pattern(rank_pattern or {})
    ranked = [(place.linear, _rank(place.path, r, pattern)) for place in chosen]
    for tensor in tensors(shape):
        if tensor.name in wanted_tensors:
            ranked.append((tensor.linear, _rank(tensor.path, 2 * r if tensor.name == GATE_UP else r, pattern)))
    if not ranked:
        raise _refusal(
            f"these options leave no module of {shape.name} with an adapter",
            "at least one adapted module",
            "change target_modules, exclude_modules, modules_to_save or layers_to_transform",
        )
    return tuple(Adapted(linear, rank, repeats) for (linear, rank), repeats in Counter(ranked).items())


def lora_parameters(
    shape: ModelShape,
    r: int,
    target_modules: str | Sequence[str],
    *,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> int:
    """Parameters that PEFT would train in the adapter, biases and modules trained whole not among them.

    Raises InputError as `adapted_linears` does, and for DoRA on stacked experts, which PEFT does not have.
    """
    adapted = adapted_linears(
        shape,
        r,
        target_modules,
        rank_pattern=rank_pattern,
        layers_to_transform=layers_to_transform,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
    )
    if use_dora and not all(part.linear.is_module for part in adapted):
        raise _refusal(
            f"use_dora on the stacked experts of {shape.name}",
            "DoRA on linears and embeddings",
            "set use_dora=false, or name only attention's linears in lora.target_modules",
        )
    return sum(part.parameters + (part.magnitudes if use_dora else 0) for part in adapted)


def saved_parameters(shape: ModelShape, modules_to_save: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Parameters of the modules trained whole beside an adapter, and the names that stand for something else than a
    linear, an embedding or the head, whose size the shape does not tell."""
    places = list(_places(shape))
    found = {place.path: place for name in modules_to_save for place in places if _is_named(place.path, name)}
    unknown = tuple(name for name in modules_to_save if not any(_is_named(place.path, name) for place in places))
    return sum(place.linear.parameters for place in found.values()), unknown


def _places(shape: ModelShape) -> Iterator[Place]:
    """Every module that can carry an adapter, in the order of the layers; embeddings and head come last."""
    for layer, indices in shape.layers:
        for linear in layer.linears:
            if linear.is_module:
                for index in indices:
                    yield Place(shape.full_path(linear, index), linear, in_decoder=True)
    for linear in (*shape.outer, *shape.sight):
        yield Place(linear.path, linear, in_decoder=True)
    for linear in (*shape.tables, shape.head):
        yield Place(linear.path, linear, in_decoder=False)


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _named(
    shape: ModelShape, places: Sequence[Place], target_modules: str | Sequence[str]
) -> tuple[set[str], set[str]]:
    """The full paths of the modules and the last names of the tensors that `target_modules` stands for."""
    names = target_modules
    if isinstance(names, str):
        in_decoder = {place.path: place.linear.name for place in places if place.in_decoder}
        if shape.model_type in RENAMED:
            _compiled(names, "target_modules")
            found = last_names(shape, names, in_decoder.values(), [place.path for place in places])
        elif names.lower() == ALL_LINEAR:
            return set(in_decoder), set()
        else:
            expression = _compiled(names, "target_modules")
            matched = {place.path for place in places if expression.fullmatch(place.path)}
            if matched:
                return matched, set()
            found = []
        names = found or [word.strip() for word in names.split(",") if word.strip()]
    if not names:
        raise _refusal("target_modules is empty", "all-linear, names, or a regular expression", "use all-linear")
    modules, wanted_tensors = split_names(shape, names)
    for name in modules:
        _check_known(shape, places, name)
    return {place.path for place in places for name in modules if _is_named(place.path, name)}, wanted_tensors


def _check_known(shape: ModelShape, places: Sequence[Place], name: str) -> None:
    """Raise InputError, with the nearest name, when a name stands for no module that can carry an adapter."""
    if any(_is_named(place.path, name) for place in places):
        return
    known = list(dict.fromkeys([*(place.linear.name for place in places), *RENAMED.get(shape.model_type, {})]))
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1].lower(), known, n=1, cutoff=0.6)
    raise _refusal(
        f"target_modules: {name!r} matches no linear of {shape.name}{f' (did you mean {near[0]}?)' if near else ''}",
        f"all-linear, a regular expression for whole paths, or names out of {', '.join(known)}",
        "correct the name in lora.target_modules",
    )


def _compiled(expression: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise _refusal(
            f"{option}: {expression!r} is no regular expression: {error}",
            "an expression that Python's re module takes",
            f"correct lora.{option}",
        ) from None


def _layer_index(path: str) -> int | None:
    """The first number between dots after two names, as PEFT finds a layer's index."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(match.group(1)) if match else None


def _is_left_out(path: str, exclude: str | Sequence[str] | None, saved: Sequence[str] | None) -> bool:
    """Whether it is excluded, or inside a module that is trained whole."""
    if isinstance(exclude, str):
        excluded = bool(exclude) and _compiled(exclude, "exclude_modules").fullmatch(path) is not None
    else:
        excluded = any(_is_named(path, name) for name in exclude or ())
    return excluded or any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in saved or ())


def _checked_pattern(rank_pattern: Mapping[str, int]) -> list[tuple[re.Pattern[str], int]]:
    for name, rank in rank_pattern.items():
        if type(rank) is not int or rank < 1:
            raise _refusal(
                f"rank_pattern: {name!r} has {rank!r}", "a whole number above 0", "correct lora.rank_pattern"
            )
    return [(_compiled(rf"(.*\.)?({name})$", "rank_pattern"), rank) for name, rank in rank_pattern.items()]


def _rank(path: str, r: int, pattern: Sequence[tuple[re.Pattern[str], int]]) -> int:
    """The rank of the first expression that the path's end answers to, else `r`."""
    return next((rank for expression, rank in pattern if expression.match(path)), r)


def _refusal(given: str, allowed: str, do: str) -> InputError:
    return InputError(given=given, allowed=allowed, do=do)
