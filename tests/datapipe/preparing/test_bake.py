"""Stored graphs: a loader that reads them makes the batches of one that builds them."""

import dataclasses
import importlib
import json
import logging
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import crysforge.datapipe.loading.worker as reading
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.edge_transforms import DropEdges
from crysforge.datapipe.graphs.neighbours import neighbours
from crysforge.datapipe.graphs.stored import StoredGraphs, graph_key
from crysforge.datapipe.graphs.transforms import Chain, MaskAtoms, ShiftAtoms, TwoViews
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.preparing.bake import bake
from crysforge.datapipe.preparing.edit_configs import BakeConfig, VerifyConfig
from crysforge.datapipe.preparing.verify import verify
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter, Manifest
from crysforge.trainer.jobs.starting import graph_of

SPECS = {
    "pddformer": GraphSpec(neighbors=6, pdd=9, depth=3),
    "matformer": GraphSpec(neighbors=4, lattice_edges="matformer", depth=2),
    "vectors": GraphSpec(radius=3.0, vectors=True, lattice_triple=True),
    "pair sums": GraphSpec(neighbors=3, pair_sums="scaled", depth=2),
}
OTHER = GraphSpec(neighbors=5, pdd=9, depth=3)
TRAIN, VAL = 30, 5
HALF = np.array([0, 0, 0.5])


@pytest.fixture(scope="module")
def built(tmp_path_factory, random_crystal):
    """A data set without graphs; some crystals have copies of an atom's surroundings, and the last
    has atoms so far apart that a radius joins none."""
    root, rng = tmp_path_factory.mktemp("bake") / "built", np.random.default_rng(0)
    lonely = Crystal.create("lonely", [2], [[0, 0, 0]], 9 * np.eye(3))
    with DatasetWriter(root, ["gap"], {"gap": "eV"}, shard_size=7) as writer:
        for i in range(TRAIN + VAL - 1):
            half = random_crystal(rng, 1 + i % 4, f"mp-{i}", {"gap": float(i)})
            frac = half.frac_coords * [1, 1, 0.5]
            twice = np.concatenate([frac, frac + HALF]), half.lattice * [[1], [1], [2]]
            double = Crystal.create(half.id, np.tile(half.numbers, 2), *twice, half.targets)
            writer.add("train" if i < TRAIN else "val", double if i % 2 else half)
        writer.add("val", lonely)
        writer.finish({"source": "test"})
    return root


@pytest.fixture(scope="module")
def baked(built):
    root = built.parent / "baked"
    config = BakeConfig(bake=str(built), output=str(root), workers=2, progress=False)
    bake(config, SPECS.values())
    return root


@pytest.fixture
def copy(tmp_path, baked):
    return shutil.copytree(baked, tmp_path / "copy")


def batches(root, spec, split="train", transform=None, workers=0, quotient=True, shuffle=1000):
    config = LoaderConfig(workers=workers, shuffle=shuffle, max_bad=5)
    source = Stream(
        Dataset.open(root), split, spec, config, batch_size=8, epochs=2, transform=transform,
        quotient=quotient, train=split == "train",
    )  # fmt: skip
    found = list(source)
    source.close()
    return found, source


def assert_same(some, others):
    assert len(some) == len(others) > 0
    for a, b in zip(some, others, strict=True):
        for name in (f.name for f in dataclasses.fields(a)):
            x, y = getattr(a, name), getattr(b, name)
            pairs = [(x[k], y[k]) for k in x | y] if isinstance(x, dict) else [(x, y)]
            for x, y in pairs:
                if isinstance(x, torch.Tensor):
                    assert x.dtype == y.dtype, name
                    assert np.array_equal(x.numpy(), y.numpy(), equal_nan=True), name
                else:
                    assert x == y, name


