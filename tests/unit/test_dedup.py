"""Deduplication: the plain matcher's answer, whatever is skipped, interrupted or done at once."""

import csv
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.io import write as write_ase
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher

from datapipe import dedup, unique
from datapipe import matcher as matcher_module
from datapipe.crystal import Crystal
from datapipe.dedup import Decide, Duplicates
from datapipe.manifest import SPLITS
from datapipe.matcher import Group, Matcher, Reduced
from datapipe.prepare import PrepareConfig, prepare, summary
from datapipe.shards import Dataset, DatasetWriter
from datapipe.work import Journal, WorkDirectory

PLAIN = StructureMatcher(stol=0.1, angle_tol=10, ltol=0.3)

FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
HEX = np.array([[1, 0, 0], [-0.5, 3**0.5 / 2, 0], [0, 0, 1.63]])
AB = {  # cell, first kind's sites, second kind's
    "rocksalt": (5 * FCC, [[0, 0, 0]], [[0.5, 0.5, 0.5]]),
    "zincblende": (5.5 * FCC, [[0, 0, 0]], [[0.25, 0.25, 0.25]]),
    "cesium chloride": (3.2 * np.eye(3), [[0, 0, 0]], [[0.5, 0.5, 0.5]]),
    "wurtzite": (
        3.9 * HEX,
        [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5]],
        [[1 / 3, 2 / 3, 0.375], [2 / 3, 1 / 3, 0.875]],
    ),
    "nickel arsenide": (
        3.6 * HEX,
        [[0, 0, 0], [0, 0, 0.5]],
        [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]],
    ),
}


def polymorph(kind: str, first: int, second: int, id: str) -> Crystal:
    cell, a, b = AB[kind]
    return Crystal.create(id, [first] * len(a) + [second] * len(b), a + b, cell)


def other_view(crystal: Crystal, rng, id: str) -> Crystal:
    """The same crystal in a larger, turned, moved, resized cell with its atoms in another order."""
    structure = crystal.to_pymatgen()
    structure.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, int(rng.integers(1, 3))]])
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(len(structure))
    frac = (structure.frac_coords + rng.random(3))[order]
    numbers = np.array(structure.atomic_numbers)[order]
    return Crystal.create(id, numbers, frac, 1.1 * structure.lattice.matrix @ turn)


def distorted(crystal: Crystal, rng, strain: float, shift: float, id: str) -> Crystal:
    """The crystal under a random strain, its atoms moved by up to `shift` Å along each axis."""
    cell = crystal.lattice @ (np.eye(3) + rng.uniform(-strain, strain, (3, 3)))
    moved = rng.uniform(-shift, shift, (len(crystal), 3)) @ np.linalg.inv(cell)
    return Crystal.create(id, crystal.numbers, crystal.frac_coords + moved, cell)


def variants(rng, count: int, prefix: str) -> list[Crystal]:
    """Crystals of three formulas, many of them nearly the same."""
    out = []
    for i in range(count):
        kind = list(AB)[rng.integers(len(AB))]
        pair = [(11, 17), (12, 8), (30, 16)][rng.integers(3)]
        crystal = other_view(polymorph(kind, *pair, ""), rng, "")
        out.append(distorted(crystal, rng, *[(0, 0), (0.05, 0.1), (0.15, 0.3)][i % 3], ""))
    return [replace(c, id=f"{prefix}-{i}") for i, c in enumerate(out)]


def store(root: Path, **crystals: list[Crystal]) -> str:
    """A data set with these splits."""
    names = sorted({name for group in crystals.values() for c in group for name in c.targets})
    with DatasetWriter(root, names, dict.fromkeys(names, "eV"), shard_size=7) as writer:
        for split in SPLITS:
            for crystal in crystals.get(split, []):
                writer.add(split, crystal)
        writer.finish({"made": "by a test"})
    return str(root)


def duplicates(**values) -> Duplicates:
    return Duplicates(**{"splits": list(SPLITS)} | values)


def run(source: str, output: Path, *references: str, workers: int = 1, **values) -> set[str]:
    """Ids that are left out."""
    config = PrepareConfig(
        input=source,
        output=str(output),
        dedup=list(references),
        duplicates=duplicates(**values),
        workers=workers,
        progress=False,
    )
    prepare(config)
    return ids(source) - ids(output)


def ids(root) -> set[str]:
    dataset = Dataset.open(root)
    return {crystal.id for _, crystal in dataset.read(range(len(dataset)))}


