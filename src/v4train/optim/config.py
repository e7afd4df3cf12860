"""What the optimizer can be told. Defaults are DeepSeek-V4's where the paper (section 4.2) gives them."""

from typing import Annotated, Any, Literal

import pydantic

from v4train.config import base

Group = Literal["muon", "adamw"]

COARSE = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients with a steep slope at 0: they lift small singular values fast, to somewhere in 0.7 .. 1.2."""
FINE = (2.0, -1.5, 0.5)
"""Newton-Schulz coefficients with a flat fixed point at 1: they settle what `COARSE` has lifted."""


class ScheduleConfig(base.Config):
    """Linear warm-up to the peak, flat, a decay to the final rate, flat again. The number of steps of the run is not part of it."""

    peak_lr: float = pydantic.Field(gt=0)
    """Learning rate of the flat part, per step. DeepSeek-V4: 2.7e-4 (Flash), 2.0e-4 (Pro)."""
    final_lr: float = pydantic.Field(ge=0)
    """Learning rate at the end of the decay, and of `final_steps`. DeepSeek-V4: a tenth of the peak."""
    warmup_steps: int = pydantic.Field(ge=0)
    """Steps of linear warm-up; the last of them runs at the peak. DeepSeek-V4: 2000."""
    decay_steps: int = pydantic.Field(ge=0)
    """Steps of decay, at the end of the run but for `final_steps`; the last of them runs at `final_lr`. 0: the rate stays at the peak."""
    decay_shape: Literal["cosine", "linear", "sqrt"] = "cosine"
    """Of the decay, from peak to final: half a cosine, as DeepSeek-V3 and V4; a straight line; or one minus the square root of the part
    done (the "1-sqrt" of WSD schedules), steep at first."""
    final_steps: int = pydantic.Field(default=0, ge=0)
    """Steps at `final_lr` after the decay. DeepSeek-V4.1: a cosine, then flat."""

    @pydantic.model_validator(mode="after")
    def _falls(self) -> "ScheduleConfig":
        if self.final_lr > self.peak_lr:
            raise ValueError(f"final_lr {self.final_lr:g} is above peak_lr {self.peak_lr:g}; the rate decays: lower final_lr")
        if self.final_steps and not self.decay_steps:
            raise ValueError(f"final_steps {self.final_steps} need a decay before them; set decay_steps, or final_steps: 0")
        return self

    def check(self, total_steps: int) -> None:
        """Refuses a run that is too short for its warm-up, its decay and its end.

        Raises:
            ValueError: ``warmup_steps + decay_steps + final_steps`` exceeds ``total_steps``.
        """
        parts = {"warmup_steps": self.warmup_steps, "decay_steps": self.decay_steps}
        parts |= {"final_steps": self.final_steps} if self.final_steps else {}
        if (needed := sum(parts.values())) > total_steps:
            listed = " + ".join(f"{name} {steps}" for name, steps in parts.items())
            raise ValueError(f"schedule: {listed} = {needed} do not fit into a run of {total_steps} steps; shorten them or train longer")


class MuonConfig(base.Config):
    """Momentum, orthogonalised."""

    momentum: float = pydantic.Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum, per step."""
    nesterov: bool = True
    """Look one step ahead: orthogonalise ``momentum * M + G`` rather than ``M``."""
    update_scale: float = pydantic.Field(default=0.18, gt=0)
    """Root mean square of an element of the update, before the learning rate. 0.18 is what AdamW's updates measure, so that one
    learning rate and one weight decay serve both."""
    coefficients: tuple[tuple[float, float, float], ...] = pydantic.Field(default=(COARSE,) * 8 + (FINE,) * 2, min_length=1)
    """One ``(a, b, c)`` per Newton-Schulz step: ``x <- a x + b x^3 + c x^5`` on the singular values."""
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the Newton-Schulz iteration. float32 is computed at full precision on every chip; bfloat16 is several times faster on
    accelerators and good to about 1 %."""

    head_wise: bool = False
    """Orthogonalise the query projections, the indexer's too, head by head; the key is one head anyway. V4.1's report does so, V4's says
    nothing. Frameworks: VeOmni has it as an option; Megatron (`muon_split_qkv`) separates queries, keys and values, not heads; MaxText
    takes all heads as one matrix."""

    @property
    def element_bytes(self) -> int:
        """Of an element of a matrix in the iteration."""
        return 4 if self.ns_dtype == "float32" else 2


class AdamWConfig(base.Config):
    """Adam's moments. Weight decay belongs to the whole optimizer."""

    b1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of the gradients, per step."""
    b2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of their squares, per step."""
    eps: float = pydantic.Field(default=1e-20, ge=1e-37)
    """Added to the root of the second moment. It only has to make 0 / 0 a 0, and it must be a normal number in fp32."""


