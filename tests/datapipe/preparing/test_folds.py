"""Data sets with folds: each crystal is tested once, and nothing that is trained has seen it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from crysforge.datapipe.preparing.inspect import InspectConfig, describe, statistics
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter, Manifest
from crysforge.datapipe.storage.manifest import SPLITS
from tests.groups import config, make_input
from tests.launching import FINETUNE, PRETRAIN


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A data set of 90 crystals in three folds by formula."""
    root = tmp_path_factory.mktemp("folds")
    source = make_input(root / "in")
    prepare(
        config(source, root / "set", folds=3, split_by="formula", targets=["gap", "metal"],
               units={"gap": "eV"}, shard_size=25)
    )  # fmt: skip
    return root / "set"


def test_a_data_set_knows_its_folds(folded):
    dataset = Dataset.open(folded)
    assert dataset.folds == 3 and len(dataset.split_items("train")) == 120
    tested: list[int] = []
    for fold in range(3):
        chosen = dataset.with_fold(fold)
        parts = [chosen.split_items(s) for s in SPLITS]
        assert sorted(np.concatenate(parts)) == list(range(120))
        assert all(len(p) > 0 for p in parts) and (np.diff(parts[0]) > 0).all()
        tested += parts[2].tolist()
        formulas = [
            {c.to_pymatgen().composition.reduced_formula for _, c in chosen.read(part)}
            for part in parts
        ]
        for one, other in itertools.combinations(formulas, 2):
            assert not one & other
    assert sorted(tested) == list(range(120))
    for fold in (None, 3, -1):
        with pytest.raises(ValueError, match="has 3 folds: give fold=0 to 2, the one to test on"):
            dataset.with_fold(fold)
    with pytest.raises(ValueError, match="has 3 folds: give fold=0 to 2"):
        dataset.split_items("test")
    plain = Dataset.open(folded.parent / "in")
    assert plain.with_fold(None).fold is None
    with pytest.raises(ValueError, match=r"fold=0, but .* has no folds: prepare it with folds=5"):
        plain.with_fold(0)


def test_inspect_shows_folds(folded):
    said = describe(statistics(InspectConfig(inspect=str(folded), workers=1, progress=False)))
    assert said.startswith("120 crystals: 3 folds\n")
    assert "split: folds split_by=formula seed=123" in said


def test_folds_are_part_of_what_identifies_a_data_set(folded, tmp_path):
    source = folded.parent / "in"
    other = prepare(
        config(source, tmp_path / "set", folds=3, split_by="chemical_system",
               targets=["gap", "metal"], units={"gap": "eV"}, shard_size=25)
    )  # fmt: skip
    here = Manifest.load(folded)
    assert [s.sha256 for s in here.shards] == [s.sha256 for s in other.shards]
    assert here.fingerprint != other.fingerprint


def folds_of(root) -> dict[str, tuple[int, int]]:
    dataset = Dataset.open(root)
    return {c.id: dataset.fold_of(i) for i, c in dataset.read(range(len(dataset)))}


@pytest.mark.parametrize(
    "action",
    [["reshard={}", "shard_size=7"], ["subset={}", "count=50"], ["bake={}", "encoders=[schnet]"],
     ["input={}", "folds=3", "split_by=formula", "targets=[gap,metal]"]],
    ids=lambda a: a[0].partition("=")[0],
)  # fmt: skip
def test_folds_come_along(action, folded, call, tmp_path):
    args = [action[0].format(folded), *action[1:], f"output={tmp_path}/out", "progress=false"]
    code, out, err = call("prepare", *args)
    assert code == 0 and "3 folds (fold=0 to 2)" in out, err
    before, after = folds_of(folded), folds_of(tmp_path / "out")
    assert after.items() <= before.items() and len(after) in (50, 120)
    code, out, _ = call("prepare", f"verify={tmp_path}/out", "progress=false", "workers=1")
    assert code == 0 and "no problems" in out


def test_what_cannot_keep_folds_says_so(folded, call, tmp_path):
    new = [f"output={tmp_path}/out", "progress=false"]
    code, _, err = call("prepare", f"input={folded}", *new)
    assert code == 2 and "has folds, which split=keep cannot keep" in err
    code, _, err = call("prepare", f"merge=[{folded},{folded}]", *new)
    assert code == 2 and "has folds, which are of that set alone" in err


