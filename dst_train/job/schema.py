"""The declarative job: what a YAML file may say. Every level is strict; units are in the field descriptions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # as torch takes it
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
# A number, or `full` for all units, which is infinity in the job.
Explore = Annotated[
    float,
    Field(ge=1.0, allow_inf_nan=True),
    BeforeValidator(lambda value: math.inf if value == "full" else value),
    PlainSerializer(lambda value: "full" if value == math.inf else value),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 1}, {"const": "full"}]}),
]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TimmModel(Strict):
    builder: Literal["timm"]
    name: str
    """A model name of `timm.list_models()`, or a class of `timm.models` where no name leaves its sizes open: `MlpMixer`."""
    args: dict[str, Any] = {}
    """Keyword arguments of `timm.create_model`, or of the class."""


class TransformersModel(Strict):
    builder: Literal["transformers"]
    name: str
    """A model type of Hugging Face transformers that has a causal language model, for example `gpt2`."""
    args: dict[str, Any] = {}
    """Arguments of its configuration."""


class MLPModel(Strict):
    builder: Literal["mlp"]
    in_features: Positive
    """Features of a flattened sample."""
    hidden_features: Annotated[list[Positive], Field(min_length=1)]
    """Width of each hidden layer, with a GELU behind it."""
    num_classes: Positive


Model = Annotated[TimmModel | TransformersModel | MLPModel, Field(discriminator="builder")]


class Rule(Strict):
    match: str
    """Glob over module names, for example `blocks.*.mlp.fc*`. The last rule that matches a layer wins."""
    pattern: Literal[
        "diagonal",
        "unstructured",
        "constant_fan_in",
        "n_m",
        "block",
        "shuffled_block",
        "tile_wise",
        "sr_ste",
        "butterfly",
        "sdgp",
    ] = "diagonal"
    """All but `diagonal` are dense weights, most with a mask: baselines for accuracy, not for speed."""
    sparsity: Share | None
    """Share of weights that are absent (of `sdgp`, of the gradient's entries); null keeps the layer dense."""
    band: Positive = 1
    """Adjacent diagonals chosen as one unit; must divide max(in_features, out_features). On a GPU 32 or 64 is fast, 1 is not."""
    size: Positive = 1
    """Of `n_m`, `sr_ste` and `sdgp`, adjacent entries of a row, N = (1 - sparsity) * size of which stay; of blocks, the side of a tile;
    of `butterfly`, its shorter side; of `tile_wise`, adjacent outputs that share an input."""
    permute: Literal["none", "learned"] = "none"
    """`learned`: each topology update also reorders some inputs of a diagonal layer."""


class LowRank(Strict):
    """A learned product of two thin matrices beside each sparse weight, one of them random and fixed (LoRA-FA)."""

    rank: Positive
    """Of the product."""
    start: Share = 0.9
    """Share of the training after which the path takes part."""


class Sparsity(Strict):
    budget: Literal["uniform", "erk", "compute_fraction"] = "uniform"
    """How the parameters that the rules leave are shared out over their layers."""
    rules: Annotated[list[Rule], Field(min_length=1)]
    low_rank: LowRank | None = None
    """Only for diagonal layers; absent or null: none."""


class Update(Strict):
    every: Positive = 100
    """Optimiser steps between topology updates."""
    until: Fraction = 0.75
    """Share of the training after which the topology is frozen."""


class Temperature(Strict):
    """Of the soft gate of `explore: full`: from start to end by cosine until `update.until`. The paper gives no values; these
    are those of its code's example."""

    start: Annotated[float, Field(gt=0.0)] = 5.0
    end: Annotated[float, Field(gt=0.0)] = 0.05


class Topology(Strict):
    method: Literal["static", "set", "rigl", "mest", "cht", "chts", "srigl", "chase", "dynadiag"] = "rigl"
    """What an update drops and grows, see docs/architecture.md; `static` has no updates."""
    update: Update = Update()
    drop_fraction: Fraction | None = None
    """Share of the active units replaced at the first update; decays to 0 by cosine. By default 0.1 for `dynadiag`, 0.3 for others; less
    where data are seen once."""
    grow_signal: Literal["exact", "local"] = "exact"
    """`exact`: |mean gradient over ranks|, the same topology on any number of ranks. `local`: mean over ranks of |gradient|, cheaper."""
    gradient_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """`mest` drops the units with the smallest mean of |value| + gradient_weight * |gradient|."""
    cold_start: Annotated[float, Field(ge=0.0)] = 0.0
    """Second moment of regrown units, as a multiple of the mean of the layer's surviving ones: 0 gives longer first steps, 1 equal
    ones, more a warm-up."""
    gamma_sal: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """`srigl` ablates outputs with fewer than this share of their inputs salient; its paper has 0.95 for ViT. 0: none."""
    channel_sparsity: Share = 0.5
    """`chase` empties this share of the outputs by the last update; the other outputs get their weights."""
    explore: Explore | None = None
    """Active units at first, as a multiple of those that stay; shrinks to 1 by cosine over the first 40 % of `update.until`.
    By default 2 for `dynadiag`, 1 for others. `full`, for `dynadiag` only: the soft gate over all units of the paper's code."""
    alpha_lr: Annotated[float, Field(gt=0.0)] = 10.0
    """Learning rate of `dynadiag`'s alpha, as a multiple of the optimiser's."""
    temperature: Temperature = Temperature()

    @property
    def explore_factor(self) -> float:
        """`explore`, or its default."""
        if self.explore is None:
            return 2.0 if self.method == "dynadiag" else 1.0
        return self.explore

    @property
    def gate(self) -> str | None:
        """The gate of the sparse layers, see `dst_train.sparse.DiagonalLinear`."""
        if self.method != "dynadiag":
            return None
        return "soft" if self.explore == math.inf else "straight_through"

    @model_validator(mode="after")
    def _full_is_of_dynadiag(self) -> Topology:
        if self.explore == math.inf and self.method != "dynadiag":
            raise ValueError(f"explore full belongs to method dynadiag, not to {self.method}; give a number")
        return self


class Split(Strict):
    shards: str
    """WebDataset tar shards, with brace ranges and ${ENV}: `${DATA}/train-{000000..000007}.tar`."""
    samples: Positive
    """Samples in all shards together."""
    transform: Literal["digits", "digits_train", "imagenet_train", "imagenet_eval", "next_byte"]
    """What becomes of a sample: `digits` 28 x 28 grey, `digits_train` with shifts and rotations, `imagenet_*` 224 x 224 RGB, `next_byte` text."""
    length: Positive | None = None
    """For `next_byte`: bytes that the model reads of a sample; each predicts the byte after it."""

    @model_validator(mode="after")
    def _length_of_sequences(self) -> Split:
        if (self.length is None) == (self.transform == "next_byte"):
            raise ValueError(
                f"next_byte needs a length, and no other transform takes one; got transform={self.transform}, length={self.length}"
            )
        return self


class Data(Strict):
    train: Split
    eval: Split | None = None
    num_workers: Count = 0
    """Loader processes per rank."""
    max_bad_samples: Count = 0
    """Undecodable samples, over all ranks and the whole run, that may be replaced by their successor before the job fails."""
    cache_dir: str | None = None
    """Where copies of remote shards are kept, and indexes of shards whose own folder cannot be written."""
    in_memory: bool = False
    """Keep training images decoded in memory, in each loader process its own: for small data sets."""

    @model_validator(mode="after")
    def _one_length(self) -> Data:
        if self.eval is not None and self.eval.length != self.train.length:
            raise ValueError(f"eval.length {self.eval.length} must be train.length {self.train.length}")
        return self


class Train(Strict):
    epochs: Length | None = None
    """Passes over the training samples."""
    steps: Length | None = None
    """Optimiser steps; give either `epochs` or `steps`."""
    batch_size: Positive
    """Global: samples per optimiser step over all ranks."""
    micro_batch_size: Positive
    """Samples per forward pass on one rank."""
    precision: Literal["fp32", "bf16", "bf16_params"] = "bf16"
    """`bf16`: autocast, parameters and optimiser in fp32. `bf16_params`: bf16 parameters with fp32 masters (ZeRO 1 to 3)."""
    clip_grad_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of all gradients together; null: not clipped."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread over all classes."""
    max_skipped_steps: Count = 0
    """Steps with a non-finite loss or gradient that may be skipped in a row before the job fails."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={self.epochs}, steps={self.steps}")
        return self


class Optimizer(Strict):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)]
    """Learning rate after the warm-up, at its largest."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Applied to parameters of two dimensions and more, but for those that timm's `no_weight_decay()` names (position embeddings and
    class tokens of a ViT); biases, norms and other vectors are not decayed."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), strict=False)
    """For adamw."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """For adamw."""
    momentum: Share = 0.9
    """For sgd."""


class Schedule(Strict):
    name: Literal["cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to `min_lr`, or not."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """The learning rate rises linearly over these; a share of an epoch may be given."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0


