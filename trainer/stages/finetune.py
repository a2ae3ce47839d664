"""Supervised training of an encoder on labels: regression of one or several crystal properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.safe_names import check_names
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.layers.readout import ReadoutHead
from crysforge.models.objectives.property_diffusion import DiffusionReadout
from crysforge.trainer.base.tensors import load_into
from crysforge.trainer.stages.base import STAGES, Saved, Stage, StageConfig, Term

HEADS = ("regression", "linear", "diffusion")
TASKS = ("regression", "classification")


@dataclass(kw_only=True)
class FinetuneConfig(StageConfig):
    """Settings of finetuning; the defaults are the paper's (Section H.1)."""

    epochs: float = 1000
    """Passes over the training crystals; 0 with `init_head` only evaluates."""
    batch_size: int = 32
    lr: float = 1e-3
    grad_clip: float = 0.0
    task: str = "regression"
    """`regression`: squared error of standardised labels. `classification` of labels 0 and 1:
    binary cross entropy; predictions are probabilities of 1."""
    freeze_encoder: bool = False
    """Trains the head alone; the encoder stays as it is, batch statistics too."""
    encoder_lr_scale: float = 1.0
    """Factor on the encoder's learning rate."""
    head: str = "regression"
    """`regression`; `linear`, one layer after the mean over atoms: with `freeze_encoder` the linear
    probe; `diffusion`: the label is denoised from the crystal (CrysDiff; for one target, and
    predictions take some hundred passes of a small head)."""
    patience: int = 0
    """Ends the training after so many validations in a row that brought nothing better; 0 never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            raise ValueError(f"unknown finetune.head {self.head!r}: {nearest(self.head, HEADS)}")
        if self.task not in TASKS:
            raise ValueError(f"unknown finetune.task {self.task!r}: {nearest(self.task, TASKS)}")
        if self.task == "classification" and self.head == "diffusion":
            raise ValueError("finetune.head=diffusion denoises a number: it does not classify")
        if self.patience < 0:
            raise ValueError(f"finetune.patience must not be negative, got {self.patience}")
        if not 0 < self.encoder_lr_scale <= 1000:
            raise ValueError(
                f"encoder_lr_scale must be above 0 and at most 1000, got {self.encoder_lr_scale}; "
                "freeze_encoder=true keeps the encoder as it is"
            )


@STAGES.register("finetune")
class FinetuneStage(Stage):
    """Encoder → mean over atoms → MLP → one number per target.

    Trained with the squared error of standardised labels; missing labels (NaN) count nothing, so
    that targets known for different crystals train together. With the diffusion head, trained with
    the squared error of the noise in a noised label. Classification is trained with the binary
    cross entropy of labels 0 and 1, which are not standardised (mean 0, spread 1), and predicts
    probabilities.

    Terms: `mse` (of standardised labels, over all present labels of all targets) and `mae/<target>`
    in the target's unit; with the diffusion head `noise`, and those only in evaluation; of
    classification `bce` and `accuracy` over all labels, and `mae/<target>` of probabilities. `mean`
    and `std` are buffers: the state dict holds all that predicting in physical units needs.

    Args:
        targets: names of the labels, in the order of the output.
        mean, std: [T] of the training labels, in physical units.

    Raises:
        ValueError: no or repeated targets, statistics of another length or that are not finite,
            a target that does not vary, or several targets for the diffusion head.
    """

    Config = FinetuneConfig
    name = "finetune"
    learns_from_labels = True

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        targets: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        _check_statistics(targets, mean, std)
        self.config = config
        self.encoder = encoder.requires_grad_(not config.freeze_encoder)
        self.readout = _head(config.head, encoder.dim, targets)
        self.targets = tuple(targets)
        self.classifies = config.task == "classification"
        if self.classifies and not (set(mean) == {0} and set(std) == {1}):
            raise ValueError("labels 0 and 1 of a classification are not standardised")
        loss = "noise" if config.head == "diffusion" else "bce" if self.classifies else "mse"
        self.weights = {loss: 1.0}
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32))

    @classmethod
    def from_exported(cls, saved: Saved) -> FinetuneStage:
        scaler = saved.scaler
        if scaler is None:
            raise ValueError(f"{saved.file.parent} has no scaler.json: its run did not finish")
        config = configure(cls.Config, saved.settings, "settings")
        stage = cls(config, saved.new_encoder(), scaler.targets, scaler.mean, scaler.std)
        given = {"mean": stage.mean.clone(), "std": stage.std.clone()}
        load_into(stage, saved.weights(), str(saved.file))
        for name, values in given.items():
            if not torch.equal(getattr(stage, name), values):
                raise ValueError(
                    f"{saved.file.parent / 'scaler.json'} is of another model: its {name} is not "
                    f"the one that {saved.file.name} was trained with"
                )
        return stage

    @property
    def lr_scales(self) -> dict[str, float]:
        """Prefix of parameter names → factor on the learning rate."""
        return {"encoder.": self.config.encoder_lr_scale}

    def train(self, mode: bool = True) -> FinetuneStage:
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def standardised(self, batch: CrystalBatch) -> Tensor:
        """Predictions in units of the training labels' spread, or logits, fp32 [B, T]."""
        return self.readout(self.encoder.nodes(batch), batch).float()

    def predict(self, batch: CrystalBatch) -> Tensor:
        """Predictions in physical units, or probabilities, fp32 [B, T]; needs no labels."""
        found = self.standardised(batch)
        return torch.sigmoid(found) if self.classifies else found * self.std + self.mean

    @property
    def monitor(self) -> str | None:
        """Validation average whose least value's weights are kept."""
        if self.classifies:
            return "bce"
        return f"mae/{self.targets[0]}" if len(self.targets) == 1 else "mse"

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        labels = self.labels(batch)
        present = torch.isfinite(labels)
        target = torch.where(present, (labels - self.mean) / self.std, 0)
        nodes, terms = self.encoder.nodes(batch), dict[str, Term]()
        if self.classifies:
            return self._classified(self.readout(nodes, batch).float(), target, present)
        if isinstance(self.readout, DiffusionReadout):
            losses = self.readout.losses(nodes, target[:, 0], batch) * present[:, 0]
            terms["noise"] = Term(losses.sum(), present.sum().float())
            if self.training:  # sampling would cost more than the step
                return terms
        error = (self.readout(nodes, batch).float() - target) * present
        terms["mse"] = Term(error.square().sum(), present.sum().float())
        absolute = error.detach().abs().sum(0) * self.std
        counts = present.sum(0).float()
        for i, name in enumerate(self.targets):
            terms[f"mae/{name}"] = Term(absolute[i], counts[i])
        return terms

    def _classified(self, logits: Tensor, target: Tensor, present: Tensor) -> dict[str, Term]:
        """Terms of logits for labels 0 and 1, all [B, T]."""
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * present
        right = ((logits.detach() > 0) == (target > 0.5)) & present
        terms = {
            "bce": Term(losses.sum(), present.sum().float()),
            "accuracy": Term(right.sum().float(), present.sum().float()),
        }
        error = ((torch.sigmoid(logits.detach()) - target) * present).abs()
        for i, name in enumerate(self.targets):
            terms[f"mae/{name}"] = Term(error[:, i].sum(), present[:, i].sum().float())
        return terms

    def labels(self, batch: CrystalBatch) -> Tensor:
        """Labels in physical units, NaN where missing, [B, T]. Raises ValueError for a target
        that the data does not have."""
        columns: Mapping[str, Tensor] = batch.targets
        for name in self.targets:
            if name not in columns:
                raise ValueError(f"the data has no target {name!r}: {nearest(name, columns)}")
        return torch.stack([columns[name] for name in self.targets], dim=1)


def _head(name: str, dim: int, targets: Sequence[str]) -> nn.Module:
    if name != "diffusion":
        return ReadoutHead(dim, len(targets), hidden=name == "regression")
    if len(targets) > 1:
        raise ValueError(f"finetune.head=diffusion predicts one target, got {', '.join(targets)}")
    return DiffusionReadout(dim)


def _check_statistics(targets: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"targets must be one or more different names, got {list(targets)}")
    check_names(targets)
    if not len(targets) == len(mean) == len(std):
        raise ValueError(
            f"{len(targets)} targets need as many means and standard deviations, "
            f"got {len(mean)} and {len(std)}"
        )
    for name, m, s in zip(targets, mean, std, strict=True):
        if 0 < s < 1e-30:
            raise ValueError(
                f"target {name!r} cannot be standardised: its training labels differ by {s:.1g} "
                "only; give it in another unit"
            )
        if not (abs(m) < float("inf") and 0 < s < float("inf")):
            raise ValueError(
                f"target {name!r} cannot be standardised: its training labels have mean {m} and "
                f"standard deviation {s}; it needs at least two different finite labels"
            )
