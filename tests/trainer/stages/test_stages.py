import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import GraphSpec
from crysforge.models.denoisers.dit import SIZES
from crysforge.models.encoders.base import Encoder
from crysforge.models.objectives.flow import centred_noise, flow_times
from crysforge.models.objectives.vae import DecoderConfig, Reconstruct
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.base.tensors import copied_state
from crysforge.trainer.runs.model_directory import export_stage, open_model
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from crysforge.trainer.stages.joint import JointConfig, JointStage
from crysforge.trainer.stages.vae import VAEConfig, VAEStage

TARGETS = {"energy": (-1.5, 0.7), "gap": (2.0, 1.2)}


@dataclass
class _NoSettings:
    pass


class Local(Encoder):
    """Latents from an atom's element and the distances to its nearest neighbours."""

    Config, tiny, section = _NoSettings, {}, {"name": "local"}
    graph = GraphSpec(neighbors=4, pdd=6, depth=1)
    dim = 8

    def __init__(self):
        super().__init__()
        self.element = nn.Embedding(119, self.dim)
        self.distances = nn.Linear(1 + self.graph.pdd, self.dim)

    def nodes(self, batch):
        return torch.tanh(self.element(batch.node_numbers) + self.distances(batch.pdd))


def crystals(n=6, seed=0):
    """Random crystals of 2 to 6 atoms, some labels missing."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        atoms = int(rng.integers(2, 7))
        lattice = np.diag(rng.uniform(3, 5, 3)) + rng.uniform(0, 1, (3, 3))
        labels = {
            k: rng.normal(m, s) if (i + j) % 3 else np.nan
            for j, (k, (m, s)) in enumerate(TARGETS.items())
        }
        numbers, frac = rng.integers(1, 95, atoms), rng.random((atoms, 3))
        out.append(Crystal.create(f"c{i}", numbers, frac, lattice, labels))
    return out


def collate(stage, crystals, epoch=0):
    """The batch a loader would make for the stage."""
    samples = [Sample.clean(c, crystal_key(7, epoch, c.id)) for c in crystals]
    graph = stage.encoder.graph
    return build(samples, graph, list(TARGETS), transform=stage.transform())


def make(name, **settings):
    """A stage with a tiny model, none of whose parameters is zero."""
    torch.manual_seed(0)
    if name == "joint":
        settings = {"dit": SIZES["tiny"], **settings}
    if name == "finetune":
        mean, std = zip(*TARGETS.values(), strict=True)
        return FinetuneStage(FinetuneConfig(**settings), Local(), list(TARGETS), mean, std)
    cls = STAGES[name]
    stage = cls(cls.Config(**settings), Local())
    for p in stage.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return stage


def loss_of(stage, terms):
    return sum(w * terms[k].total / terms[k].count.clamp(min=1) for k, w in stage.weights.items())


KEPT = Reconstruct(atoms=1, coords=0.5, lattice=0.1)
PAPERS = DecoderConfig(heads="mlp", coords_loss="mse", lattice_loss="mse")
ALL = [
    ("vae", {}),
    ("vae", {"latent_dim": 3, "kl_weight": 0.0}),
    ("vae", {"mask_ratio": 0.0}),
    ("vae", {"reconstruct": Reconstruct(atoms=0, lattice=0)}),
    ("vae", {"reconstruct": Reconstruct(coords=0)}),
    ("vae", {"decoder": PAPERS, "masks": "fixed"}),
    ("joint", {}),
    ("joint", {"latent_norm": True}),
    ("joint", {"reconstruct": KEPT}),
    ("joint", {"reconstruct": KEPT, "mask_ratio": 0.3}),
    ("joint", {"reconstruct": KEPT, "retain_decoder": True, "latent_dim": 5}),
    ("finetune", {}),
]


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_every_parameter_gets_a_gradient_from_the_loss(name, settings):
    stage = make(name, **settings)
    terms = stage(collate(stage, crystals()))
    assert set(stage.weights) <= set(terms)
    for term in terms.values():
        assert term.total.shape == term.count.shape == ()
        assert term.total.dtype == term.count.dtype == torch.float32
        assert torch.isfinite(term.total)
    loss_of(stage, terms).backward()
    for key, p in stage.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_parts_add_up_to_the_whole_in_any_order(name, settings):
    stage, all_crystals = make(name, **settings), crystals()
    whole = stage(collate(stage, all_crystals))
    parts = [
        stage(collate(stage, all_crystals[i])) for i in (slice(4, 6), slice(0, 1), slice(1, 4))
    ]
    for key in whole:
        if key == "latent_variance":  # of one rank's batch, as declared
            continue
        total, count = (sum(getattr(p[key], x) for p in parts) for x in ("total", "count"))
        assert count == whole[key].count, key
        assert torch.allclose(total, whole[key].total, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["vae", "joint"])
def test_draws_repeat_in_an_epoch_and_change_with_it(name):
    stage = make(name)
    first, again, other = (stage(collate(stage, crystals(), epoch)) for epoch in (0, 0, 1))
    for key in stage.weights:
        assert first[key].total == again[key].total
    assert loss_of(stage, first) != loss_of(stage, other)


@pytest.mark.parametrize("name", ["vae", "joint"])
def test_validation_draws_too(name):
    stage = make(name)
    batch = collate(stage, crystals())
    training = stage(batch)
    stage.eval()
    for key, term in stage(batch).items():
        assert torch.equal(term.total, training[key].total)


def test_stages_are_registered_and_configured_by_name():
    assert STAGES["vae"] is VAEStage and STAGES["joint"] is JointStage
    config = configure(VAEConfig, {"reconstruct": {"coords": 0}, "latent_dim": 16}, "vae")
    assert VAEStage(config, Local()).weights == {"atoms": 1, "lattice": 1, "kl": 1e-5}
    config = configure(JointConfig, {"dit": {"width": 64, "layers": 1, "heads": 2}}, "joint")
    assert config.lr == 1e-4 and len(JointStage(config, Local()).denoiser.blocks) == 1
    with pytest.raises(ValueError, match=r"unknown config key 'joint\.dit\.widht': did you mean"):
        configure(JointConfig, {"dit": {"widht": 64}}, "joint")


@pytest.mark.parametrize(
    ("config", "settings", "word"),
    [
        (VAEConfig, {"mask_ratio": 1.5}, "mask_ratio"),
        (VAEConfig, {"kl_weight": -1.0}, "kl_weight"),
        (VAEConfig, {"reconstruct": {"atoms": 0, "coords": 0, "lattice": 0}}, "reconstruct"),
        (JointConfig, {"dit": {"width": 30}}, "dit.width"),
        (FinetuneConfig, {"encoder_lr_scale": 0.0}, "freeze_encoder"),
    ],
)
def test_settings_that_make_no_sense_are_named(config, settings, word):
    with pytest.raises(ValueError, match=word):
        configure(config, settings)


def test_vae_hides_elements_from_the_encoder_and_learns_them():
    stage = make("vae")
    batch = collate(stage, crystals())
    assert batch.masked.any()
    assert torch.equal(batch.node_numbers[batch.node_of_atom] == 0, batch.masked)
    terms = stage(batch)
    assert terms["atoms"].count == batch.masked.sum()
    optimizer = torch.optim.Adam(stage.parameters(), 1e-2)
    start = loss_of(stage, terms).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(stage, stage(batch)).backward()
        optimizer.step()
    assert loss_of(stage, stage(batch)).item() < 0.6 * start


def test_joint_is_the_flow_loss_of_the_encoder_output():
    """With a denoiser that is still zero, the loss is known: mean Z1² over (1 − min(t, 0.9))²."""
    stage = JointStage(JointConfig(dit=SIZES["tiny"]), Local())
    batch = collate(stage, crystals())
    terms = stage(batch)
    z1, t = stage.encoder(batch), flow_times(batch.rng_key)
    each = crystal_mean(z1.square(), batch.ptr).mean(1) / (1 - t.clamp(max=0.9)) ** 2
    assert torch.allclose(terms["flow"].total, each.sum(), rtol=1e-4)
    assert terms["flow"].count == batch.num_crystals


def test_joint_gradient_reaches_the_encoder_through_target_and_path():
    stage = make("joint")
    batch = collate(stage, crystals())
    t = flow_times(batch.rng_key)
    at, noise = (
        t[batch.batch, None],
        centred_noise(batch.rng_key, batch.batch, batch.ptr, Local.dim),
    )

    def grad(target_flows, path_flows):
        z1 = stage.encoder(batch)
        target, path = (z1 if flows else z1.detach() for flows in (target_flows, path_flows))
        prediction = stage.denoiser((1 - at) * noise + at * path, t, batch.batch, batch.ptr)
        error = crystal_mean((target - prediction).square(), batch.ptr).mean(1)
        loss = (error / (1 - t.clamp(max=0.9)) ** 2).sum()
        return torch.autograd.grad(loss, list(stage.encoder.parameters()))

    whole = torch.autograd.grad(stage(batch)["flow"].total, list(stage.encoder.parameters()))
    for w, a, b in zip(whole, grad(True, False), grad(False, True), strict=True):
        assert torch.allclose(w, a + b, rtol=1e-3, atol=1e-4 * w.abs().max().item())
        assert (w - a).norm() > 0.01 * w.norm() and (w - b).norm() > 0.01 * w.norm()


def test_joint_bins_by_time_cover_the_loss():
    stage = make("joint")
    terms = stage(collate(stage, crystals(40)))
    bins = {k: v for k, v in terms.items() if k.startswith("flow_t/")}
    assert list(bins) == [f"flow_t/0.{i}-{(i + 2) / 10}" for i in (0, 2, 4, 6, 8)]
    assert sum(v.count for v in bins.values()) == 40
    total = sum(v.total for v in bins.values())
    assert torch.allclose(total, terms["flow"].total, rtol=1e-4)
    assert not any(v.total.requires_grad for v in bins.values())


def test_an_empty_time_bin_is_zero():
    stage = make("joint")
    empty = [v for v in stage(collate(stage, crystals(1))).values() if v.count == 0]
    assert len(empty) == 4
    assert all(v.total == 0 for v in empty)


def test_latent_variance_is_over_atoms_per_channel():
    stage = make("joint")
    batch = collate(stage, crystals())
    term = stage(batch)["latent_variance"]
    want = stage.encoder(batch).detach().numpy().var(axis=0).mean()
    assert term.count == 1
    assert term.total.item() == pytest.approx(want, rel=1e-4)


def test_collapse_is_reported_against_the_first_value_across_a_resume():
    stage = make("joint")
    batch = collate(stage, crystals())

    def means(s):
        return {k: (v.total / v.count).item() for k, v in s(batch).items() if v.count > 0}

    assert stage.warnings({}) == []
    first = means(stage)
    assert stage.warnings(first) == []
    resumed = make("joint")
    resumed.load_state_dict(stage.state_dict())
    with torch.no_grad():
        for p in resumed.encoder.parameters():
            p.mul_(0.1)
    shrunk = means(resumed)
    (warning,) = resumed.warnings(shrunk)
    assert "collapsing" in warning and f"{first['latent_variance']:.3g}" in warning
    assert shrunk["flow"] < first["flow"]  # the loss alone would look like progress
    assert resumed.warnings(first) == []


def test_latent_norm_holds_the_scale_of_the_latents():
    stage = make("joint", latent_norm=True)
    batch = collate(stage, crystals())
    before = stage(batch)["latent_variance"].total
    forward = Local.forward
    stage.encoder.forward = lambda b: 0.01 * forward(stage.encoder, b)
    assert stage(batch)["latent_variance"].total > 0.5 * before


def test_kept_reconstruction_reads_the_latents_of_the_flow():
    stage = make("joint", reconstruct=KEPT)
    assert stage.weights == {"flow": 1.0, "atoms": 1, "coords": 0.5, "lattice": 0.1}
    batch = collate(stage, crystals())
    terms = stage(batch)
    assert terms["atoms"].count == batch.num_atoms
    want = stage.heads(stage.encoder(batch), batch)
    for key in ("atoms", "coords", "lattice"):
        assert torch.allclose(terms[key].total, want[key][0])


def test_a_retained_decoder_is_that_of_the_stage_before(tmp_path):
    """Bottleneck and heads as they were saved: the losses are those of stage 1 on the same latents,
    and only the heads that are asked for are taken."""
    before = make("vae", latent_dim=5, decoder=PAPERS, mask_ratio=0.0)
    settings = {"latent_dim": 5, "decoder": PAPERS, "retain_decoder": True}
    stage = make("joint", reconstruct=Reconstruct(atoms=0, coords=2), **settings)
    stage.encoder.load_state_dict(before.encoder.state_dict())
    batch = collate(stage, crystals())
    assert not torch.allclose(stage(batch)["lattice"].total, before(batch)["lattice"].total)
    export_stage(tmp_path / "vae", before, copied_state(before), {})
    stage.take(open_model(tmp_path / "vae"))
    terms, want = stage(batch), before(batch)
    for name in ("coords", "lattice", "kl"):
        torch.testing.assert_close(terms[name].total, want[name].total)
    assert "atoms" not in terms and stage.weights["kl"] == 1e-5 and stage.weights["coords"] == 2
    with pytest.raises(ValueError, match=r"is from another model"):
        make("joint", reconstruct=KEPT, retain_decoder=True).take(open_model(tmp_path / "vae"))
    export_stage(tmp_path / "joint", stage, copied_state(stage), {})
    with pytest.raises(ValueError, match=r"decoder of stage vae, and .*joint is a stage joint"):
        stage.take(open_model(tmp_path / "joint"))
    make("joint").take(open_model(tmp_path / "joint"))  # takes nothing


def shrunk(stage, share, alike=0.0):
    """Averages of a batch in validation, with latents that are a share of what they were, and atoms
    of a crystal that are as much alike; the denoiser knows as much of them as at the start."""
    batch, encode = collate(stage, crystals(20)), stage.encoder.forward

    def forward(batch):
        z = encode(batch)
        mean = crystal_mean(z, batch.ptr)[batch.batch]
        return share * (z + alike * (mean - z))

    stage.encoder.forward = forward
    with torch.no_grad():
        means = {k: (v.total / v.count).item() for k, v in stage(batch).items() if v.count > 0}
    del stage.encoder.forward
    means["loss"] = sum(w * means[k] for k, w in stage.weights.items())
    return means | stage.derived(means)


@pytest.mark.parametrize("settings", [{}, {"reconstruct": KEPT}])
def test_the_robust_loss_does_not_fall_when_latents_shrink_or_atoms_become_alike(settings):
    """As the loss does: it counts the flow's loss as a share of what there is to predict."""
    stage = make("joint", **settings).eval()
    assert "robust_loss" not in stage.derived({"kl": 1.0})
    for p in stage.denoiser.parameters():
        torch.nn.init.zeros_(p)  # predicts nothing
    first = shrunk(stage, 1)
    for change in ((0.1, 0), (0.01, 0), (1, 0.9), (1, 1)):
        found = shrunk(stage, *change)
        rest = found["loss"] - found["flow"] - (first["loss"] - first["flow"])
        assert found["flow"] < first["flow"]
        assert found["robust_loss"] > first["robust_loss"] + rest - 1e-3 * first["robust_loss"]
    assert shrunk(stage, 1, 1)["variance_within"] < 1e-10


