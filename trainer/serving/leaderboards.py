"""Finished finetunings in the formats of public leaderboards.

JARVIS-Leaderboard takes one zipped CSV of test predictions for each property, and metadata.json.
Matbench v0.1 takes one results.json.gz with the predictions and scores of all five folds of each
task, and info.json.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import platform
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.escape import cell
from crysforge.datapipe.common.files import new_directory, write_bytes, write_json, write_text
from crysforge.datapipe.common.places import own_file
from crysforge.datapipe.common.safe_read import read_mapping, read_text
from crysforge.datapipe.common.tables import number, read_rows
from crysforge.datapipe.preparing.splitting.splits import FOLDS, by_fold
from crysforge.trainer.runs.forms import METRICS

MATBENCH = {
    "matbench_dielectric": 4764,
    "matbench_jdft2d": 636,
    "matbench_log_gvrh": 10987,
    "matbench_log_kvrh": 10987,
    "matbench_mp_e_form": 132752,
    "matbench_mp_gap": 106113,
    "matbench_perovskites": 18928,
    "matbench_phonons": 1265,
}
"""Regression tasks of Matbench v0.1 that have structures, and their crystals."""
MATBENCH_VERSION = "0.6"
_LEAST = 1e-5
"""Matbench leaves labels of no greater magnitude out of the percentage error."""


_FORM = {key: METRICS[key] for key in ("targets", "encoder", "seed", "seconds?")}
"""What is asked of metrics.json."""


def jarvis(
    runs: Sequence[str | Path],
    output: str | Path,
    metadata: Mapping[str, Any],
    dataset: str = "dft_3d",
    version: str = "8-18-2021",
) -> list[str]:
    """Writes a contribution to JARVIS-Leaderboard: a zipped CSV `id,prediction` of each run's test
    part, metadata.json and run.sh. Returns the names of the benchmarks.

    Args:
        runs: finetunings, one for each property; their targets have the data set's field names.
        metadata: `model_name`, `team_name`, `project_url`, `author_email`, and whatever else
            metadata.json is to say.
        dataset, version: JARVIS's names of the data set and its release.

    Raises:
        ValueError: an unfinished run, one of several targets, two of the same property, or a
            missing piece of metadata.
    """
    _needs(metadata, "model_name", "team_name", "project_url", "author_email")
    tables: dict[str, bytes] = {}
    seconds = 0.0
    for run in map(Path, runs):
        metrics, rows = _results(run)
        target = metrics["targets"][0]
        if not re.fullmatch(r"[A-Za-z0-9_+-]+", target):
            raise ValueError(f"{run}: {target!r} is no field of JARVIS")
        if odd := next((row["id"] for row in rows if cell(row["id"]) != row["id"]), None):
            raise ValueError(f"{run}: {odd!r} is no id of JARVIS")
        if not np.isfinite([number(row["prediction"], run) for row in rows]).all():
            raise ValueError(f"{run}: a prediction is no finite number")
        name = f"AI-SinglePropertyPrediction-{target}-{dataset}-test-mae.csv"
        if name in tables:
            raise ValueError(f"{run}: there is a run of {target} already")
        tables[name] = _predictions(rows)
        seconds += float(metrics.get("seconds", 0))
    about = {
        "date_submitted": _date(Path(output, "metadata.json"), "date_submitted", "%m-%d-%Y"),
        "database_version": version,
        "time_taken_seconds": round(seconds, 1),
        "language": "python",
        "os": platform.system().lower(),
        "software_used": "crysforge,torch,pymatgen",
        "hardware_used": "not stated",
        "git_url": [metadata["project_url"]],
        **metadata,
    }
    with new_directory(output, again=True) as work:
        for name, content in tables.items():
            entry = zipfile.ZipInfo(name)  # of a fixed date: equal runs give equal files
            entry.compress_type = zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(work / f"{name}.zip", "w") as archive:
                archive.writestr(entry, content)
        write_json(work / "metadata.json", about)
        write_text(work / "run.sh", _commands(runs))
    return [f"{name}.zip" for name in tables]


def _predictions(rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(
        [("id", "prediction"), *((row["id"], row["prediction"]) for row in rows)]
    )
    return text.getvalue().encode()


def matbench(
    runs: Sequence[str | Path], output: str | Path, metadata: Mapping[str, Any]
) -> dict[str, float]:
    """Writes a submission to Matbench v0.1: results.json.gz, info.json and run.sh. Returns the mean
    MAE over the folds of each task.

    Args:
        runs: finetunings on the official folds (`prepare … split=matbench`, `finetune … fold=K`),
            five for each task, in any order; which they are is told from their test crystals.
        metadata: `authors`, `algorithm`, `algorithm_long`, `bibtex_refs`, and whatever else
            info.json is to say.

    Raises:
        ValueError: a run whose test crystals are no official fold, one fold twice, missing folds,
            or a missing piece of metadata.
    """
    _needs(metadata, "authors", "algorithm", "algorithm_long")
    tasks = _by_fold(runs)
    record = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": MATBENCH_VERSION,
        "benchmark_name": "matbench_v0.1",
        "user_metadata": {k: v for k, v in metadata.items() if isinstance(v, str)},
        "datestamp": _date(Path(output, "results.json.gz"), "datestamp", "%Y.%m.%d %H:%M.%S"),
        "tasks": {
            task: {
                "@module": "matbench.task",
                "@class": "MatbenchTask",
                "benchmark_name": "matbench_v0.1",
                "dataset_name": task,
                "results": {f"fold_{fold}": folds[fold] for fold in range(FOLDS)},
            }
            for task, folds in tasks.items()
        },
    }
    record["hash"] = digest(record)
    info = {"bibtex_refs": "", "notes": "", "requirements": {"python": ["crysforge"]}, **metadata}
    with new_directory(output, again=True) as work:
        content = gzip.compress(json.dumps(record).encode(), mtime=0)
        write_bytes(work / "results.json.gz", content)
        write_json(work / "info.json", info)
        write_text(work / "run.sh", _commands(runs))
    return {
        task: float(np.mean([fold["scores"]["mae"] for fold in folds.values()]))
        for task, folds in tasks.items()
    }


def _by_fold(runs: Sequence[str | Path]) -> dict[str, dict[int, dict[str, Any]]]:
    """What each fold of each task has to say, all folds there."""
    tasks: dict[str, dict[int, dict[str, Any]]] = {}
    for run in map(Path, runs):
        metrics, rows = _results(run)
        task, fold, ids = _fold(run, [row["id"] for row in rows])
        folds = tasks.setdefault(task, {})
        if fold in folds:
            raise ValueError(f"{run}: there is a run of fold {fold} of {task} already")
        values = np.array([[number(r[c], run) for c in ("target", "prediction")] for r in rows])
        folds[fold] = {
            "data": dict(zip(ids, values[:, 1].tolist(), strict=True)),
            "parameters": {"encoder": metrics["encoder"], "seed": metrics["seed"]},
            "scores": scores(values[:, 0], values[:, 1]),
        }
    for task, folds in tasks.items():
        if missing := sorted(set(range(FOLDS)) - set(folds)):
            raise ValueError(f"{task} has no run of fold {', '.join(map(str, missing))}")
    return tasks


def scores(label: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Matbench's four scores of a regression, of [n] labels and predictions."""
    error = np.abs(prediction - label)
    counted = np.abs(label) > _LEAST
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mape": float((error[counted] / np.abs(label[counted])).mean()) if counted.any() else 0.0,
        "max_error": float(error.max()),
    }


