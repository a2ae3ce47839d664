"""What one crystal may cost while it is read: a bomb costs itself and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from crysforge.datapipe.crystals.crystal import BadCrystal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one crystal may cost while it is read. One that costs more is left out, with the limit
    named."""

    atoms: int = 20_000
    """Atoms in the cell."""
    images: int = 1_000_000
    """Symmetry operations times sites, from which the atoms of the cell follow."""
    seconds: float = 60.0
    """Processor time."""
    memory_gb: float = 2.0
    """Memory of the process that reads it, beyond what it has before."""

    def __post_init__(self) -> None:
        for name in ("atoms", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seconds", "memory_gb"):
            if not 0 < getattr(self, name) <= 1e6:
                raise ValueError(
                    f"limits.{name} must be above 0 and at most 1e6, got {getattr(self, name)}"
                )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lets `check_atoms` and `check_images` go by these limits."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT = ContextVar("limits", default=Limits())  # noqa: B039  (it is frozen)


def check_atoms(count: int) -> None:
    """Raises BadCrystal for a number of atoms that is too much; to be called as soon as it is
    known."""
    if count > (most := _CURRENT.get().atoms):
        raise BadCrystal(f"it has {count} atoms, more than limits.atoms={most}", "too many atoms")


def check_images(operations: int, sites: int) -> None:
    """Raises BadCrystal for symmetry operations and sites that are too many; to be called before
    the ones are applied to the others."""
    if operations * sites > (most := _CURRENT.get().images):
        raise BadCrystal(
            f"{operations} symmetry operations on {sites} sites are {operations * sites} images, "
            f"more than limits.images={most}",
            "too many atoms",
        )
