"""Numbers that no setting, label or field can have end in one line that names it."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import resource
import shutil
import typing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.edit import MergeConfig, ReshardConfig, SubsetConfig
from crysforge.datapipe.preparing.edit_configs import BakeConfig, InspectConfig
from crysforge.datapipe.storage.dataset import Manifest
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.reports.config import EvaluateConfig
from crysforge.trainer.runs.board import Board
from crysforge.trainer.serving.config import PredictConfig
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from tests.launching import FINETUNE, PRETRAIN

SCHEMAS = [
    *(STAGES[name].Config for name in STAGES), FinetuneJob, PrepareConfig, PredictConfig,
    MergeConfig, SubsetConfig, ReshardConfig, BakeConfig, InspectConfig, SubmitConfig,
    EvaluateConfig,
]  # fmt: skip


def numeric(schema: type, prefix: tuple = ()) -> list[tuple[tuple[str, ...], type]]:
    """Every setting that is a number, by its path, and whether it is a whole one."""
    found = []
    for name, hint in typing.get_type_hints(schema).items():
        options = [hint, *typing.get_args(hint)]
        section = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if section is not None:
            found += numeric(section, (*prefix, name))
        else:
            found += [((*prefix, name), o) for o in options if o in (int, float)][:1]
    return found


def setting(path: tuple[str, ...], value: float) -> dict:
    for name in reversed(path):
        value = {name: value}
    return value


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.__name__)
def test_a_number_that_no_setting_can_have_is_named(schema):
    for path, kind in numeric(schema):
        odd = [10**30] if kind is int else [math.nan, math.inf, -math.inf, 1e300]
        for value in odd:
            with pytest.raises(ValueError) as error:
                configure(schema, setting(path, value))
            assert path[-1] in str(error.value) and "\n" not in str(error.value), path


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.__name__)
def test_no_count_or_seed_is_negative(schema):
    """Of whole numbers, those that may be checked where they are used are listed."""
    later = {"fold", "n_train", "n_val", "n_test", "shard_size"}
    for path, kind in numeric(schema):
        if kind is int and path[-1] not in later:
            with pytest.raises(ValueError) as error:
                configure(schema, setting(path, -1))
            assert path[-1] in str(error.value), path


@pytest.mark.parametrize(
    ("script", "setting", "words"),
    [
        ("finetune", "finetune.lr=1e6", "lr must be above 0 and at most 10, got 1000000.0"),
        ("finetune", "finetune.lr=nan", "'finetune.lr': nan is no finite number"),
        ("finetune", "seed=-1", "'seed' must be 0 to"),
        ("finetune", "loader.lanes=-1", "loader.lanes must be at least 1, got -1"),
        ("finetune", "loader.workers=5000", "loader.workers' must be 0 to 1024"),
        ("finetune", "encoder.dropout=.nan", "'encoder.dropout': nan is no finite number"),
        ("pretrain", "vae.latent_dim=-1", "latent_dim must be at least 1, got -1"),
        ("pretrain", "joint.dit.layers=1000000000", "'joint.dit.layers' must be 0 to 1000"),
        ("pretrain", "joint.dit.mlp_ratio=1e20", "dit.mlp_ratio must be above 0 and at most 1000"),
        ("pretrain", "vae.latent_dim=1000000000000", "not enough memory for 2.56e+05 GB more"),
        ("prepare", "seed=-1", "'seed' must be 0 to"),
        ("prepare", "n_val=-1", "n_val=-1"),
        ("prepare", "shard_size=-1", "shard_size must be at least 1, got -1"),
        ("prepare", "workers=-1", "'workers' must be 0 to 1024"),
        ("prepare", "filters.atoms=[2,.inf]", r"'filters.atoms[1]': inf is no finite number"),
    ],
)
def test_one_line_names_the_setting(call, data, tmp_path, script, setting, words):
    here = {
        "pretrain": [*PRETRAIN, f"data={data}", f"run_dir={tmp_path}/run"],
        "finetune": [*FINETUNE, f"data={data}", f"run_dir={tmp_path}/run", "target=density"],
        "prepare": ["input=prototypes", "size=200", f"output={tmp_path}/run", "progress=false"],
    }
    code, _, err = call(script, *here[script], setting)
    assert code == 2 and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "run").exists() or "memory" in words


# -- Labels ----------------------------------------------------------------------------------------


def test_labels_that_overflow_are_named(call, tmp_path):
    cif = (
        "data_x\n_cell_length_a 3\n_cell_length_b 3\n_cell_length_c 3\n_cell_angle_alpha 90\n"
        "_cell_angle_beta 90\n_cell_angle_gamma 90\n_symmetry_space_group_name_H-M 'P 1'\nloop_\n"
        "_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n"
        "_atom_site_fract_z\nNa Na 0 0 0\n"
    )
    labels = {"fine": "1e29", "huge": "1e306", "low": "-2e30"}
    with open(tmp_path / "x.csv", "w", newline="") as file:
        rows = ([name, cif, label] for name, label in labels.items())
        csv.writer(file).writerows([["id", "cif", "gap"], *rows])
    args = [f"input={tmp_path}/x.csv", "targets=[gap]", "progress=false", "workers=1"]
    code, out, err = call("prepare", *args, f"output={tmp_path}/out")
    assert code == 0 and "dropped 2: 2 bad label" in out, err
    dropped = (tmp_path / "out" / "dropped.csv").read_text()
    assert "huge,x.csv row 2,bad label,\"label 'gap' is 1e+306, beyond" in dropped
    code, _, err = call("prepare", *args, f"output={tmp_path}/no", "on_bad=error")
    assert code == 2 and err.count("\n") == 1 and "'huge'" in err and "'gap' is 1e+306" in err


def test_labels_that_hardly_differ_are_named():
    encoder = build_encoder({"name": "cgcnn", "tiny": True})
    with pytest.raises(ValueError, match=r"target 'gap' .* differ by 1e-40 only; .* another unit"):
        FinetuneStage(FinetuneConfig(), encoder, ["gap"], [0.0], [1e-40])


# -- Files -----------------------------------------------------------------------------------------


KEY = "0123456789ab"


@pytest.mark.parametrize(
    "graphs", [[], ["a"], "a", 3, {"a": 3}, {"a": None}, None, {KEY: {"radius": [1]}}]
)
def test_graphs_of_another_type(call, data, tmp_path, graphs):
    shutil.copytree(data, tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "graphs": graphs}))
    code, _, err = call("prepare", f"verify={tmp_path}/set", "progress=false", "workers=1")
    assert code == 2 and err.count("\n") == 1
    assert "manifest.json is damaged: graphs" in err or "a key of graphs" in err


@pytest.mark.parametrize("spec", [{"neighbors": "x"}, {"radius": "1"}, {"what": 1}, {}])
def test_graphs_of_odd_specs(call, data, tmp_path, spec):
    shutil.copytree(data, tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "graphs": {KEY: spec}}))
    Manifest.load(tmp_path / "set")
    code, out, _ = call("prepare", f"verify={tmp_path}/set", "progress=false", "workers=1")
    assert code == 1 and f"graphs.{KEY} is no graph spec" in out


def test_odd_results_are_one_line_on_export(call, runs, tmp_path):
    shutil.copytree(runs / "fine", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.json"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "test": {"mae": "low"}}))
    code, _, err = call("export", f"checkpoint={tmp_path}/run", f"output={tmp_path}/model")
    assert code == 2 and err.count("\n") == 1 and "metrics.json is damaged: test.mae" in err
    assert not (tmp_path / "model").exists()


# -- A full disk under TensorBoard -----------------------------------------------------------------


@pytest.fixture
def disk():
    """Sets how many bytes a file may have: to write more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size < 0 else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def shown(path) -> list[int]:
    return [point.step for point in EventAccumulator(str(path)).Reload().Scalars("loss")]


