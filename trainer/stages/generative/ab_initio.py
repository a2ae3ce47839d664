"""Crystals from nothing: elements, coordinates and lattice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.generative.diffusions import GaussianDiffusion
from crysforge.models.generative.flows import MaskedDiscrete
from crysforge.models.generative.process import FieldProcess
from crysforge.models.generative.sampler import Fields, SamplingConfig
from crysforge.trainer.stages.base import STAGES, Saved
from crysforge.trainer.stages.generative.csp import CSPConfig, CSPStage
from crysforge.trainer.stages.made import Wanted, drawn_sizes

TYPES = ("gaussian", "masked")


@dataclass(kw_only=True)
class AbInitioConfig(CSPConfig):
    """Settings of generation; the defaults are DiffCSP's."""

    coords: str = "wrapped_gaussian"
    lattice: str = "gaussian"
    types: str = "gaussian"
    """Process of the elements: `gaussian` noise on their one-hot vectors (DiffCSP), or `masked`:
    hidden, and uncovered one by one."""
    coords_weight: float = 1.0
    lattice_weight: float = 1.0
    types_weight: float = 20.0
    """Weight of the elements' error; 1 suits `masked`."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(steps=1000, method="ancestral", corrector=0.2)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.types not in TYPES:
            raise ValueError(f"unknown process types={self.types!r}: {nearest(self.types, TYPES)}")
        if not self.types_weight > 0:
            raise ValueError(f"types_weight must be positive, got {self.types_weight}")


@STAGES.register("ab_initio")
class AbInitioStage(CSPStage):
    """`CSPStage` whose elements are a third field, `types`: [A, channels] or hidden numbers [A].

    Raises:
        ValueError: also an encoder whose elements are known.
    """

    Config = AbInitioConfig
    name = "ab_initio"
    config: AbInitioConfig

    def __init__(self, config: AbInitioConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        if self.trunk.config.elements != "vector":
            raise ValueError(f"stage {self.name} needs encoder.elements=vector")
        self.types_head = nn.Linear(self.trunk.dim, self.channels)
        self.weights: Mapping[str, float] = {**self.weights, "types": config.types_weight}

    @property
    def channels(self) -> int:
        """Numbers of `types`, one for each element."""
        return self.trunk.config.channels

    def types_process(self) -> FieldProcess:
        if self.config.types == "gaussian":
            return GaussianDiffusion(self.channels, self.config.timesteps)
        return MaskedDiscrete(self.channels)

    def take(self, before: Saved) -> None:
        super().take(before)
        if before.stage == self.name:
            self.types_head.load_state_dict(before.weights("types_head."))

    def clean(self, batch: CrystalBatch) -> Fields:
        out = super().clean(batch)
        if self.config.types == "gaussian":
            one_hot = F.one_hot(batch.numbers - 1, self.channels)
            out["types"] = one_hot.to(batch.frac_coords.dtype)
        return out

    def predict_types(self, latents: Tensor) -> Fields:
        return {"types": self.types_head(latents)}

    def sizes(self, keys: Tensor) -> list[int]:
        return drawn_sizes(self.seen_atoms, keys)

    def check_wanted(self, wanted: Sequence[Wanted]) -> None:
        if any(w.numbers for w in wanted):
            raise ValueError(
                f"stage {self.name} chooses elements itself: for a formula take a model of stage "
                "csp"
            )
        if not all(w.atoms for w in wanted):
            raise ValueError("a cell needs at least one atom")

    def given(self, wanted: Sequence[Wanted], device: torch.device) -> Fields:
        return {}

    def allow(self, predictions: Fields, wanted: Sequence[Wanted]) -> Fields:
        if self.config.types == "gaussian":
            return predictions
        return {**predictions, "types": only_allowed(predictions["types"], wanted)}

    def numbers(self, state: Fields, wanted: Sequence[Wanted]) -> Tensor:
        types = state["types"]
        if self.config.types == "masked":
            return types
        return only_allowed(types, wanted).argmax(1) + 1


def only_allowed(scores: Tensor, wanted: Sequence[Wanted]) -> Tensor:
    """Scores of elements [A, channels], minus infinity for those that an atom may not be."""
    if not any(w.elements for w in wanted):
        return scores
    barred = torch.zeros(scores.shape, dtype=torch.bool)
    atom = 0
    for one in wanted:
        if one.elements:
            allowed = torch.tensor(one.elements) - 1
            barred[atom : atom + len(one)] = True
            barred[atom : atom + len(one), allowed] = False
        atom += len(one)
    return scores.masked_fill(barred.to(scores.device), -torch.inf)
