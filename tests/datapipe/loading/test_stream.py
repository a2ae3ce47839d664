"""The loader: the same batches for any number of workers, over interruptions, and past damage."""

import dataclasses
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import MaskAtoms, Sample, Step
from crysforge.datapipe.loading.config import LoaderConfig, estimate_edges
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.schema import CrystalBatch, GraphSpec, concat
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter

SPEC = GraphSpec(neighbors=4, pdd=4, depth=2)
TRAIN, VAL = 40, 7
KEPT, STREAMED = 1000, 12
"""Shuffle windows: the data set in memory, and read from its shards every epoch."""


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_crystal):
    root, rng = tmp_path_factory.mktemp("stream") / "data", np.random.default_rng(0)
    with DatasetWriter(root, ["e_form", "gap"], shard_size=9) as writer:
        for i in range(TRAIN + VAL):
            labels = {"e_form": float(i)} | ({"gap": -float(i)} if i % 2 else {})
            crystal = random_crystal(rng, 1 + i % 6, f"mp-{i}", labels)
            writer.add("train" if i < TRAIN else "val", crystal)
        writer.finish({})
    return root


@pytest.fixture(scope="module")
def dataset(root):
    return Dataset.open(root)


def stream(dataset, split="train", *, batch_size=8, **values):
    names = {f.name for f in dataclasses.fields(LoaderConfig)}
    config = {"workers": 0, "shuffle": KEPT}
    config |= {k: values.pop(k) for k in list(values) if k in names}
    return Stream(dataset, split, SPEC, LoaderConfig(**config), batch_size=batch_size, **values)


def same(a: CrystalBatch, b: CrystalBatch) -> bool:
    """Whether two batches are bit for bit equal."""

    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and np.array_equal(x.numpy(), y.numpy(), equal_nan=True)
        return x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def all_same(some, others):
    return all(same(a, b) for a, b in zip(some, others, strict=True))


def take(source, count):
    return list(islice(source, count))


class Only(Step):
    """A step of one function."""

    def __init__(self, function):
        self.function = function

    def on_crystal(self, sample, rng):
        return self.function(sample, rng)


def shift(sample: Sample, rng: np.random.Generator) -> Sample:
    """Moves atoms, so that no graph can be reused."""
    moved = sample.crystal.frac_coords + rng.normal(0, 0.02, (len(sample.crystal), 3))
    return replace(sample, seen=replace(sample.seen, frac_coords=moved % 1.0))


def stumble(sample: Sample, rng: np.random.Generator) -> Sample:
    raise RuntimeError("a bug in the transform")


def die(sample: Sample, rng: np.random.Generator) -> Sample:
    os.kill(os.getpid(), signal.SIGKILL)
    return sample


@pytest.mark.parametrize("shuffle", [KEPT, STREAMED])
def test_workers_do_not_change_the_batches(dataset, shuffle):
    steps = 12  # over two ends of an epoch
    expected = take(stream(dataset, shuffle=shuffle, transform=MaskAtoms(0.3)), steps)
    assert all(b.num_crystals == 8 for b in expected)
    for workers in (1, 2, 3):
        source = stream(dataset, shuffle=shuffle, transform=MaskAtoms(0.3), workers=workers)
        assert all_same(take(source, steps), expected)


def test_more_workers_than_lanes(dataset):
    expected = take(stream(dataset, lanes=2), 3)
    assert all_same(take(stream(dataset, lanes=2, workers=3), 3), expected)


@pytest.mark.parametrize("shuffle", [KEPT, STREAMED])
def test_ranks_share_the_global_batch(dataset, shuffle):
    whole = take(stream(dataset, shuffle=shuffle), 7)
    for world_size in (2, 3):
        ranks = [
            take(stream(dataset, shuffle=shuffle, rank=rank, world_size=world_size), 7)
            for rank in range(world_size)
        ]
        assert all_same([concat(parts) for parts in zip(*ranks, strict=True)], whole)


