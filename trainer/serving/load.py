"""A model or ensemble from its directory."""

from __future__ import annotations

from pathlib import Path

import torch

from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.serving.ensemble import ENSEMBLE, Ensemble
from crysforge.trainer.serving.generator import Generator, generates
from crysforge.trainer.serving.predictor import Predictor


def load(
    path: str | Path,
    stage: str = "",
    device: str | torch.device = "cpu",
    max_pairs: int = MAX_PAIRS,
) -> Predictor | Ensemble | Generator:
    """The model in a run directory: a finetuned one predicts and embeds, a pretrained one embeds, a
    generative one makes crystals too, an ensemble predicts and says how sure it is.

    Args:
        path: run directory, or that of an exported model or an ensemble.
        stage: of a pretraining run; default its last.
        device: where to run.
        max_pairs: pairs of atoms that are looked at for the graph of one crystal.

    Raises:
        ValueError: no finished model there, or files that are not what a model has.
    """
    if (Path(path) / ENSEMBLE).is_file():
        return Ensemble(path, device, max_pairs)
    exported = open_model(path, stage)
    if generates(exported.stage):
        return Generator(exported, device, max_pairs)
    return Predictor(exported, device, max_pairs)
