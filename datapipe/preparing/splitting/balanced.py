"""Splits and folds of groups: near the shares asked for, alike in their classes, and the same
whatever the order of the input."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crysforge.datapipe.storage.manifest import MAX_FOLDS

VALIDATION_SHARE = 0.1
"""Share of the crystals outside a fold that validate where the fold is the test."""
MAX_CLASSES = 10
"""Most values of a label that is taken for classes."""
_LEAST_OF_EACH = 5
"""Crystals for each value, on average, of such a label."""


@dataclass(frozen=True)
class Folds:
    """Which fold every crystal is tested in, and those in which it validates.

    Attributes:
        count: folds.
        test: [n] int8, 0 to `count` - 1.
        validates: [n] uint32; bit k is set where the crystal validates while fold k is the test.
    """

    count: int
    test: np.ndarray
    validates: np.ndarray

    def at(self, i: int) -> tuple[int, int]:
        """Both numbers of a crystal."""
        return int(self.test[i]), int(self.validates[i])


def balanced(
    groups: Sequence[str],
    shares: Sequence[float],
    seed: int | str,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """Part of every record, [n] int8; the records of a group are in one part.

    Groups are taken in an order that follows from the seed and their names alone. Each goes to the
    part that is filled least for its share, as far as the classes of the group go. So a part falls
    short of its share by less than the largest group; of every class, where groups have one each.

    Args:
        groups: name of the group of each record. shares: of the parts, adding up to one.
        classes: [n] int, numbers from 0, that every part should have in like shares.

    Raises:
        ValueError: fewer groups than parts.
    """
    names, member = np.unique(np.array(groups, dtype=object), return_inverse=True)
    kinds = np.zeros(len(groups), dtype=np.int64) if classes is None else classes
    held = np.zeros((len(names), int(kinds.max(initial=0)) + 1))
    np.add.at(held, (member, kinds), 1)
    parts = [p for p, share in enumerate(shares) if share > 0]
    if len(names) < len(parts):
        raise ValueError(f"{len(names)} groups are too few for {len(parts)} parts")
    expected = np.outer([shares[p] for p in parts], held.sum(axis=0)) + 1e-9
    filled = np.zeros_like(expected)
    part = np.zeros(len(names), dtype=np.int8)
    order = sorted(range(len(names)), key=lambda g: _draw(seed, names[g]))
    for g in order:
        cost = ((filled + held[g]) / expected * held[g]).sum(axis=1)
        chosen = int(cost.argmin())
        part[g] = chosen
        filled[chosen] += held[g]
    _fill_empty(part, held.sum(axis=1), len(parts), order)
    return np.array(parts, dtype=np.int8)[part][member]


def _draw(seed: int | str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()


def _fill_empty(part: np.ndarray, size: np.ndarray, parts: int, order: Sequence[int]) -> None:
    """Gives a part without a group the smallest one of the part that has most."""
    for empty in range(parts):
        if (part == empty).any():
            continue
        counts = np.bincount(part, minlength=parts)
        givers = [g for g in order if part[g] == counts.argmax()]
        part[min(givers, key=lambda g: size[g])] = empty


def make_folds(
    groups: Sequence[str], count: int, seed: int, classes: np.ndarray | None = None
) -> Folds:
    """Folds of records, each group in one; where a fold is the test, a tenth of the others
    validates, in whole groups, too.

    Args:
        groups, classes: see `balanced`. count: folds, 2 to `MAX_FOLDS`.

    Raises:
        ValueError: too few groups.
    """
    if not 2 <= count <= MAX_FOLDS:
        raise ValueError(f"folds must be 2 to {MAX_FOLDS}, got {count}")
    names = np.array(groups, dtype=object)
    if len(set(groups)) <= count:
        raise ValueError(f"{len(set(groups))} groups are too few for {count} folds: give fewer")
    test = balanced(groups, [1 / count] * count, seed, classes)
    validates = np.zeros(len(names), dtype=np.uint32)
    for fold in range(count):
        rest = np.flatnonzero(test != fold)
        if len(set(names[rest])) < 2:
            raise ValueError(
                f"one group is so large that nothing validates fold {fold}: give split_by another "
                "value, or a split into train, val and test"
            )
        shares = [1 - VALIDATION_SHARE, VALIDATION_SHARE]
        own = None if classes is None else classes[rest]
        part = balanced(names[rest].tolist(), shares, f"{seed}/validation {fold}", own)
        validates[rest[part == 1]] |= np.uint32(1 << fold)
    return Folds(count, test, validates)


def classes_of(labels: np.ndarray) -> np.ndarray | None:
    """[n] class of each label, where they are classes: few values that occur often, as 0 and 1. A
    missing label (NaN) is a class, too. None where they are quantities."""
    known = labels[~np.isnan(labels)]
    values = np.unique(known)
    if not 2 <= len(values) <= MAX_CLASSES or len(known) < _LEAST_OF_EACH * len(values):
        return None
    return np.where(np.isnan(labels), len(values), np.searchsorted(values, labels))
