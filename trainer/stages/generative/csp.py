"""Crystal structure prediction: coordinates and lattice of a crystal whose elements are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.lattice_numbers import from_log_metric
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders.base import Encoder
from crysforge.models.encoders.cspnet import LATTICES, CSPEncoder
from crysforge.models.generative.diffusions import GaussianDiffusion, WrappedDiffusion
from crysforge.models.generative.flows import Linear, TorusLinear
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.process import FieldProcess, Fixed
from crysforge.models.generative.rows import Packing
from crysforge.models.generative.sampler import Field, Fields, SamplingConfig, check, sample
from crysforge.models.layers.basic import WideLinear
from crysforge.models.ops.keyed_random import derive, keyed_uniform
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.stages.base import STAGES, Saved, Stage, StageConfig, Term
from crysforge.trainer.stages.made import Seen, Wanted, Watch, made

COORDS = ("torus_linear", "wrapped_gaussian")
LATTICE = ("linear", "gaussian")
_LEVEL, _CORRUPT = 0xC5, 0xC6  # salts


@dataclass(kw_only=True)
class CSPConfig(StageConfig):
    """Settings of structure prediction; the defaults are the few-step flow."""

    coords: str = "torus_linear"
    """Process of the fractional coordinates: `torus_linear`, or DiffCSP's `wrapped_gaussian`."""
    lattice: str = "linear"
    """Process of the lattice: `linear` from a prior fitted to the training lattices, or DiffCSP's
    `gaussian`."""
    timesteps: int = 1000
    """T, levels of noise of a diffusion; flows have all levels."""
    coords_weight: float = 10.0
    """Weight of the coordinates' error."""
    lattice_weight: float = 1.0
    """Weight of the lattice's error."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(steps=50, anneal={"coords": 10.0})
    )
    """How samples are drawn unless a command says otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("coords", COORDS), ("lattice", LATTICE)):
            value = getattr(self, name)
            if value not in kinds:
                raise ValueError(f"unknown process {name}={value!r}: {nearest(value, kinds)}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        for name in ("coords_weight", "lattice_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@STAGES.register("csp")
class CSPStage(Stage):
    """Crystal corrupted to a random level → CSPNet, which knows its elements → the way back.

    Fields of the state: `coords` [A, 3] and `lattice` [B, S], the encoder's standardised lattice
    coordinates. Terms: the errors of both. The trunk is the encoder, so that it can be finetuned.

    Raises:
        ValueError: another encoder than CSPNet, or a combination that makes no sense.
    """

    Config = CSPConfig
    name = "csp"
    encoder: CSPEncoder

    seen_atoms: Tensor
    seen_elements: Tensor

    def __init__(self, config: CSPConfig, encoder: Encoder) -> None:
        super().__init__()
        if not isinstance(encoder, CSPEncoder):
            name = encoder.section["name"]
            raise ValueError(f"stage {self.name} needs encoder.name=cspnet, not {name!r}")
        self.config, self.encoder = config, encoder
        trunk = self.make_trunk()
        kind = trunk.config.lattice
        if kind == "matrix" and config.lattice == "linear":
            raise ValueError("lattice=linear needs encoder.lattice=log_metric")
        self.coords_head = WideLinear(trunk.dim, 3, bias=False)
        self.lattice_head = WideLinear(trunk.dim, LATTICES[kind], bias=False)
        self.weights: Mapping[str, float] = {
            "coords": config.coords_weight,
            "lattice": config.lattice_weight,
        }
        self.fields = {
            "coords": Field(_coords(config), True),
            "lattice": Field(_lattice(config, LATTICES[kind]), False),
            "types": Field(self.types_process(), True),
        }
        check(config.sampling, self.fields)
        for name, values in Seen.none().buffers().items():
            self.register_buffer(name, values)

    def make_trunk(self) -> CSPEncoder:
        """The network that sees noisy states: here the encoder itself."""
        return self.encoder

    @property
    def trunk(self) -> CSPEncoder:
        """What `make_trunk` made."""
        return self.encoder

    def types_process(self) -> FieldProcess:
        """What is done to the elements: nothing here."""
        return Fixed()

    @property
    def levels(self) -> int:
        """Levels of noise; 0: all."""
        return max(f.process.levels for f in self.fields.values())

    def look(self, crystals: Iterable[Crystal]) -> None:
        seen = Seen.of(crystals, self.encoder.config.channels)
        for name, values in seen.buffers().items():
            getattr(self, name).copy_(values)
        fresh = not self.encoder.lattice_mean.any() and bool((self.encoder.lattice_std == 1).all())
        if fresh and self.encoder.config.lattice == "log_metric":
            self.encoder.lattice_mean.copy_(seen.lattice_mean)
            self.encoder.lattice_std.copy_(seen.lattice_std)

    def take(self, before: Saved) -> None:
        if before.stage == self.name:
            for head in ("coords_head", "lattice_head"):
                getattr(self, head).load_state_dict(before.weights(f"{head}."))

    # Training

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        layout = PairLayout.of(batch.batch, batch.ptr, batch.atoms_per_crystal or None)
        clean = self.clean(batch)
        level = _levels(batch.rng_key, self.levels).to(batch.frac_coords.dtype)
        key = derive(batch.rng_key, _CORRUPT)
        where = Packing(key, batch.batch, batch.ptr, (), batch.frac_coords.dtype)
        state, targets = {}, {}
        for name, f in self.fields.items():
            rows = where.rows(name, f.of_members)
            at = (level[batch.batch] if f.of_members else level)[:, None]
            state[name], targets[name] = f.process.corrupt(clean[name], at, rows)
        predictions = self.predict(state, level, layout, batch.ptr)
        terms = {}
        for name, prediction in predictions.items():
            error = self.fields[name].process.error(prediction, targets[name], state[name])
            terms[name] = Term(*(part.float() for part in error))
        return terms

    def clean(self, batch: CrystalBatch) -> Fields:
        """The fields of the crystals of a batch."""
        return {
            "coords": batch.frac_coords,
            "lattice": self.encoder.describe(batch.lattice, batch.ptr.diff()),
            "types": batch.numbers,
        }

    def predict(self, state: Fields, level: Tensor, layout: PairLayout, ptr: Tensor) -> Fields:
        """Predictions of the fields that move, from a state at levels [B]."""
        nodes = self.trunk.embed(state["types"])
        latents = self.trunk.denoise(nodes, state["coords"], state["lattice"], level, layout)
        latents = latents.to(state["coords"].dtype)
        lattice = self.lattice_head(crystal_mean(latents, ptr))
        if self.trunk.config.lattice == "matrix":  # turns with the lattice
            lattice = (lattice.view(-1, 3, 3) @ state["lattice"].view(-1, 3, 3)).flatten(1)
        out = {"coords": self.coords_head(latents), "lattice": lattice}
        return out | self.predict_types(latents)

    def predict_types(self, latents: Tensor) -> Fields:
        """Predictions of the elements: none here."""
        return {}

    # Sampling

    def draw(
        self,
        wanted: Sequence[Wanted],
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
        watch: Watch | None = None,
    ) -> list[Crystal | BadCrystal]:
        self.check_wanted(wanted)
        device = self.coords_head.weight.device
        key = torch.tensor([w.key for w in wanted], device=device)
        dtype = self.coords_head.weight.dtype
        where = Packing.of(key, [len(w) for w in wanted], dtype)
        layout = PairLayout.of(where.batch, where.ptr, where.sizes)
        settings = sampling or self.config.sampling
        crystals = partial(self.crystals, wanted, where)
        done = 0

        def after(level: float, state: Fields) -> None:
            nonlocal done
            done += 1
            if watch is not None:
                watch(done, settings.steps, lambda: crystals(state))

        def denoise(state: Fields, level: Tensor) -> Fields:
            return self.allow(self.predict(state, level, layout, where.ptr), wanted)

        given = self.given(wanted, device)
        return crystals(sample(denoise, self.fields, where, settings, given, guidance, watch=after))

    def check_wanted(self, wanted: Sequence[Wanted]) -> None:
        """Raises ValueError for a crystal that this stage cannot make."""
        if not all(w.numbers for w in wanted):
            raise ValueError(f"stage {self.name} predicts structures: give a formula")

    def given(self, wanted: Sequence[Wanted], device: torch.device) -> Fields:
        """Fields that are known from the start."""
        return {"types": torch.tensor([z for w in wanted for z in w.numbers], device=device)}

    def allow(self, predictions: Fields, wanted: Sequence[Wanted]) -> Fields:
        """Predictions within what is wanted."""
        return predictions

    def numbers(self, state: Fields, wanted: Sequence[Wanted]) -> Tensor:
        """[A] atomic numbers of a state."""
        return state["types"]

    def crystals(
        self, wanted: Sequence[Wanted], where: Packing, state: Fields
    ) -> list[Crystal | BadCrystal]:
        """The crystals of a state."""
        lattice = state["lattice"]
        if self.encoder.config.lattice == "matrix":
            cells = lattice.view(-1, 3, 3)
        else:
            raw = lattice * self.encoder.lattice_std + self.encoder.lattice_mean
            cells = from_log_metric(raw, where.ptr.diff())
        return made(wanted, where.sizes, self.numbers(state, wanted), state["coords"], cells)


def _coords(config: CSPConfig) -> FieldProcess:
    if config.coords == "torus_linear":
        return TorusLinear(3)
    return WrappedDiffusion(3, config.timesteps)


def _lattice(config: CSPConfig, width: int) -> FieldProcess:
    return (
        Linear(width) if config.lattice == "linear" else GaussianDiffusion(width, config.timesteps)
    )


def _levels(key: Tensor, levels: int) -> Tensor:
    """[B] a level for each crystal, uniform in (0, 1] or over those that there are."""
    draw = keyed_uniform(key, 1, _LEVEL)[:, 0]
    return ((draw * levels).floor() + 1) / levels if levels else 1 - draw
