"""A model made ready to be shared: a directory with a model card that loads by itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from torch import Tensor

from crysforge.datapipe.common.escape import code_block, code_span, markdown
from crysforge.datapipe.common.files import new_directory, write_json, write_text
from crysforge.datapipe.common.safe_names import in_markdown
from crysforge.datapipe.common.safe_read import read_mapping, to_yaml
from crysforge.trainer.base.tensors import save_tensors
from crysforge.trainer.runs.forms import METRICS
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.model_directory import (
    SCALER,
    SCHEMA,
    WEIGHTS,
    Exported,
    Scaler,
    read_model,
    write_config,
)
from crysforge.trainer.stages.base import count_parameters

CARD = "README.md"
TRAINING = ("seed", "label_fraction", "label_count", "graph", "trainer")
"""Sections of a run's config that a model repeats; the others are paths or in it already."""


def share(
    exported: Exported,
    output: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    checkpoint: str = "",
    license: str = "",
) -> Path:
    """Writes a model directory that can be given away: `model.safetensors`, `config.yaml`,
    `scaler.json` (finetuned models) and `README.md`. It appears when it is complete and loads.

    Args:
        exported: what to share. output: directory that does not exist yet, or is what is
            asked for.
        weights: those to take instead of the exported ones. checkpoint: where they are from.
        license: name of the licence, best an SPDX identifier.

    Raises:
        ValueError: `output` exists, or the model is not complete.
    """
    path = Path(output)
    if "\n" in license:
        raise ValueError("license must be one line: the name of the licence")
    with new_directory(path, again=True) as work:
        if weights is None:
            shutil.copyfile(exported.file, work / WEIGHTS)
        else:
            save_tensors(work / WEIGHTS, weights)
        if exported.scaler is not None:
            write_json(work / SCALER, vars(exported.scaler))
        config = _config(exported, checkpoint, license)
        write_config(work, config)
        stage = read_model(work).build_stage()
        config["parameters"] = {
            "encoder": count_parameters(stage.encoder),
            "total": count_parameters(stage),
        }
        write_config(work, config)
        try:
            card = model_card(path.name, config, exported.scaler)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{exported.path}: its config or the results of its run are damaged: {error!r}"
            ) from None
        write_text(work / CARD, card)
    return path


def _config(exported: Exported, checkpoint: str, license: str) -> dict[str, Any]:
    run = _run_of(exported)
    return {
        "schema": SCHEMA,
        "stage": exported.stage,
        **({"targets": exported.scaler.targets} if exported.scaler else {}),
        "license": license,
        "encoder": exported.encoder,
        "settings": exported.settings,
        "data": exported.data,
        "start": exported.start,
        "versions": exported.versions,
        "checkpoint": checkpoint,
        "training": _training(run) if run else {},
        "results": _results(run, exported, checkpoint) if run else {},
    }


def _run_of(exported: Exported) -> Path | None:
    """The run that a model directory lies in."""
    places = (exported.path, exported.path.parent)
    return next((p for p in places if (p / "run.json").is_file()), None)


def _training(run: Path) -> dict[str, Any]:
    config = read_mapping(run / "config.yaml")
    return {key: config[key] for key in TRAINING if config.get(key) is not None}


def _results(run: Path, exported: Exported, checkpoint: str) -> dict[str, Any]:
    """Errors of a finished finetuning; else the last averages of validation and training."""
    if exported.finetuned and not checkpoint and (run / "metrics.json").is_file():
        metrics = read_mapping(run / "metrics.json", METRICS)
        return {k: metrics[k] for k in ("labels", "val", "test", "baselines") if k in metrics}
    if not (run / "metrics.jsonl").is_file():
        return {}
    last = int(checkpoint.rpartition("-")[2]) if checkpoint else math.inf
    out: dict[str, Any] = {}
    for name, points in read_metrics(run, exported.stage).items():
        kind, _, term = name.partition("/")
        reached = [(step, value) for step, value in points if step <= last]
        if kind in ("train", "val") and reached:
            out.setdefault(kind, {"step": reached[-1][0]})[term] = reached[-1][1]
    return out


