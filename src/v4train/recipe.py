"""The recipe: the components' configs side by side, and the checks that need more than one of them.

A recipe is loaded, checked and counted without starting a device: this file imports only `config.py` files, and those import no jax.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pydantic

from v4train.checkpoint import config as checkpoint_config
from v4train.config import base, load
from v4train.data import config as data_config
from v4train.decode import config as decode_config
from v4train.model import config as model_config
from v4train.numerics import config as numerics_config
from v4train.optim import config as optim_config
from v4train.sharding import config as sharding_config
from v4train.train import config as train_config
from v4train.train.evals import config as evals_config

_AUDIO = (80, 16)
"""Channels and levels of a frame, as every token store holds them."""


_FIELDS = ("kind", "step", "tokens", "loss", "bpb", "modality_bpb")
"""Of records of held-out loss."""

_FP4_GROUP = 32
"""Values that share a scale in MXFP4."""


class Recipe(base.Config):
    """Everything about a run."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Of the run; by default also of its directory."""
    seed: int = 0
    """Of the parameters' first values."""
    init_from: str | None = None
    """Where the first values come from: a run directory, an import (`v4train convert import`), or one step of either. Parameters, router
    biases and hash tables are taken; optimizer, schedule and data start anew. null: drawn from the seed. A resumed run does not read it."""
    init_draws: tuple[str, ...] = ()
    """Parameters that init_from lacks and that are drawn from the seed, each with everything below its path: [embedding/image]."""
    mesh: sharding_config.MeshConfig = sharding_config.MeshConfig()
    numerics: numerics_config.NumericsConfig = numerics_config.NumericsConfig()
    model: model_config.ModelConfig
    data: data_config.DataConfig
    optimizer: optim_config.AnyOptimizerConfig
    train: train_config.TrainConfig
    cluster: train_config.ClusterConfig = train_config.ClusterConfig()
    checkpoint: checkpoint_config.CheckpointConfig = checkpoint_config.CheckpointConfig()
    decode: decode_config.DecodingConfig = decode_config.DecodingConfig()

    @property
    def run_directory(self) -> str:
        return self.train.run_directory.replace("{name}", self.name)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_rows * self.data.sequence_length


def _phases_fit(r: Recipe) -> str | None:
    try:
        r.data.schedule(batch_rows=r.train.batch_rows)
    except ValueError as e:
        return str(e)
    return None


class _Shape(NamedTuple):
    """Sizes of a phase's batches, and where its rows and its length are said."""

    rows: int
    length: int
    patches: int
    frames: int
    rows_from: str = "train.batch_rows"
    length_from: str = "data.sequence_length"


def _shapes(r: Recipe) -> list[_Shape]:
    """The first phase's, and all others."""
    first = _Shape(r.train.batch_rows, r.data.sequence_length, r.data.max_patches, r.data.max_audio_frames)
    try:
        phases = r.data.schedule(batch_rows=r.train.batch_rows).phases
    except ValueError:  # `_phases_fit` reports it
        return [first]
    shapes = [_Shape(*shape) for shape in dict.fromkeys(phase.shape for phase in phases)]
    return [
        shape._replace(
            rows_from=first.rows_from if shape.rows == first.rows else "data.phases: batch_rows",
            length_from=first.length_from if shape.length == first.length else "data.phases: sequence_length",
        )
        for shape in shapes
    ]


def _batch_divides(r: Recipe) -> str | None:
    parts = r.mesh.batch_shards * r.train.microbatches
    for shape in _shapes(r):
        if shape.rows % parts:
            return (
                f"{shape.rows_from} {shape.rows} must be a multiple of {parts} (mesh.replica {r.mesh.replica} x "
                f"mesh.fsdp {r.mesh.fsdp} x mesh.expert {r.mesh.expert} x train.microbatches {r.train.microbatches}); "
                f"nearest: {max(shape.rows // parts, 1) * parts}"
            )
    return None


def _experts_divide(r: Recipe) -> str | None:
    if r.model.moe.experts % r.mesh.expert_shards:
        product = " x ".join(f"mesh.{name} {r.mesh.sizes[name]}" for name in r.mesh.experts_over)
        return f"{product} must divide model.moe.experts {r.model.moe.experts}"
    return None


def _tensor_divides(r: Recipe) -> str | None:
    model, size = r.model, r.mesh.tensor
    split = {"attention.heads": model.attention.heads, "moe.ffn": model.moe.ffn, "vocab_size": model.vocab_size}
    wrong = [f"model.{name} {value}" for name, value in split.items() if value % size]
    return f"mesh.tensor {size} must divide {', '.join(wrong)}" if wrong else None


def _sequence_divides(r: Recipe) -> str | None:
    for shape in _shapes(r):
        if shape.length % r.mesh.context:
            return f"mesh.context {r.mesh.context} must divide {shape.length_from} {shape.length}"
    return None


def _mesh_is_emulated_whole(r: Recipe) -> str | None:
    if r.mesh.emulate_devices is not None and r.mesh.emulate_devices < r.mesh.devices:
        return f"mesh.emulate_devices {r.mesh.emulate_devices} is less than the mesh's {r.mesh.devices} devices; set it to {r.mesh.devices}"
    return None


def _positions_suffice(r: Recipe) -> str | None:
    for shape in _shapes(r):
        if shape.length > r.model.max_positions:
            return f"{shape.length_from} {shape.length} exceeds model.max_positions {r.model.max_positions}"
    return None


