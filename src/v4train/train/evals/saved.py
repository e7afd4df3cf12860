"""What a checkpoint says of itself that an evaluation needs beside its parameters: its data, its rows, its phase of attention."""

import dataclasses
import json
import pathlib
from typing import Any, cast

import jax
import pydantic

from v4train.checkpoint import restore, step_directory
from v4train.core import param
from v4train.data import config as data_config
from v4train.data import pipeline
from v4train.model import config as model_config
from v4train.model import transformer
from v4train.numerics import config as numerics_config
from v4train.sharding import config as sharding_config
from v4train.sharding import constrain
from v4train.sharding import mesh as mesh_lib
from v4train.train import stages
from v4train.train import state as state_lib
from v4train.train.evals import heldout


@dataclasses.dataclass(frozen=True)
class About:
    """A checkpoint's recipe, as far as it concerns an evaluation; of the released layout nothing is known.

    Attributes:
        path: of the checkpoint, for messages.
        data: its data; None if it says nothing of them.
        train: its `train` section, as plain values.
        attention: phase of the CSA layers in its last step; None if there are none, or it is not known.
    """

    path: pathlib.Path
    data: data_config.DataConfig | None = None
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention: str | None = None

    @property
    def sequence_length(self) -> int | None:
        return None if self.data is None else self.data.sequence_length

    def open_data(self, *, required: bool) -> pipeline.Pipeline | None:
        """The data that the checkpoint was trained on, if they are here and some are held out; None if not, and not ``required``.

        Raises:
            ValueError: they are required, and cannot be opened, or nothing of them is held out.
        """
        remedy = "ask for something else (--choices, --needle)"
        if self.data is None or not self.data.holdout:
            if not required:
                return None
            why = "does not say what it was trained on" if self.data is None else "held nothing out (data.holdout is 0)"
            raise ValueError(f"{self.path}: held-out loss cannot be measured, since it {why}; {remedy}")
        try:
            return pipeline.Pipeline(self.data, batch_rows=self.train["batch_rows"])
        except ValueError as error:
            if not required:
                return None
            raise ValueError(f"{self.path}: its data cannot be opened: {error}\nBring them back, or {remedy}.") from None


def about(path: str | pathlib.Path) -> About:
    """What a checkpoint says of itself.

    Raises:
        ValueError: it is no checkpoint.
    """
    directory = pathlib.Path(path)
    if (directory / "config.json").is_file():
        return About(directory)
    try:
        steps, step = step_directory.locate(directory)
    except ValueError as error:
        raise ValueError(f"{error}, or a directory in the released layout (with config.json)") from None
    metadata = restore.describe(steps, step=step, verify=False).metadata  # whoever reads the arrays compares digests
    recipe, history = metadata["recipe"], metadata.get("stages") or [{}]
    model = model_config.ModelConfig.model_validate_json(json.dumps(recipe["model"]))
    attention = history[-1].get("attention", stages.Stage.of(model).attention)
    if "imported" in metadata:
        return About(directory, attention=attention)
    try:
        data = data_config.DataConfig.model_validate_json(json.dumps(recipe["data"]))
    except pydantic.ValidationError as error:
        raise ValueError(f"{directory}: its data section cannot be used by this version of v4train: {error}") from None
    return About(directory, data, recipe["train"], attention)


def in_phase(model: model_config.ModelConfig, attention: str | None) -> model_config.ModelConfig:
    """The model as it predicts in a phase of attention; as it is, if that is None."""
    stage = stages.Stage.of(model)
    if attention is not None:
        stage = stage._replace(attention=cast(stages.Attention, attention))
    return stage.evaluated.model(model)


def one_device() -> jax.sharding.Mesh:
    """The mesh of a single device."""
    return mesh_lib.make(sharding_config.MeshConfig())


def losses(
    model: model_config.ModelConfig,
    params: dict,
    *,
    numerics: numerics_config.NumericsConfig,
    data: pipeline.Pipeline,
    about: About,
    batches: int | None = None,
) -> dict[str, float]:
    """Held-out loss on the rows that the run evaluates on: see `heldout.fields`. Rows go through the model one at a time.

    Args:
        model: without MTP block.
        params: all its parameters and buffers, on one device.
        numerics: formats.
        data: see `About.open_data`.
        about: how many rows a batch has.
        batches: batches of each source; None: as many as the run takes.
    """
    abstract = transformer.Transformer(model)
    counts = data.tokenizer.byte_counts()
    evaluate = jax.jit(heldout.Evaluate(abstract, param.declarations(abstract), numerics, len(data.sources), counts))
    state = state_lib.State(cast(Any, None), params, {}, None, cast(Any, None))
    rows, count = about.train["batch_rows"], batches or about.train.get("eval_batches", 1)
    sums = []
    with constrain.on_mesh(one_device()):
        for name in data.sources:
            for batch in data.holdout_batches(name, batches=count, batch_rows=rows):
                for row in range(rows):
                    sums.append(jax.device_get(evaluate(state, jax.tree.map(lambda x, row=row: x[row : row + 1], batch))))
    return heldout.fields(sums, sources=data.sources)
