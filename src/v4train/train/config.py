"""Config of the training run itself."""

from typing import Literal

import pydantic

from v4train.config import base
from v4train.data import phases as phases_lib
from v4train.model import config as model_config
from v4train.train import stages as stages_lib
from v4train.train.evals import config as evals_config


class ClusterConfig(base.Config):
    """How the processes of a run on several hosts find each other. Empty: detected (Slurm, Open MPI, Cloud TPU, GKE, Kubernetes), else
    one process. The options --coordinator, --processes and --process of `v4train train` set the first three; hosts may differ in them."""

    coordinator: str | None = None
    """host:port of process 0, as the others reach it; the port must be free there."""
    processes: int | None = pydantic.Field(default=None, ge=1)
    """How many there are, one a host or one a GPU. 1: alone, whatever the environment says."""
    process: int | None = pydantic.Field(default=None, ge=0)
    """Which of them this is, from 0; different on each."""
    start_seconds: float = pydantic.Field(default=300.0, ge=1)
    """Time for all processes to come."""
    lost_seconds: float = pydantic.Field(default=30.0, ge=3)
    """Silence of a machine's network after which it is lost. A process that dies on a machine that lives is noticed at once."""


class StageConfig(base.Config):
    """What of the model changes from a step on; `data.phases` has what changes of the data. What a stage does not name stays as it was. To
    change a run that has begun, append a stage."""

    from_step: int | None = pydantic.Field(default=None, gt=0)
    """The stage's first step, counted from 0; instead of `from_tokens`."""
    from_tokens: int | None = pydantic.Field(default=None, gt=0)
    """The stage begins with the first step that has at least so many tokens, padding included, before it: by the rule of
    `data.phases`, so that the same number means the same step."""
    attention: Literal["dense", "warmup", "sparse"] | None = None
    """Phase of the CSA layers, instead of `model.kinds.*.phase`. dense: every visible entry, no indexer; warmup: every visible entry, only
    the indexer learns; sparse: the selected entries. DeepSeek-V4: dense for about 1T tokens of 4K and 16K, at 64K a short warm-up,
    then sparse."""
    mtp_weight: float | None = pydantic.Field(default=None, ge=0)
    """Of the multi-token prediction's loss, instead of `model.mtp.loss_weight`. DeepSeek-V4: 0.3, and 0.1 from the learning rate's decay
    on."""

    @pydantic.model_validator(mode="after")
    def _begins_once_and_changes_something(self) -> "StageConfig":
        if (self.from_step is None) == (self.from_tokens is None):
            raise ValueError("a stage needs either from_step or from_tokens: give one of them")
        if self.attention is None and self.mtp_weight is None:
            raise ValueError("a stage that names neither attention nor mtp_weight changes nothing: give one of them, or remove it")
        return self


class AnticipateConfig(base.Config):
    """Anticipatory routing (V4 report): the experts of a step are chosen by the parameters of an earlier one, everything else is computed
    with the current ones. It breaks the loop in which routing and features push each other away, and costs one forward pass a step."""

    lag: int = pydantic.Field(default=8, ge=0)
    """Steps between the parameters that choose the experts and those that compute. The paper does not say; chosen here. As many batches
    and their choices (4 bytes per token, layer and choice) are kept on the devices."""
    calm_steps: int = pydantic.Field(default=500, ge=1)
    """Steps without a spike after which routing is the usual one again. The paper does not say; chosen here."""
    always: bool = False
    """From the first step to the last, spike or not: for studying it."""


