"""How far each encoder is from its definition: the largest difference of latents and of gradients,
as a share of the largest value, in fp64.

    python benchmarks/definitions.py

The definitions (tests/reference_*.py) are written anew from papers and released codes, on the full
graph, with concatenations over edges and gathers by index; SchNet, DimeNet++ and Equiformer use
parts of PyG. The encoder runs on the quotient graph where it has one. Debug sizes, training mode;
PDDFormer, whose dropout draws by nodes, in evaluation mode. (CSPNet's layers are held to theirs in
tests/models/denoisers/test_cspnet.py.)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.tables import show
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders import ENCODERS, Encoder
from tests import reference_angles, reference_backbones
from tests.models.encoders.test_encoders import crystals, doubled, tiny
from tests.reference_encoders import REFERENCES, reference


def plain(name: str, encoder: Encoder) -> tuple[Callable[[CrystalBatch], Tensor], nn.Module]:
    """Batch → latents by the definition, and the module whose weights it uses."""
    if name in REFERENCES:
        settings = {k: v for k, v in encoder.section.items() if k != "name"}
        module = reference(encoder, name, configure(type(encoder).Config, settings))
        return module, module
    definition = {**reference_backbones.PLAIN, **reference_angles.PLAIN}[name]
    return lambda batch: definition(encoder, batch), encoder


def main() -> None:
    rows = []
    for name in (n for n in ENCODERS if n != "cspnet"):
        encoder = tiny(name, name != "pddformer").double()
        full, fewest = (
            doubled(build(crystals(), encoder.graph, quotient=q)) for q in (False, True)
        )
        torch.manual_seed(0)
        weight = torch.randn(full.num_atoms, encoder.dim, dtype=torch.float64)
        found = []
        definition, module = plain(name, encoder)
        for run, owner, batch in ((encoder, encoder, fewest), (definition, module, full)):
            owner.zero_grad()
            latents = run(batch)
            (latents * weight).sum().backward()
            by_name = sorted(owner.named_parameters(), key=lambda pair: pair[0])
            gradients = torch.cat([p.grad.flatten() for _, p in by_name])
            found.append((latents.detach(), gradients.clone()))
        shares = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]
        rows.append(
            {"encoder": name, "latents": f"{shares[0]:.0e}", "gradients": f"{shares[1]:.0e}"}
        )
    show(rows, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
