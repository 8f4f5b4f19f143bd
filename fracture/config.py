"""The one tree of settings: defaults here are `fracture/configs/default.yaml`; YAML and `--set` are deltas of it.

`docs/configuration.md` is made of this file by `python -m fracture.config_docs`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fracture.errors import UsageError

Positive = Annotated[int, Field(ge=1, strict=True)]
Units = Annotated[int, Field(ge=1, le=16384, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


Backbone = Literal[
    "resnet50",
    "densenet121",
    "mobilenetv2",
    "efficientnetv2b0",
    "efficientnetv2s",
    "convnexttiny",
    "convnextbase",
]
# The values of `model.name`, and the module of fracture.models whose `build` makes each.
MODELS = {"cnn": "cnn"} | dict.fromkeys(get_args(Backbone), "transfer") | {"qnn": "quantum", "qnn_transfer": "transfer"}

_MOST_ACTIVATIONS = 2**30  # bytes of one layer's float32 output for one image
_MOST_STATES = 2**31  # bytes of a circuit's states for all of a worker's images


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Section(Settings):
    """A section of the settings. Each one states whether another value in it makes another model."""

    changes_recipe: ClassVar[bool]

    def __init_subclass__(cls, changes_recipe: bool, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.changes_recipe = changes_recipe


class DataConfig(Section, changes_recipe=True):
    """Making a dataset of images. Another value of any key makes another dataset."""

    image_size: int = Field(224, ge=32, le=1024, description="Side of the square grey image, in pixels.")
    seed: Seed = Field(0, description="Seed of the rows' order, and of which group goes to which split.")
    fracture_labels: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Names of folders, values of a labels file and names of boxes that mean fracture, beside the known "
        "ones.",
    )
    normal_labels: tuple[str, ...] = Field((), strict=False, description="The same for normal.")
    excluded_labels: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Names and values such as `unclear`, whose images are left out and counted.",
    )
    layout: Literal["auto", "folders", "csv", "mura", "fracatlas", "grazpedwri", "yolo", "coco"] = Field(
        "auto",
        description="Where the labels are: `folders` that name a class; `csv`, a labels file; or a public set as it is "
        "downloaded. `auto` finds out.",
    )
    label_key: str = Field(
        "",
        description="Column of the labels file that says which image or study a row is of, where its name does not say "
        "so.",
    )
    max_unmatched_fraction: Fraction = Field(
        0.05, description="Share of the labels file's rows without an image above which preprocessing stops."
    )
    max_unlabelled_fraction: float = Field(
        0.5, ge=0, le=1, description="Share of the images without a row above which preprocessing stops."
    )
    exclude_burned_in: bool = Field(
        False, description="Leave out DICOM images that say that annotations are burnt into their pixels."
    )
    split: Literal["auto", "official", "group", "test"] = Field(
        "auto",
        description="`official` keeps the split found; `group` makes one that no radiograph or patient straddles; "
        "`auto` keeps the split found if it is clean, and makes one otherwise; `test` puts every image into test, to "
        "evaluate a model.",
    )
    folds: Annotated[int, Field(ge=0, le=20)] | Literal["source"] = Field(
        0,
        description="Number of grouped folds, in place of train, val and test; 0 for none. `source` holds out each "
        "hospital or collection in turn: a model of the others is tested on it.",
    )
    val_fraction: float = Field(
        0.15, gt=0, lt=0.5, description="Share of the groups that goes to validation, where a split is made."
    )
    test_fraction: float = Field(
        0.15, gt=0, lt=0.5, description="Share of the groups that goes to test, where a split is made."
    )
    copy_suffix: str = Field(
        r"(-rotated\d+| - Copy| ?\(\d+\)|\.rf\.[0-9a-f]{32})+$",
        description="Regular expression for what copies, those of Roboflow too, add to a file's name. Files of one "
        "name without it are compared less strictly.",
    )
    group_pattern: str = Field(
        "",
        description="Regular expression on the path. Files with the same match, or the same captures, are of one "
        "patient.",
    )
    max_rejected_fraction: Fraction = Field(
        0.05, description="Share of unreadable files above which preprocessing stops."
    )
    rows_per_shard: Positive = Field(512, description="Images in a Parquet file; 512 of 224 pixels are 26 MB.")

    @field_validator("copy_suffix", "group_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str, info: ValidationInfo) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"data.{info.field_name}: {pattern!r} is not a regular expression: {error}. Correct it, or leave it out"
            ) from None
        return pattern

    @model_validator(mode="after")
    def _check_folds(self) -> "DataConfig":
        if self.folds == 1 or self.folds == 2:
            raise ValueError(f"data.folds: {self.folds} folds leave nothing to train on; use 3 or more, or 0 for none")
        if self.folds and self.split == "official":
            raise ValueError("data.folds: folds replace the split found; leave out data.split = official")
        return self


FORMER_COPY_SUFFIX = r"(-rotated\d+| - Copy| ?\(\d+\))+$"  # the default of `data.copy_suffix` in earlier versions
_FORMER_NAMES = {"fracture_folders": "fracture_labels", "normal_folders": "normal_labels"}  # of DataConfig


def rename_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `data` as an earlier version wrote it under today's names."""
    return {_FORMER_NAMES.get(name, name): value for name, value in data.items()}