class GuardConfig(base.Config):
    """What to do about a spike of loss or gradient: go back to a state from before it, leave out the batches since, go on; and stop a run
    that does not get over it. docs/stability.md explains it."""

    window: int = pydantic.Field(default=128, ge=4)
    """Accepted steps whose medians a step is compared with. OLMo-core, Levanter and MaxText: 128."""
    least: int = pydantic.Field(default=20, ge=2)
    """Accepted steps before which, at the start and after a change of attention, only what is not finite is a spike. After a change of
    shape alone it is 4, and up to this many the limits are twice as wide."""
    loss_deviations: float = pydantic.Field(default=6.0, gt=0)
    """A loss so many standard deviations (by the median of distances) above the median is a spike, if it is above the margin too.
    OLMo-core, Levanter and MaxText: 6 standard deviations above the mean."""
    loss_margin: float = pydantic.Field(default=0.1, ge=0)
    """Least excess over the median loss, as a share of it. LLM Foundry ends a run whose loss is twice its average."""
    gradient_factor: float = pydantic.Field(default=10.0, gt=1)
    """A gradient norm so many times the median is a spike. Chosen here; OLMo-core, Levanter and MaxText: 6 deviations above the mean."""
    snapshot_every: int = pydantic.Field(default=50, ge=2)
    """Steps between snapshots of the state; the last two are kept. A rollback loses the batches since the snapshot, at most twice this
    many. PaLM went back about 100 steps and left out 200 to 500 batches."""
    snapshots: Literal["host", "device"] = "host"
    """Where snapshots lie: in the memory of the hosts, or beside the state on the devices, twice its size and faster."""
    max_rollbacks: int = pydantic.Field(default=3, ge=0)
    """Rollbacks within `rollback_window` steps; one more spike saves the run, ends it and says why. 0: the first spike does."""
    rollback_window: int = pydantic.Field(default=1000, ge=1)
    """Steps in which rollbacks are counted together."""
    anticipate: AnticipateConfig | None = None
    """Anticipatory routing after a rollback. DeepSeek-V4 switches it on after a spike and a short rollback; null: never."""


class TrainConfig(base.Config):
    """How long, how much at a time, and what to look at on the way."""

    steps: int = pydantic.Field(gt=0)
    """Optimizer steps of the whole run."""
    batch_rows: int = pydantic.Field(gt=0)
    """Rows of a step over all devices; a row is data.sequence_length tokens."""
    microbatches: int = pydantic.Field(default=1, gt=0)
    """Parts of a batch whose gradients are summed before one update."""
    stages: tuple[StageConfig, ...] = ()
    """Changes of the model's attention and losses in the course of training, in their order."""
    eval_every: int | None = pydantic.Field(default=None, gt=0)
    """Steps between evaluations on held-out rows; always also before the first and after the last step."""
    eval_batches: int = pydantic.Field(default=1, gt=0)
    """Held-out batches per source and evaluation."""
    evals: tuple[evals_config.Evaluation, ...] = ()
    """What else to ask the model on the way. Held-out loss, in nats and in bits a byte, is always measured if data.holdout is above 0."""
    log_every: int = pydantic.Field(default=10, gt=0)
    """Steps between plain lines on a stream that is no terminal."""
    experts_every: int = pydantic.Field(default=20, gt=0)
    """Steps between records of expert load."""
    run_directory: str = "runs/{name}"
    """Where the run lives; {name} is the recipe's."""
    guard: GuardConfig | None = None
    """Detection of spikes and rollback; null: none."""
    skip_nonfinite: bool = True
    """A step whose loss or gradients are not finite changes nothing but the data position. false: it ruins the parameters, for studies."""
    grace_seconds: float = pydantic.Field(default=30.0, gt=0)
    """Time after SIGTERM in which the last checkpoint must be written."""
    stall_seconds: float | None = pydantic.Field(default=None, ge=1)
    """Time after which a run that does not get on is ended, with a message that says which process hangs, and in what. No step,
    evaluation, save or restore of a healthy run may take as long; compiling a training step may. Null: it waits for ever."""

    def course(self, *, model: model_config.ModelConfig, phases: phases_lib.Phases) -> stages_lib.Stages:
        """The stages by step. ``model`` is the first; ``phases`` are the data's, which count tokens.

        Raises:
            ValueError: stages out of order, or one that changes what the model does not have.
        """
        return stages_lib.Stages.of(self.stages, model=model, phases=phases)
