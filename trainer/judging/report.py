"""The evaluation of a folder of generated crystals: tables, one row a structure, and numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.files import make_directory, replacing, write_json
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.generation.files import Generated, read_samples
from crysforge.trainer.generation.known import Known, composition_of
from crysforge.trainer.judging.baselines import BASELINES, Baselines
from crysforge.trainer.judging.config import JudgeConfig
from crysforge.trainer.judging.novelty import judged_all
from crysforge.trainer.judging.novelty import table as novelty_table
from crysforge.trainer.judging.prediction import Answer, Question, answers, coverage, rows, table
from crysforge.trainer.reports.formats import Table


def judge_prediction(config: JudgeConfig) -> Table:
    """Writes prediction.md, .csv, .tex, metrics.csv and metrics.json; the table.

    Raises:
        ValueError: crystals that were not made for a data set's crystals, or for another's.
    """
    folder, data = Path(config.csp), Dataset.open(config.reference)
    samples, _ = read_samples(folder)
    questions = _questions(samples, data, config.split)
    most = max(len(q.made) for q in questions)
    found = answers(questions, config.workers)
    named: list[tuple[str, list[Question], list[Answer]]] = [(_name(folder), questions, found)]
    if config.baselines:
        baselines = Baselines(Known.of(data, None, ["train"]))
        for name in BASELINES:
            asked = [
                Question(q.target, baselines.make(name, q.target, most, config.seed))
                for q in questions
            ]
            named.append((name, asked, answers(asked, config.workers)))
    lines = []
    for name, asked, replies in named:
        covered = coverage(asked)
        lines += [rows(name, replies, covered, k) for k in sorted({1, most})]
    result = table(lines, len(questions))
    out = _output(config, folder)
    result.write(out)
    with replacing(out / "metrics.csv") as file:
        line = row_writer(file)
        line(["target", "sample", "rms", "matches_default", "valid", "target_valid"])
        for a in found:
            for i, d in enumerate(a.distances):
                rms = "" if math.isinf(d) else f"{d:.6f}"
                line([a.target, i, rms, a.strict_cells[i], a.valid[i], a.target_valid])
    failed = [why for a in found for why in a.failed]
    write_json(out / "metrics.json", {**_about(config, folder), "failed": failed})
    return result


def _questions(samples: list[Generated], data: Dataset, split: str) -> list[Question]:
    made: dict[str, list[Generated]] = defaultdict(list)
    for sample in samples:
        made[sample.target].append(sample)
    if "" in made:
        raise ValueError("these crystals were not made for targets: generate with input=DATA")
    out = []
    for _, crystal in data.read(data.split_items(split).tolist()):
        if isinstance(crystal, Crystal) and crystal.id in made:
            group = sorted(made.pop(crystal.id), key=lambda s: s.number)
            out.append(Question(crystal, [s.crystal for s in group]))
    if made or not out:
        names = ", ".join(list(made)[:3])
        raise ValueError(f"the {split!r} split of {data.root} lacks {len(made)} targets: {names}")
    return out


def judge_generation(config: JudgeConfig) -> Table:
    """Writes generation.md, .csv, .tex, metrics.csv and metrics.json; the table."""
    folder, data = Path(config.generation), Dataset.open(config.reference)
    samples, failed = read_samples(folder)
    crystals = [s.crystal for s in samples]
    found = judged_all(crystals, config.oxidation, config.workers)
    training = Known.of(data, {composition_of(c) for c in crystals}, ["train"])
    items = data.read(data.split_items(config.split).tolist())
    reference = [c for _, c in items if isinstance(c, Crystal)]
    if not reference:
        raise ValueError(f"data set {config.reference} has no crystals in {config.split!r}")
    result = novelty_table(crystals, failed, found, reference, training)
    out = _output(config, folder)
    result.write(out)
    with replacing(out / "metrics.csv") as file:
        line = row_writer(file)
        line(["name", "composition_valid", "structure_valid", "density", "elements", "why"])
        for v in found:
            line([v.name, v.composition, v.structure, f"{v.density:.5f}", v.elements, v.why])
    write_json(out / "metrics.json", _about(config, folder))
    return result


def _output(config: JudgeConfig, folder: Path) -> Path:
    out = Path(config.output or folder / "evaluation")
    make_directory(out)
    return out


def _about(config: JudgeConfig, folder: Path) -> dict[str, Any]:
    """What the numbers are of."""
    report = folder / "report.json"
    known = read_mapping(report) if report.is_file() else {}
    kept = ("calls_per_sample", "seconds_sampling", "sampling", "made", "failed", "weights_sha256")
    return {
        "reference": config.reference,
        "split": config.split,
        "oxidation": config.oxidation,
        "generated": {k: known.get(k) for k in kept},
    }


def _name(folder: Path) -> str:
    return folder.resolve().name