class SampleConfig(Section, changes_recipe=False):
    """The synthetic radiographs that are generated where no data is named."""

    images: int = Field(600, ge=60, description="Number of images over all three splits.")
    seed: Seed = Field(0, description="Seed of the images.")
    format: Literal["images", "dicom"] = Field(
        "images", description="JPEG and PNG files, or DICOM files in the encodings that hospitals have."
    )


class ModelConfig(Section, changes_recipe=True):
    """The network."""

    name: Literal[*MODELS] = Field("cnn", description="The network.")
    filters: tuple[Units, ...] = Field(
        (64, 128, 256, 512), min_length=1, max_length=6, strict=False, description="Filters of each block of the CNN."
    )
    block: Literal["conv-pool-bn-relu", "conv-bn-relu-pool"] = Field(
        "conv-pool-bn-relu",
        description="Order of the layers in a block. Pooling first quarters the work of the layers after it.",
    )
    head: Literal["pooled", "flatten"] = Field(
        "pooled",
        description="What the dense layers take: the average of each channel (`pooled`), or every activation "
        "(`flatten`).",
    )
    dense: tuple[Units, ...] = Field(
        (256,), max_length=8, strict=False, description="Units of the dense layers before the sigmoid."
    )
    dropout: Fraction = Field(0.5, description="Dropout rate after each dense layer, or before the head.")
    batch_norm: bool = Field(True, description="Put batch normalisation into each block.")
    batch_norm_momentum: Fraction = Field(
        0.9, description="Momentum of the moving averages. 0.99 lags for many epochs on sets of some thousand images."
    )
    sync_batch_norm: bool = Field(
        False, description="Compute batch statistics over all workers. The fused kernel is not used then."
    )


