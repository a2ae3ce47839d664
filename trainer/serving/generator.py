"""A generative model as a Python object: a formula in, structures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.models.generative.sampler import SamplingConfig, check
from crysforge.trainer.generation.config import numbers_of, parse_units
from crysforge.trainer.generation.ranking import ranked
from crysforge.trainer.generation.request import Asked, chunks, of_formula, of_nothing, outside
from crysforge.trainer.generation.work import unless_absurd
from crysforge.trainer.runs.model_directory import Exported
from crysforge.trainer.serving.predictor import Predictor
from crysforge.trainer.stages.base import STAGES, Stage


def generates(stage: str) -> bool:
    """Whether a stage makes crystals."""
    return stage in STAGES and STAGES[stage].draw is not Stage.draw


class Generator(Predictor):
    """Makes crystals with a generative model, and embeds with its trunk."""

    def __init__(
        self,
        exported: Exported,
        device: str | torch.device = "cpu",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        super().__init__(exported, device, max_pairs)
        self._exported = exported

    @cached_property
    def maker(self) -> Stage:
        """The stage that makes crystals."""
        return self._exported.build_stage().to(self.device)

    def generate(
        self,
        formula: str = "",
        samples: int = 20,
        *,
        z: int | str = 1,
        n: int = 0,
        atoms: int | None = None,
        elements: Sequence[str] = (),
        seed: int = 0,
        sampling: Mapping[str, Any] | None = None,
        max_atoms: int = 2048,
        rank: bool = True,
        force: bool = False,
    ) -> list[Any]:
        """pymatgen structures of a formula, those that most samples agree on first; or `n` whose
        elements the model chooses. Arguments are the settings of `GenerateConfig`.

        Args:
            rank: whether samples are compared with each other; else they come as they were drawn.

        Raises:
            ValueError: no formula, one that the model cannot make, or (without `force`) elements
                or sizes that it has not learned from.
        """
        if bool(formula) == bool(n):
            raise ValueError("give a formula, or n=N crystals of the model's choice")
        if formula:
            asked = of_formula(formula, parse_units(str(z)), samples, seed)
        else:
            asked = of_nothing(self.maker, n, atoms, numbers_of(elements), seed)
        self.require_known(asked, force)
        settings = self.sampling(sampling or {})
        found: dict[str, Crystal | BadCrystal] = {}
        for chunk in chunks(asked, max_atoms):
            drawn = self.maker.draw([a.wanted for a in chunk], settings)
            found |= {
                a.wanted.name: c for a, c in zip(chunk, map(unless_absurd, drawn), strict=True)
            }
        made = [(a, found[a.wanted.name]) for a in asked]
        good = [(a, c) for a, c in made if isinstance(c, Crystal)]
        if rank and formula:
            return [r.crystal.to_pymatgen() for r in ranked(good)]
        return [c.to_pymatgen() for _, c in good]

    def require_known(self, asked: Sequence[Asked], force: bool = False) -> None:
        """Raises ValueError naming what of it the model has not learned from, unless `force`."""
        known = self.trained_on
        unlike = [] if force else list(outside(asked, known.elements, known.atoms))
        if unlike:
            raise ValueError(
                f"the model has not learned from {', '.join(unlike)}: force=true tries it anyway"
            )

    def sampling(self, changed: Mapping[str, Any]) -> SamplingConfig:
        """The model's settings of sampling with some changed.

        Raises:
            ValueError: an unknown setting, or one that does not fit the model.
        """
        own = dataclasses.asdict(self.maker.own_sampling())
        settings = configure(SamplingConfig, {**own, **changed}, "sampling")
        check(settings, self.maker.fields)
        return settings
