"""Config of what a model is asked beside its loss. Imports no jax."""

import pathlib
from typing import Annotated, Literal

import pydantic

from v4train.config import base


class EvaluationConfig(base.Config):
    """What all evaluations have: when."""

    name: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """In records; null: the file's name without its ending, or the kind."""
    every: int | None = pydantic.Field(default=None, gt=0)
    """Steps between two; always also before the first and after the last step. null: as train.eval_every."""

    @property
    def label(self) -> str:
        """What its fields of a record begin with."""
        return self.name or pathlib.Path(getattr(self, "path", "needle")).stem


class MultipleChoiceConfig(EvaluationConfig):
    """Questions with given answers, from a file of JSON lines; which fields are read is in evaluation.md."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    path: str
    """The file."""
    limit: int | None = pydantic.Field(default=None, gt=0)
    """Only its first questions."""
    long: Literal["refuse", "cut"] = "refuse"
    """What happens to a question longer than a row: the run does not start, or the beginning of its context is dropped and counted."""


class NeedleConfig(EvaluationConfig):
    """A fact at a depth of a text, asked for at its end."""

    kind: Literal["needle"] = "needle"
    lengths: tuple[pydantic.PositiveInt, ...] = pydantic.Field(min_length=1)
    """Tokens of a document, question and answer included. May exceed data.sequence_length, up to model.max_positions."""
    depths: tuple[Annotated[float, pydantic.Field(ge=0, le=1)], ...] = pydantic.Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Where the fact is: 0 at the beginning, 1 just before the question."""
    samples: int = pydantic.Field(default=4, gt=0)
    """Documents for each length and depth."""
    text: str | None = None
    """A file of text to hide the fact in. null: held-out text of the data, or made-up sentences if nothing is held out."""
    seed: int = 0
    """Of facts and stretches of text."""


Evaluation = Annotated[MultipleChoiceConfig | NeedleConfig, pydantic.Field(discriminator="kind")]