def _needles_fit(r: Recipe) -> str | None:
    for i, each in enumerate(r.train.evals):
        longest = max(each.lengths) if isinstance(each, evals_config.NeedleConfig) else 0
        if longest > r.model.max_positions:
            return f"train.evals[{i}].lengths has {longest}, but model.max_positions is {r.model.max_positions}: leave longer ones out"
    return None


def _evaluations_have_names(r: Recipe) -> str | None:
    names = [each.label for each in r.train.evals]
    for name in names:
        if names.count(name) > 1:
            return f"train.evals: {names.count(name)} are called {name!r}; give each a name of its own"
        if name in _FIELDS:
            return f"train.evals: {name!r} is a field of every record; give this evaluation another name"
    return None


def _image_stem_fits(r: Recipe) -> str | None:
    patches = max(shape.patches for shape in _shapes(r))
    if patches and r.model.image is None:
        return f"data.max_patches is {patches}, but the model has no image stem; add model.image or set data.max_patches: 0"
    if r.model.image is not None and r.model.image.patch != r.data.image_patch:
        return f"model.image.patch {r.model.image.patch} and data.image_patch {r.data.image_patch} must be equal"
    return None


def _audio_stem_fits(r: Recipe) -> str | None:
    frames = max(shape.frames for shape in _shapes(r))
    if frames and r.model.audio is None:
        return f"data.max_audio_frames is {frames}, but the model has no audio stem; add model.audio or set it to 0"
    if r.model.audio is not None and (r.model.audio.bins, r.model.audio.levels) != _AUDIO:
        found = f"{r.model.audio.bins} and {r.model.audio.levels}"
        return f"model.audio.bins and model.audio.levels are {found}, but audio data have {_AUDIO[0]} and {_AUDIO[1]}; set these"
    return None


def _run_directory_is_a_path(r: Recipe) -> str | None:
    if set("{}") & set(r.run_directory):
        return f"train.run_directory {r.train.run_directory!r} has braces other than {{name}}, the recipe's name; remove them"
    return None


def _draws_belong_to_a_source(r: Recipe) -> str | None:
    if r.init_draws and r.init_from is None:
        return f"init_draws names {list(r.init_draws)}, but without init_from everything is drawn; remove it"
    return None


def _decoding_fits(r: Recipe) -> str | None:
    decode = r.decode
    if decode.speculate and r.model.mtp is None:
        return "decode.speculate is true, but the model has no MTP block (model.mtp is null): set it to false"
    if (decode.max_length or 0) > r.model.max_positions:
        return f"decode.max_length {decode.max_length} exceeds model.max_positions {r.model.max_positions}"
    return None


def _schedule_fits(r: Recipe) -> str | None:
    try:
        r.optimizer.schedule.check(r.train.steps)
    except ValueError as e:
        return f"optimizer.{e} (train.steps)"
    return None


def _stages_fit(r: Recipe) -> str | None:
    try:
        phases = r.data.schedule(batch_rows=r.train.batch_rows)
    except ValueError:  # `_phases_fit` reports it
        return None
    try:
        r.train.course(model=r.model, phases=phases)
    except ValueError as e:
        return str(e)
    return None


def _groups_of_fp4_divide(r: Recipe) -> str | None:
    if r.numerics.experts != "mxfp4":
        return None
    sizes = {"hidden": r.model.hidden, "moe.ffn": r.model.moe.ffn}
    wrong = [f"model.{name} {value}" for name, value in sizes.items() if value % _FP4_GROUP]
    return f"numerics.experts mxfp4 has a scale for {_FP4_GROUP} inputs, which must divide {' and '.join(wrong)}" if wrong else None


def _gradients_are_summed(r: Recipe) -> str | None:
    if r.numerics.gradient_sums == "bfloat16" and r.train.microbatches == 1:
        return "numerics.gradient_sums is bfloat16, but train.microbatches is 1, so nothing is summed; remove it or use more microbatches"
    return None


def _something_is_emulated(r: Recipe) -> str | None:
    if r.numerics.emulate and not r.numerics.low_precision:
        return "numerics.emulate is true, but nothing is in FP8; remove it or set numerics.linear or numerics.experts"
    return None


CHECKS: tuple[Callable[[Recipe], str | None], ...] = (
    _phases_fit,
    _stages_fit,
    _batch_divides,
    _experts_divide,
    _tensor_divides,
    _sequence_divides,
    _mesh_is_emulated_whole,
    _positions_suffice,
    _needles_fit,
    _evaluations_have_names,
    _image_stem_fits,
    _audio_stem_fits,
    _run_directory_is_a_path,
    _draws_belong_to_a_source,
    _decoding_fits,
    _schedule_fits,
    _groups_of_fp4_divide,
    _gradients_are_summed,
    _something_is_emulated,
)


def resolve(path: str, *, overrides: Sequence[str] = ()) -> load.Loaded[Recipe]:
    """Loads a recipe file and checks it as a whole.

    Raises:
        ValueError: every problem found, each with its place, value and remedy.
    """
    loaded = load.load(path, cls=Recipe, overrides=overrides)
    problems = [message for check in CHECKS if (message := check(loaded.config))]
    if problems:
        raise ValueError(f"{path}: {len(problems)} setting(s) do not fit together:\n" + "\n".join(f"  - {p}" for p in problems))
    return loaded
