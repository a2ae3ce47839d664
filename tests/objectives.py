"""Every pretraining objective with tiny settings, and batches for it."""

from __future__ import annotations

import torch

from crysforge.datapipe.crystals.crystal import crystal_key
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.loading.worker import LASTING
from crysforge.models.denoisers.cspnet import CSPNetConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.stages.base import STAGES

SMALL = CSPNetConfig(width=16, layers=2, frequencies=4)
OBJECTIVES = {
    "dpf": ("dpf", {}),
    "dpf displacement": ("dpf", {"position_target": "displacement"}),
    "dpf released": ("dpf", {"noise": "released", "position_noise": 0.3, "lattice_noise": 0.3}),
    "crysxpp": ("crysxpp", {}),
    "crysgnn": ("crysgnn", {}),
    "barlow": ("crystal_twins", {"mask_ratio": 0.3, "shift": 0.3}),
    "simsiam": ("crystal_twins", {"variant": "simsiam"}),
    "crysdiff": ("crysdiff", {"denoiser": SMALL, "timesteps": 50}),
}


def make(objective, encoder="pddformer"):
    torch.manual_seed(0)
    name, settings = OBJECTIVES[objective]
    cls = STAGES[name]
    return cls(cls.Config(**settings), build_encoder({"name": encoder, "tiny": True}))


def collate(stage, crystals, epoch=0):
    """The batch a loader would make for the stage."""
    keys = [[crystal_key(7, e, c.id) for e in (epoch, LASTING)] for c in crystals]
    samples = [Sample.clean(c, *pair) for c, pair in zip(crystals, keys, strict=True)]
    return build(samples, stage.encoder.graph, transform=stage.transform())
