"""What a generative stage notes of the crystals it learns from, and crystals from its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crysforge.datapipe.crystals.crystal import MAX_Z, BadCrystal, Crystal
from crysforge.datapipe.crystals.lattice import log_metric
from crysforge.models.ops.keyed_random import keyed_uniform

MOST_ATOMS = 512
"""Larger cells are no part of the distribution of sizes."""
LEAST_SPREAD = 0.05
"""Least standard deviation of a lattice coordinate, in its units: where all cells are alike (cubic,
say) the prior is narrow, and not a point."""
_SIZE = 0xC7  # salt


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What a generative stage is asked for."""

    count: int
    """Number of crystals."""
    formula: str = ""
    """Composition of one formula unit; empty: the stage chooses."""
    formula_units: int = 1
    """Formula units in a cell."""
    atoms: int | None = None
    """Atoms in a cell where no formula says; None: drawn as in training."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One crystal that a generative stage is to make."""

    name: str
    """Id of the crystal."""
    key: int
    """Seed of all its draws: they are equal whatever else is made with it."""
    numbers: tuple[int, ...] = ()
    """Atomic numbers of its atoms; empty: the stage chooses."""
    atoms: int = 0
    """Atoms in its cell, where the stage chooses their elements."""
    elements: tuple[int, ...] = ()
    """Those that the stage may choose; empty: all."""

    def __len__(self) -> int:
        return len(self.numbers) or self.atoms


Watch = Callable[[int, int, Callable[[], list[Crystal | BadCrystal]]], None]
"""(steps done, steps, what the crystals are by now) → None."""


@dataclass(frozen=True)
class Seen:
    """Statistics of training crystals."""

    atoms: Tensor
    """[MOST_ATOMS + 1] crystals by atoms in the cell."""
    elements: Tensor
    """[119] crystals that have each element."""
    lattice_mean: Tensor
    """[6] of the log-metric coordinates."""
    lattice_std: Tensor

    @classmethod
    def none(cls) -> Seen:
        """Of no crystals."""
        atoms, elements = torch.zeros(MOST_ATOMS + 1), torch.zeros(MAX_Z + 1)
        return cls(atoms, elements, torch.zeros(6), torch.ones(6))

    @classmethod
    def of(cls, crystals: Iterable[Crystal], channels: int) -> Seen:
        """Of these crystals.

        Raises:
            ValueError: one has an element for which there is no channel.
        """
        seen, numbers = cls.none(), []
        for crystal in crystals:
            if crystal.numbers.max() > channels:
                raise ValueError(
                    f"crystal {crystal.id} has element {crystal.numbers.max()}: give "
                    f"encoder.channels={MAX_Z} instead of {channels}"
                )
            if len(crystal) <= MOST_ATOMS:
                seen.atoms[len(crystal)] += 1
            seen.elements[np.unique(crystal.numbers).astype(int)] += 1
            numbers.append(log_metric(crystal.lattice, len(crystal)))
        if not numbers:
            return seen
        table = torch.from_numpy(np.array(numbers))
        spread = table.std(0, correction=0).clamp(min=LEAST_SPREAD)
        return cls(seen.atoms, seen.elements, table.mean(0).float(), spread.float())

    def buffers(self) -> dict[str, Tensor]:
        """What a stage keeps beside its encoder."""
        return {"seen_atoms": self.atoms, "seen_elements": self.elements}


def drawn_sizes(seen_atoms: Tensor, keys: Tensor) -> list[int]:
    """Atoms in a cell for each key, by the counts of cells seen [MOST_ATOMS + 1].

    Raises:
        ValueError: none was seen.
    """
    share = seen_atoms.double().cpu().cumsum(0)
    if share[-1] == 0:
        raise ValueError("the model has seen no crystals: give atoms=N")
    draw = keyed_uniform(keys, 1, _SIZE)[:, 0].double() * share[-1]
    return torch.searchsorted(share, draw, right=True).tolist()


def made(
    wanted: Sequence[Wanted], sizes: Sequence[int], numbers: Tensor, coords: Tensor, cells: Tensor
) -> list[Crystal | BadCrystal]:
    """Crystals from elements [A], fractional coordinates [A, 3] and cells [B, 3, 3] in Å."""
    z, frac, cell = (x.double().cpu().numpy() for x in (numbers, coords, cells))
    ends = np.cumsum(sizes)
    out: list[Crystal | BadCrystal] = []
    for i, (one, end) in enumerate(zip(wanted, ends, strict=True)):
        part = slice(end - sizes[i], end)
        try:
            out.append(Crystal.create(one.name, z[part].astype(int), frac[part], cell[i]))
        except BadCrystal as error:
            out.append(error)
    return out