def test_variance_within_is_that_of_each_crystal():
    stage = make("joint")
    batch = collate(stage, crystals())
    term = stage(batch)["variance_within"]
    z, ptr = stage.encoder(batch).detach().numpy(), batch.ptr.tolist()
    parts = [z[a:b].var(axis=0).mean() * (b - a) for a, b in itertools.pairwise(ptr)]
    assert (term.total / term.count).item() == pytest.approx(sum(parts) / len(z), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "monitor"),
    [
        ({}, None),
        ({"keep_weights": "best"}, "loss"),
        ({"keep_weights": "best", "best_metric": "robust"}, "robust_loss"),
    ],
)
def test_what_the_kept_weights_are_best_by(settings, monitor):
    assert make("joint", **settings).monitor == monitor
    assert make("vae", **settings).monitor == (monitor and "loss")


def test_finetuned_predictions_and_errors_are_in_physical_units():
    stage = make("finetune")
    batch = collate(stage, crystals())
    prediction = stage.predict(batch)
    assert prediction.shape == (6, 2)
    terms = stage(batch)
    errors, counts = [], []
    for i, (name, (_, std)) in enumerate(TARGETS.items()):
        label = batch.targets[name]
        present = ~label.isnan()
        assert 0 < present.sum() < 6
        difference = (prediction[:, i] - label)[present]
        mae = terms[f"mae/{name}"]
        assert mae.count == present.sum()
        assert torch.allclose(mae.total, difference.abs().sum(), rtol=1e-4)
        errors.append((difference / std).square().sum())
        counts.append(present.sum())
    assert torch.allclose(terms["mse"].total, sum(errors), rtol=1e-4)
    assert terms["mse"].count == sum(counts)