@pytest.mark.parametrize("room", [0, 10, 23, 60, 100, 101])
def test_a_full_disk_leaves_whole_events_in_one_file(tmp_path, disk, room):
    board = Board(tmp_path / "board")
    disk(room)
    written = []
    for step in (1, 2, 3):
        try:
            board.scalars(step, {"loss": 0.5})
            written.append(step)
        except OSError:
            pass
    disk(-1)
    assert written == [1, 2, 3][: len(written)] and len(written) < 3
    board.scalars(4, {"loss": 0.25})
    board.close()
    assert len(list((tmp_path / "board").iterdir())) == 1
    assert shown(tmp_path / "board") == [*written, 4]


def test_what_a_killed_process_logged_too_far_is_not_shown(tmp_path):
    first = Board(tmp_path)
    for step in range(1, 6):
        first.scalars(step, {"loss": float(step)})
    second = Board(tmp_path, purge_step=4)  # what went before is not closed
    second.scalars(4, {"loss": 0.0})
    assert shown(tmp_path) == [1, 2, 3, 4]
    assert torch.isfinite(torch.tensor(shown(tmp_path))).all()


def test_a_run_starts_and_ends_with_a_full_disk_under_tensorboard(call, data, tmp_path):
    run = tmp_path / "run"
    args = ["finetune", *FINETUNE, f"data={data}", f"run_dir={run}", "target=density"]
    code, _, err = call(*args, "trainer.walltime_minutes=0")
    assert code == 75, err
    (run / "tensorboard").mkdir(exist_ok=True)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("")  # nothing can be made in it
    code, out, err = call(*args)
    assert code == 0, err
    assert (out + err).count("warning: logs are not complete") == 1 and "Traceback" not in err
