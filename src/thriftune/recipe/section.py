"""What every section of a recipe is: frozen, strict about keys and numbers."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1; `r: true` is a slip all the same."""
        if isinstance(value, bool) and _takes_a_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("expects a number")
        return value


def _takes_a_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_takes_a_number(part) for part in get_args(annotation))