def model_card(name: str, config: Mapping[str, Any], scaler: Scaler | None) -> str:
    """The README.md of a model directory, from its config."""
    encoder, data, counts = config["encoder"], config["data"], config["parameters"]
    license = config["license"]
    head = {
        "license": license or "unknown",
        "library_name": "crysforge",
        "tags": ["crystals", "materials-science", encoder["name"], config["stage"]],
    }
    parts = [
        f"---\n{to_yaml(head)}---",
        f"# {markdown(name)}",
        _purpose(config, scaler),
        _unfinished(config["checkpoint"]),
        "## Use",
        _use(scaler),
        "## Model",
        _table(
            {
                "encoder": f"{encoder['name']}, {counts['encoder']:,} parameters",
                "stage": f"{config['stage']}, {counts['total']:,} parameters in all",
                "started from": _start(config["start"]),
                "versions": _pairs(config["versions"]),
                "licence": in_markdown(license) or "not stated: ask the author before you use it",
            }
        ),
        "## Data",
        _data(data),
        "## Results",
        _results_text(config["results"], scaler),
        "## Training settings",
        _yaml({"encoder": encoder, config["stage"]: config["settings"], **config["training"]}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _purpose(config: Mapping[str, Any], scaler: Scaler | None) -> str:
    if scaler is None:
        return (
            "A pretrained crystal encoder. It predicts no property: it embeds crystals, and is a "
            "start for finetuning."
        )
    named = [
        f"{code_span(t)} in {markdown(u) or 'no unit'}"
        for t, u in zip(scaler.targets, scaler.units, strict=True)
    ]
    return f"Predicts {', '.join(named)} from a crystal structure (cell, elements, positions)."


def _unfinished(checkpoint: str) -> str:
    if not checkpoint:
        return ""
    return f"Taken from checkpoint `{checkpoint}` in the course of training, not from its end."


def _use(scaler: Scaler | None) -> str:
    call = "model.embed(structures)" if scaler is None else "model.predict(structures)"
    code = f'from crysforge import load\n\nmodel = load("DIR")  # this directory\nprint({call})'
    start = "launch/finetune.py init_from=DIR target=NAME data=DATA run_dir=RUN"
    table = "launch/predict.py checkpoint=DIR input=FILE output=predictions.csv"
    lines = f"python {start}" + ("" if scaler is None else f"\npython {table}")
    return (
        f"```python\n{code}\n```\n\nwith pymatgen `Structure` or ASE `Atoms`, where "
        "Crysforge is installed. On the command line:\n\n"
        f"```\n{lines}\n```"
    )


def _start(start: Mapping[str, Any] | None) -> str:
    if not start:
        return "random weights"
    weights, before = str(start.get("weights_sha256"))[:16], start.get("start")
    data = str(start.get("data", {}).get("fingerprint", "unknown"))[:16]
    text = f"encoder of stage {start.get('stage')} (weights {weights}…), trained on data {data}…"
    return text + (f"; before that: {_start(before)}" if before else "")


def _data(data: Mapping[str, Any]) -> str:
    provenance = data.get("provenance") or {}
    rows = {
        "fingerprint": data.get("fingerprint", "not recorded"),
        "crystals": _pairs(data.get("splits")),
        "labelled crystals used": data.get("labels"),
        "fold left out": data.get("fold"),
        "elements": " ".join(chemical_symbols[z] for z in data.get("elements") or []),
        "cells": (data.get("cell") or {}).get("rule", "as they were given"),
        "labels": _pairs({n: t.get("unit") or "?" for n, t in (data.get("targets") or {}).items()}),
    }
    known = {k: v for k, v in provenance.items() if k not in ("versions", "request")}
    parts = [_table(rows), _yaml(known) if known else ""]
    return "\n\n".join(part for part in parts if part)


def _results_text(results: Mapping[str, Any], scaler: Scaler | None) -> str:
    if not results:
        return "Not recorded."
    if scaler is None or "train" in results:
        names = {"val": "validation", "train": "training"}
        return "Averages:\n\n" + _table({names[k]: _pairs(v) for k, v in results.items()})
    lines = ["| target | split | crystals | MAE | RMSE | R² |", "|---|---|---|---|---|---|"]
    for i, target in enumerate(scaler.targets):
        shown = code_span(target) + (f" ({markdown(scaler.units[i])})" if scaler.units[i] else "")
        for split in ("val", "test"):
            row = results.get(split, {})
            row = row if len(scaler.targets) == 1 else row.get(target)
            if row:
                numbers = " | ".join(_number(row.get(k, "")) for k in ("n", "mae", "rmse", "r2"))
                lines.append(f"| {shown} | {split} | {numbers} |")
        for kind, mae in results.get("baselines", {}).get(target, {}).items():
            name = f"test, {markdown(kind)} (composition only)"
            lines.append(f"| {shown} | {name} | | {_number(mae)} | | |")
    return "\n".join(lines)


def _table(rows: Mapping[str, Any]) -> str:
    shown = [
        f"| {markdown(key)} | {markdown(str(value))} |"
        for key, value in rows.items()
        if value not in (None, "")
    ]
    return "\n".join(["| | |", "|---|---|", *shown])


def _pairs(values: Mapping[str, Any] | None) -> str:
    given = (values or {}).items()
    return ", ".join(f"{in_markdown(key)} {in_markdown(_number(value))}" for key, value in given)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _yaml(values: Mapping[str, Any]) -> str:
    return code_block(to_yaml(values), "yaml")
