"""Samples pushed by what a finetuned model predicts of them."""

from __future__ import annotations

import torch
from torch import Tensor

from crysforge.datapipe.common.names import nearest
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders.cspnet import CSPEncoder
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.rows import Packing
from crysforge.models.layers.readout import ReadoutHead
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.generation.config import GuidanceConfig
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.stages.base import Stage
from crysforge.trainer.stages.finetune import FinetuneStage
from crysforge.trainer.stages.generative.ab_initio import AbInitioStage
from crysforge.trainer.stages.generative.csp import CSPStage


def guidance(config: GuidanceConfig, maker: Stage) -> Guidance:
    """The push that is asked for, on samples of a generative stage.

    The property is that of the noisy crystal, as the model, which has learned from clean ones, sees
    it; so the push grows from nothing at level 1 to its full strength at level 0.

    Raises:
        ValueError: a model whose predictions have no gradient with respect to coordinates and
            lattice, or a stage whose samples have none.
    """
    if type(maker) not in (CSPStage, AbInitioStage):
        raise ValueError(f"samples of stage {maker.name!r} cannot be guided: they are latents")
    assert isinstance(maker, CSPStage)
    model, column = _property(config)
    property_of = _Property(model.to(maker.coords_head.weight.device), column, maker)

    def energy(state: dict[str, Tensor], level: Tensor, where: Packing) -> Tensor:
        value = property_of(state, where)  # in units of the labels' spread
        if config.value is not None:
            goal = (config.value - model.mean[column]) / model.std[column]
            value = (value - goal).square() / 2
        sign = -1.0 if config.direction == "up" else 1.0
        return sign * (1 - level) * value

    return Guidance(energy, config.strength, ("coords", "lattice"))


def _property(config: GuidanceConfig) -> tuple[FinetuneStage, int]:
    exported = open_model(config.checkpoint)
    stage = exported.build_stage() if exported.finetuned else None
    if not isinstance(stage, FinetuneStage) or not isinstance(stage.encoder, CSPEncoder):
        raise ValueError(
            f"guidance.checkpoint={config.checkpoint} is no finetuned cspnet: other encoders see a "
            "graph, and have no gradient with respect to coordinates"
        )
    if not isinstance(stage.readout, ReadoutHead):
        raise ValueError("guidance needs finetune.head=regression or linear")
    if not config.target and len(stage.targets) > 1:
        raise ValueError(f"give guidance.target, one of {', '.join(stage.targets)}")
    target = config.target or stage.targets[0]
    if target not in stage.targets:
        raise ValueError(f"unknown guidance.target {target!r}: {nearest(target, stage.targets)}")
    return stage.requires_grad_(False), stage.targets.index(target)


class _Property:
    """What a model predicts of a state."""

    def __init__(self, model: FinetuneStage, column: int, maker: CSPStage) -> None:
        assert isinstance(model.encoder, CSPEncoder) and isinstance(model.readout, ReadoutHead)
        self.encoder, self.readout = model.encoder, model.readout
        self.column, self.maker = column, maker
        kinds = {self.encoder.config.lattice, maker.encoder.config.lattice}
        if len(kinds) > 1:
            raise ValueError("guidance needs a model with the same encoder.lattice")

    def __call__(self, state: dict[str, Tensor], where: Packing) -> Tensor:
        """[B], standardised."""
        own, encoder = self.maker.encoder, self.encoder
        lattice = state["lattice"] * own.lattice_std + own.lattice_mean
        lattice = (lattice - encoder.lattice_mean) / encoder.lattice_std
        numbers = self.maker.numbers(state, ())
        layout = PairLayout.of(where.batch, where.ptr, where.sizes)
        level = torch.zeros_like(lattice[:, 0])
        nodes = encoder.embed(numbers)
        latents = encoder.denoise(nodes, state["coords"], lattice, level, layout)
        out: Tensor = self.readout.of_means(crystal_mean(latents, where.ptr))
        return out[:, self.column]