class TransferConfig(Section, changes_recipe=True):
    """Models on a backbone of keras.applications. The head is trained first, on the frozen backbone."""

    weights: str = Field(
        "imagenet",
        min_length=1,
        description="Pretrained weights of the backbone: `imagenet` downloads them; `none` trains all layers from "
        "random weights; a path or URI ending in `.h5` names a file of weights without top, as keras.applications "
        "writes them.",
    )
    pixel_scaling: Literal["imagenet", "radimagenet"] = Field(
        "imagenet",
        description="Scaling of the pixels that the weights were trained with: that of each family's ImageNet weights, "
        "or that of RadImageNet's.",
    )
    pooling: Literal["average", "maximum", "both"] = Field(
        "average",
        description="What the head takes of each channel of the backbone's last layer: its average over positions, its "
        "maximum, or `both`, which is twice as many features.",
    )
    reductions: tuple[Annotated[int, Field(ge=1, le=16, strict=True)], ...] = Field(
        (1,),
        min_length=1,
        max_length=5,
        strict=False,
        description="Factors by which the image is reduced before the backbone, ascending; the features of all are "
        "joined. What is reduced below 224 pixels is enlarged again by a whole factor, where one fits, so that only "
        "its detail is lost.",
    )
    inverted: bool = Field(
        False,
        description="Whether the backbone sees each image inverted, too. Its features are then the mean of both, so "
        "that the model cannot tell a radiograph from its negative.",
    )
    standardise: Literal["all", "source"] = Field(
        "all",
        description="Mean and variance that features are standardised by in head training: of all training images, or "
        "of those of each `source` (hospital, collection), so that the head cannot tell the label by the source.",
    )
    head: Literal["logistic", "ridge"] = Field(
        "logistic",
        description="Head training: logistic regression in steps, or ridge regression (`ridge`) in closed form, its "
        "penalty chosen by grouped folds on training.",
    )
    features: Literal["once", "augmented"] = Field(
        "once",
        description="Features that the head is trained on: computed once for each image and its mirror image "
        "(`augment.horizontal_flip`), or anew for each augmented image.",
    )
    head_epochs: Positive = Field(
        40, description="Most epochs of head training, at the learning rate `training.learning_rate`."
    )
    unfreeze: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0,
        description="Number of last layers of the backbone that are fine-tuned after the head, for `training.epochs` "
        "at most; 0 for none.",
    )
    learning_rate: float = Field(1e-5, gt=0, description="Highest learning rate of fine-tuning.")


class QuantumConfig(Section, changes_recipe=True):
    """The circuit of the models `qnn` and `qnn_transfer`, simulated exactly."""

    qubits: int = Field(
        4, ge=1, le=64, description="Number of qubits; 4 to 8 are usual. Each one more doubles memory and work."
    )
    layers: int = Field(
        3, ge=1, le=64, description="Number of entangling layers; 3 join each pair of 4 qubits in both directions."
    )
    circuit: Literal["quantum", "classical"] = Field(
        "quantum",
        description="`classical` is the control: a map with as many parameters between the same layers.",
    )
    backbone: Backbone = Field("mobilenetv2", description="Backbone of `qnn_transfer`.")


def circuit_bytes(qubits: int, layers: int) -> int:
    """Return the bytes of one image's states, in float32, that training keeps for the gradient."""
    state = 2 * 4 * 2**qubits  # real and imaginary parts
    return state * (layers * (qubits + 2) + 2)  # before each RY and two RZ of a layer; after embedding and at the end


class AugmentConfig(Section, changes_recipe=True):
    """Changes of training images: one affine transform that flips, rotates, zooms, stretches and shifts; exposure."""

    horizontal_flip: bool = Field(True, description="Mirror half of the images left to right.")
    vertical_flip: bool = Field(False, description="Mirror half of the images top to bottom.")
    rotation_degrees: float = Field(20.0, ge=0, le=180, description="Angle x in degrees: uniform in [-x, x].")
    zoom: float = Field(0.25, ge=0, lt=1, description="Scale x: uniform in [1-x, 1+x].")
    stretch: float = Field(0.2, ge=0, lt=1, description="Ratio x of width to height: uniform in [1-x, 1+x].")
    shift: float = Field(0.1, ge=0, lt=1, description="Shift x in each direction: uniform in [-x, x] of the side.")
    exposure: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Exposure x: contrast is uniform in [1-x, 1+x] about mid-grey, brightness in [-x/2, x/2] of white.",
    )