class ZeroOptimization(Strict):
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What ZeRO partitions: 0 nothing, 1 optimiser states and masters, 2 gradients too, 3 parameters too."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass runs (DeepSpeed's default when absent, as of all below)."""
    reduce_bucket_size: Positive | None = None
    """Elements."""
    allgather_bucket_size: Positive | None = None
    """Elements."""
    stage3_param_persistence_threshold: Count | None = None
    """Parameters up to this many elements stay whole on every rank (DeepSpeed's default when absent)."""


class DeepSpeed(Strict):
    zero_optimization: ZeroOptimization = ZeroOptimization()


class Evaluate(Strict):
    every_epochs: Positive = 1
    """Evaluation also runs once at the end."""


class Checkpoint(Strict):
    every_steps: Positive = 1000
    """A checkpoint is also written at the end."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints kept; at least 2, so that a damaged one is never the only one."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues a run directory that has a checkpoint; `never` refuses to touch one."""


class Monitor(Strict):
    tensorboard: bool = True
    """Write scalars, pictures and histograms for TensorBoard."""
    every_steps: Positive = 50
    """Steps between log lines and scalars."""
    hang_minutes: Annotated[float, Field(gt=0.0)] = 30.0
    """A step, a batch of an evaluation or a checkpoint that takes longer ends the run, and each rank says where it was."""


