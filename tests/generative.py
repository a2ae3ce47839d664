"""Every generative stage with tiny settings."""

from __future__ import annotations

import torch

from crysforge.models.encoders import build_encoder
from crysforge.models.generative.sampler import SamplingConfig
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.made import Wanted

FLOW = SamplingConfig(steps=6, anneal={"coords": 5.0})
NOISY = SamplingConfig(steps=10, method="ancestral", corrector=0.2)
PRESETS = {
    "csp_flow": ("csp", {}, {"sampling": FLOW}),
    "diffcsp": (
        "csp",
        {"lattice": "matrix"},
        {
            "coords": "wrapped_gaussian",
            "lattice": "gaussian",
            "timesteps": 20,
            "sampling": NOISY,
        },
    ),
    "ab_initio": (
        "ab_initio",
        {"lattice": "matrix", "elements": "vector"},
        {"timesteps": 20, "sampling": NOISY},
    ),
    "masked": (
        "ab_initio",
        {"elements": "vector"},
        {"types": "masked", "coords": "torus_linear", "lattice": "linear", "sampling": FLOW},
    ),
}


def make(preset):
    torch.manual_seed(0)
    name, encoder, settings = PRESETS[preset]
    cls = STAGES[name]
    return cls(cls.Config(**settings), build_encoder({"name": "cspnet", "tiny": True, **encoder}))


def wanted(stage, sizes=(3, 1, 4, 2), first=0):
    """Requests that the stage can answer."""
    chooses = stage.name != "csp"
    return [
        Wanted(
            name=f"w{i}",
            key=1000 + 7 * i,
            numbers=() if chooses else tuple(range(11, 11 + n)),
            atoms=n if chooses else 0,
        )
        for i, n in enumerate(sizes, start=first)
    ]