class DecayConfig(base.Config):
    """What else shrinks by `weight_decay`. Matrices, embedding and head always do."""

    norms: bool = True
    """Weights of norms. V4 and V4.1: yes; torchtitan and MaxText: yes, like everything; Megatron-LM: nothing of one dimension."""
    position_tables: bool = False
    """The compressors' tables of position logits. The paper does not say. Megatron-LM and torchtitan: yes, for want of a rule."""
    sinks: bool = False
    """Attention sinks, one logit a head. The paper does not say. Megatron-LM: no, they have one dimension; torchtitan: yes, like
    everything; VeOmni: yes unless `no_decay_params` names them."""
    hyper_gates: bool = False
    """Scales and biases of the hyper-connections. The paper does not say; V4.1: no decay on biases and scales. Megatron-LM: no, they have
    one dimension; torchtitan: yes, like everything."""


class CommonConfig(base.Config):
    """What every optimizer has."""

    schedule: ScheduleConfig
    clip_norm: float | None = pydantic.Field(default=1.0, gt=0)
    """Largest global norm of the gradients; null: they are not clipped. The paper does not say. Megatron-LM (`clip_grad`), MaxText
    (`gradient_clipping_threshold`) and torchtitan (`max_norm`): 1.0."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    """Decoupled: a decaying parameter shrinks by this times the learning rate, each step."""
    decays: DecayConfig = DecayConfig()


class OptimizerConfig(CommonConfig):
    """Muon for matrices, AdamW for the rest. Which is which, and what decays, is said where a parameter is declared, and here for
    those about which the paper is silent."""

    kind: Literal["hybrid"] = "hybrid"
    """May be left out."""
    muon: MuonConfig | None = MuonConfig()
    """Of the matrices. null: AdamW trains them, too."""
    router_gates: Group = "muon"
    """What trains the gates of the routers, `[hidden, experts]`. The paper gives "everything else" to Muon and does not name them.
    Megatron-LM and `optax.contrib.muon`: Muon, as every matrix; MaxText: Muon, with an option to leave them out."""
    position_tables: Group = "adamw"
    """What trains the compressors' tables of position logits, `[ratio, features]`. The paper does not name them, either. Megatron-LM and
    `optax.contrib.muon`: Muon, as every array of two dimensions; NeMo Automodel: AdamW, as everything. A row of the table belongs to a
    place in a block, so it is no linear map: AdamW."""
    adamw: AdamWConfig = AdamWConfig()


class TransformConfig(base.Config):
    """One transform of `optax` or `optax.contrib`."""

    name: str
    """As optax calls it: scale_by_adam, lion, adafactor."""
    args: dict[str, pydantic.JsonValue] = pydantic.Field(default={})
    """Its arguments by name. Learning rate, weight decay and the mask of what decays are given by the recipe's own keys."""


class OptaxConfig(CommonConfig):
    """Transforms of optax by name, one after the other, for all parameters.

    If none of them takes a learning rate, decay and learning rate follow: ``update = -lr (direction + weight_decay param)``. One that does
    (adamw, lion) is given the schedule, and decay and mask too if it takes these; otherwise the decay follows.
    """

    kind: Literal["optax"]
    transforms: tuple[TransformConfig, ...] = pydantic.Field(min_length=1)
    """In the order in which they see the gradients, which `clip_norm` has already clipped."""

    @property
    def muon(self) -> None:
        """Of this framework's Muon, which is distributed, there is none here."""
        return None


def _kind(values: Any) -> str:
    return values.get("kind", "hybrid") if isinstance(values, dict) else getattr(values, "kind", "hybrid")


AnyOptimizerConfig = Annotated[
    Annotated[OptimizerConfig, pydantic.Tag("hybrid")] | Annotated[OptaxConfig, pydantic.Tag("optax")], pydantic.Discriminator(_kind)
]
"""A recipe without a kind has the hybrid."""