def classifier(**settings):
    torch.manual_seed(0)
    config = FinetuneConfig(task="classification", **settings)
    return FinetuneStage(config, Local(), list(TARGETS), [0, 0], [1, 1])


def test_classification_is_the_cross_entropy_of_probabilities():
    stage = classifier()
    batch = collate(stage, crystals(12))
    for name, labels in batch.targets.items():
        batch.targets[name] = torch.where(labels.isnan(), torch.nan, (labels > 0).float())
    labels, p = stage.labels(batch), stage.predict(batch)
    assert ((p > 0) & (p < 1)).all()
    known = ~labels.isnan()
    assert 0 < known.sum() < known.numel()
    terms = stage(batch)
    want = torch.nn.functional.binary_cross_entropy(p[known], labels[known])
    torch.testing.assert_close(terms["bce"].total / terms["bce"].count, want)
    right = ((p[known] > 0.5) == (labels[known] == 1)).float().mean()
    torch.testing.assert_close(terms["accuracy"].total / terms["accuracy"].count, right)
    for i, name in enumerate(TARGETS):
        error = (p - labels)[known[:, i], i].abs()
        torch.testing.assert_close(terms[f"mae/{name}"].total, error.sum())
    assert stage.weights == {"bce": 1.0} and stage.monitor == "bce"
    loss_of(stage, terms).backward()
    assert all(p.grad is not None and p.grad.any() for p in stage.parameters())
    with pytest.raises(ValueError, match="not standardised"):
        FinetuneStage(stage.config, Local(), ["a"], [0.2], [1.0])