@pytest.mark.parametrize("folds", [{"count": 1}, {"count": 33}, {"count": "5"}, [], 5, {"a": 3}])
def test_odd_folds_of_a_manifest(folded, tmp_path, folds):
    text = json.loads((folded / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**text, "folds": folds}))
    with pytest.raises(ValueError, match=r"is damaged: .*folds"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [[(0, 0), (3, 0)], [(0, 0), (-1, 0)], [(0, 1), (1, 0)], [(0, 8), (1, 0)]],
    ids=["no such fold", "negative", "validates its own fold", "validates in no fold"],
)
def test_folds_that_do_not_fit_are_damage(tmp_path, wrong, random_crystal):
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "x", [], folds=3) as writer:
        for i, fold in enumerate(wrong):
            writer.add("train", random_crystal(rng, 2, f"c{i}"), fold=fold)
        writer.finish({})
    with pytest.raises(ValueError, match="does not belong to the manifest"):
        Dataset.open(tmp_path / "x")


# -- Training and evaluating on folds --------------------------------------------------------------


@pytest.fixture
def finetune(call, folded, tmp_path):
    def finetune(name: str, *args: str) -> tuple[int, str, str]:
        return call(
            "finetune", *FINETUNE, f"data={folded}", f"run_dir={tmp_path}/{name}", "target=gap",
            *args,
        )  # fmt: skip

    return finetune


def test_every_crystal_is_predicted_in_one_fold(finetune, call, folded, tmp_path):
    ids: list[str] = []
    for fold in range(3):
        code, _, err = finetune(f"run-{fold}", f"fold={fold}")
        assert code == 0, err
        rows = (tmp_path / f"run-{fold}" / "predictions_test.csv").read_text().splitlines()
        ids += [row.partition(",")[0] for row in rows[1:]]
        assert json.loads((tmp_path / f"run-{fold}" / "metrics.json").read_text())["fold"] == fold
    assert sorted(ids) == sorted(folds_of(folded))
    code, _, err = finetune("run-0", "fold=1")
    assert code == 2 and "fold" in err  # another fold is another run
    code, _, err = call("evaluate", f"suite={tmp_path}", "figures=false", "space_groups=false")
    assert code == 0, err
    tables = {p.stem: p.read_text() for p in (tmp_path / "report" / "tables").glob("*.csv")}
    assert len(tables["scores"].splitlines()) == 2  # one arm, of three folds
    assert (
        "120" in tables["by_atoms"]
        or sum(int(row.split(",")[1]) for row in tables["by_atoms"].splitlines()[1:]) == 120
    )
    code, _, _ = call("export", f"checkpoint={tmp_path}/run-2", f"output={tmp_path}/model")
    assert code == 0 and "| fold left out | 2 |" in (tmp_path / "model" / "README.md").read_text()


def test_a_fold_must_be_chosen_and_must_be_there(finetune, data, call, tmp_path):
    for args, words in (
        ([], "has 3 folds: give fold=0 to 2"),
        (["fold=3"], "give fold=0 to 2, the one to test on, not 3"),
        ([f"data={data}", "fold=0", "target=density"], "has no folds"),
    ):
        code, _, err = finetune("run", *args)
        assert code == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "run").exists()


def test_a_start_that_saw_the_test_crystals_is_refused(finetune, folded, call, tmp_path):
    args = [*PRETRAIN, f"data={folded}", f"run_dir={tmp_path}/pre", "stages=[vae]", "fold=0"]
    code, _, err = call("pretrain", *args)
    assert code == 0, err
    code, _, err = finetune("bad", f"init_from={tmp_path}/pre", "fold=1")
    assert code == 2 and "was trained on fold 0 of" in err and "per: [fold]" in err
    code, _, err = finetune("good", f"init_from={tmp_path}/pre", "fold=0")
    assert code == 0, err
    code, _, err = finetune("worse", f"init_from={tmp_path}/good", "fold=2")
    assert code == 2 and "was trained on fold 0 of" in err