def digest(record: Mapping[str, Any]) -> str:
    """Matbench's checksum of a record: SHA-256 of its JSON with all keys sorted."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _fold(run: Path, ids: Sequence[str]) -> tuple[str, int, list[str]]:
    """(task, fold, Matbench's own ids) of test crystals named `<task>-<number from 1>`."""
    tasks = {id.rpartition("-")[0] for id in ids}
    task = tasks.pop() if len(tasks) == 1 else ""
    numbers = [id.rpartition("-")[2] for id in ids]
    if task not in MATBENCH or not all(re.fullmatch(r"\d{1,9}", n, re.ASCII) for n in numbers):
        raise ValueError(
            f"{run}: its test crystals are not of one Matbench task: prepare matbench_TASK.json.gz "
            f"under its own name, one of {', '.join(MATBENCH)}"
        )
    count, digits = MATBENCH[task], len(str(MATBENCH[task]))
    chosen = np.sort(np.array(numbers, dtype=np.int64)) - 1
    for fold in range(FOLDS):
        if np.array_equal(np.flatnonzero(by_fold(count, fold, 0) == 2), chosen):
            prefix = task.replace("matbench", "mb").replace("_", "-")
            return task, fold, [f"{prefix}-{int(n):0{digits}d}" for n in numbers]
    raise ValueError(
        f"{run}: its {len(ids)} test crystals are not those of an official fold of {task}: prepare "
        f"with split=matbench and without filters, and finetune with fold=0 to {FOLDS - 1}"
    )


def _results(run: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """metrics.json of a finetuning of one target, and its test predictions."""
    path = run / "predictions_test.csv"
    if not (run / "metrics.json").is_file() or not path.is_file():
        raise ValueError(f"{run} is no finished finetuning with a test part")
    metrics = read_mapping(run / "metrics.json", _FORM)
    rows = list(read_rows(path))
    if not rows or not set(rows[0]) >= {"id", "target", "prediction"}:
        raise ValueError(f"{path} has no columns id, target, prediction: one target is needed")
    return metrics, rows


def _date(path: Path, key: str, form: str) -> str:
    """Now; of a file that was made before, what it says, so that equal runs give equal files."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(own_file(path), "rb") as file:
            text = file.read(1 << 16).decode(errors="replace")
    except (OSError, EOFError, ValueError, zlib.error):
        text = ""
    found = re.search(rf'(?<!\\)"{key}": "([\d.: -]+)"', text)
    return found[1] if found else datetime.now(timezone.utc).strftime(form)


def _commands(runs: Sequence[str | Path]) -> str:
    """A script that trains the runs again."""
    lines = [
        "#!/usr/bin/env bash",
        "# Each config names its data set, prepared beforehand.",
        "set -e",
    ]
    for run in runs:
        config = read_text(Path(run) / "config.yaml")
        whole = hashlib.sha256(config.encode()).hexdigest()
        name = whole[:12]
        end = f"CONFIG_{whole}"  # which no config can hold itself
        lines += [f"cat > {name}.yaml <<'{end}'", config.rstrip("\n"), end]
        lines += [f"python launch/finetune.py --config {name}.yaml run_dir=runs/{name}"]
    return "\n".join(lines) + "\n"


def _needs(metadata: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if not metadata.get(name):
            raise ValueError(f"the leaderboard asks for metadata.{name}: give metadata.{name}=…")
