"""The base class of every component's config."""

import pydantic


class Config(pydantic.BaseModel):
    """A frozen value object: unknown keys and wrong types are errors, nothing changes after construction.

    Put the unit into a field's name or its docstring (a string below the field, or `pydantic.Field(description=...)`); give ranges
    with `pydantic.Field(gt=..., ge=...)`, so that a bad value is refused with its path before a device starts.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
