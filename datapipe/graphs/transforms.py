"""What a stage does to a crystal before and after its graph is built.

A transform has two hooks. `on_crystal` turns a `Sample` into another one, or into several views of
it; `on_graph` changes a view's graph, or says something of it in `Sample.extras`. Both draw from
generators that are seeded by the crystal's key, so that the result depends on (seed, epoch, crystal
id) alone. The clean crystal stays in `Sample.crystal` as the target; what the encoder sees is
`Sample.seen` and `Sample.masked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal, wrap
from crysforge.datapipe.crystals.lattice import from_log_metric, log_metric
from crysforge.datapipe.crystals.symmetry import space_group
from crysforge.datapipe.graphs.neighbours import Neighbours
from crysforge.datapipe.graphs.quotient import orbits


@dataclass(frozen=True)
class Sample:
    """A crystal on its way into a batch."""

    crystal: Crystal
    """The clean crystal: targets of reconstruction, labels, id."""
    rng_key: int
    """Seed of everything random about it in this epoch."""
    masked: np.ndarray
    """[n] bool: atoms whose element the encoder must not see."""
    seen: Crystal
    """The structure whose graph is built; `crystal` itself unless a transform moved atoms."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Rows that the batch carries in its `extras`; all samples of a batch have the same names."""
    lasting_key: int = 0
    """Seed of what is drawn once about it, the same in every epoch."""

    @classmethod
    def clean(cls, crystal: Crystal, rng_key: int = 0, lasting_key: int = 0) -> Sample:
        """A sample that shows the encoder everything."""
        masked = np.zeros(len(crystal), dtype=bool)
        return cls(crystal, rng_key, masked, crystal, lasting_key=lasting_key)


_AFTER_GRAPH = 1
"""Tells the draws of `on_graph` from those of `on_crystal`."""


class Transform:
    """Base of all transforms: does nothing."""

    views: int = 1
    """Views of each crystal; they follow one another in the batch."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample | tuple[Sample, ...]:
        """Before the graph is built: the view of a crystal, or its `views`."""
        return sample

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        """After a view's graph was built, which others may share: the view's own, and the view."""
        return graph, sample

    def show(
        self, sample: Sample, graph_of: Callable[[Crystal], Neighbours]
    ) -> list[tuple[Sample, Neighbours]]:
        """The views of a sample with their graphs."""
        shown = self.on_crystal(sample, np.random.default_rng(sample.rng_key))
        out = []
        for view in shown if isinstance(shown, tuple) else (shown,):
            rng = np.random.default_rng([view.rng_key, _AFTER_GRAPH])
            graph, view = self.on_graph(graph_of(view.seen), view, rng)
            out.append((view, graph))
        return out


class Step(Transform):
    """A transform that gives one view."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample


@dataclass(frozen=True)
class Chain(Step):
    """Steps one after another."""

    steps: tuple[Step, ...]

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for step in self.steps:
            sample = step.on_crystal(sample, rng)
        return sample

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        for step in self.steps:
            graph, sample = step.on_graph(graph, sample, rng)
        return graph, sample


@dataclass(frozen=True)
class Once(Step):
    """A step whose draws are the same in every epoch."""

    step: Step

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.step.on_crystal(sample, np.random.default_rng(sample.lasting_key))

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        again = np.random.default_rng([sample.lasting_key, _AFTER_GRAPH])
        return self.step.on_graph(graph, sample, again)


@dataclass(frozen=True)
class TwoViews(Transform):
    """Two draws of a step; each view has a key of its own."""

    step: Step
    views: ClassVar[int] = 2  # type: ignore[misc]

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> tuple[Sample, ...]:
        keys = rng.integers(2**63, size=2).tolist()
        return tuple(
            self.step.on_crystal(replace(sample, rng_key=k), np.random.default_rng(k)) for k in keys
        )

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        return self.step.on_graph(graph, sample, rng)


@dataclass(frozen=True)
class Mask(Step):
    """Base of what hides elements: how many atoms it is to hide."""

    ratio: float
    """Share of the atoms."""
    round_up: bool = True
    """Whether a fraction of an atom counts as one, or as none."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"mask ratio must be in (0, 1], got {self.ratio}")

    def count(self, n: int) -> int:
        """Atoms to hide of n, at least one."""
        return max(1, (math.ceil if self.round_up else math.floor)(self.ratio * n))


class MaskAtoms(Mask):
    """Hides the element of at least one atom, chosen without replacement."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        n = len(sample.crystal)
        masked = np.zeros(n, dtype=bool)
        masked[rng.choice(n, size=self.count(n), replace=False)] = True
        return replace(sample, masked=masked)


