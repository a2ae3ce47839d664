"""A trained model as a Python object: structures in, properties or latents out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.graphs.packing import Neighbours, neighbours, pack
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders import Encoder
from crysforge.trainer.base.distributed import device_of
from crysforge.trainer.jobs.tables import suffixes
from crysforge.trainer.runs.model_directory import Exported
from crysforge.trainer.stages.finetune import FinetuneStage


class Predictor:
    """Predicts with a finetuned model, embeds with any.

    Attributes:
        targets: names of the predicted properties; empty for a pretrained encoder.
        units: their units.
        columns: names of the numbers in a row of `iterate`.
    """

    def __init__(
        self,
        exported: Exported,
        device: str | torch.device = "cpu",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        self.device, self.max_pairs = device_of(device), max_pairs
        self.targets: list[str] = []
        self.units: list[str] = []
        self.stage: FinetuneStage | None = None
        if exported.finetuned:
            stage = exported.build_stage()
            assert isinstance(stage, FinetuneStage) and exported.scaler is not None
            self.targets, self.units = exported.scaler.targets, exported.scaler.units
            self.stage = stage.to(self.device)
            self.encoder: Encoder = stage.encoder
        else:
            self.encoder = exported.build_encoder().to(self.device)
        self.columns = [f"prediction{suffix}" for suffix in suffixes(self.targets)]

    def predict(self, structures: Any, max_atoms: int = 4096) -> np.ndarray:
        """Properties in physical units.

        Args:
            structures: pymatgen `Structure`, ASE `Atoms` or `Crystal`; one, or a sequence.
            max_atoms: atoms per batch.

        Returns:
            [n] for one target, [n, T] for several, float64; one structure gives a number or [T].

        Raises:
            ValueError: the model is a pretrained encoder without a head.
            BadCrystal: a structure that cannot be used; names which.
        """
        self.require_head()
        crystals, single = _crystals(structures)
        rows = [row for _, row in self.iterate(crystals, max_atoms)]
        for i, row in enumerate(rows):
            if isinstance(row, BadCrystal):
                raise BadCrystal(f"structure {i}: {row}", row.reason)
        out = np.stack(rows) if rows else np.empty((0, len(self.targets)))
        out = out[:, 0] if len(self.targets) == 1 else out
        return out[0] if single else out

    def require_head(self) -> None:
        """Raises ValueError if this model is a pretrained encoder that predicts nothing."""
        if self.stage is None:
            raise ValueError(
                "this is a pretrained encoder, it predicts no property: finetune it with "
                "launch/finetune.py init_from=RUN target=NAME, or call .embed"
            )

    def embed(self, structures: Any, max_atoms: int = 4096) -> np.ndarray:
        """Latents of crystals: the mean over atoms of the encoder's output, float32 [n, dim]; one
        structure gives [dim]."""
        crystals, single = _crystals(structures)
        rows: list[np.ndarray] = []
        with torch.no_grad():
            for batch in self._batches(crystals, max_atoms):
                latents = self.encoder(batch).float()
                pooled = torch.segment_reduce(latents, "mean", offsets=batch.ptr)
                rows += list(pooled.cpu().numpy())
        out = np.stack(rows) if rows else np.empty((0, self.encoder.dim), dtype=np.float32)
        return out[0] if single else out

    def iterate(
        self, crystals: Iterable[Crystal], max_atoms: int = 4096
    ) -> Iterator[tuple[Crystal, np.ndarray | BadCrystal]]:
        """Crystals with their predictions [T], or why there is none, batch by batch, in order;
        holds one batch."""
        assert self.stage is not None
        for group in _groups(crystals, max_atoms):
            graphs = [self._graph(crystal) for crystal in group]
            values: Iterator[np.ndarray] = iter(())
            if batch := self._pack(group, graphs):
                with torch.no_grad():  # not around the yield: that would reach into the caller
                    values = iter(self.stage.predict(batch).double().cpu().numpy())
            for crystal, graph in zip(group, graphs, strict=True):
                yield crystal, graph if isinstance(graph, BadCrystal) else next(values)

    def _batches(self, crystals: Iterable[Crystal], max_atoms: int) -> Iterator[CrystalBatch]:
        for group in _groups(crystals, max_atoms):
            graphs = [self._graph(crystal) for crystal in group]
            for crystal, graph in zip(group, graphs, strict=True):
                if isinstance(graph, BadCrystal):
                    raise BadCrystal(f"structure {crystal.id}: {graph}", graph.reason)
            if batch := self._pack(group, graphs):
                yield batch

    def _graph(self, crystal: Crystal) -> Neighbours | BadCrystal:
        try:
            return neighbours(crystal, self.encoder.graph, self.max_pairs)
        except BadCrystal as error:
            return error

    def _pack(
        self, group: Sequence[Crystal], graphs: Sequence[Neighbours | BadCrystal]
    ) -> CrystalBatch | None:
        """A batch of the crystals that have a graph; None if there is none."""
        both = [(c, g) for c, g in zip(group, graphs, strict=True) if isinstance(g, Neighbours)]
        if not both:
            return None
        samples = [Sample.clean(crystal) for crystal, _ in both]
        return pack(samples, [g for _, g in both], self.encoder.graph).to(self.device)


def _crystals(structures: Any) -> tuple[list[Crystal], bool]:
    """Anything predict takes as crystals, and whether it was a single structure."""
    single = (
        isinstance(structures, Crystal)
        or hasattr(structures, "lattice")
        or (hasattr(structures, "get_scaled_positions"))
    )
    out = []
    for i, item in enumerate([structures] if single else structures):
        try:
            out.append(_crystal(item, str(i)))
        except BadCrystal as error:
            raise BadCrystal(f"structure {i}: {error}") from None
    return out, single


def _crystal(item: Any, id: str) -> Crystal:
    if isinstance(item, Crystal):
        return item
    if hasattr(item, "get_scaled_positions"):
        return Crystal.from_ase(item, id)
    if hasattr(item, "lattice") and hasattr(item, "frac_coords"):
        return Crystal.from_pymatgen(item, id)
    raise BadCrystal(f"{type(item).__name__} is no pymatgen Structure, ASE Atoms or Crystal")


def _groups(crystals: Iterable[Crystal], max_atoms: int) -> Iterator[list[Crystal]]:
    """Consecutive crystals of at most `max_atoms` atoms together (a larger crystal goes alone)."""
    group: list[Crystal] = []
    atoms = 0
    for crystal in crystals:
        if group and atoms + len(crystal) > max_atoms:
            yield group
            group, atoms = [], 0
        group.append(crystal)
        atoms += len(crystal)
    if group:
        yield group
