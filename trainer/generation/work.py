"""Chunks of samples, made and kept one by one: after a kill, only what is missing is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.common.files import make_directory, write_json, write_text
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.sampler import SamplingConfig
from crysforge.trainer.generation.files import frame
from crysforge.trainer.generation.request import Asked
from crysforge.trainer.stages.base import Stage

CHUNK = {
    "seconds": float,
    "crystals": [{
        "name": str, "numbers?": list[int], "frac_coords?": list[list[float]],
        "lattice?": list[list[float]], "error?": str,
    }],
}  # fmt: skip
"""What a chunk's file holds."""
VOLUMES, LONGEST, FLATTEST = (1.0, 2000.0), 300.0, 0.02
"""Å³ per atom, Å of an edge, and volume over the product of the edges, of a cell that is none."""
MOST_CHUNK = 1 << 28
"""Bytes of the largest one."""


@dataclass(frozen=True)
class Chunks:
    """Chunks that are to be made in a folder."""

    chunks: Sequence[Sequence[Asked]]
    folder: Path
    sampling: SamplingConfig
    snapshots: int = 0
    """Moments of every sample's way that are written too."""

    def path(self, number: int) -> Path:
        """Of a chunk's file."""
        return self.folder / f"{number:06d}.json"

    def make(
        self,
        stage: Stage,
        rank: int = 0,
        ranks: int = 1,
        guidance: Guidance | None = None,
        progress: bool = False,
    ) -> None:
        """Makes those chunks of a rank that are not there."""
        mine = range(rank, len(self.chunks), ranks)
        total = sum(len(self.chunks[i]) for i in mine)
        with tqdm(
            total=total, desc="generating", unit=" crystals", disable=not progress, mininterval=1
        ) as bar:
            for number in mine:
                if not self.path(number).is_file():
                    self._make(stage, number, guidance)
                bar.update(len(self.chunks[number]))

    def _make(self, stage: Stage, number: int, guidance: Guidance | None) -> None:
        asked, began = self.chunks[number], time.monotonic()
        seen = _Snapshots(asked, self.snapshots) if self.snapshots else None
        wanted = [a.wanted for a in asked]
        found = stage.draw(wanted, self.sampling, guidance, seen.look if seen else None)
        if seen is not None:
            seen.write(self.folder.parent / "trajectories")
        rows = [_row(a.wanted.name, crystal) for a, crystal in zip(asked, found, strict=True)]
        seconds = time.monotonic() - began
        write_json(self.path(number), {"seconds": seconds, "crystals": rows}, durable=False)

    def read(self) -> tuple[dict[str, Crystal | BadCrystal], float]:
        """What was made, by name, and the seconds that it took.

        Raises:
            ValueError: a chunk is missing or damaged.
        """
        out: dict[str, Crystal | BadCrystal] = {}
        seconds = 0.0
        for number in range(len(self.chunks)):
            path = self.path(number)
            record = read_mapping(path, CHUNK, MOST_CHUNK)
            seconds += record["seconds"]
            for row in record["crystals"]:
                out[row["name"]] = unless_absurd(_crystal(row))
        return out, seconds


def _row(name: str, crystal: Crystal | BadCrystal) -> dict[str, Any]:
    if isinstance(crystal, BadCrystal):
        return {"name": name, "error": str(crystal)}
    arrays = ("numbers", "frac_coords", "lattice")
    return {"name": name, **{a: getattr(crystal, a).tolist() for a in arrays}}


def unless_absurd(crystal: Crystal | BadCrystal) -> Crystal | BadCrystal:
    """The crystal, if its cell could be one; else what is wrong with it. A bad model makes cells
    that symmetry searches take hours for, or never come back from."""
    if isinstance(crystal, BadCrystal):
        return crystal
    edges = np.linalg.norm(crystal.lattice, axis=1)
    each = crystal.volume / len(crystal)
    if not VOLUMES[0] <= each <= VOLUMES[1]:
        return BadCrystal(f"the cell has {each:.3g} Å³ per atom", "absurd cell")
    if edges.max() > LONGEST or crystal.volume < FLATTEST * edges.prod():
        shown = " × ".join(f"{x:.3g}" for x in edges)
        return BadCrystal(f"the cell is flat or too long: {shown} Å, {crystal.volume:.3g} Å³")
    return crystal


def _crystal(row: dict[str, Any]) -> Crystal | BadCrystal:
    if "error" in row:
        return BadCrystal(row["error"])
    try:  # as it was made, to the bit: not turned or wrapped again
        return Crystal(
            row["name"],
            np.array(row["numbers"], dtype=np.uint8),
            np.array(row["frac_coords"], dtype=np.float64).reshape(-1, 3),
            np.array(row["lattice"], dtype=np.float64).reshape(3, 3),
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"crystal {row['name']} is damaged: {error}") from None


class _Snapshots:
    """Crystals at evenly spaced moments of their way."""

    def __init__(self, asked: Sequence[Asked], count: int) -> None:
        self.count = count
        self.frames: dict[str, list[str]] = {a.wanted.name: [] for a in asked}

    def look(
        self, done: int, steps: int, crystals: Callable[[], list[Crystal | BadCrystal]]
    ) -> None:
        """Is a `Watch`."""
        if done * self.count // steps == (done - 1) * self.count // steps:
            return
        for (name, frames), crystal in zip(self.frames.items(), crystals(), strict=True):
            if isinstance(crystal, Crystal):
                frames.append(frame(crystal, {"id": name, "step": done}))

    def write(self, folder: Path) -> None:
        """One file for each sample."""
        make_directory(folder)
        for name, frames in self.frames.items():
            write_text(folder / f"{name}.extxyz", "".join(frames), durable=False)
