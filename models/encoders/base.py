"""What an encoder is: packed batch in, one latent per atom out."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.registry import Registry


class Encoder(nn.Module):
    """Base of all encoders. A subclass sets `Config` (a dataclass whose every field has a
    default), `tiny` (field values of its debug flavour), `graph`, `dim`, and implements `nodes`.
    """

    Config: ClassVar[type]
    tiny: ClassVar[Mapping[str, Any]]
    supercell: ClassVar[bool] = False
    """Whether the atoms of a supercell have the latents of the cell's atoms."""

    graph: GraphSpec
    """The graph this encoder needs."""
    dim: int
    """Width of the latents."""
    section: dict[str, Any]
    """The complete config section that `build_encoder` rebuilds this encoder from."""

    @abstractmethod
    def nodes(self, batch: CrystalBatch) -> Tensor:
        """Latents of the batch's nodes, [N, dim]."""

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Latents of the batch's atoms, [A, dim]."""
        return self.nodes(batch)[batch.node_of_atom]


_OURS = {
    "alignn": "alignn",
    "cgcnn": "cgcnn",
    "cogn": "cogn",
    "cspnet": "cspnet",
    "dimenet++": "dimenet",
    "ecomformer": "ecomformer",
    "equiformer": "equiformer",
    "gatgnn": "gatgnn",
    "icomformer": "icomformer",
    "matformer": "matformer",
    "megnet": "megnet",
    "pddformer": "pddformer",
    "potnet": "potnet",
    "schnet": "schnet",
}
ENCODERS: Registry[type[Encoder]] = Registry(
    "encoder",
    modules={name: f"crysforge.models.encoders.{module}" for name, module in _OURS.items()},
    plugins="crysforge.encoders",
)


def build_encoder(section: Mapping[str, Any]) -> Encoder:
    """An encoder from its config section `{name: pddformer, width: 256, …}`. `tiny: true` starts
    from the debug flavour.

    Raises:
        ValueError: no name, an unknown name, a plug-in that is no encoder, or an unknown key.
    """
    values = dict(section)
    if "name" not in values:
        raise ValueError(f"config section 'encoder' needs a name: one of {', '.join(ENCODERS)}")
    name = values.pop("name")
    cls = ENCODERS[name]
    if not (isinstance(cls, type) and issubclass(cls, Encoder)):
        raise ValueError(f"encoder {name!r} is {cls!r}, which is no subclass of Encoder")
    if values.pop("tiny", False):
        values = {**cls.tiny, **values}
    config: Any = configure(cls.Config, values, "encoder")
    encoder = cls(config)
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):  # what is left open is no setting of this encoder
        if values[field.name] is field.default is None:
            del values[field.name]
    encoder.section = {"name": name, **values}
    return encoder


@dataclass(kw_only=True)
class NearestConfig:
    """What encoders on k-nearest graphs have in common."""

    own_images_once: bool | None = None
    """Whether an edge to an atom's own image counts once. None: twice, as the published recipes
    have it, but once where an encoder is made for a data set of primitive cells."""
    cut_ties: bool | None = None
    """Whether rounding cuts ties at the k-th distance, as in the released codes. None: ties are
    kept. `graph.ties` of a job sets it."""

    def near_rules(self) -> dict[str, Any]:
        """The settings of `GraphSpec` that these are."""
        return {"own_images_once": bool(self.own_images_once), "cut_ties": bool(self.cut_ties)}


GRAPH_ONLY = ("cut_ties", "lattice_edges")
"""Settings of encoders that change their graph and no weight: another job may choose anew."""


def for_primitive_cells(section: Mapping[str, Any]) -> dict[str, Any]:
    """A config section for crystals in primitive cells: see `NearestConfig`."""
    config = getattr(ENCODERS[section["name"]], "Config", None) if "name" in section else None
    setting = "own_images_once"
    if setting in getattr(config, "__dataclass_fields__", {}) and section.get(setting) is None:
        return {**section, setting: True}
    return dict(section)


def with_ties(section: Mapping[str, Any], ties: str) -> dict[str, Any]:
    """A config section with ties `kept` or `cut`; as it is where that is empty.

    Raises:
        ValueError: an encoder whose graph has no ties.
    """
    if not ties or "name" not in section:
        return dict(section)
    config = getattr(ENCODERS[section["name"]], "Config", None)
    if "cut_ties" in getattr(config, "__dataclass_fields__", {}):
        return {**section, "cut_ties": ties == "cut"}
    if ties == "cut":
        raise ValueError(
            f"graph.ties=cut: encoder {section['name']!r} joins all atoms within a radius, and "
            "there are no ties to cut"
        )
    return dict(section)


def check_positive(config: Any, encoder: str, *names: str) -> None:
    """Raises ValueError unless the named settings of an encoder's config are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{encoder} {name} must be at least 1, got {getattr(config, name)}")
