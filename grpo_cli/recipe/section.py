"""What every model of settings inherits."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LONGEST_WAIT_S = 1e9
"""Thirty years. Python's clocks overflow soon after."""


class Section(BaseModel):
    """Unknown keys are errors, types are not coerced, values do not change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        """Whole numbers have 64 bits: longer ones are no counts, and overflow where they are computed with."""
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError("have at most 63 bits")
        return value