TRANSFORMS = {
    "as it is": None,
    "masked": MaskAtoms(0.4),
    "fewer edges": DropEdges(0.3),
    "moved": ShiftAtoms(0.1),
    "two views": TwoViews(Chain((ShiftAtoms(0.1), MaskAtoms(0.2)))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", SPECS)
def test_baked_batches_are_equal_to_built_ones(built, baked, name, transform):
    for shuffle in (1000, 12):
        some, others = (
            batches(root, SPECS[name], transform=TRANSFORMS[transform], shuffle=shuffle)[0]
            for root in (built, baked)
        )
        assert_same(some, others)


@pytest.mark.parametrize("name", SPECS)
def test_validation_full_graphs_and_workers_too(built, baked, name):
    for values in ({"split": "val"}, {"quotient": False}, {"workers": 2, "shuffle": 12}):
        assert_same(
            batches(built, SPECS[name], **values)[0], batches(baked, SPECS[name], **values)[0]
        )


@pytest.mark.parametrize("transform", ["as it is", "masked", "fewer edges"])
def test_nothing_is_built_where_it_is_stored(baked, monkeypatch, transform):
    monkeypatch.setattr(reading, "neighbours", None)
    assert len(batches(baked, SPECS["pddformer"], transform=TRANSFORMS[transform])[0]) == 8


def test_stored_graphs_are_those_of_neighbours(built, baked):
    crystals = dict(Dataset.open(built).read(range(TRAIN + VAL)))
    for item, _, tensors in Dataset.open(baked).read_records(range(TRAIN + VAL)):
        for spec in SPECS.values():
            stored = StoredGraphs(spec).find(tensors, len(crystals[item]))
            for name, array in vars(neighbours(crystals[item], spec)).items():
                found = getattr(stored, name)
                assert (array is None) == (found is None)
                assert array is None or (array.dtype, array.shape) == (found.dtype, found.shape)
                assert np.array_equal(array, found)


def test_another_spec_gets_graphs_of_its_own(built, baked, caplog):
    with caplog.at_level(logging.WARNING, "crysforge.datapipe.loading.worker"):
        found = batches(baked, OTHER)[0]
    assert "stores graphs of other encoders" in caplog.text
    assert_same(batches(built, OTHER)[0], found)


def test_the_key_is_of_all_that_a_graph_depends_on():
    spec = SPECS["pddformer"]
    assert graph_key(replace(spec, depth=1)) == graph_key(spec)
    others = [
        {"neighbors": 7}, {"pdd": 8}, {"tie_tolerance": 1e-3}, {"lattice_edges": "comformer"},
        {"lattice_triple": True}, {"vectors": True, "depth": None}, {"pair_sums": "exact"},
        {"neighbors": None, "radius": 6.0}, {"own_images_once": True}, {"cut_ties": True},
    ]  # fmt: skip
    assert {next(iter(x)) for x in others} | {"radius", "depth"} == {
        f.name for f in dataclasses.fields(GraphSpec)
    }
    assert len({graph_key(replace(spec, **x)) for x in others} | {graph_key(spec)}) == 11


def test_the_manifest_says_which_graphs_there_are(built, baked):
    found, source = Manifest.load(baked), Manifest.load(built)
    assert found.graphs == {graph_key(s): dataclasses.asdict(s) for s in SPECS.values()}
    assert source.graphs == {}
    assert found.provenance["sources"][0]["fingerprint"] == source.fingerprint
    same = ("splits", "elements", "targets")
    assert all(getattr(found, name) == getattr(source, name) for name in same)
    assert [s.count for s in found.shards] == [s.count for s in source.shards]


def test_a_manifest_that_says_nothing_of_graphs_is_read(built, tmp_path):
    root = shutil.copytree(built, tmp_path / "older")
    values = json.loads((root / "manifest.json").read_text())
    del values["graphs"]
    (root / "manifest.json").write_text(json.dumps(values))
    assert Manifest.load(root) == Manifest.load(built)


# What is unsound

KEY = graph_key(SPECS["pddformer"])


def away(graph, row):
    """Edges of which a row points at nothing."""
    return graph.edges + 200 * (np.arange(4) == row)[:, None]


UNSOUND = {
    "an atom that is not there": lambda g: {"edges": away(g, 1)},
    "a shell that is not there": lambda g: {"edges": away(g, 2)},
    "another order": lambda g: {"edges": g.edges[:, ::-1]},
    "signed": lambda g: {"edges": g.edges.astype(np.float32)},
    "a row that is not there": lambda g: {"pdd_row": g.pdd_row + 99},
    "fewer atoms": lambda g: {"pdd_row": g.pdd_row[:-1]},
    "fewer columns": lambda g: {"pdd": g.pdd[:, 1:]},
    "NaN": lambda g: {"distances": g.distances * np.nan},
    "flat": lambda g: {"distances": g.distances[None]},
}


def rewrite(root, change):
    """The data set with other graphs of crystal mp-9; its checksums are right."""
    dataset = Dataset.open(root)
    records = list(dataset.read_records(range(TRAIN + VAL)))
    graphs = dataset.manifest.graphs
    shutil.rmtree(root)
    with DatasetWriter(root, ["gap"], {"gap": "eV"}, shard_size=7) as writer:
        for item, crystal, tensors in records:
            more = change(crystal, dict(tensors)) if crystal.id == "mp-9" else tensors
            writer.add("train" if item < TRAIN else "val", crystal, more)
        writer.finish({}, graphs)


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_graph_is_quarantined_and_verify_finds_it(copy, kind):
    stored = StoredGraphs(SPECS["pddformer"])

    def change(crystal, tensors):
        graph = stored.find(tensors, len(crystal))
        values = {k: np.asarray(v) for k, v in UNSOUND[kind](graph).items()}
        unsigned = {k: v.astype(np.uint16) for k, v in values.items() if v.dtype.kind == "i"}
        return tensors | stored.tensors(replace(graph, **values | unsigned))

    rewrite(copy, change)
    found, source = batches(copy, SPECS["pddformer"])
    assert "mp-9" not in {i for batch in found for i in batch.ids}
    (bad,) = source.quarantined
    assert f"train-000001.tar entry 2, mp-9: the graph {KEY} that is stored" in bad.reason
    (problem,) = verify(VerifyConfig(verify=str(copy), workers=1, progress=False))
    assert problem == bad.reason


def test_a_graph_that_lacks_a_tensor_is_unsound_and_one_that_is_not_there_is_built(copy, built):
    rewrite(copy, lambda c, t: {k: v for k, v in t.items() if k != f"{KEY}.pdd"})
    assert len(batches(copy, SPECS["pddformer"])[1].quarantined) == 1
    rewrite(copy, lambda c, t: {k: v for k, v in t.items() if not k.startswith(KEY)})
    assert_same(batches(copy, SPECS["pddformer"])[0], batches(built, SPECS["pddformer"])[0])
    (problem,) = verify(VerifyConfig(verify=str(copy), workers=1, progress=False))
    assert problem == f"train-000001.tar entry 2, mp-9: has no graph {KEY}"


def test_flipped_bytes_are_found_in_graphs_as_well(copy, baked):
    path, spec = copy / "train-000001.tar", SPECS["pddformer"]
    sound, wanted = path.read_bytes(), batches(baked, spec)[0]
    for at in np.random.default_rng(0).choice(len(sound), 40, replace=False):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        found, source = batches(copy, spec)
        assert len(source.quarantined) <= 1
        if not source.quarantined:  # padding
            assert_same(found, wanted)


def test_verify_finds_baked_sets_sound_and_wrong_keys(copy):
    config = VerifyConfig(verify=str(copy), workers=1, progress=False)
    assert list(verify(config)) == []
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(KEY, "0" * 12))
    assert list(verify(config)) == [
        "manifest.json: graphs.000000000000 is not the key of its spec: bake it again"
    ]
    (copy / "manifest.json").write_text(text.replace('"neighbors"', '"neighbours"'))
    problems = list(verify(config))
    assert len(problems) == len(SPECS)
    assert all("is no graph spec" in p and "neighbours" in p for p in problems)


# The action


def test_what_cannot_be_baked(built, tmp_path):
    config = BakeConfig(bake=str(built), output=str(tmp_path / "d"), workers=1, progress=False)
    with pytest.raises(ValueError, match="no graph to bake: name an encoder"):
        bake(config, [])
    damaged = shutil.copytree(built, tmp_path / "damaged")
    path = damaged / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b'"mp-9"', b'"mp-8"'))
    with pytest.raises(ValueError, match=r"train-000001.tar entry 2 is damaged.*verify="):
        bake(replace(config, bake=str(damaged)), SPECS.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_bake_by_name_and_by_config(built, tmp_path, monkeypatch, capsys):
    script = importlib.import_module("crysforge.launch.prepare")
    config = tmp_path / "run.yaml"
    config.write_text("encoder: {name: pddformer, neighbors: 7, pdd: 5}\ndata: elsewhere\n")

    def call(*encoders):
        argv = ["prepare", f"bake={built}", f"output={tmp_path / 'out'}", "workers=1"]
        monkeypatch.setattr(sys, "argv", [*argv, f"encoders=[{','.join(encoders)}]"])
        script.main()

    call("matformer", str(config))
    assert f"{TRAIN + VAL} crystals" in capsys.readouterr().out
    graphs = Manifest.load(tmp_path / "out").graphs.values()
    assert [(g["neighbors"], g["pdd"]) for g in graphs] == [(12, 0), (7, 5)]
    path = built / "manifest.json"
    values = json.loads(path.read_text())
    values["provenance"] = {"cell": {"rule": "primitive", "tolerance": 0.01}}
    primitive = shutil.copytree(built, tmp_path / "primitive")
    (primitive / "manifest.json").write_text(json.dumps(values))
    spec = graph_of("pddformer", Manifest.load(primitive))
    assert spec.own_images_once and not graph_of("pddformer", Manifest.load(built)).own_images_once
    assert graph_key(spec) != graph_key(replace(spec, own_images_once=False))
    config.write_text("data: elsewhere\n")
    for encoder, message in ((str(config), "has no section 'encoder'"), ("x", "unknown encoder")):
        with pytest.raises(ValueError, match=message):
            call(encoder)