class Job(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run directory."""
    seed: Seed = 0
    """Of initial values, first units, the order of samples, augmentation and dropout."""
    run_root: str = "runs"
    """Folder of run directories."""
    model: Model
    sparsity: Sparsity | None = None
    """Absent or null: the model stays dense."""
    topology: Topology = Topology()
    data: Data
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    deepspeed: DeepSpeed = DeepSpeed()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _check_conflicts(self) -> Job:
        conflicts = list(self._conflicts())
        if conflicts:
            text = "; ".join(f"{'.'.join(key)}: {problem}" for key, problem in conflicts)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": conflicts})
        return self

    def _conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Keys that do not go together with keys of other sections, and why."""
        stage = self.deepspeed.zero_optimization.stage
        if self.schedule.min_lr > self.optimizer.lr:
            yield (
                ("schedule", "min_lr"),
                f"{self.schedule.min_lr:g} is above optimizer.lr {self.optimizer.lr:g}, from which the rate decays to it",
            )
        if self.topology.method == "dynadiag" and self.optimizer.name != "adamw":
            yield (
                ("topology", "method"),
                f"dynadiag with optimizer.name {self.optimizer.name}: the gradients of alpha have no scale of their own, as only "
                "Adam can take them; use adamw",
            )
        trained = [key for key in ("pretrained", "checkpoint_path") if getattr(self.model, "args", {}).get(key)]
        if trained and self.sparsity is not None:
            yield (
                ("model", "args", trained[0]),
                "sparse layers keep a part of the weights, rescaled as if they were initial values, which is not what was trained; "
                "leave it out, or set sparsity null",
            )
        if self.train.precision == "bf16_params" and stage == 0:
            yield (
                ("train", "precision"),
                "bf16_params with deepspeed.zero_optimization.stage 0 takes a false first optimiser step in DeepSpeed; use stage 1, "
                "2 or 3, or precision bf16",
            )
        if self.train.max_skipped_steps and stage == 0:
            yield (
                ("train", "max_skipped_steps"),
                f"{self.train.max_skipped_steps} with deepspeed.zero_optimization.stage 0: without ZeRO nothing stands between a bad "
                "gradient and the weights; use stage 1, 2 or 3, or max_skipped_steps 0",
            )