def rows(output: Path, name: str = "matches.csv") -> list[dict[str, str]]:
    with open(output / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(output: Path) -> dict:
    return json.loads((output / "dedup.json").read_text("utf-8"))


def same(a: Crystal, b: Crystal) -> bool:
    """The definition."""
    return PLAIN.fit(a.to_pymatgen(), b.to_pymatgen())


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict:
    """Two data sets with many crystals in common, their crystals, and the plain answers."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(5)
    new, known = variants(rng, 24, "new"), variants(rng, 9, "known")
    kept: list[Crystal] = []
    within = set()
    for crystal in new:
        if any(same(other, crystal) for other in kept):
            within.add(crystal.id)
        else:
            kept.append(crystal)
    return {
        "new": store(root / "new", train=new),
        "known": store(root / "known", train=known[:3], val=known[3:5], test=known[5:]),
        "crystals": new,
        "against": {c.id for c in new if any(same(other, c) for other in known)},
        "against test": {c.id for c in new if any(same(other, c) for other in known[5:])},
        "within": within,
    }


def test_left_out_is_what_the_plain_matcher_finds(sets, tmp_path):
    found = run(sets["new"], tmp_path / "out", sets["known"])
    assert found == sets["against"]
    assert 5 <= len(found) < 20
    pairs = report(tmp_path / "out")["pairs"]
    assert pairs["formula"] > pairs["sites"] > pairs["compared"]
    assert pairs["compared"] >= pairs["matched"] == len(found)


def test_only_the_chosen_splits_count(sets, tmp_path):
    found = run(sets["new"], tmp_path / "out", sets["known"], splits=["test"])
    assert found == sets["against test"] != sets["against"]


def test_within_a_set_the_first_of_each_group_stays(sets, tmp_path):
    assert run(sets["new"], tmp_path / "out", within=True) == sets["within"]
    groups = PLAIN.group_structures([c.to_pymatgen() for c in sets["crystals"]])
    assert len(groups) == 24 - len(sets["within"])
    matches = rows(tmp_path / "out")
    assert not {row["same_as"] for row in matches} & sets["within"]
    assert report(tmp_path / "out")["within"]["duplicates"] == len(matches)


def test_workers_and_parts_change_nothing(sets, tmp_path, monkeypatch):
    run(sets["new"], tmp_path / "one", sets["known"], within=True)
    monkeypatch.setattr(dedup, "_LARGE", 3)
    monkeypatch.setattr(dedup, "_SCANNED", 4)
    run(sets["new"], tmp_path / "two", sets["known"], within=True, workers=2)
    for name in ("matches.csv", "dropped.csv", "index.safetensors", "dedup.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_view_is_a_duplicate_and_another_polymorph_is_not(tmp_path):
    rng = np.random.default_rng(0)
    first = {kind: polymorph(kind, 12, 8, kind) for kind in AB}
    known = store(tmp_path / "known", test=list(first.values()))
    views = [other_view(c, rng, f"other {kind}") for kind, c in first.items()]
    alien = polymorph("rocksalt", 12, 16, "alien")
    new = store(tmp_path / "new", train=[*views, alien])
    assert run(new, tmp_path / "out", known) == {view.id for view in views}
    assert {(row["id"], row["same_as"]) for row in rows(tmp_path / "out")} == {
        (f"other {kind}", kind) for kind in AB
    }
    assert all(float(row["rms"]) < 1e-3 for row in rows(tmp_path / "out"))


def test_rms_is_the_plain_matchers(tmp_path):
    rng = np.random.default_rng(1)
    crystal = polymorph("wurtzite", 30, 16, "a")
    moved = distorted(crystal, rng, 0.0, 0.1, "b")
    new, known = store(tmp_path / "n", train=[moved]), store(tmp_path / "k", train=[crystal])
    # The rest of the set is there so that something is left.
    new = store(tmp_path / "n2", train=[moved, polymorph("rocksalt", 3, 9, "c")])
    assert run(new, tmp_path / "out", known) == {"b"}
    (row,) = rows(tmp_path / "out")
    rms, largest = PLAIN.get_rms_dist(crystal.to_pymatgen(), moved.to_pymatgen())
    assert [float(row["rms"]), float(row["largest"])] == pytest.approx([rms, largest], abs=2e-4)
    assert 0.01 < float(row["rms"]) < float(row["largest"]) < 0.1


# -- The tests before the matcher ------------------------------------------------------------------


def test_no_match_is_skipped():
    """Of crystals near and beyond the tolerances in strain, displacement, or both."""
    rng, matcher = np.random.default_rng(2), Matcher()
    matched = skipped = 0
    for i in range(120):
        crystal = polymorph(list(AB)[i % len(AB)], 12, 8, "")
        other = distorted(
            other_view(crystal, rng, ""), rng, (0, 0.15)[i % 2], (0, 0.3)[i % 3 > 0], ""
        )
        known, new = Reduced(crystal, 0), Reduced(other, 1)
        fits = known.counts == new.counts and matcher.fits(known, new)
        may = matcher.may_fit(known, new)
        assert may or not fits, i
        matched, skipped = matched + fits, skipped + (not may)
    assert matched > 20
    assert skipped > 20


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.02, 0.12))
def test_no_match_is_skipped_in_any_cell(random_crystal, seed, n, shift):
    rng = np.random.default_rng(seed)
    crystal = random_crystal(rng, n)
    crystal = replace(crystal, numbers=rng.choice([8, 12], n).astype(np.uint8))
    stretch = np.diag(rng.uniform(0.5, 2, 3))
    crystal = Crystal.create("", crystal.numbers, crystal.frac_coords, crystal.lattice @ stretch)
    size = (crystal.volume / n) ** (1 / 3)
    other = distorted(other_view(crystal, rng, ""), rng, 0.05, shift * size, "")
    known, new = Reduced(crystal, 0), Reduced(other, 1)
    if known.counts == new.counts and Matcher().fits(known, new):
        assert Matcher().may_fit(known, new)


def test_pairs_in_blocks_are_the_same_pairs(monkeypatch):
    rng = np.random.default_rng(9)
    crystals = [Reduced(c, i) for i, c in enumerate(variants(rng, 12, "x"))]
    pairs = list(itertools.product(crystals, repeat=2))
    whole = [Matcher().may_fit(*pair) for pair in pairs]
    monkeypatch.setattr(matcher_module, "_AT_ONCE", 1)
    assert [Matcher().may_fit(*pair) for pair in pairs] == whole
    assert {False, True} == set(whole)


def test_the_most_similar_come_first_and_members_can_be_added():
    rng = np.random.default_rng(3)
    crystal = polymorph("wurtzite", 12, 8, "")
    group = Group()
    for i in range(20):
        group.add(Reduced(distorted(crystal, rng, 0.01 * i, 0.0, str(i)), i))
    found = [c.item for c in group.nearest(Reduced(crystal, 0))]
    assert len(group) == 20
    assert found[0] == 0
    assert sorted(found) == list(range(20))


# -- What counts -----------------------------------------------------------------------------------


def test_the_same_id_and_formula_is_a_duplicate_without_a_match(tmp_path):
    known = store(
        tmp_path / "known",
        test=[polymorph("rocksalt", 12, 8, "mp-1"), polymorph("rocksalt", 3, 9, "mp-2")],
    )
    new = store(
        tmp_path / "new",
        train=[polymorph("zincblende", 12, 8, "mp-1"), polymorph("rocksalt", 12, 16, "mp-2")],
    )
    assert run(new, tmp_path / "by id", known) == {"mp-1"}
    (row,) = rows(tmp_path / "by id")
    assert (row["by"], row["rms"]) == ("id", "")
    assert report(tmp_path / "by id")["references"][0]["by_id_without_match"] == 1
    with pytest.raises(ValueError, match="already holds a data set"):
        run(new, tmp_path / "by id", known)
    assert run(new, tmp_path / "by structure", known, ids=False) == set()


@pytest.mark.parametrize(
    ("keep", "kept"), [("first", "c"), ("lowest:energy", "d"), ("highest:energy", "c")]
)
def test_which_of_several_is_kept(tmp_path, keep, kept):
    rng = np.random.default_rng(4)
    crystal = polymorph("rocksalt", 12, 8, "")

    def copy(id, energy):
        return other_view(crystal, rng, id).with_targets({"energy": energy})

    source = store(
        tmp_path / "in",
        train=[copy("a", -9.0)],
        val=[copy("b", -8.0)],
        test=[copy("c", -1.0), copy("d", -2.0), copy("e", float("nan"))],
    )
    assert run(source, tmp_path / "out", within=True, keep=keep) == set("abcde") - {kept}


def test_files_count_whole_and_their_unusable_crystals_are_counted(tmp_path):
    rng = np.random.default_rng(6)
    known = [polymorph("rocksalt", 12, 8, ""), polymorph("wurtzite", 30, 16, "")]
    broken = Crystal.create("", [12, 8], [[0, 0, 0], [0, 0, 0.001]], 4 * np.eye(3))
    write_ase(tmp_path / "test.extxyz", [c.to_ase() for c in [*known, broken]], format="extxyz")
    new = store(
        tmp_path / "new",
        train=[other_view(known[0], rng, "x"), polymorph("rocksalt", 3, 9, "y")],
        val=[other_view(known[1], rng, "z")],
    )
    assert run(new, tmp_path / "out", str(tmp_path / "test.extxyz")) == {"x", "z"}
    (reference,) = report(tmp_path / "out")["references"]
    assert (reference["crystals"], reference["unusable"]) == (2, 1)
    assert len(reference["sha256"]) == 64


def test_report_manifest_and_dropped_list_agree(sets, tmp_path):
    rng = np.random.default_rng(7)
    known = Dataset.open(sets["known"])
    (_, crystal), *_ = known.read([0])
    more = store(tmp_path / "known", test=[other_view(crystal, rng, "again")])
    found = run(sets["new"], tmp_path / "out", sets["known"], more)
    matches, told = rows(tmp_path / "out"), report(tmp_path / "out")
    assert {row["id"] for row in matches} == found
    assert [r["name"] for r in told["references"]] == ["known (1)", "known (2)"]
    for reference in told["references"]:
        mine = [row for row in matches if row["set"] == reference["name"]]
        assert reference["duplicates"] == len(mine) == len({row["id"] for row in mine})
        assert reference["of_its_crystals"] == len({row["same_as"] for row in mine})
    assert told["references"][0]["fingerprint"] == known.manifest.fingerprint
    assert told["dropped"] == {"train": len(found), "val": 0, "test": 0}
    assert told["kept"]["train"] == len(ids(tmp_path / "out")) == 24 - len(found)
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest.provenance["dedup"] | {"undecided": []} == told
    assert sum(manifest.provenance["dropped"].values()) == len(found)
    assert {row["id"] for row in rows(tmp_path / "out", "dropped.csv")} == found
    assert f"{len(found)} duplicate of known (1)" in summary(manifest, "out")


def test_labels_units_and_splits_come_through(tmp_path):
    rng = np.random.default_rng(8)
    crystals = [
        polymorph(kind, 12, 8, kind).with_targets({"gap": i, "energy": float("nan")})
        for i, kind in enumerate(AB)
    ]
    new = store(tmp_path / "new", train=crystals[:2], val=crystals[2:3], test=crystals[3:])
    known = store(tmp_path / "known", test=[other_view(crystals[0], rng, "k")])
    run(new, tmp_path / "out", known)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.splits == {"train": 1, "val": 1, "test": 2}
    assert dataset.targets_of("gap").tolist() == [1, 2, 3, 4]
    assert np.isnan(dataset.targets_of("energy")).all()
    assert {t.unit for t in dataset.manifest.targets.values()} == {"eV"}


# -- Faults ----------------------------------------------------------------------------------------


def killed(work, call: int, monkeypatch, owner, name: str) -> None:
    """Runs `work` in a process that is killed at a call of `owner.name`."""
    pid = os.fork()
    if pid == 0:
        real, count = getattr(owner, name), itertools.count(1)

        def deadly(*args, **kwargs):
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, deadly)
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "name", "call", "again"),
    [
        (DatasetWriter, "finish", 1, 3),  # while parsing
        (Decide, "__call__", 1, 3),
        (Decide, "__call__", 3, 1),
        (DatasetWriter, "finish", 2, 0),  # before the data set is complete
    ],
)
def test_a_killed_run_goes_on(sets, tmp_path, monkeypatch, owner, name, call, again):
    output = tmp_path / "out"

    def work():
        return run(sets["new"], output, sets["known"], within=True)

    killed(work, call, monkeypatch, owner, name)
    assert not output.exists()
    decided = []
    real = Decide.__call__
    monkeypatch.setattr(
        Decide, "__call__", lambda self, task: (decided.append(task.key), real(self, task))[1]
    )
    work()
    assert len(decided) == again
    run(sets["new"], tmp_path / "whole", sets["known"], within=True)
    for file in ("matches.csv", "dropped.csv", "index.safetensors", "dedup.json"):
        assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_other_settings_do_not_go_on_with_old_decisions(sets, tmp_path, monkeypatch):
    output = tmp_path / "out"
    killed(lambda: run(sets["new"], output, sets["known"]), 3, monkeypatch, Decide, "__call__")
    strict = run(sets["new"], output, sets["known"], stol=0.001)
    assert strict == run(sets["new"], tmp_path / "fresh", sets["known"], stol=0.001)
    assert strict < sets["against"]


def test_a_torn_journal_keeps_its_whole_lines(tmp_path):
    log = Journal(tmp_path / "log")
    for i in range(3):
        log.add(f"key {i}", {"value": i})
    log.close()
    text = (tmp_path / "log").read_bytes()
    for length in range(len(text)):
        (tmp_path / "torn").write_bytes(text[:length])
        log = Journal(tmp_path / "torn")
        whole = text[:length].count(b"\n")
        assert log.done == {f"key {i}": {"value": i} for i in range(whole)}
        log.add("more", 1)
        log.close()
        again = Journal(tmp_path / "torn")
        again.close()
        assert again.done == log.done


def test_two_at_the_same_work(tmp_path):
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with WorkDirectory(tmp_path / "out", "dedup", {}):
            os.write(ready[1], b".")
            os.close(done[1])
            os.read(done[0], 1)
        os._exit(0)
    os.close(done[0])
    os.read(ready[0], 1)
    try:
        with (
            pytest.raises(ValueError, match="another process is writing"),
            WorkDirectory(tmp_path / "out", "dedup", {}),
        ):
            pass
    finally:
        os.close(done[1])
        os.waitpid(pid, 0)
    with WorkDirectory(tmp_path / "out", "dedup", {}) as work:
        work.remove()
    assert not work.path.exists()


def test_what_the_matcher_fails_on_is_kept_and_listed(sets, tmp_path, monkeypatch):
    bad = {min(sets["against"]), "known-3"}

    class Failing(Reduced):
        def __init__(self, crystal, item):
            if crystal.id in bad:
                raise ValueError("can't find niggli")
            super().__init__(crystal, item)

    monkeypatch.setattr(dedup, "Reduced", Failing)
    found = run(sets["new"], tmp_path / "out", sets["known"])
    assert found <= sets["against"] - bad
    listed = report(tmp_path / "out")["undecided"]
    assert {(u["set"], u["id"]) for u in listed} == {
        ("known", "known-3"),
        ("the set itself", min(sets["against"])),
    }
    assert all("niggli" in u["why"] for u in listed)
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest.provenance["dedup"]["undecided"] == 2


def damage(root: Path) -> None:
    path = next(root.glob("train-*.tar"))
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def test_mistakes_are_one_clear_line(sets, tmp_path):
    known, new, out = sets["known"], sets["new"], tmp_path / "out"
    only_train = store(tmp_path / "only", train=[polymorph("rocksalt", 12, 8, "a")])
    broken = store(tmp_path / "broken", train=[polymorph("rocksalt", 12, 8, "a")])
    damage(tmp_path / "broken")
    with pytest.raises(ValueError, match="only has no crystals in test, only 1 train"):
        run(new, out, only_train, splits=["test"])
    with pytest.raises(ValueError, match="new is the input itself"):
        run(new, out, new)
    with pytest.raises(ValueError, match=r"broken: train-000000.tar entry 0 is damaged"):
        run(new, out, broken)
    with pytest.raises(ValueError, match="has no target 'energy'"):
        run(new, out, within=True, keep="lowest:energy")
    with pytest.raises(ValueError, match="does not exist"):
        run(new, out, str(tmp_path / "nothing"))
    (out).mkdir()
    (out / "file").touch()
    with pytest.raises(ValueError, match="already holds files"):
        run(new, out, known)
    for values in ({"keep": "best"}, {"keep": "lowest"}, {"splits": ["tests"]}, {"stol": 0}):
        with pytest.raises(ValueError, match=f"duplicates.{next(iter(values))}"):
            Duplicates(**values)


def test_dry_run_writes_nothing(sets, tmp_path):
    from datapipe.prepare import plan

    config = PrepareConfig(
        input=sets["new"], output=str(tmp_path / "out"), dedup=[sets["known"]], progress=False
    )
    assert f"duplicates of {sets['known']}" in plan(config)
    assert not list(tmp_path.iterdir())


def test_names_of_references():
    assert unique._names(["a/x", "b/x/", "c/y.csv"]) == ["x (1)", "x (2)", "y.csv"]