def test_a_batch_is_what_the_crystals_give(dataset):
    crystals = {c.id: c for _, c in dataset.read(range(len(dataset)))}
    source = stream(dataset, "val", train=False, seed=5, quotient=False)
    for batch in source:
        samples = [Sample.clean(crystals[i], crystal_key(5, 0, i)) for i in batch.ids]
        assert same(batch, build(samples, SPEC, ["e_form", "gap"], quotient=False))
    only = next(iter(stream(dataset, "val", train=False, targets=["gap"])))
    assert list(only.targets) == ["gap"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [KEPT, STREAMED])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(dataset, shuffle, workers):
    values = {"shuffle": shuffle, "workers": workers, "transform": MaskAtoms(0.3), "batch_size": 6}
    expected = take(stream(dataset, **values), 15)
    for done in (2, 6, 7):  # in mid-epoch; just before and after an epoch has ended inside a step
        first = stream(dataset, **values)
        assert all_same(take(first, done), expected[:done])
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(dataset, **values)
        second.load_state_dict(state)
        assert (second.position, second.position // second.epoch_size) == (6 * done, 6 * done // 40)
        assert all_same(take(second, 15 - done), expected[done:])


def test_a_change_of_ranks_in_mid_epoch_loses_and_repeats_nothing(dataset):
    ids = []
    state = None
    for world_size, steps in ((2, 3), (1, 4), (4, 3)):
        ranks = [stream(dataset, rank=r, world_size=world_size) for r in range(world_size)]
        for source in ranks:
            if state:
                source.load_state_dict(state)
            ids += [i for batch in take(source, steps) for i in batch.ids]
        states = [source.state_dict() for source in ranks]
        state = states[0]
        assert all(s == state for s in states)
    assert state["position"] == 2 * TRAIN
    assert set(Counter(ids).values()) == {2}


def test_a_living_stream_goes_back_to_a_state(dataset):
    for workers in (0, 2):
        source = stream(dataset, workers=workers)
        take(source, 3)
        state = source.state_dict()
        expected = take(source, 3)
        source.load_state_dict(state)
        assert all_same(take(source, 3), expected)


def test_state_of_other_data_or_selection_is_refused(dataset, tmp_path, random_crystal):
    state = stream(dataset).state_dict()
    assert len(json.dumps(state)) < 1000
    with pytest.raises(ValueError, match="other crystals are selected"):
        stream(dataset, select=np.arange(20)).load_state_dict(state)
    with DatasetWriter(tmp_path / "other", []) as writer:
        for i in range(TRAIN):
            writer.add("train", random_crystal(np.random.default_rng(i), 2, str(i)))
        writer.finish({})
    with pytest.raises(ValueError, match="the data set has changed"):
        stream(Dataset.open(tmp_path / "other")).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_covers_each_crystal_once_in_equal_steps(dataset, workers):
    for world_size in (1, 2, 3):
        ranks = [
            stream(
                dataset,
                "val",
                train=False,
                batch_size=3,
                rank=rank,
                world_size=world_size,
                workers=workers,
            )
            for rank in range(world_size)
        ]
        for _ in range(2):  # every pass is the same
            passes = [list(source) for source in ranks]
            assert {len(batches) for batches in passes} == {ranks[0].total_steps} == {3}
            ids = [i for batches in passes for b in batches if not b.is_dummy for i in b.ids]
            assert sorted(ids) == sorted(f"mp-{i}" for i in range(TRAIN, TRAIN + VAL))
            dummies = [b for batches in passes for b in batches if b.is_dummy]
            assert len(dummies) == {1: 0, 2: 1, 3: 2}[world_size]
            assert all(b.ids == ["mp-40"] for b in dummies)


def test_training_takes_its_epochs_in_full_steps(dataset):
    source = stream(dataset, epochs=1.5, batch_size=7)
    sizes = [b.num_crystals for b in source]
    assert sizes == [7] * 9  # 60 crystals, and three more that fill the last step
    assert source.total_steps == len(source) == 9
    resumed = stream(dataset, epochs=1.5, batch_size=7)
    resumed.load_state_dict({**source.state_dict(), "position": 28, "steps": 4})
    assert (resumed.total_steps, len(list(resumed))) == (9, 5)


def test_a_set_smaller_than_a_batch_goes_round(dataset):
    source = stream(dataset, select=np.array([3, 5, 11]), batch_size=8, world_size=2)
    for batch in take(source, 6):
        assert batch.num_crystals == 4
        assert len(set(batch.rng_key.tolist())) == 4  # the same crystal again has other draws
    assert source.position == 48


def test_selection_and_smallest_size(dataset):
    source = stream(dataset, min_atoms=3, select=np.arange(20), epochs=1)
    assert source.epoch_size == sum(1 + i % 6 >= 3 for i in range(20))
    assert all(int(n) >= 3 for b in source for n in b.ptr.diff())
    everything = stream(dataset, None, train=False)
    assert sum(b.num_crystals for b in everything) == TRAIN + VAL
    assert list(stream(dataset, "test", train=False)) == []
    for values, message in [
        ({"select": np.array([2, 44])}, "item 44 is not in the 'train' split"),
        ({"select": np.zeros(0, int)}, "40 crystals, 0 of them are selected"),
        ({"min_atoms": 7}, "none has 7 atoms or more"),
        ({"split": "test"}, "nothing to train on in the 'test' split"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"targets": ["volume"]}, "no target 'volume': it has e_form, gap"),
        ({"world_size": 9}, "9 ranks cannot share 8 lanes"),
        ({"max_atoms": 5}, r"crystal 'mp-5' \(train-000000.tar entry 5\): it has 6 atoms"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(dataset, **{"split": "train", **values})
    with pytest.raises(ValueError, match=r"loader\.workers must be at least 0"):
        LoaderConfig(workers=-1)


def test_limits_hold_on_every_rank(dataset):
    ranks = [stream(dataset, max_atoms=11, epochs=2, rank=r, world_size=2) for r in range(2)]
    batches = [list(source) for source in ranks]
    assert all(b.num_atoms <= 11 for rank in batches for b in rank)
    assert [len(rank) for rank in batches] == [source.total_steps for source in ranks]
    seen = Counter(i for rank in batches for b in rank for i in b.ids)
    assert len(seen) == TRAIN
    assert min(seen.values()) == 2


def test_edge_estimate_is_near_the_graph(random_crystal):
    rng = np.random.default_rng(4)
    crystals = [random_crystal(rng, int(n), str(n)) for n in rng.integers(2, 30, 60)]
    atoms = np.array([len(c) for c in crystals])
    volume = np.array([c.volume for c in crystals])
    for spec in (
        GraphSpec(neighbors=12),
        GraphSpec(neighbors=12, lattice_edges="matformer"),
        GraphSpec(neighbors=16, lattice_edges="comformer"),
        GraphSpec(radius=5.0),
    ):
        true = build(crystals, spec, quotient=False).num_edges
        assert estimate_edges(spec, atoms, volume).sum() == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("transform", [None, MaskAtoms(0.5), Only(shift)])
def test_kept_graphs_change_nothing(dataset, transform):
    fresh, kept, few = (
        take(stream(dataset, transform=transform, cache_mb=c, workers=w), 15)
        for c, w in ((0, 0), (512, 0), (1, 2))
    )
    assert all_same(fresh, kept)
    assert all_same(fresh, few)


@pytest.fixture
def damaged(root, tmp_path):
    """The data set with one byte of crystal mp-12 flipped."""
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b'"mp-12"') + 2] ^= 1
    path.write_bytes(data)
    return Dataset.open(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [KEPT, STREAMED])