class TrainingConfig(Section, changes_recipe=True):
    """The training loop."""

    epochs: Positive = Field(8, description="Most epochs.")
    batch_size: Positive = Field(32, description="Global batch size, which is divided among the workers.")
    sampling: Literal["source", "radiograph", "image"] = Field(
        "radiograph",
        description="What is seen equally often in training: each class of each source, and its radiographs "
        "(`source`); each class and its radiographs (`radiograph`); or each image.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate of Adam.")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="Schedule of the learning rate; `cosine` goes down to 0 at the last epoch."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay, as in AdamW.")
    label_smoothing: Fraction = Field(0.05, description="Label smoothing of the training loss.")
    patience: Positive = Field(5, description="Epochs without a lower validation loss after which training stops.")
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="Keras' precision policy; `auto` takes the fastest that the hardware computes natively."
    )
    xla: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compile each worker's part of a training step with XLA; `auto` does so on GPUs, except with "
        "`model.sync_batch_norm`, which XLA cannot compile.",
    )
    seed: Seed = Field(0, description="Seed of initial weights, shuffling, augmentation and dropout.")

    @field_validator("xla", mode="before")
    @classmethod
    def _name_boolean(cls, value: Any) -> Any:
        """Take the booleans of earlier versions, which stand in their bundles too; XLA by auto-clustering is gone."""
        return ("auto" if value else "never") if isinstance(value, bool) else value


class EvaluationConfig(Section, changes_recipe=True):
    """The choice of the operating point on validation, after training, and what a study's probability is."""

    threshold_rule: Literal["sensitivity", "youden", "given"] = Field(
        "sensitivity",
        description="Rule for the threshold: the highest with `min_sensitivity` (`sensitivity`), the one with the "
        "largest Youden index (`youden`), or `threshold` (`given`).",
    )
    min_sensitivity: float = Field(
        0.95, gt=0, le=1, description="Least sensitivity on validation, for the rule `sensitivity`."
    )
    min_specificity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Least specificity on validation from which the outcome is `fracture`; between the threshold and "
        "that it is `doubt`.",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="The threshold, for the rule `given`.")
    usable_auc: float = Field(
        0.8,
        ge=0.5,
        lt=1,
        description="AUC per radiograph above which the whole interval must lie for `fracture evaluate` to call the "
        "model usable on other radiographs.",
    )
    study_probability: Literal["max", "mean"] = Field(
        "max", description="A study's probability: the largest of its radiographs', or their mean."
    )


class CheckpointConfig(Section, changes_recipe=False):
    """Checkpoints of the training state."""

    every_minutes: float = Field(
        10.0,
        gt=0,
        description="Minutes between checkpoints inside an epoch. The end of each epoch is a checkpoint too.",
    )


class RecoveryConfig(Section, changes_recipe=False):
    """Recovery of a run when machines fail."""

    max_failures: int = Field(
        3, ge=0, description="Restarts in a row, without a checkpoint between them, after which the run gives up."
    )
    stuck_seconds: Annotated[float, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Seconds without a group of steps after which a worker counts as stuck; `auto` is ten times the "
        "slowest, and at least 300.",
    )
    grace_seconds: float = Field(
        20.0, ge=0, description="Seconds for a last checkpoint after SIGTERM or Ctrl-C; Kubernetes grants 30 in all."
    )
    wait_minutes: float = Field(
        60.0, gt=0, description="Minutes to wait for machines that hold the workers before the run gives up."
    )


class ComputeConfig(Section, changes_recipe=False):
    """Workers and what each of them has."""

    workers: Positive = Field(2, description="Number of workers; the most, where `min_workers` is set.")
    min_workers: Positive | None = Field(
        None,
        description="Least number of workers to go on with when machines are lost, until there are more again; null "
        "waits for all.",
    )
    cpus_per_worker: Positive = Field(1, description="CPU cores of each worker.")
    image_memory_gb: float = Field(
        4.0,
        gt=0,
        description="Gigabytes of images that a worker holds in memory; 10,000 of 224 pixels are 0.5 GB. With more, "
        "they go to a file on its disk.",
    )
    gpu: bool = Field(False, description="Give each worker one GPU.")

    @property
    def fewest(self) -> int:
        """Return the number of workers below which a run waits."""
        return self.min_workers or self.workers


