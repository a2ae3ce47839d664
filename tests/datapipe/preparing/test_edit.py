"""Data sets from data sets, and what verify and inspect say of one."""

import hashlib
import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy as safetensors

from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing.edit import merge, reshard, subset
from crysforge.datapipe.preparing.edit_configs import (
    InspectConfig,
    MergeConfig,
    ReshardConfig,
    SubsetConfig,
    VerifyConfig,
)
from crysforge.datapipe.preparing.inspect import describe, statistics
from crysforge.datapipe.preparing.verify import verify
from crysforge.datapipe.storage.dataset import SPLITS, Dataset, DatasetWriter, Manifest
from crysforge.trainer.base.script import run

SPLIT = ("train", "train", "train", "val", "test")
COUNT = 40


def write(root, crystals, units=None, targets=("gap", "e_form")):
    units = {"gap": "eV"} if units is None else units
    with DatasetWriter(root, targets, units, shard_size=7) as writer:
        for i, crystal in enumerate(crystals):
            writer.add(SPLIT[i % 5], crystal)
        writer.finish({"source": "test"})
    return str(root)


@pytest.fixture(scope="module")
def crystals(random_crystal):
    rng = np.random.default_rng(0)
    labels = [{"gap": float(i)} | ({"e_form": -i} if i % 3 else {}) for i in range(COUNT)]
    return [random_crystal(rng, 1 + i % 6, f"a-{i}", labels[i]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, crystals):
    return write(tmp_path_factory.mktemp("actions") / "a", crystals)


def read(path):
    """Splits and crystals in order; verify must find nothing."""
    assert list(verify(VerifyConfig(verify=str(path), workers=1, progress=False))) == []
    dataset = Dataset.open(path)
    return [(s, c) for s in SPLITS for _, c in dataset.read(dataset.split_items(s))]


def assert_equal(found, wanted):
    assert [(s, c.id) for s, c in found] == [(s, c.id) for s, c in wanted]
    for (_, a), (_, b) in zip(found, wanted, strict=True):
        assert np.array_equal(a.numbers, b.numbers)
        assert np.array_equal(a.frac_coords, b.frac_coords)
        assert np.array_equal(a.lattice, b.lattice)
        names = a.targets.keys() & b.targets.keys()
        assert all(np.array_equal(a.targets[k], b.targets[k], equal_nan=True) for k in names)


def action(config_type, act, output, **values):
    return act(config_type(**{"output": str(output), "progress": False} | values))


# New data sets


def test_reshard_keeps_everything_but_the_shards(root, tmp_path):
    found = action(ReshardConfig, reshard, tmp_path / "r", reshard=root, shard_size=3)
    assert_equal(read(tmp_path / "r"), read(root))
    assert [s.count for s in found.shards if s.split == "train"] == [3] * 8
    assert found.targets == Manifest.load(root).targets
    assert found.provenance["sources"][0]["fingerprint"] == Manifest.load(root).fingerprint


def test_merge_keeps_splits_and_the_union_of_labels(root, tmp_path, random_crystal):
    rng = np.random.default_rng(1)
    more = [random_crystal(rng, 3, f"b-{i}", {"density": 1.0 + i}) for i in range(10)]
    other = write(tmp_path / "b", more, {}, ["density"])
    found = action(MergeConfig, merge, tmp_path / "m", merge=[root, other])
    assert list(found.targets) == ["gap", "e_form", "density"]
    assert found.targets["gap"].unit == "eV"
    both = read(root) + read(other)
    assert_equal(read(tmp_path / "m"), [x for s in SPLITS for x in both if x[0] == s])
    assert sum(np.isnan(Dataset.open(tmp_path / "m").targets_of("density"))) == COUNT
    shared = action(MergeConfig, merge, tmp_path / "i", merge=[root, other], targets="intersection")
    assert list(shared.targets) == []


def test_an_id_in_two_sets(root, tmp_path, crystals, random_crystal):
    other = write(tmp_path / "b", [*crystals[:2], random_crystal(np.random.default_rng(2), 2, "b")])
    sets = {"merge": [root, other]}
    with pytest.raises(ValueError, match=r"id 'a-0' is in .*/a and in .*/b: give same_id=first"):
        action(MergeConfig, merge, tmp_path / "x", **sets)
    assert not (tmp_path / "x").exists()
    first = action(MergeConfig, merge, tmp_path / "first", same_id="first", **sets)
    assert sum(first.splits.values()) == COUNT + 1
    assert first.provenance["dropped"] == {"id in an earlier set": 2}
    action(MergeConfig, merge, tmp_path / "both", same_id="rename", **sets)
    assert {"a-0", "b/a-0", "b"} <= {c.id for _, c in read(tmp_path / "both")}


def test_units_must_agree(root, tmp_path, random_crystal):
    one = [random_crystal(np.random.default_rng(3), 2, "c", {"gap": 1.0})]
    sets = [root, write(tmp_path / "c", one, {"gap": "meV"})]
    with pytest.raises(ValueError, match=r"units of gap differ: eV in .*, meV in .*convert"):
        action(MergeConfig, merge, tmp_path / "x", merge=sets)
    sets = [root, write(tmp_path / "d", one, {})]
    with pytest.raises(ValueError, match=r"unit of gap is not known in .*/d .*give units.gap="):
        action(MergeConfig, merge, tmp_path / "x", merge=sets)
    told = action(MergeConfig, merge, tmp_path / "y", merge=sets, units={"gap": "eV"})
    assert told.targets["gap"].unit == "eV"
    with pytest.raises(ValueError, match="needs two data sets or more"):
        action(MergeConfig, merge, tmp_path / "x", merge=[root])


def test_subset_by_all_its_settings(root, tmp_path):
    every = read(root)
    found = action(
        SubsetConfig, subset, tmp_path / "s", subset=root, splits=["train", "test"],
        labelled=["e_form"], filters=Filters(atoms=[2, 4]),
    )  # fmt: skip
    wanted = [
        (s, c) for s, c in every
        if s != "val" and not np.isnan(c.targets["e_form"]) and 2 <= len(c) <= 4
    ]  # fmt: skip
    assert_equal(read(tmp_path / "s"), wanted)
    dropped = found.provenance["dropped"]
    assert COUNT - sum(dropped.values()) == len(wanted)
    assert dropped["split"] == COUNT // 5
    assert len(dropped) == 3


def test_subset_by_ids_and_by_number(root, tmp_path):
    listed = tmp_path / "ids.txt"
    listed.write_text("a-3\n\n a-17 \n")
    action(SubsetConfig, subset, tmp_path / "ids", subset=root, ids=str(listed))
    assert {c.id for _, c in read(tmp_path / "ids")} == {"a-3", "a-17"}
    listed.write_text("a-3\nnot-there\n")
    with pytest.raises(ValueError, match=r"ids.txt: 1 ids are not in train, val, test.*not-there"):
        action(SubsetConfig, subset, tmp_path / "x", subset=root, ids=str(listed))
    draws = []
    for name, seed in (("d", 1), ("e", 1), ("f", 2)):
        values = {"subset": root, "count": 9, "seed": seed}
        action(SubsetConfig, subset, tmp_path / name, **values)
        draws.append([c.id for _, c in read(tmp_path / name)])
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 9
    for values, message in (
        ({"count": COUNT + 1}, f"count={COUNT + 1}, but only {COUNT} crystals are left"),
        ({"labelled": ["gapp"]}, "has no target 'gapp': it has gap, e_form"),
        ({"filters": Filters(labels={"gapp": [0, 1]})}, "has no target 'gapp'"),
    ):
        with pytest.raises(ValueError, match=message):
            action(SubsetConfig, subset, tmp_path / "x", subset=root, **values)
    assert not (tmp_path / "x").exists()


def test_a_damaged_set_is_not_made_into_another(root, tmp_path):
    damaged = shutil.copytree(root, tmp_path / "damaged")
    path = damaged / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    for config, act, values in (
        (ReshardConfig, reshard, {"reshard": str(damaged)}),
        (SubsetConfig, subset, {"subset": str(damaged)}),
        (MergeConfig, merge, {"merge": [str(damaged), root], "same_id": "first"}),
    ):
        with pytest.raises(ValueError, match=r"train-000001.tar entry \d.*see all with verify="):
            action(config, act, tmp_path / "x", **values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


# Verify


def change_json(root, change):
    values = json.loads((root / "manifest.json").read_text())
    change(values)
    (root / "manifest.json").write_text(json.dumps(values))


def change_index(root, change):
    """The index with other numbers, its hash in the manifest right."""

    index = {
        k: v.copy() for k, v in safetensors.load((root / "index.safetensors").read_bytes()).items()
    }
    change(index)
    data = safetensors.save(index)
    (root / "index.safetensors").write_bytes(data)
    change_json(root, lambda m: m.update(index_sha256=hashlib.sha256(data).hexdigest()))


def flip(root):
    path = root / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b'"a-8"') + 1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped byte": (flip, ["val-000000.tar: its hash", "val-000000.tar entry 1 is damaged"]),
    "truncated shard": (
        lambda root: (root / "val-000000.tar").write_bytes(b""),
        ["val-000000.tar: has 0 bytes", *["val-000000.tar entry . is lost in damage"] * 7],
    ),
    "missing shard": (
        lambda root: (root / "val-000000.tar").unlink(), ["val-000000.tar: cannot be read"],
    ),
    "shard that does not belong": (
        lambda root: shutil.copy(root / "val-000000.tar", root / "val-000009.tar"),
        ["val-000009.tar: is not in the manifest"],
    ),
    "index of others": (
        lambda root: change_index(root, lambda x: x["atoms"].__setitem__(3, 77)),
        ["train-000000.tar entry 3, a-5: atoms 6, the index says 77"],
    ),
    "labels of others": (
        lambda root: change_index(root, lambda x: x["targets"].__setitem__((3, 0), 77)),
        [
            "train-000000.tar entry 3, a-5: targets .*the index says",
            "manifest.json: mean of target gap", "manifest.json: std of target gap",
        ],
    ),
    "index with another hash": (
        lambda root: change_json(root, lambda m: m.update(index_sha256="0" * 64)),
        ["index.safetensors: its hash is not the manifest's"],
    ),
    "index that points before the start": (
        lambda root: change_index(root, lambda x: x["offset"].__setitem__(3, -5)),
        ["index.safetensors: does not belong to the manifest: offset of a crystal is out of range"],
    ),
    "cut index": (
        lambda root: (root / "index.safetensors").write_bytes(b"\0" * 9), ["index.safetensors: "],
    ),
    "elements": (
        lambda root: change_json(root, lambda m: m.update(elements=[1])),
        [r"manifest.json: elements are \[.*\], not \[1\]"],
    ),
    "statistics": (
        lambda root: change_json(root, lambda m: m["targets"]["gap"].update(mean=0.5)),
        ["manifest.json: mean of target gap is .*, not 0.5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("workers", [1, 2])
def test_verify_names_every_problem(root, tmp_path, kind, workers):
    damage, wanted = DAMAGE[kind]
    copy = shutil.copytree(root, tmp_path / "copy")
    damage(copy)
    found = list(verify(VerifyConfig(verify=str(copy), workers=workers, progress=False)))
    assert len(found) == len(wanted)
    for problem, pattern in zip(sorted(found), sorted(wanted), strict=True):
        assert re.match(pattern, problem)


def test_verify_finds_an_id_that_occurs_twice(tmp_path, crystals, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "add", forgetful(DatasetWriter.add))
        path = write(tmp_path / "twice", [*crystals[:5], *crystals[:1]])
    (problem,) = verify(VerifyConfig(verify=path, workers=2, progress=False))
    assert (
        problem == "train-000000.tar entry 3: id 'a-0' occurs before, in train-000000.tar entry 0"
    )


def forgetful(add):
    """`DatasetWriter.add` that takes an id as often as it comes."""

    def call(writer, *args):
        writer._ids.clear()
        add(writer, *args)

    return call


# Inspect, and the command line


def test_inspect_counts_what_is_there(root, crystals):
    found = statistics(InspectConfig(inspect=root, workers=2, symprec=[0.01], progress=False))
    every = [c for _, c in read(root)]
    assert found.splits == {"train": 24, "val": 8, "test": 8}
    assert found.atoms.tolist() == [len(c) for c in every]
    assert np.allclose(found.volume, [c.volume / len(c) for c in every])
    masses = [c.to_ase().get_masses().sum() / c.volume * 1.66053907 for c in every]
    assert np.allclose(found.density, masses)
    assert found.kinds.tolist() == [len(set(c.numbers.tolist())) for c in every]
    assert sum(found.elements.values()) == found.kinds.sum()
    assert found.space_groups[0.01].tolist()[0] >= 1
    assert np.array_equal(found.targets["gap"], [c.targets["gap"] for c in every])
    text = describe(found)
    assert "40 crystals: 24 train, 8 val, 8 test" in text
    assert "gap (eV)" in text
    assert "space groups at 0.01 Å" in text


def test_inspect_counts_what_is_damaged(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    flip(copy)
    found = statistics(InspectConfig(inspect=str(copy), workers=1, progress=False))
    assert found.damaged == 1
    assert "1 of them cannot be read: see verify=DIR" in describe(found)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs launch/prepare.py in this process: (exit code, output, error)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
        code = 0
        try:
            run(importlib.import_module("crysforge.launch.prepare").main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_actions_by_command(call, root, tmp_path):
    quiet = ("progress=false",)
    code, out, _ = call(f"verify={root}", "workers=1", *quiet)
    assert (code, out) == (0, f"{root}: no problems\n")
    code, out, _ = call(f"inspect={root}", f"output={tmp_path / 'h.png'}", "workers=1", *quiet)
    assert (code, (tmp_path / "h.png").read_bytes()[:4]) == (0, b"\x89PNG")
    for args in (
        (f"reshard={root}", "shard_size=5"),
        (f"subset={root}", "count=10", "filters.atoms=[1,4]"),
    ):
        code, out, _ = call(*args, f"output={tmp_path / args[0][:6]}", *quiet)
        assert (code, out.splitlines()[-1]) == (0, f"written to {tmp_path / args[0][:6]}")
    both = f"[{tmp_path / 'reshar'},{tmp_path / 'subset'}]"
    code, out, _ = call(f"merge={both}", "same_id=first", f"output={tmp_path / 'm'}", *quiet)
    assert (code, "dropped 10: 10 id in an earlier set" in out) == (0, True)
    copy = shutil.copytree(root, tmp_path / "copy")
    flip(copy)
    code, out, _ = call(f"verify={copy}", "workers=1", *quiet)
    assert (code, out.splitlines()[-1]) == (1, f"{copy}: 2 problems")
    for args, message in (
        (("verify=nowhere",), "nowhere is not a data set"),
        (("inspect=nowhere",), "nowhere is not a data set"),
        ((f"reshard={root}",), "setting 'output' is required"),
        ((f"reshard={root}", f"output={root}"), "already holds a data set"),
        ((f"subset={root}", "output=x", "splits=[trian]"), "splits must be some of"),
        ((f"merge={root}", "output=x"), "config key 'merge': give a list: merge=[…]"),
        ((f"reshard={root}", "output=x", "shardsize=3"), "'shardsize': did you mean 'shard_size'"),
    ):
        code, _, err = call(*args)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
