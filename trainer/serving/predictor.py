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
from crysforge.models import kernels
from crysforge.models.encoders import Encoder
from crysforge.trainer.base.distributed import device_of
from crysforge.trainer.jobs.tables import suffixes
from crysforge.trainer.runs.model_directory import Exported
from crysforge.trainer.runs.trained_on import TrainedOn
from crysforge.trainer.serving.inputs import crystals_of
from crysforge.trainer.stages.finetune import FinetuneStage


class Predictor:
    """Predicts with a finetuned model, embeds with any.

    Attributes:
        targets: names of the predicted properties; empty for a pretrained encoder.
        units: their units.
        columns: names of the numbers in a row of `iterate`.
        trained_on: what its crystals were like; it brings others to the same cell.
    """

    def __init__(
        self,
        exported: Exported,
        device: str | torch.device = "cpu",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        self.device, self.max_pairs = device_of(device), max_pairs
        kernels.enable(self.device)
        self.trained_on = TrainedOn.of(exported.data, str(exported.path))
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
        self._of_cell = np.array([name in self.trained_on.extensive for name in self.targets])

    def predict(
        self, structures: Any, max_atoms: int = 4096, *, strict: bool = False, **reading: Any
    ) -> np.ndarray:
        """Properties in physical units; those that go with the size of the cell are of the cell
        that is given.

        Args:
            structures: pymatgen `Structure`, ASE or JARVIS `Atoms`, `Crystal`, one of these as a
                dict, or a path; one, or several in a list, array or Series. A path by itself may
                be anything that `prepare` reads.
            max_atoms: atoms per batch.
            strict: whether crystals unlike those that the model learned from (elements, size,
                density) are refused; otherwise a warning names them.
            reading: `cell` and other settings of reading, see `PredictReading`.

        Returns:
            [n] for one target, [n, T] for several, float64; one structure gives a number or [T].

        Raises:
            ValueError: the model is a pretrained encoder without a head.
            BadCrystal: a structure that cannot be used; names which.
        """
        self.require_head()
        crystals, single = crystals_of(structures, self.trained_on, strict, reading)
        rows = [row for _, row in self.iterate(crystals, max_atoms)]
        for i, row in enumerate(rows):
            if isinstance(row, BadCrystal):
                raise BadCrystal(f"structure {i}: {row}", row.reason)
        out = (
            np.stack([row for row in rows if isinstance(row, np.ndarray)])
            if rows
            else np.empty((0, len(self.targets)))
        )
        out = out[:, 0] if len(self.targets) == 1 else out
        return out[0] if single else out

    def require_head(self) -> None:
        """Raises ValueError if this model is a pretrained encoder that predicts nothing."""
        if self.stage is None:
            raise ValueError(
                "this is a pretrained encoder, it predicts no property: finetune it with "
                "launch/finetune.py init_from=RUN target=NAME, or call .embed"
            )

    def embed(
        self, structures: Any, max_atoms: int = 4096, *, strict: bool = False, **reading: Any
    ) -> np.ndarray:
        """Latents of crystals: the mean over atoms of the encoder's output, float32 [n, dim]; one
        structure gives [dim]. Arguments as `predict` has them."""
        crystals, single = crystals_of(structures, self.trained_on, strict, reading)
        rows: list[np.ndarray] = []
        with torch.no_grad():
            for batch in self._batches(crystals, max_atoms):
                latents = self.encoder(batch).float()
                pooled = torch.segment_reduce(latents, "mean", offsets=batch.ptr)
                rows += list(pooled.cpu().numpy())
        out = (
            np.stack([row for row in rows if isinstance(row, np.ndarray)])
            if rows
            else np.empty((0, self.encoder.dim), dtype=np.float32)
        )
        return out[0] if single else out

    def iterate(
        self, crystals: Iterable[Crystal], max_atoms: int = 4096
    ) -> Iterator[tuple[Crystal, np.ndarray | BadCrystal]]:
        """Crystals, which are in the model's cell, with their predictions [T], or why there is
        none, batch by batch, in order; holds one batch."""
        assert self.stage is not None
        for group in _groups(crystals, max_atoms):
            graphs = [self._graph(crystal) for crystal in group]
            values: Iterator[np.ndarray] = iter(())
            if batch := self._pack(group, graphs):
                with torch.no_grad():  # not around the yield: that would reach into the caller
                    values = iter(self.stage.predict(batch).double().cpu().numpy())
            for crystal, graph in zip(group, graphs, strict=True):
                if isinstance(graph, BadCrystal):
                    yield crystal, graph
                else:
                    yield crystal, np.where(self._of_cell, crystal.copies, 1) * next(values)

    def _batches(self, crystals: Iterable[Crystal], max_atoms: int) -> Iterator[CrystalBatch]:
        """Raises BadCrystal for one that has no graph."""
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
