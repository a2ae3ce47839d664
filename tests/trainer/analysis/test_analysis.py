"""Analyses of encoders: known answers, and one run of them all."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import build_encoder
from crysforge.trainer.analysis.geometry import invariance, smoothness
from crysforge.trainer.analysis.health import collapse
from crysforge.trainer.analysis.information import mutual_information
from crysforge.trainer.analysis.latents import Latents, latents, sample
from crysforge.trainer.analysis.maps import components
from crysforge.trainer.analysis.probes import classify, regress


class Toy(nn.Module):
    """An encoder whose latents are what `rule` says of a batch."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.scale = rule, nn.Parameter(torch.ones(()))
        self.graph = GraphSpec(neighbors=4, pdd=0)

    def forward(self, batch):
        return self.rule(batch) * self.scale


@pytest.fixture(scope="module")
def crystals(data):
    return sample(Dataset.open(data), "train", 40, seed=0)


def test_a_sample_is_drawn_by_its_seed_and_bounded(data):
    dataset = Dataset.open(data)
    first, again, other = ([c.id for c in sample(dataset, "train", 10, seed)] for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 10
    assert all(len(c) >= 3 for c in sample(dataset, "train", 1000, 0, least=3))
    with pytest.raises(ValueError, match="no crystal"):
        sample(dataset, "train", 10, 0, least=10**6)


def test_pooled_latents_are_means_and_batches_do_not_matter(crystals):
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    whole, parts = (latents(encoder, crystals, max_atoms=m) for m in (10**6, 20))
    np.testing.assert_allclose(parts.atoms, whole.atoms, rtol=1e-4, atol=1e-5)
    for i in range(len(crystals)):
        np.testing.assert_allclose(whole.pooled[i], whole.atoms[whole.owner == i].mean(0))
    hidden = latents(encoder, crystals, mask_ratio=0.5, seed=3)
    again = latents(encoder, crystals[::-1], mask_ratio=0.5, seed=3)
    assert 0.4 < hidden.masked.mean() < 0.8 and not whole.masked.any()
    assert hidden.masked[hidden.owner == 0].tolist() == again.masked[again.owner == 39].tolist()


def test_probes_find_what_is_linear_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, asked = rng.normal(size=(600, 8)), rng.normal(size=(300, 8))
    weight = rng.normal(size=(8, 3))
    assert np.abs(regress(x, x @ weight + 5, asked) - (asked @ weight + 5)).max() < 1e-3
    noise = rng.normal(size=(600, 1))
    assert np.abs(regress(x, noise, asked)).mean() < 0.3
    labels = np.array([3, 8, 26])[(x @ weight).argmax(1)]
    guess = classify(x, labels, asked)
    assert (guess == np.array([3, 8, 26])[(asked @ weight).argmax(1)]).mean() > 0.9
    shuffled = classify(x, rng.permutation(labels), asked)
    assert (shuffled == np.array([3, 8, 26])[(asked @ weight).argmax(1)]).mean() < 0.6


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_mutual_information_of_gaussians(correlation):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6000, 1))
    y = correlation * x + math.sqrt(1 - correlation**2) * rng.normal(size=(6000, 1))
    found = mutual_information(x, y, seeds=2, steps=400, batch=256, width=32)
    assert found["nats"] == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.08)
    assert found["ceiling"] == pytest.approx(math.log(6000))


def test_invariance_is_told_from_dependence(crystals):
    exact = invariance(build_encoder({"name": "pddformer", "tiny": True}), crystals)
    for change in ("rotation", "translation", "permutation"):
        assert exact[change]["cosine"] > 1 - 1e-6 and exact[change]["difference"] < 1e-3

    moved = invariance(Toy(lambda batch: batch.seen_frac_coords), crystals)
    assert moved["translation"]["difference"] > 0.1 and moved["rotation"]["difference"] < 1e-6
    first = torch.tensor([1.0, 0.0])
    ordered = invariance(
        Toy(lambda batch: batch.numbers[batch.ptr[:-1]][batch.batch, None] * first),
        crystals,
    )
    assert ordered["permutation"]["difference"] > 0.1 and ordered["rotation"]["difference"] == 0