class GateConfig(Section, changes_recipe=False):
    """Requirements for promoting a retrained model; figures per radiograph, on test."""

    min_radiographs: Positive = Field(
        20, description="Least radiographs of each class in the test on which both models are compared."
    )
    min_auc: float = Field(0.75, ge=0, le=1, description="Least AUC.")
    auc_margin: float = Field(0.03, ge=0, le=1, description="How far the AUC may lie below that of the model in use.")
    min_sensitivity: float = Field(0.85, ge=0, le=1, description="Least sensitivity at the model's own threshold.")
    min_specificity: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Least specificity at the model's own threshold, which is chosen for sensitivity.",
    )
    specificity_margin: float = Field(
        0.2,
        ge=0,
        le=1,
        description="How far the specificity may lie below that of the model in use. It varies more than the AUC, "
        "since each model's threshold comes from validation.",
    )
    confidence: float = Field(
        0.9,
        gt=0.5,
        lt=1,
        description="Confidence that AUC and specificity do not lie further below than their margins.",
    )
    max_calibration_error: float = Field(
        0.2, ge=0, le=1, description="Highest expected calibration error. With few radiographs it is higher by chance."
    )
    max_doubt: Fraction = Field(0.8, description="Highest share of radiographs in doubt, between both thresholds.")
    max_left_test: Fraction = Field(
        0.1,
        description="Highest share of the champion's test that is no longer in test: removed, unreadable, under both "
        "labels, or joined to others.",
    )
    max_conflicts: Fraction = Field(
        0.02, description="Highest share of the new radiographs under both labels, or under another than before."
    )
    max_drift: float = Field(
        0.4,
        gt=0,
        le=1,
        description="Largest Kolmogorov-Smirnov distance of the new radiographs from the earlier ones, and largest "
        "change of the share of fractures.",
    )
    min_agreement: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Least AUC of the model in use on the new radiographs. Labels that are swapped give less.",
    )


Range = dict[str, list[Any]]  # one kind of distribution, and its bounds or values
_DISTRIBUTIONS = ("uniform", "loguniform", "choice")


class TuneConfig(Section, changes_recipe=False):
    """The search for better settings, `fracture tune`."""

    trials: Positive = Field(12, description="Number of trials. The first has the settings as they are.")
    concurrent: Positive | None = Field(
        None, description="Most trials at a time; null takes as many as there is room for."
    )
    grace_epochs: Positive = Field(2, description="Epochs that every trial trains before it may be stopped early.")
    reduction_factor: int = Field(
        3,
        ge=2,
        description="At `grace_epochs`, and at each multiple by this factor, the best one in this many trials goes on.",
    )
    space: dict[str, Range] = Field(
        {
            "training.learning_rate": {"loguniform": [0.0003, 0.01]},
            "training.weight_decay": {"loguniform": [0.001, 0.1]},
            "model.dropout": {"uniform": [0.2, 0.6]},
            "model.dense": {"choice": [[128], [256]]},
            "augment.rotation_degrees": {"uniform": [5.0, 30.0]},
        },
        description="Settings that are searched, each with `{uniform: [least, most]}`, `{loguniform: [least, most]}` "
        "or `{choice: [one, another, ...]}`.",
    )

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: dict[str, Range]) -> dict[str, Range]:
        return {key: _checked_range(f"tune.space: {key}", range_) for key, range_ in space.items()}


