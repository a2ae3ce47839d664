"""Masks of whole orbits: which atoms go together, how many, and what is left of the quotient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crysforge.datapipe.crystals.prototypes import prototype_crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import MASKS, Chain, MaskAtoms, MaskOrbits, Once, Sample
from crysforge.datapipe.schema import GraphSpec, concat
from tests.datapipe.graphs.test_quotient import (
    CHAIN,
    CRYSTALS,
    DIAMOND,
    PEROVSKITE,
    plain_refinement,
    random_crystal,
)

SPECS = {
    "pdd": GraphSpec(neighbors=25, pdd=30, depth=4),
    "matformer": GraphSpec(neighbors=12, lattice_edges="matformer", depth=5),
    "radius": GraphSpec(radius=4.0, depth=3),
    "no depth": GraphSpec(radius=4.0, vectors=True),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def symmetric():
    """Prototypes that were not distorted, and so have atoms alike."""
    found = [prototype_crystal(i) for i in range(60)]
    return [c for c in found if build([c], SPECS["pdd"]).num_nodes <= len(c) / 2]


def masked(crystal, spec, key=0, ratio=0.3, **settings):
    """[n] bool."""
    sample = Sample.clean(crystal, key)
    return build([sample], spec, transform=MaskOrbits(ratio, **settings)).masked.numpy()


@each_spec
def test_orbits_are_hidden_whole(spec, symmetric):
    partly = 0
    for crystal in [*CRYSTALS, *symmetric[:6]]:
        colour = plain_refinement(build([crystal], spec, quotient=False), len(crystal))
        for key in range(8):
            hidden = masked(crystal, spec, key)
            for c in set(colour):
                assert len({h for h, other in zip(hidden, colour, strict=True) if other == c}) == 1
            partly += 0 < hidden.sum() < len(hidden)
    assert partly > 20


@pytest.mark.parametrize("crystal", [PEROVSKITE, DIAMOND, CHAIN, random_crystal(0, 6)])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_every_atom_is_hidden_as_often_as_by_masks_of_atoms(crystal, ratio):
    spec, draws, n = SPECS["radius"], 1500, len(crystal)
    largest = int(build([crystal], replace(spec, depth=n)).node_multiplicity.max())
    for round_up in (True, False):
        count = MaskAtoms(ratio, round_up).on_crystal(
            Sample.clean(crystal), np.random.default_rng(0)
        )
        count = int(count.masked.sum())
        samples = [Sample.clean(crystal, key) for key in range(draws)]
        batch = build(samples, spec, transform=MaskOrbits(ratio, round_up))
        hidden = batch.masked.view(draws, n).double()
        error = 5 * (0.25 / draws) ** 0.5
        assert hidden.mean(0).numpy() == pytest.approx(np.full(n, count / n), abs=error)
        assert (hidden.sum(1) - count).abs().max() <= (largest if largest > 1 else 0)


@each_spec
def test_the_order_of_the_atoms_does_not_matter(spec, symmetric):
    for i, crystal in enumerate([*CRYSTALS, *symmetric[:8]]):
        order = np.random.default_rng(i).permutation(len(crystal))
        shuffled = replace(
            crystal, numbers=crystal.numbers[order], frac_coords=crystal.frac_coords[order]
        )
        for key in range(4):
            assert (masked(shuffled, spec, key) == masked(crystal, spec, key)[order]).all()


def test_a_draw_is_that_of_the_key_in_any_batch_and_epoch(symmetric):
    spec, mask = SPECS["pdd"], MaskOrbits(0.5)
    samples = [Sample.clean(c, 31 * i, lasting_key=i) for i, c in enumerate(symmetric[:8])]
    whole = build(samples, spec, transform=mask)
    parts = concat([build([s], spec, transform=Chain((mask,))) for s in samples])
    assert torch.equal(whole.masked, parts.masked)
    assert torch.equal(whole.edge_index, parts.edge_index)
    later = [replace(s, rng_key=s.rng_key + 1) for s in samples]
    assert not torch.equal(build(later, spec, transform=mask).masked, whole.masked)
    once = [build(s, spec, transform=Once(mask)).masked for s in (samples, later)]
    assert torch.equal(*once)


@pytest.mark.parametrize("name", ["pdd", "matformer", "radius"])
def test_the_quotient_keeps_its_size(name, symmetric):
    spec = SPECS[name]
    clean, edges = 0, dict.fromkeys(MASKS, 0)
    for key, crystal in enumerate(symmetric):
        whole = build([crystal], replace(spec, depth=len(crystal)))
        clean += whole.num_edges
        for unit, mask in MASKS.items():
            sample = Sample.clean(crystal, key)
            batch = build([sample], spec, transform=mask(0.3))
            edges[unit] += batch.num_edges
            if unit == "orbit":
                assert batch.num_nodes <= whole.num_nodes
                assert batch.num_edges <= whole.num_edges
    assert edges["orbit"] <= clean < edges["atom"] / 1.5
