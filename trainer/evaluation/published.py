"""Published results (published.yaml), and which of them are of the same task as a run of ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.safe_read import parse_yaml
from crysforge.trainer.evaluation.compare import Arm
from crysforge.trainer.evaluation.suite import shown

PATH = Path(__file__).with_name("published.yaml")
ENCODER, PRETRAINING, NONE = "encoder", "pretraining", "none"
OWN, ANY = "own", "any"
"""Encoders of published rows: of the method's own paper; not said."""
OWN_ENCODERS = {
    "crysxpp": "cgcnn",
    "crystaltwins": "cgcnn",
    "crysgnn": "cgcnn",
    "dpf": "matformer",
}
"""The encoder of a method's own paper, where it is one of ours."""
SAME_SIZE = 0.02
"""Relative difference in training crystals up to which a run is set on a par."""


@dataclass(frozen=True)
class Property:
    """A column of published tables."""

    key: str
    data: str
    """Title of its data set."""
    names: tuple[str, ...]
    """What names of that data set begin with."""
    quantity: str
    unit: str
    train: int
    """Training crystals with a label."""

    @property
    def title(self) -> str:
        """For the head of a column."""
        return f"{self.data} {self.quantity}"


@dataclass(frozen=True)
class PublishedRow:
    """One model of a published table."""

    encoder: str
    mae: dict[str, float]
    """By property; a value that was not given is absent."""
    std: dict[str, float]
    pretraining: str = NONE

    @property
    def title(self) -> str:
        """As the papers write it: `CrysLDNet (PDDFormer)`, or the encoder alone."""
        if self.pretraining == NONE:
            return self.encoder
        return f"{self.pretraining} ({self.encoder})"

    def is_of(self, encoder: str, pretraining: str) -> bool:
        """Whether it is the model with this encoder, and this pretraining or title."""
        own = self.encoder == OWN
        mine = OWN_ENCODERS.get(plain(self.pretraining)) if own else plain(self.encoder)
        if mine not in (plain(encoder), ANY):
            return False
        return plain(pretraining) in (plain(self.pretraining), plain(self.title))


@dataclass(frozen=True)
class PublishedTable:
    """A table of MAEs, as printed."""

    key: str
    source: str
    properties: list[Property]
    rows: list[PublishedRow]
    note: str = ""
    also: tuple[str, ...] = ()
    """Other names."""


@dataclass(frozen=True)
class Published:
    """All that is known of some papers."""

    tables: list[PublishedTable]
    quantities: dict[str, list[str]]
    improvements: list[dict[str, Any]] = field(default_factory=list)
    """`key`, `source`, `what`, `percent`."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """`key`, `source`, `pretraining`, `stage`, `peak_gb`, `minutes`."""

    def select(self, paper: str) -> Published:
        """The tables of that key or name, or whose key begins with it; none for an empty one.

        Raises:
            ValueError: no such table; lists those there are.
        """
        keys = [k for t in self.tables for k in (t.key, *t.also)]
        keys += [x["key"] for x in (*self.improvements, *self.costs)]
        if paper and not any(_chosen(k, paper) for k in keys):
            raise ValueError(
                f"no published table {paper!r}: known are {', '.join(dict.fromkeys(keys))}"
            )
        tables = [t for t in self.tables if _chosen(t.key, paper) or paper in t.also]
        chosen = {t.key for t in tables}

        def theirs(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [
                x for x in notes
                if _chosen(x["key"], paper) or any(_chosen(x["key"], key) for key in chosen)
            ]  # fmt: skip

        return replace(
            self,
            tables=tables,
            improvements=theirs(self.improvements),
            costs=theirs(self.costs),
        )

    def means(self, target: str, unit: str, of: Property) -> bool:
        """Whether a target of this name and unit is the property's quantity, of whatever data."""
        names = map(plain, [of.quantity, *self.quantities[of.quantity]])
        return plain(target) in names and plain(unit) in ("", plain(of.unit))

    def property_of(self, arm: Arm, properties: Sequence[Property]) -> Property | None:
        """The published task that an arm is of: data set, quantity, unit and size agree."""
        if not arm.results:
            return None
        ours = arm.first
        data = plain(ours.data.rstrip("/").rsplit("/", 1)[-1])
        for p in properties:
            if (
                data.startswith(p.names)
                and self.means(ours.target, ours.unit, p)
                and abs(ours.labels - p.train) <= SAME_SIZE * p.train
            ):
                return p
        return None

    def value(self, arm: Arm, compared: str = "") -> tuple[float, str] | None:
        """(MAE, source) that was published of an arm's task and model; the first that fits."""
        for table in self.tables:
            same = self.property_of(arm, table.properties)
            for row in table.rows if same else ():
                assert same is not None
                if same.key in row.mae and row.is_of(*model_of(arm, compared)):
                    return row.mae[same.key], table.source
        return None


def model_of(arm: Arm, compared: str = "") -> tuple[str, str]:
    """(encoder, pretraining) of an arm: factors of these names, else the run's encoder and the
    compared value."""
    encoder = arm.values.get(ENCODER) or arm.values.get("encoder.name")
    if not encoder:
        encoder = arm.first.encoder if arm.results else ""
    pretraining = arm.values.get(PRETRAINING)
    if pretraining is None:
        pretraining = arm.values[compared] if compared and compared != ENCODER else NONE
    return encoder, pretraining


def plain(name: str) -> str:
    """A name by its letters and digits, lower case; `++` counts."""
    return "".join(c for c in name.lower() if c.isalnum() or c == "+")


@functools.cache
def published() -> Published:
    """What published.yaml holds."""
    record = parse_yaml(PATH.read_text(encoding="utf-8"), str(PATH), aliases=True)  # ours
    assert record["schema"] == 1
    sets = record["datasets"]
    properties = {
        key: Property(
            key,
            sets[p["data"]]["title"],
            tuple(map(plain, sets[p["data"]]["names"])),
            p["quantity"],
            p["unit"],
            p["train"],
        )
        for key, p in record["properties"].items()
    }
    tables = []
    for t in record["tables"]:
        columns = [properties[key] for key in t["properties"]]
        rows = [
            PublishedRow(shown(r["encoder"]), _by(columns, r["mae"]), _by(columns, r.get("std")),
                shown(r.get("pretraining", NONE)))
            for r in t["rows"]
        ]  # fmt: skip
        tables.append(
            PublishedTable(
                t["key"], t["source"], columns, rows, t.get("note", ""), tuple(t.get("also", ()))
            )
        )
    return Published(tables, record["quantities"], record["improvements"], record["costs"])


def _by(columns: Sequence[Property], values: Sequence[float | None] | None) -> dict[str, float]:
    """Values by property; `std` may stop early."""
    given = list(values or [])
    given += [None] * (len(columns) - len(given))
    return {p.key: float(x) for p, x in zip(columns, given, strict=True) if x is not None}


def _chosen(key: str, paper: str) -> bool:
    return bool(paper) and (key == paper or key.startswith(f"{paper}-"))