def _checked_range(name: str, range_: Range) -> Range:
    if len(range_) != 1 or not range_.keys() <= set(_DISTRIBUTIONS):
        raise ValueError(f"{name} has {', '.join(range_) or 'nothing'}; give one of {', '.join(_DISTRIBUTIONS)}")
    ((kind, values),) = range_.items()
    if kind == "choice":
        if not values:
            raise ValueError(f"{name}: a choice of nothing; list the values")
        return {kind: values}
    if len(values) != 2 or not all(type(bound) in (int, float) and isfinite(bound) for bound in values):
        raise ValueError(f"{name}: {kind} of {values!r}; give the least and the most, two numbers")
    least, most = map(float, values)
    if least >= most or (kind == "loguniform" and least <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ValueError(f"{name}: {kind} of {values!r}; the least comes first, below the most{above}")
    return {kind: [least, most]}


class RegistryConfig(Section, changes_recipe=False):
    """The registry of trained models."""

    keep: Positive = Field(
        5, description="Number of newest versions and runs that are kept, beside every version that was ever in use."
    )


class Config(Settings):
    """All settings."""

    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig = TransferConfig()
    quantum: QuantumConfig = QuantumConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    tune: TuneConfig = TuneConfig()

    def recipe(self) -> dict[str, Any]:
        """Return the settings that make a model what it is, as plain values."""
        return self.model_dump(mode="json", include={name for name, section in self if section.changes_recipe})

    @property
    def uses_xla(self) -> bool:
        """Return whether XLA compiles the training step."""
        if self.training.xla == "auto":
            return self.compute.gpu and not self.model.sync_batch_norm
        return self.training.xla == "always"

    @property
    def backbone(self) -> Backbone | None:
        """Return the name of the network in keras.applications that the model is built on, if it is."""
        if self.model.name == "qnn_transfer":
            return self.quantum.backbone
        return self.model.name if self.model.name in get_args(Backbone) else None

    @property
    def pretrained(self) -> bool:
        """Return whether training begins with pretrained weights of a backbone."""
        return self.backbone is not None and self.transfer.weights != "none"

    @property
    def without_effect(self) -> set[str]:
        """Return the settings that this model or its way of training does not read, such as "model.dense"."""
        quantum = self.model.name in ("qnn", "qnn_transfer")
        idle = {"quantum": set() if quantum else {*QuantumConfig.model_fields}}
        if self.backbone is None:
            idle |= {"transfer": {*TransferConfig.model_fields}, "model": {"head", "dense"} if quantum else set()}
            idle["quantum"] |= {"backbone"}
        else:
            idle["model"] = {"filters", "block", "head", "dense", "batch_norm", "sync_batch_norm"}
            if not self.pretrained:
                idle["transfer"] = {*TransferConfig.model_fields} - {
                    *("weights", "pixel_scaling", "pooling", "reductions", "inverted")
                }
            elif not self.transfer.unfreeze:
                idle |= {"transfer": {"learning_rate"}, "training": {"epochs"}}
                if self.transfer.head == "ridge":
                    idle["training"] |= {"learning_rate", "schedule", "weight_decay", "label_smoothing", "patience"}
                    idle["model"] |= {"dropout"}
                if self.transfer.features == "once":
                    idle["augment"] = {*AugmentConfig.model_fields} - {"horizontal_flip"}
            if self.pretrained and self.transfer.head == "ridge":
                idle["transfer"] = {*idle.get("transfer", ()), "head_epochs"}
        return {f"{section}.{name}" for section, names in idle.items() for name in names}

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        if self.backbone is None:
            self._check_filters()
        else:
            self._check_transfer()
        if self.model.name.startswith("qnn") and self.quantum.circuit == "quantum":
            self._check_circuit()
        if self.training.xla == "always" and self.model.sync_batch_norm:
            raise ValueError(
                "training.xla: always cannot compile model.sync_batch_norm, whose sums over the workers lie inside the "
                "network; use auto or never, or model.sync_batch_norm = false"
            )
        if self.compute.workers > self.training.batch_size:
            raise ValueError(
                f"compute.workers: {self.compute.workers} workers cannot share a global training.batch_size of "
                f"{self.training.batch_size}; each needs at least one image a step"
            )
        if self.compute.fewest > self.compute.workers:
            raise ValueError(
                f"compute.min_workers: {self.compute.min_workers} is more than compute.workers, "
                f"{self.compute.workers}; it is the least to go on with"
            )
        if self.model.sync_batch_norm and not self.model.batch_norm:
            raise ValueError("model.sync_batch_norm: needs model.batch_norm; set it to true, or drop this key")
        return self

    def _check_circuit(self) -> None:
        qubits, layers, images = self.quantum.qubits, self.quantum.layers, self.training.batch_size
        each = -(-images // self.compute.fewest)  # of a worker
        needed = circuit_bytes(qubits, layers) * each
        if needed > _MOST_STATES:
            smaller = ", or a smaller training.batch_size" if needed / each <= _MOST_STATES else ""
            raise ValueError(
                f"quantum.qubits: {qubits} qubits in {layers} layers take {needed / 2**30:,.1f} GB for a worker's "
                f"{each} images of a step, over the limit of {_MOST_STATES / 2**30:.0f}; use fewer{smaller}"
            )

    def _check_transfer(self) -> None:
        transfer = self.transfer
        for name, value in (("head", "ridge"), ("standardise", "source")):
            if getattr(transfer, name) == value and (transfer.features == "augmented" or not self.pretrained):
                raise ValueError(
                    f"transfer.{name}: {value} needs the features of a pretrained backbone, computed once; use "
                    "transfer.features = once and transfer.weights other than none"
                )
        if transfer.head == "ridge" and self.model.name == "qnn_transfer":
            raise ValueError("transfer.head: ridge cannot train a circuit; use logistic with model.name = qnn_transfer")
        reductions, size = self.transfer.reductions, self.data.image_size
        if list(reductions) != sorted(set(reductions)):
            raise ValueError(
                f"transfer.reductions: {list(reductions)} do not ascend; name each factor once, the smallest first"
            )
        for reduction in reductions:
            if size % reduction:
                raise ValueError(
                    f"transfer.reductions: {reduction} does not divide data.image_size, {size}; use factors that do"
                )

    def _check_filters(self) -> None:
        smallest = 2 ** len(self.model.filters)
        if self.data.image_size < smallest:
            raise ValueError(
                f"model.filters: {len(self.model.filters)} poolings need data.image_size of at least {smallest}"
            )
        for number, filters in enumerate(self.model.filters):
            needed = (self.data.image_size >> number) ** 2 * filters * 4
            if needed > _MOST_ACTIVATIONS:
                raise ValueError(
                    f"model.filters: {filters} filters at {self.data.image_size >> number} pixels take "
                    f"{needed / 2**30:.1f} GB for one image, over the limit of {_MOST_ACTIVATIONS / 2**30:.0f}; use "
                    "fewer, or a smaller data.image_size"
                )


def load_config(path: str | Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Return the defaults with the YAML file at `path`, and then each `key.subkey=value`, laid on top.

    Raises:
        UsageError: unknown key, wrong type or impossible value; names the key, the value and what is allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        _merge(tree, read_yaml(Path(path)))
    for assignment in assignments:
        _merge(tree, _parse_assignment(assignment))
    return _validated(tree)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the settings with others, each named `section.key`, laid on top.

    Raises:
        UsageError: as `load_config`.
    """
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        _merge(tree, _nest(key.split("."), value))
    return _validated(tree)


def _validated(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(e) for e in error.errors())) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their names: `{"a": {"b": 1}}` gives `("a.b", 1)`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path, flag: str = "--config") -> dict[str, Any]:
    """Read the mapping in the file at `path`, which `flag` named.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(beside)}." if beside else ""
        raise UsageError(f"{flag} {path}: no such file.{hint}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{flag} {path}: must hold settings such as 'training: {{epochs: 3}}', holds {tree!r}")
    return tree


def _parse_assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: must be KEY=VALUE, for example training.epochs=3")
    keys = key.strip().split(".")
    is_list = get_origin(_kind_at(keys)) is tuple
    brackets = is_list and not value.lstrip().startswith("[")  # people type a list of one, and others, without them
    try:
        return _parse_yaml(f"[{value}]" if brackets else value, keys)
    except yaml.YAMLError:
        hint = f". Write a list in brackets, and all in quotes: --set '{'.'.join(keys)}=[A, B]'" if is_list else ""
        raise UsageError(f"--set {text!r:.200}: {value!r:.200} is not readable as YAML{hint}") from None


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` for the keys `a` and `b` and the value 1."""
    for key in reversed(keys):
        value = {key: value}
    return value


class _Loader(yaml.SafeLoader):
    """A loader that takes only `true` and `false` for booleans, and 1e-3 for a number, as YAML 1.2 has it.

    YAML 1.1, which PyYAML reads, takes `no`, `off` and `y` for booleans, 1:30 for 90, and 1e-3 for text.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_PLAIN = {  # values that are not text: tag -> pattern
    "tag:yaml.org,2002:bool": "true|True|false|False",
    "tag:yaml.org,2002:int": "[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
    "tag:yaml.org,2002:null": "~|null|",
}
for _tag, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"({_pattern})$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), None)


def _parse_yaml(text: str, keys: Sequence[str] = ()) -> Any:
    """Parse settings, or the value of one whose keys are given; where a setting is text, it is kept as written.

    Raises:
        yaml.YAMLError: it is no YAML, holds more than plain values, or is nested too deeply.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _keep_text(node, _kind_at(keys))
        value = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # Python's, of a number with thousands of digits
        raise yaml.YAMLError(str(error).partition(";")[0]) from None
    finally:
        loader.dispose()
    return _nest(keys, value) if keys else value


def _kind_at(keys: Sequence[str]) -> Any:
    """Return the type of the setting that the keys lead to; None where there is no such setting."""
    kind: Any = Config
    for key in keys:
        kind = _kind_of(kind, key)
    return kind


def _kind_of(section: Any, key: str) -> Any:
    """Return the type of a section's setting; None where there is no such setting."""
    fields = getattr(section, "model_fields", {})
    return fields[key].annotation if key in fields else None


def _keep_text(node: yaml.Node | None, kind: Any) -> None:
    """Mark values such as 7 and `true` as text where the setting is text: a folder may have such a name."""
    if kind is None:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                _keep_text(value, _kind_of(kind, key.value))
    elif isinstance(node, yaml.SequenceNode) and get_origin(kind) is tuple:
        for item in node.value:
            _keep_text(item, get_args(kind)[0])
    elif isinstance(node, yaml.ScalarNode) and kind is str and node.value and node.tag in _PLAIN:
        node.tag = "tag:yaml.org,2002:str"


def _merge(tree: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "space":  # which is one value
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(error: Mapping[str, Any]) -> str:
    # Where a setting may be of two kinds, pydantic adds the kind to its location, and has an error for each.
    kinds = ("constrained-int", "constrained-float", "literal[")
    parts = [part for part in error["loc"] if not str(part).startswith(kinds)]
    location = [part for part in parts if isinstance(part, str)]
    key = ".".join(map(str, parts))
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = [".".join([*location[:-1], name]) for name in get_close_matches(location[-1], known, n=1)]
        near += [name for name, _ in flatten(Config().model_dump()) if name.endswith(f".{location[-1]}")]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown setting {key!r} = {error['input']!r}.{hint} Allowed here: {', '.join(known)}."
    if error["type"] == "value_error":  # a rule across several keys, which names them itself
        return str(error["ctx"]["error"])
    if error["type"] == "model_type":
        known = ", ".join(_known_keys(location))
        return f"setting {key!r} = {error['input']!r} is not possible: {key} is a section; it holds {known}."
    if error["type"] == "tuple_type":
        return f"setting {key!r} = {error['input']!r} is not possible: it is a list; write it in brackets, [A, B]."
    return f"setting {key!r} = {error['input']!r} is not possible: {error['msg'].lower()}."


def _known_keys(location: Sequence[str]) -> list[str]:
    settings: Any = Config
    for part in location:
        settings = settings.model_fields[part].annotation
    return list(settings.model_fields)