def test_a_damaged_crystal_is_passed_over(dataset, damaged, shuffle, workers, caplog):
    sound, source = (
        stream(dataset, shuffle=shuffle),
        stream(damaged, shuffle=shuffle, workers=workers),
    )
    for batch, expected in zip(take(source, 10), take(sound, 10), strict=True):
        assert batch.ids == [i for i in expected.ids if i != "mp-12"]
    assert [q.item for q in source.quarantined] == [12]  # told once, though it comes twice
    assert "train-000001.tar entry 3" in source.quarantined[0].reason
    assert len(caplog.records) == 1


def test_too_many_bad_crystals_stop_the_run(damaged):
    for workers in (0, 2):
        source = stream(damaged, max_bad=0, workers=workers)
        with pytest.raises(ValueError, match=r"1 crystals could not be used.*train-000001"):
            take(source, 5)


def test_a_rank_left_without_usable_crystals_gets_dummy(damaged):
    source = stream(damaged, "train", select=np.array([2, 12]), batch_size=1, epochs=3)
    batches = list(source)
    assert [b.is_dummy for b in batches].count(True) == 3
    assert all(b.ids == ["mp-2"] for b in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_worker_is_one_clear_error(dataset, workers, root, tmp_path):
    with pytest.raises(RuntimeError, match="a bug in the transform"):
        take(stream(dataset, transform=Only(stumble), workers=workers), 3)
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = stream(Dataset.open(tmp_path), workers=workers)
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"^cannot open shard .*train-000002\.tar"):
        take(broken, 3)


def test_a_killed_worker_is_an_error_and_no_hang(dataset):
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        take(stream(dataset, transform=Only(die), workers=2), 3)


def test_the_global_generator_is_left_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(stream(dataset, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_depend_on_seed_and_epoch(dataset):
    def key_of(seed, epoch):
        batches = take(stream(dataset, seed=seed), 10)[5 * epoch : 5 * epoch + 5]
        return {i: k for b in batches for i, k in zip(b.ids, b.rng_key.tolist(), strict=True)}

    keys = [key_of(0, 0), key_of(0, 1), key_of(1, 0)]
    assert all(len(k) == TRAIN for k in keys)
    assert not set(keys[0].values()) & set(keys[1].values())
    assert not set(keys[0].values()) & set(keys[2].values())


def test_crystals_are_not_changed_by_the_loader(dataset):
    source = stream(dataset, transform=Only(shift))
    clean = {c.id: c for _, c in dataset.read(range(TRAIN)) if isinstance(c, Crystal)}
    for batch in take(source, 5):
        for i, id in enumerate(batch.ids):
            part = slice(int(batch.ptr[i]), int(batch.ptr[i + 1]))
            assert np.allclose(batch.frac_coords[part], clean[id].frac_coords, atol=1e-7)