def test_predicting_needs_no_labels_and_the_state_dict_carries_the_scale():
    stage, batch = make("finetune"), collate(make("finetune"), crystals())
    other = FinetuneStage(FinetuneConfig(), Local(), list(TARGETS), [0, 0], [1, 1])
    other.load_state_dict(stage.state_dict())
    want = stage.predict(batch)
    batch.targets = {}
    assert torch.equal(other.predict(batch), want)


def test_a_missing_label_changes_nothing():
    stage = make("finetune")
    some = crystals()
    without = [c.with_targets({}) for c in crystals(3, seed=5)]
    mixed, alone = stage(collate(stage, some + without)), stage(collate(stage, some))
    for key in alone:
        assert mixed[key].count == alone[key].count
        assert torch.allclose(mixed[key].total, alone[key].total, rtol=1e-4)
    nothing = stage(collate(stage, without))
    assert all(v.total == 0 and v.count == 0 for v in nothing.values())
    nothing["mse"].total.backward()
    assert all(not p.grad.any() for p in stage.parameters())


def test_a_frozen_encoder_stays_as_it_is():
    stage = make("finetune", freeze_encoder=True).train()
    assert stage.readout.training and not stage.encoder.training
    loss_of(stage, stage(collate(stage, crystals()))).backward()
    assert all(p.grad is None for p in stage.encoder.parameters())
    assert all(p.grad is not None for p in stage.readout.parameters())