class MaskOrbits(Mask):
    """Hides the elements of whole orbits: of all atoms that the view's graph cannot tell apart.

    Orbits lie in random order around a circle as long as there are atoms, each over its number of
    atoms; those are hidden whose middle falls into a window as long as `count`, at a random place.
    So each atom is hidden with probability `count / n`, as in `MaskAtoms`, and the number of hidden
    atoms has the mean `count` and misses it by no more than the size of the largest orbit: a
    crystal of one orbit is hidden altogether or not at all, one without symmetry has exactly
    `count` hidden atoms. The draw does not depend on the order of the atoms.
    """

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        whole = graph.with_pairs()
        colour = orbits(sample.seen.numbers, whole.pdd_row, whole.edges)
        _, orbit, size = np.unique(colour, return_inverse=True, return_counts=True)
        n, order = len(colour), rng.permutation(len(size))
        middle = np.cumsum(size[order]) - size[order] / 2
        hidden = np.empty(len(size), dtype=bool)
        hidden[order] = (middle - rng.uniform(0, n)) % n < self.count(n)
        return graph, replace(sample, masked=hidden[orbit])


MASKS: dict[str, type[Mask]] = {"atom": MaskAtoms, "orbit": MaskOrbits}
"""What hides elements, by the unit that is hidden."""


@dataclass(frozen=True)
class ShiftAtoms(Step):
    """Moves every atom of what is seen in a random direction by a uniform random distance."""

    most: float
    """Longest distance in Å."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        direction = rng.standard_normal((len(sample.seen), 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return displaced(sample, direction * rng.uniform(0, self.most, (len(direction), 1)))


def displaced(sample: Sample, shift: np.ndarray) -> Sample:
    """The sample with atoms moved by Cartesian vectors [n, 3] in Å."""
    seen = sample.seen
    frac = seen.frac_coords + np.linalg.solve(seen.lattice.T, shift.T).T
    return replace(sample, seen=replace(seen, frac_coords=wrap(frac)))


@dataclass(frozen=True, eq=False)
class Diffuse(Step):
    """Noises what is seen to a random level of a diffusion: fractional coordinates by wrapped
    normal noise, the lattice by a variance-preserving one in its log-metric coordinates, so that
    every level is a sound cell.

    Extras: `timestep` [1] int64 in 1..T, `lattice_state` [1, 6] and `lattice_noise` [1, 6] float32.
    """

    alpha_bar: np.ndarray
    """[T+1] share of the lattice signal's variance at each level, 1 at level 0."""
    sigma: np.ndarray
    """[T+1] standard deviation of the fractional coordinates' noise, 0 at level 0."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        seen = sample.seen
        t = int(rng.integers(1, len(self.sigma)))
        noise = rng.standard_normal(6)
        keep = self.alpha_bar[t]
        clean = log_metric(seen.lattice, len(seen))
        state = math.sqrt(keep) * clean + math.sqrt(1 - keep) * noise
        frac = seen.frac_coords + self.sigma[t] * rng.standard_normal(seen.frac_coords.shape)
        noisy = replace(seen, frac_coords=wrap(frac), lattice=from_log_metric(state, len(seen)))
        extras = {
            "timestep": np.array([t]),
            "lattice_state": state[None].astype(np.float32),
            "lattice_noise": noise[None].astype(np.float32),
        }
        return replace(sample, seen=noisy, extras={**sample.extras, **extras})


@dataclass(frozen=True)
class SpaceGroup(Step):
    """Labels the crystal with the number of its space group: `space_group` [1] int64.

    A label `space_group` of the data set is taken as it is. Without one spglib finds the number of
    the clean crystal, which takes several times as long as its graph; each worker remembers what
    it found.
    """

    _known: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        extras = {"space_group": np.array([self._number(sample.crystal)])}
        return replace(sample, extras={**sample.extras, **extras})

    def _number(self, crystal: Crystal) -> int:
        given = crystal.targets.get("space_group", math.nan)
        if not math.isnan(given):
            if given not in range(1, 231):
                raise ValueError(f"label 'space_group' must be a number 1..230, got {given:g}")
            return int(given)
        if (known := self._known.get(crystal.id)) is not None:
            return known
        number = space_group(crystal)
        if len(self._known) < MOST_REMEMBERED:
            self._known[crystal.id] = number
        return number


MOST_REMEMBERED = 2**18
"""Crystals whose space group a worker remembers: about 30 MB."""
