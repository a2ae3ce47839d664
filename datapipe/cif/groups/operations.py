"""Groups of symmetry operations: read, checked to be groups, and applied to sites."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import lcm

import gemmi
import numpy as np

from crysforge.datapipe.crystals.crystal import BadCrystal

MAX_OPERATIONS = 400
"""Operations of the largest group that is read; a cubic F cell has 192, a magnetic one 384."""
_MAX_DENOMINATOR = 360
_MAX_ENTRY = 8
_TERM = re.compile(r"([+-]?)(?:(\d+\.?\d*|\.\d+)(?:/(\d+\.?\d*))?)?\*?([xyzabc]?)")


@dataclass(frozen=True, eq=False)
class SymmetryGroup:
    """A space group in one setting: operations modulo the translations of the cell.

    Attributes:
        rotations: [m, 3, 3] float64, the identity first.
        translations: [m, 3] float64.
        product: [m, m] int16; `product[i, j]` is the operation that does j, then i.
    """

    rotations: np.ndarray
    translations: np.ndarray
    product: np.ndarray
    _cosets: dict[bytes, np.ndarray | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rotations)

    @cached_property
    def number(self) -> int:
        """International number of the space-group type; 0 where it cannot be found."""
        if len(self) == 1:
            return 1
        import spglib

        rotations = np.rint(self.rotations).astype(np.intc)
        try:
            found = spglib.get_spacegroup_type_from_symmetry(rotations, self.translations)
        except getattr(spglib, "SpglibError", ()):
            return 0
        return 0 if found is None else int(found.number)

    @cached_property
    def point_group(self) -> np.ndarray:
        """[p, 3, 3] distinct rotations."""
        return np.unique(self.rotations, axis=0)

    @cached_property
    def mean_metric(self) -> np.ndarray:
        """[9, 9] takes the elements of a metric tensor to their mean over all rotations, which is
        the tensor itself where the group leaves it alone."""
        turned = np.einsum("rji,rkl->riljk", self.point_group, self.point_group)
        return turned.mean(0).reshape(9, 9)

    @cached_property
    def stacked(self) -> np.ndarray:
        """[3, 3 m] rotations side by side, to apply all at once."""
        return np.ascontiguousarray(self.rotations.reshape(-1, 3).T)

    @cached_property
    def name(self) -> str:
        """Symbol of the setting, or of the type where the setting is not tabulated."""
        table = gemmi.spacegroup_table_itb()
        if (entry := _entries_by_operations().get(self.key)) is not None:
            return entry.xhm()
        standard = next((e.hm for e in table if e.number == self.number), "unknown")
        return f"{standard} in another setting"

    @cached_property
    def key(self) -> bytes:
        """Equal for equal sets of operations."""
        code = np.column_stack(
            [
                np.rint(self.rotations).reshape(len(self), 9),
                np.rint(self.translations * _MAX_DENOMINATOR) % _MAX_DENOMINATOR,
            ]
        ).astype(np.int16)
        return np.unique(code, axis=0).tobytes()

    def cosets(self, stabiliser: np.ndarray) -> np.ndarray | None:
        """Operations that give the distinct images of a site.

        Args:
            stabiliser: [m] bool, the operations that leave the site where it is.

        Returns:
            [k] indices, the identity first; None if the stabiliser is no group.
        """
        key = stabiliser.tobytes()
        if key not in self._cosets:
            members = np.flatnonzero(stabiliser)
            closed = stabiliser[self.product[np.ix_(members, members)]].all()
            first = self.product[:, members].min(axis=1)
            self._cosets[key] = np.flatnonzero(first == np.arange(len(self))) if closed else None
        return self._cosets[key]


@lru_cache(maxsize=512)
def group_of_triplets(triplets: tuple[str, ...]) -> SymmetryGroup:
    """The group of operations such as `-x,y+1/2,-z`; an identity that the list lacks is added.

    Raises:
        BadCrystal: one cannot be read, or they do not form a group; says which.
    """
    if len(triplets) > MAX_OPERATIONS:
        raise BadCrystal(f"{len(triplets)} symmetry operations: no space group has so many")
    return _group([_parse(triplet) for triplet in triplets])


@lru_cache(maxsize=512)
def group_of_hall(symbol: str) -> SymmetryGroup | None:
    """The group of a Hall symbol; None if it cannot be read."""
    clean = symbol.replace("_", " ").strip()
    for attempt in (clean, clean.capitalize(), f"-{clean[1:].capitalize()}"):
        try:
            return _group(
                [
                    ([[x // op.DEN for x in row] for row in op.rot], _shift(op.tran, op.DEN))
                    for op in gemmi.symops_from_hall(attempt)
                ]
            )
        except (RuntimeError, ValueError):
            continue
    return None


def product_of(triplets: tuple[str, ...], centring: tuple[str, ...]) -> SymmetryGroup:
    """The group of a list of operations and one of centring translations, as magCIF has them.

    Raises:
        BadCrystal: see `group_of_triplets`.
    """
    return _product(triplets, centring) if centring else group_of_triplets(triplets)


@lru_cache(maxsize=512)
def _product(triplets: tuple[str, ...], centring: tuple[str, ...]) -> SymmetryGroup:
    operations, shifts = ([_parse(x) for x in texts] for texts in (triplets, centring))
    if any(rotation != _IDENTITY for rotation, _ in shifts):
        raise BadCrystal("a centring of the CIF is not a translation")
    if len(operations) * len(shifts) > MAX_OPERATIONS:
        raise BadCrystal("the CIF has more symmetry operations than any space group")
    return _group(
        [(r, [a + b for a, b in zip(t, s, strict=True)]) for r, t in operations for _, s in shifts]
    )


Operation = tuple[list[list[int]], list[Fraction]]
_IDENTITY = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def _shift(translation: list[int], denominator: int) -> list[Fraction]:
    return [Fraction(x, denominator) for x in translation]


def _parse(triplet: str) -> Operation:
    """Rotation and translation of `-x,y+1/2,-z`; a fourth part (time reversal) is left out."""
    text = re.sub(r"\s+", "", triplet.strip("'\"").lower()).replace("+-", "-")
    parts = text.split(",")
    if len(parts) == 4 and parts[3] in ("1", "+1", "-1", "m", "-m", "+m"):
        parts.pop()
    if len(parts) != 3:
        raise BadCrystal(f"symmetry operation {triplet.strip()!r} cannot be read")
    rows, shifts = zip(*[_parse_row(part, triplet) for part in parts], strict=True)
    rotation = [list(row) for row in rows]
    if round(abs(np.linalg.det(rotation)), 6) != 1:
        raise BadCrystal(f"symmetry operation {triplet.strip()!r} is no rotation or reflection")
    return rotation, list(shifts)


def _parse_row(text: str, triplet: str) -> tuple[list[int], Fraction]:
    row, shift, place = [0, 0, 0], Fraction(0), 0
    while place < len(text):
        found = _TERM.match(text, place)
        if found is None or found.end() == place or not (found[2] or found[4]):
            raise BadCrystal(f"symmetry operation {triplet.strip()!r} cannot be read")
        if found[3] is not None and not float(found[3]):
            raise BadCrystal(f"symmetry operation {triplet.strip()!r} divides by zero")
        sign = -1 if found[1] == "-" else 1
        value = _fraction(found[2], found[3]) if found[2] else Fraction(1)
        if found[4]:
            if value.denominator != 1 or abs(value) > _MAX_ENTRY:
                raise BadCrystal(f"symmetry operation {triplet.strip()!r} cannot be read")
            row["xyzabc".index(found[4]) % 3] += sign * int(value)
        else:
            shift += sign * value
        place = found.end()
    return row, shift


def _fraction(numerator: str, denominator: str | None) -> Fraction:
    """1/3 from `1/3`, and from `.333`."""
    value = Fraction(numerator) / (Fraction(denominator) if denominator else 1)
    near = value.limit_denominator(24)
    return near if abs(near - value) < Fraction(2, 1000) else value


def _group(operations: list[Operation]) -> SymmetryGroup:
    """Checks closure, exactly.

    Raises:
        BadCrystal: the operations do not form a group.
    """
    denominator = lcm(*(x.denominator for _, shift in operations for x in shift))
    if denominator > _MAX_DENOMINATOR:
        raise BadCrystal("the translations of the symmetry operations are no simple fractions")
    rotation = np.array([r for r, _ in operations], dtype=np.int64)
    shift = np.array([[int(x * denominator) for x in t] for _, t in operations]) % denominator
    codes = _codes(rotation, shift, denominator)
    _, first = np.unique(codes, return_index=True)
    keep = np.sort(first)
    rotation, shift, codes = rotation[keep], shift[keep], codes[keep]
    one = _codes(np.eye(3, dtype=np.int64)[None], np.zeros((1, 3), np.int64), denominator)[0]
    if one in codes:  # to the front
        order = np.argsort(codes != one, kind="stable")
        rotation, shift, codes = rotation[order], shift[order], codes[order]
    else:
        rotation = np.concatenate([np.eye(3, dtype=np.int64)[None], rotation])
        shift = np.concatenate([np.zeros((1, 3), np.int64), shift])
        codes = np.concatenate([[one], codes])
    both = np.einsum("iab,jbc->ijac", rotation, rotation)
    moved = (np.einsum("iab,jb->ija", rotation, shift) + shift[:, None]) % denominator
    if np.abs(both).max() > _MAX_ENTRY:
        raise BadCrystal(_NO_GROUP)
    wanted = _codes(both, moved, denominator)
    order = np.argsort(codes)
    place = np.minimum(np.searchsorted(codes, wanted, sorter=order), len(codes) - 1)
    product = order[place]
    if not np.array_equal(codes[product], wanted):
        raise BadCrystal(_NO_GROUP)
    return SymmetryGroup(rotation.astype(float), shift / denominator, product.astype(np.int16))


_NO_GROUP = (
    "the symmetry operations of the CIF do not form a group: one is missing, doubled or misspelt"
)


def _codes(rotation: np.ndarray, shift: np.ndarray, denominator: int) -> np.ndarray:
    """One integer for each operation."""
    digits = (rotation + _MAX_ENTRY).reshape(*rotation.shape[:-2], 9)
    code = digits @ (17 ** np.arange(9, dtype=np.int64))
    return code * denominator**3 + shift @ (denominator ** np.arange(3, dtype=np.int64))


@lru_cache(maxsize=1)
def _entries_by_operations() -> dict[bytes, gemmi.SpaceGroup]:
    found: dict[bytes, gemmi.SpaceGroup] = {}
    for entry in gemmi.spacegroup_table():
        group = group_of_entry(entry.hall)
        found.setdefault(group.key, entry)
    return found


def group_of_entry(hall: str) -> SymmetryGroup:
    """The group of a tabulated Hall symbol."""
    group = group_of_hall(hall)
    assert group is not None
    return group
