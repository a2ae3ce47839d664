"""CSPNet as an encoder: all pairs of a cell's atoms, their Fourier features and the lattice.

It needs no graph. It is the trunk of the denoisers of generation (stages `csp`, `ab_initio`,
`crysldm`): there it sees noisy elements, coordinates and lattices and a level of noise; as the
encoder of a property it sees the crystal, at level 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.schema import MAX_Z, CrystalBatch, GraphSpec
from crysforge.models.denoisers.cspnet import CSPLayers
from crysforge.models.denoisers.lattice_numbers import gram, log_metric
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders.base import ENCODERS, Encoder, check_positive
from crysforge.models.layers.time_embedding import TIME_CHANNELS, timestep_embedding

LATTICES = {"log_metric": 6, "matrix": 9}
"""Kinds of lattice coordinates, and how many numbers describe one."""
ELEMENTS = ("embedding", "vector")
STEPS = 1000
"""A level of noise between 0 and 1 enters the time embedding times this."""


@dataclass(kw_only=True)
class CSPEncoderConfig:
    """Size and inputs of CSPNet."""

    width: int = 256
    layers: int = 4
    frequencies: int = 128
    """Waves along each axis, from the constant one up."""
    lattice: str = "log_metric"
    """`log_metric`: six numbers that always are a cell; `matrix`: the nine of DiffCSP, seen through
    their products."""
    elements: str = "embedding"
    """`embedding`: elements are known; `vector`: they are numbers that noise is added to, or hidden
    (stages `ab_initio`, `crysldm`)."""
    channels: int = MAX_Z
    """Elements, from hydrogen on, or numbers that stand for one."""

    def __post_init__(self) -> None:
        check_positive(self, "cspnet", "width", "layers", "frequencies", "channels")
        for name, kinds in (("lattice", LATTICES), ("elements", ELEMENTS)):
            if getattr(self, name) not in kinds:
                value = getattr(self, name)
                raise ValueError(f"unknown cspnet {name} {value!r}: {nearest(value, kinds)}")


@ENCODERS.register("cspnet")
class CSPEncoder(Encoder):
    """See the module.

    Attributes:
        lattice_mean, lattice_std: [S] of the lattice coordinates of the crystals learned from;
            what the layers see is standardised by them (`log_metric` alone).
    """

    Config = CSPEncoderConfig
    tiny: ClassVar[Mapping[str, Any]] = {"width": 32, "layers": 2, "frequencies": 8}
    graph = GraphSpec(radius=1e-3)  # there are no atoms so near: no edges

    lattice_mean: Tensor
    lattice_std: Tensor

    def __init__(self, config: CSPEncoderConfig) -> None:
        super().__init__()
        self.config, self.dim = config, config.width
        width, state = config.width, LATTICES[config.lattice]
        self.elements = nn.Linear(config.channels, width, bias=config.elements == "vector")
        if config.elements == "embedding":
            nn.init.normal_(self.elements.weight)
        self.input = nn.Linear(width + TIME_CHANNELS, width)
        self.trunk = CSPLayers(width, config.layers, config.frequencies, state)
        self.register_buffer("lattice_mean", torch.zeros(state))
        self.register_buffer("lattice_std", torch.ones(state))

    def nodes(self, batch: CrystalBatch) -> Tensor:
        sizes = batch.atoms_per_crystal or None
        layout = PairLayout.of(batch.batch, batch.ptr, sizes)
        lattice = self.describe(batch.seen_lattice, batch.ptr.diff())
        level = torch.zeros_like(lattice[:, 0])
        return self.denoise(
            self.embed(batch.node_numbers), batch.seen_frac_coords, lattice, level, layout
        )

    def describe(self, lattice: Tensor, atoms: Tensor) -> Tensor:
        """Standardised lattice coordinates [B, 6], or [B, 9], of lattices [B, 3, 3] in Å."""
        if self.config.lattice == "matrix":
            return lattice.flatten(1)
        return (log_metric(lattice, atoms) - self.lattice_mean) / self.lattice_std

    def embed(self, elements: Tensor) -> Tensor:
        """[A, H] from atomic numbers [A] (0: hidden) or vectors [A, channels].

        Raises:
            ValueError: an element beyond `channels`.
        """
        if elements.is_floating_point():
            return self.elements(elements)
        small = self.config.channels < MAX_Z and elements.device.type == "cpu"
        if small and type(elements) is Tensor and int(elements.max()) > self.config.channels:
            raise ValueError(
                f"atomic number {int(elements.max())} needs more than "
                f"cspnet channels={self.config.channels}"
            )
        table = F.pad(self.elements.weight.t(), (0, 0, 1, 0))
        rows = F.embedding(elements, table)
        return rows if self.elements.bias is None else rows + self.elements.bias

    def denoise(
        self, nodes: Tensor, frac_coords: Tensor, lattice: Tensor, level: Tensor, layout: PairLayout
    ) -> Tensor:
        """Latents [A, H] of noisy crystals.

        Args:
            nodes: [A, H] from `embed`. frac_coords: [A, 3].
            lattice: [B, S] coordinates as `describe` gives them. level: [B] of noise, 0 to 1.
        """
        sort = layout.sort_atoms
        time = layout.sort_crystals(timestep_embedding(level * STEPS)).to(nodes.dtype)
        x = self.input(torch.cat([sort(nodes), time[layout.batch]], dim=1))
        seen = gram(lattice.view(-1, 3, 3)) if self.config.lattice == "matrix" else lattice
        x = self.trunk.propagate(x, sort(frac_coords), layout.sort_crystals(seen), layout)
        return layout.unsort_atoms(x)