def test_smoothness_of_a_linear_map_is_a_line():
    cells = [
        Crystal(f"c{i}", np.full(6, 6), np.random.default_rng(i).uniform(0.3, 0.7, (6, 3)),
                np.eye(3) * 20.0, {})
        for i in range(200)
    ]  # fmt: skip
    straight = Toy(lambda batch: batch.seen_frac_coords * 20 + 100)
    found = smoothness(straight, cells, sigmas=(0.01, 0.05, 0.1, 0.2))
    assert found["r2"] > 0.99 and abs(found["jump"]) < 0.01
    assert found["slope_per_angstrom"] == pytest.approx(math.sqrt(8 / math.pi / 6), rel=0.1)
    assert all(r["cosine"] > 0.999 for r in found["rows"])
    constant = smoothness(Toy(lambda batch: torch.ones(batch.num_atoms, 3)), cells[:5])
    assert all(r["delta"] == 0 for r in constant["rows"])


def test_collapse_is_found_where_it_is_and_only_there(crystals):
    rng = np.random.default_rng(0)
    count = sum(map(len, crystals))
    masked = np.zeros(count, dtype=bool)

    def health(atoms):
        return collapse(Latents(crystals, atoms, masked))

    alive = health(rng.normal(size=(count, 16)))
    assert not alive["collapsed"] and alive["effective_rank"] > 12 and alive["dead_channels"] == 0
    constant = health(np.ones((count, 16)))
    assert constant["collapsed"] and constant["dead_channels"] == 1
    line = health(rng.normal(size=(count, 1)) * np.ones((1, 16)))
    assert line["collapsed"] and "effective rank" in line["why"]
    half = health(rng.normal(size=(count, 16)) * (np.arange(16) < 8))
    assert half["dead_channels"] == 0.5 and not half["collapsed"]


def test_components_are_ordered_and_keep_distances():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(50, 2)) * [5, 1]
    turned = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    place, share = components(np.pad(plane, ((0, 0), (0, 5))) @ turned + 3)
    assert share.sum() == pytest.approx(1) and share[0] > 0.9
    np.testing.assert_allclose(
        np.linalg.norm(place[0] - place[1:], axis=1), np.linalg.norm(plane[0] - plane[1:], axis=1)
    )
    assert components(np.ones((4, 3)))[1].tolist() == [0, 0]


def test_all_analyses_of_a_run(runs, data, call, tmp_path):
    output = tmp_path / "analysis"
    args = [f"checkpoint={runs / 'pre'}", f"data={data}", f"output={output}", "seeds=1"]
    code, out, err = call("analyse", *args, "fit_count=54", "count=18")
    assert code == 0, err
    found = json.loads((output / "analysis.json").read_text())
    assert {"probes", "information", "smoothness", "invariance", "collapse", "map"} <= set(found)
    for change in ("rotation", "translation"):  # also through the denoiser
        assert found["invariance_denoised"][change]["cosine"] > 1 - 1e-6
    assert found["invariance_denoised"] != found["invariance"]
    assert "Invariance of the denoised latents" in out
    assert found["variance_over_training"]["train/latent_variance"]
    assert "Linear probes" in out and "nan" not in out.replace("nans", "")
    for name in ("map", "smoothness", "variance"):
        assert (output / f"{name}.png").stat().st_size > 10_000
    with open(next((output / "projector").rglob("metadata.tsv"))) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    tensors = np.loadtxt(next((output / "projector").rglob("tensors.tsv")), delimiter="\t")
    assert len(rows) == len(tensors) == 18
    assert {"id", "formula", "atoms", "density"} <= set(rows[0])
    dataset = Dataset.open(data)
    known = {c.id: c for _, c in dataset.read(dataset.split_items("test"))}
    for row in rows:
        assert int(row["atoms"]) == len(known[row["id"]])
        assert float(row["density"]) == pytest.approx(known[row["id"]].targets["density"], rel=1e-4)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["analyses=[prob]"], "'prob'"),
        (["targets=[gap]"], "no target 'gap'"),
        (["split=all"], "all"),
        (["count=1"], "count must be at least 2"),
    ],
)
def test_mistakes(runs, data, call, tmp_path, args, words):
    output = tmp_path / "analysis"
    base = [f"checkpoint={runs / 'pre'}", f"data={data}", f"output={output}"]
    code, _, err = call("analyse", *base, *args)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
