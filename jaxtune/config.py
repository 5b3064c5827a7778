"""Every key of a run, its type, its default and its meaning; defaults live here and nowhere else.

Only pydantic is imported, so that a command can check its configuration in a fraction of a second.
How YAML text and `key=value` words become a `Config` stands in `decode.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxtune.config_data import DataConfig, problems_of_data
from jaxtune.config_section import Fraction, Positive, Section


class ModelConfig(Section):
    """Which model is tuned, and how it is computed."""

    path: str = Field(description="Hugging Face folder (local, gs://, s3://) or hub id")
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random draws the weights from the seed; the folder then needs no safetensors"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the computation; auto is bfloat16 on TPU and GPU, float32 on CPU"
    )
    param_dtype: Literal["auto", "file", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype that weights are held in; auto is float32 for trained weights and `dtype` for frozen ones; "
        "file keeps each tensor's own",
    )
    attention: Literal["auto", "xla", "splash", "tokamax"] = Field("auto", description="attention kernel")
    remat: Literal["auto", "none", "dots", "minimal", "mid", "full", "offload"] = Field(
        "auto",
        description="what the backward pass recomputes; auto is none on CPU, and elsewhere what is fastest of that "
        "which fits",
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="dropout inside an encoder-decoder while it is trained; adapters have tuning.dropout"
    )


class TuningConfig(Section):
    """What is trained."""

    method: Literal["lora", "full"] = "lora"
    rank: Positive = Field(16, description="LoRA rank r")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="LoRA update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="dropout on the adapters' input")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or names (q_proj, ...) of the linear layers that get an adapter"
    )
    loss_weighting: Literal["token", "example"] = Field(
        "token", description="token: every trained token counts the same; example: every example counts the same"
    )
    routers: Literal["train", "freeze"] = Field(
        "train", description="full tuning of a mixture of experts: whether its routers are trained (LoRA freezes them)"
    )
    load_balance: Literal["auto"] | Annotated[float, Field(ge=0.0)] = Field(
        "auto",
        description="coefficient of the load-balance loss; auto is config.json's router_aux_loss_coef where it says "
        "output_router_logits, else 0, as transformers trains",
    )
    router_z: Annotated[float, Field(ge=0.0)] = Field(0.0, description="coefficient of the routers' z-loss")


class OptimizerConfig(Section):
    """How weights are updated."""

    name: str = Field("adamw", description="any optimizer of optax by its name")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate; default 2e-4 (lora), 1e-5 (full)"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_ratio: Fraction = Field(0.03, description="share of the steps, rounded up, that the rate climbs over")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="instead of warmup_ratio")
    decay_ratio: Fraction = Field(0.2, description="wsd: share of the steps, at the end, that the rate falls over")
    final_ratio: Fraction = Field(0.1, description="last learning rate over the peak (linear, cosine, wsd)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="applied to matrices, not norms or biases")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="clip the global gradient norm")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optax optimizer")


class TrainConfig(Section):
    """How long, in what portions."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Annotated[int, Field(ge=0)] | None = Field(None, description="optimizer updates; wins over epochs")
    batch_rows: Positive = Field(8, description="rows of max_length tokens in one update, over all devices")
    microbatch_rows: Literal["auto"] | Positive | None = Field(
        None,
        description="rows computed at once; the rest of the batch is accumulated; default: the whole batch; auto is "
        "what is fastest of that which fits",
    )
    compiler_options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="told to XLA for the update, in place of ours or beside them"
    )
    max_bad_steps: Positive = Field(5, description="stop after so many updates in a row with a NaN or infinity")
    preempted_exit_code: Annotated[int, Field(ge=1, le=255)] = 143
    hang_seconds: Literal["auto"] | Annotated[float, Field(gt=0)] | None = Field(
        "auto",
        description="no update, evaluated batch or save in so many seconds: tell where every thread stands and end "
        "with exit code 1, to be started again; give more than the longest of them takes; auto is 3600 on several "
        "hosts and null, which waits for ever, on one",
    )
    spike_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="an update whose loss or gradient norm lies more than so many deviations above the median of the "
        "last 64 is not applied, e.g. 6",
    )
    spike_patience: Positive = Field(
        3, description="with spike_factor: so many updates in a row not applied, and the run goes back to a checkpoint"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(3, description="stop instead of going back once more")


class MeshConfig(Section):
    """Devices along each axis; one axis may be -1, meaning all that are left. `mesh: auto` says `auto: true`."""

    auto: bool = Field(False, description="all axes are chosen: what is fastest of that which fits")
    slice: Annotated[int, Field(ge=-1)] = 1
    data: Annotated[int, Field(ge=-1)] = 1
    fsdp: Annotated[int, Field(ge=-1)] = -1
    tensor: Annotated[int, Field(ge=-1)] = 1
    context: Annotated[int, Field(ge=-1)] = 1
    expert: Annotated[int, Field(ge=-1)] = 1


class LocalCheckpointConfig(Section):
    """Copies of the newest states on the hosts' own disks, from which a run that begins again goes on at once."""

    path: str | None = Field(
        None,
        description="folder on a disk of each host's own, or in its memory (/dev/shm/jaxtune); ~ and $NAME are the "
        "host's; null: no copies",
    )
    every_steps: Positive = 50


class CheckpointConfig(Section):
    """When state is saved, and how a run goes on."""

    every_steps: Positive | None = Field(
        500, description="null saves at the end, and whenever the held-out loss is the best so far"
    )
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best")
    resume: Literal["auto", "never"] = Field("auto", description="auto goes on where the folder's run stopped")
    changed_data: Literal["refuse", "accept"] = Field(
        "refuse",
        description="accept goes on although `data` is another than the run was saved with: model, optimizer and step "
        "stay, the new data is read from its start",
    )
    retries: Annotated[int, Field(ge=0)] = Field(5, description="how often a save that failed is tried again")
    retry_seconds: Annotated[float, Field(ge=0)] = Field(
        10.0, description="pause before the first of them; each next one is twice as long"
    )
    save_seconds: Positive = Field(1800, description="a save that is not done by then has failed")
    local: LocalCheckpointConfig = LocalCheckpointConfig()


class EvalConfig(Section):
    """Held-out loss during training."""

    every_steps: Positive | None = Field(None, description="default: ten times over the run, and at its end")
    max_batches: Positive | None = Field(None, description="at most so many batches each time")


class LogConfig(Section):
    """What a run tells, and where."""

    every_steps: Positive = 10
    tensorboard: bool = True
    examples: bool = Field(
        False, description="OUTPUT/examples.jsonl: which examples (source, row, epoch) stood in each row of each update"
    )
    wandb: str | None = Field(None, description="Weights & Biases project; nothing is sent without it")


class ExportConfig(Section):
    """What is written when training ends."""

    adapter: bool = Field(True, description="LoRA runs: OUTPUT/adapter, a PEFT folder")
    hf: bool = Field(True, description="OUTPUT/hf, the full or merged model folder")


class Config(Section):
    """A whole run."""

    output: str = Field(description="folder for everything the run writes")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    tuning: TuningConfig = TuningConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("mesh", mode="before")
    @classmethod
    def _whole_mesh(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"mesh: found {value!r}; expected auto, or sizes of axes, e.g. mesh.fsdp=-1")
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = []
        if not self.data.train and self.train.steps != 0:
            problems.append("data.train: found no source; expected at least one, e.g. data.train.0.path=FILE.jsonl")
        problems += problems_of_data(self.data, steps=self.train.steps)
        rows, micro = self.train.batch_rows, self.train.microbatch_rows
        if isinstance(micro, int) and rows % micro:
            problems.append(f"train.microbatch_rows: found {micro}; expected a divisor of train.batch_rows = {rows}")
        if isinstance(self.data.lanes, int) and rows % self.data.lanes:
            problems.append(f"data.lanes: found {self.data.lanes}; expected a divisor of train.batch_rows = {rows}")
        axes = self.mesh.model_dump(exclude={"auto"})
        if sum(size == -1 for size in axes.values()) > 1:
            problems.append(f"mesh: found {axes}; expected at most one axis with -1")
        empty = [axis for axis, size in axes.items() if size == 0]
        problems += [f"mesh.{axis}: found 0; expected a size of at least 1, or -1" for axis in empty]
        if self.mesh.auto and axes != MeshConfig().model_dump(exclude={"auto"}):
            problems.append("mesh: found auto beside sizes; expected one of the two")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def rows_at_once(self) -> int:
        """Rows that are computed together: a microbatch, or the whole batch (where it is still to be chosen, too)."""
        micro = self.train.microbatch_rows
        return micro if isinstance(micro, int) else self.train.batch_rows

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: as asked for, or the method's default."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return {"lora": 2e-4, "full": 1e-5}[self.tuning.method]


# Outside these a value still runs, with a warning; docs/recipes.md says where they come from.
USUAL_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "lora": {"learning_rate": (1e-5, 2e-3), "tuning.rank": (4, 256), "train.epochs": (1, 10)},
    "full": {"learning_rate": (1e-6, 1e-3), "train.epochs": (1, 10)},
}


def unusual_values(config: Config) -> list[str]:
    """Sentences about values outside the field's usual range; empty when there are none."""
    values = {
        "learning_rate": config.learning_rate,
        "tuning.rank": float(config.tuning.rank),
        "train.epochs": float(config.train.epochs),
    }
    return [
        f"{key} = {values[key]:g} is outside the usual range for {config.tuning.method}: {low:g} to {high:g}"
        for key, (low, high) in USUAL_RANGES[config.tuning.method].items()
        if not low <= values[key] <= high
    ]
