"""What every objective promises, with every encoder; and each one's own definition."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.models.encoders import ENCODERS, build_encoder
from crysforge.models.objectives.connectivity import MOST_EDGES, UNJOINED_WEIGHT
from crysforge.models.objectives.diffusion import wrapped_score
from crysforge.models.objectives.element_features import element_features
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.dpf import displacement
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from tests.objectives import OBJECTIVES, collate, make

GLOBAL = {"contrast", "barlow", "spread"}
"""Terms of which a batch is more than its parts."""

each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
each_encoder = pytest.mark.parametrize("encoder", ["pddformer", "matformer"])


@pytest.fixture
def crystals(random_crystal):
    rng = np.random.default_rng(0)
    groups = (1, 225, 2, 216, 14, 227, 1)
    return [
        random_crystal(rng, 2 + i % 4, f"c{i}", {"space_group": group})
        for i, group in enumerate(groups)
    ]


def loss_of(stage, terms):
    return sum(w * terms[k].total / terms[k].count.clamp(min=1) for k, w in stage.weights.items())


@each_objective
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradient_reaches_every_parameter(objective, encoder, crystals):
    """In eval mode: in training a batch norm takes the gradient of the bias before it away. Its own
    bias keeps the few rectified units of a tiny head from being all off at once."""
    stage = make(objective, encoder).eval()
    for module in stage.modules():
        if hasattr(module, "running_mean") and module.bias is not None:
            torch.nn.init.ones_(module.bias)
    terms = stage(collate(stage, crystals))
    assert set(stage.weights) <= set(terms)
    for term in terms.values():
        assert term.total.shape == term.count.shape == ()
        assert term.total.dtype == term.count.dtype == torch.float32
        assert torch.isfinite(term.total)
    loss_of(stage, terms).backward()
    for key, p in stage.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        assert p.grad.any(), key


@each_objective
@each_encoder
def test_the_loss_falls(objective, encoder, crystals):
    stage = make(objective, encoder)
    batch = collate(stage, crystals)
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss_of(stage, stage(batch)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_objective
@each_encoder
def test_parts_add_up_to_the_whole_in_any_order(objective, encoder, crystals):
    """So no draw depends on the rest of the batch."""
    stage = make(objective, encoder).eval()
    whole = stage(collate(stage, crystals))
    slices = [slice(4, 7), slice(0, 1), slice(1, 4)]
    parts = [stage(collate(stage, crystals[i])) for i in slices]
    for key in whole.keys() - GLOBAL:
        total, count = (sum(getattr(p[key], x) for p in parts) for x in ("total", "count"))
        torch.testing.assert_close(count, whole[key].count, msg=key)
        torch.testing.assert_close(total, whole[key].total, rtol=1e-4, atol=1e-4, msg=key)


@each_objective
def test_losses_stay_close_in_bf16(objective, crystals):
    stage = make(objective)
    batch = collate(stage, crystals)
    wide = loss_of(stage, stage(batch))
    with torch.autocast("cpu", torch.bfloat16):
        terms = stage(batch)
    for name in stage.weights:
        assert terms[name].total.dtype == torch.float32
    loss = loss_of(stage, terms)
    loss.backward()
    assert loss.item() == pytest.approx(wide.item(), rel=0.1)


@each_objective
def test_draws_repeat_in_an_epoch_and_change_with_it(objective, crystals):
    stage = make(objective).eval()
    first, again, other = (
        loss_of(stage, stage(collate(stage, crystals, epoch))) for epoch in (0, 0, 1)
    )
    assert first == again
    if objective == "dpf released":  # drawn once for all epochs
        assert first == other
    elif objective not in ("crysxpp", "crysgnn"):  # these draw nothing
        assert first != other


@each_objective
def test_a_filler_shows_others_nothing(objective, crystals):
    stage = make(objective)
    batch = collate(stage, crystals[:1])
    batch.is_dummy = True
    for name, term in stage(batch).items():
        assert torch.isfinite(term.total) and term.total.requires_grad <= (name in stage.weights)
        if name in GLOBAL:
            assert term.total == term.count == 0


@pytest.mark.parametrize(
    ("stage", "settings", "word"),
    [
        ("dpf", {"mask_ratio": 0, "position_noise": 0, "lattice_noise": 0}, "nothing to denoise"),
        ("dpf", {"lattice_noise": -1.0}, "lattice_noise"),
        ("dpf", {"position_target": "vector"}, "position_target"),
        ("dpf", {"noise": "relased"}, "did you mean 'released'"),
        ("dpf", {"keep_weights": "bst"}, "did you mean 'best'"),
        ("dpf", {"best_metric": "mae"}, "best_metric"),
        ("vae", {"masks": "static"}, "masks"),
        ("joint", {"mask_unit": "orbits"}, "did you mean 'orbit'"),
        ("vae", {"decoder": {"heads": "mpl"}}, "did you mean 'mlp'"),
        ("vae", {"decoder": {"coords_loss": "l2"}}, "coords_loss"),
        ("joint", {"retain_decoder": True}, "retain_decoder"),
        ("crysxpp", {"feature_weight": 0.0}, "feature_weight"),
        ("crysgnn", {"temperature": 0.0}, "temperature"),
        ("crystal_twins", {"variant": "barlo"}, "did you mean 'barlow'"),
        ("crystal_twins", {"edge_ratio": 1.0}, "edge_ratio"),
        ("crysdiff", {"timesteps": 1}, "timesteps"),
        ("crysdiff", {"denoiser": {"layers": 0}}, r"denoiser\.layers"),
    ],
)
def test_settings_that_make_no_sense_are_named(stage, settings, word):
    with pytest.raises(ValueError, match=word):
        configure(STAGES[stage].Config, settings, stage)


@pytest.mark.parametrize("unit", ["atom", "orbit"])
@pytest.mark.parametrize("masks", ["fresh", "fixed"])
@pytest.mark.parametrize("stage", ["vae", "joint", "dpf", "crystal_twins"])
def test_atoms_alike_are_hidden_one_by_one_or_together(stage, masks, unit):
    still = {
        "vae": {"masks": masks},
        "dpf": {"position_noise": 0.0, "lattice_noise": 0.0},
        "crystal_twins": {"shift": 0.0},
    }
    settings = {**still.get(stage, {}), "mask_ratio": 0.5, "mask_unit": unit}
    config = configure(STAGES[stage].Config, settings, stage)
    stage = STAGES[stage](config, build_encoder({"name": "pddformer", "tiny": True}))
    diamond = Crystal.create("C", [6, 6], [[0, 0, 0], [0.25] * 3], 1.785 * (1 - np.eye(3)))
    samples = [Sample.clean(diamond, key, lasting_key=key) for key in range(30)]
    batch = build(samples, stage.encoder.graph, transform=stage.transform())
    hidden = set(batch.masked.view(-1, 2).sum(1).tolist())
    assert hidden == ({1} if unit == "atom" else {0, 2})


# Denoising


@pytest.mark.parametrize("noise", ["paper", "released"])
@pytest.mark.parametrize(
    ("on", "terms"),
    [
        ("mask_ratio", {"atoms", "atom_accuracy"}),
        ("position_noise", {"coords"}),
        ("lattice_noise", {"lattice"}),
    ],
)
def test_each_corruption_stands_alone(on, terms, noise, crystals):
    off = {"mask_ratio": 0.0, "position_noise": 0.0, "lattice_noise": 0.0}
    config = configure(STAGES["dpf"].Config, {**off, on: 0.3, "noise": noise})
    stage = STAGES["dpf"](config, build_encoder({"name": "pddformer", "tiny": True}))
    batch = collate(stage, crystals)
    assert set(stage(batch)) == terms
    assert bool(batch.masked.any()) == (on == "mask_ratio")
    moved = not torch.equal(batch.seen_frac_coords, batch.frac_coords)
    strained = not torch.equal(batch.seen_lattice, batch.lattice)
    assert (moved, strained) == (on == "position_noise", on == "lattice_noise")
    clean = build(crystals, stage.encoder.graph)
    assert torch.equal(batch.frac_coords, clean.frac_coords)
    assert torch.equal(batch.lattice, clean.lattice)


def test_displacement_is_the_shortest_way_in_the_seen_cell(crystals):
    stage = make("dpf displacement")
    batch = collate(stage, crystals)
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    for i, found in enumerate(displacement(batch).tolist()):
        moved = (batch.seen_frac_coords - batch.frac_coords)[i].numpy()
        lattice = batch.seen_lattice[batch.batch[i]].numpy()
        assert found == pytest.approx(np.linalg.norm((moved + steps) @ lattice, axis=1).min())


# Connectivity


@pytest.mark.parametrize("objective", ["crysxpp", "crysgnn"])
def test_adjacency_is_the_weighted_cross_entropy(objective, crystals):
    stage = make(objective).eval()
    batch = collate(stage, crystals)
    edges = batch.extras["pair_edges"].long().clamp(max=MOST_EDGES)
    assert (edges == 0).any() and (edges > 0).any()
    atoms = stage.encoder(batch)
    log_p = stage.decoder.pairs(atoms, batch.ptr)
    weight = torch.tensor([UNJOINED_WEIGHT, *[1.0] * MOST_EDGES])
    logits, features = stage.decoder.features(atoms), element_features()[batch.numbers]
    if objective == "crysgnn":  # over the batch
        adjacency = F.nll_loss(log_p, edges, weight)
        feature = F.binary_cross_entropy_with_logits(logits, features)
    else:  # over each crystal, then over crystals
        counts = batch.ptr.diff().tolist()
        adjacency = torch.stack(
            [
                F.nll_loss(p, e, weight)
                for p, e in zip(
                    log_p.split([n * n for n in counts]),
                    edges.split([n * n for n in counts]),
                    strict=True,
                )
            ]
        ).mean()
        feature = torch.stack(
            [
                F.binary_cross_entropy_with_logits(a, b)
                for a, b in zip(logits.split(counts), features.split(counts), strict=True)
            ]
        ).mean()
    terms = stage(batch)
    for name, expected in (("adjacency", adjacency), ("features", feature)):
        torch.testing.assert_close(terms[name].total / terms[name].count, expected)


# Contrast


def test_views_are_neighbours_and_differ(crystals):
    stage = make("barlow")
    batch = collate(stage, crystals)
    assert batch.num_crystals == 2 * len(crystals)
    assert batch.ids[0::2] == batch.ids[1::2] == [c.id for c in crystals]
    assert len(set(batch.rng_key.tolist())) == 2 * len(crystals)
    for i in range(0, batch.num_crystals, 2):
        a, b, c = batch.ptr[i : i + 3].tolist()
        assert torch.equal(batch.numbers[a:b], batch.numbers[b:c])
        assert not torch.equal(batch.seen_frac_coords[a:b], batch.seen_frac_coords[b:c])


def test_collapsed_embeddings_are_reported(crystals):
    stage = make("simsiam")
    batch = collate(stage, crystals)
    spread = stage(batch)["spread"]
    with torch.no_grad():
        stage.projector.norm.weight.zero_()
        stage.projector.norm.bias.fill_(1.0)
    collapsed = stage(batch)["spread"]
    assert collapsed.total.abs() < 1e-4 < 0.1 < spread.total
    assert "collapsing" in stage.warnings({"spread": float(collapsed.total)})[0]
    assert stage.warnings({}) == stage.warnings({"spread": 0.9}) == []


# Diffusion


def test_denoised_directions_follow_the_crystal(crystals):
    """The score does not change when the noised crystal is rotated or moved, and goes along when
    its atoms change places."""
    stage = make("crysdiff").eval()
    batch = collate(stage, crystals)
    h, state = stage.encoder(batch), batch.extras["lattice_state"]
    t, n = batch.extras["timestep"], batch.num_atoms

    def score(h, frac):
        return stage.denoiser(h, t, frac, state, batch.batch, batch.ptr)

    coords, lattice = score(h, batch.seen_frac_coords)
    assert coords.std() > 1e-3
    moved, same = score(h, batch.seen_frac_coords + torch.tensor([0.3, 1.0, -0.2]))
    torch.testing.assert_close(moved, coords, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, lattice, rtol=1e-3, atol=1e-4)
    order = torch.arange(n)
    order[0], order[1] = 1, 0  # of the first crystal
    swapped, same = score(h[order], batch.seen_frac_coords[order])
    torch.testing.assert_close(swapped, coords[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, lattice, rtol=1e-3, atol=1e-4)


def test_a_denoiser_that_knows_the_noise_has_no_loss(crystals):
    stage = make("crysdiff").eval()
    batch = collate(stage, crystals)
    t = batch.extras["timestep"]
    level = stage.sigma[t[batch.batch, None]]
    moved = batch.seen_frac_coords - batch.frac_coords
    score = wrapped_score(moved - moved.round(), level) * stage.scale[t[batch.batch, None]]
    stage.denoiser.forward = lambda *_: (score, batch.extras["lattice_noise"])
    for term in stage(batch).values():
        assert term.total < 1e-6


# A property by diffusion


def finetune(targets=("e",), **settings):
    torch.manual_seed(0)
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    config = FinetuneConfig(head="diffusion", **settings)
    return FinetuneStage(config, encoder, targets, [1.0] * len(targets), [2.0] * len(targets))


@pytest.fixture
def labelled(crystals):
    labels = (0.0, 3.0, np.nan, -1.0, 2.0, 1.5, 4.0)
    return [c.with_targets({"e": e}) for c, e in zip(crystals, labels, strict=True)]


def test_a_head_that_knows_the_label_denoises_to_it(labelled):
    stage = finetune().eval()
    batch = build(labelled, stage.encoder.graph, ["e"])
    known = torch.tensor([0.5, -1.0, 3.0, 0.0, 0.1, 0.2, 2.0])

    def noise(nodes, labels, t, batch):
        keep = stage.readout.alpha_bar[t, None]
        return (labels - keep.sqrt() * known[:, None]) / (1 - keep).sqrt()

    stage.readout.noise = noise
    torch.testing.assert_close(stage.predict(batch)[:, 0], 1 + 2 * known, rtol=1e-3, atol=1e-3)


def test_diffusion_head_learns_and_reports_physical_units(labelled):
    stage = finetune()
    batch = build(
        [Sample.clean(c, crystal_key(0, 0, c.id)) for c in labelled], stage.encoder.graph, ["e"]
    )
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        terms = stage(batch)
        assert set(terms) == {"noise"} and terms["noise"].count == 6
        losses.append(terms["noise"].total)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in stage.parameters())
    stage.eval()
    with torch.no_grad():
        terms, prediction = stage(batch), stage.predict(batch)[:, 0]
    error = (prediction - batch.targets["e"])[torch.isfinite(batch.targets["e"])]
    assert terms["mae/e"].count == 6
    torch.testing.assert_close(terms["mae/e"].total, error.abs().sum())
    alone = build(labelled[2:3], stage.encoder.graph)
    torch.testing.assert_close(stage.predict(alone)[0, 0], prediction[2], rtol=1e-4, atol=1e-4)


def test_diffusion_head_predicts_one_target():
    with pytest.raises(ValueError, match="predicts one target, got e, f"):
        finetune(("e", "f"))
    with pytest.raises(ValueError, match="did you mean 'diffusion'"):
        FinetuneConfig(head="difusion")