def test_the_encoder_learning_rate_scale_names_its_parameters():
    stage = make("finetune", encoder_lr_scale=0.1)
    ((prefix, scale),) = stage.lr_scales.items()
    scaled = {k for k, _ in stage.named_parameters() if k.startswith(prefix)}
    assert scale == 0.1
    assert scaled == {f"encoder.{k}" for k, _ in stage.encoder.named_parameters()}


@pytest.mark.parametrize(
    ("targets", "mean", "std", "word"),
    [
        ([], [], [], "one or more"),
        (["a", "a"], [0, 0], [1, 1], "different"),
        (["a"], [0, 0], [1], "as many"),
        (["a"], [0.0], [0.0], "'a' cannot be standardised"),
        (["a"], [float("nan")], [1.0], "'a' cannot be standardised"),
    ],
)
def test_statistics_that_make_no_sense_are_named(targets, mean, std, word):
    with pytest.raises(ValueError, match=word):
        FinetuneStage(FinetuneConfig(), Local(), targets, mean, std)


def test_a_target_the_data_lacks_is_named():
    stage = FinetuneStage(FinetuneConfig(), Local(), ["energi"], [0], [1])
    with pytest.raises(ValueError, match="no target 'energi': did you mean 'energy'"):
        stage(collate(stage, crystals()))
