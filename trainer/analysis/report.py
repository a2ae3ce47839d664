"""All analyses of one encoder: numbers as JSON, a page of Markdown, figures, projector files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.checked import Name
from crysforge.datapipe.common.files import new_directory, sha256, write_json, write_text
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.places import own_file
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.preparing.request import HOW, request_of
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import Encoder
from crysforge.trainer.analysis.config import AnalysisConfig
from crysforge.trainer.analysis.geometry import Denoised, invariance, smoothness
from crysforge.trainer.analysis.health import collapse, variance_over_training
from crysforge.trainer.analysis.information import mutual_information
from crysforge.trainer.analysis.latents import Latents, latents, sample
from crysforge.trainer.analysis.maps import latent_map, projector
from crysforge.trainer.analysis.page import page
from crysforge.trainer.analysis.probes import reconstruction
from crysforge.trainer.figures.style import STYLE, TRAIN, VAL, new_figure, save_png
from crysforge.trainer.runs.model_directory import Exported
from crysforge.trainer.stages.base import Stage
from crysforge.trainer.stages.joint import JointStage


def analyse(
    stage: Stage,
    dataset: Dataset,
    config: AnalysisConfig,
    output: str | Path,
    run: str = "",
    request: str = "",
) -> dict[str, Any]:
    """Makes the analyses and writes analysis.json, analysis.md, PNG figures and projector/ into a
    directory that appears when it is complete.

    Args:
        stage: whose encoder is looked at; of stage 2 also the denoised latents.
        run: the encoder's run, whose log says how the latents' variance went.
        request: what is asked for, kept in analysis.json; see `analysed_before`.

    Raises:
        ValueError: `output` exists, an unknown target, or an empty split.
    """
    encoder = stage.encoder
    targets = dataset.names if config.targets is None else config.targets
    for name in targets:
        if name not in dataset.names:
            raise ValueError(f"the data has no target {name!r}: {nearest(name, dataset.names)}")
    with new_directory(output) as work:
        crystals = sample(dataset, config.split, config.count, config.seed)
        found = latents(encoder, crystals)
        out: dict[str, Any] = {"crystals": len(crystals), "atoms": len(found.atoms)}
        out |= {"request": request} if request else {}
        if "probes" in config.analyses:
            out["probes"] = _probes(encoder, dataset, config, found)
        if "information" in config.analyses:
            out["information"] = _information(found, config)
        if "smoothness" in config.analyses:
            out["smoothness"] = smoothness(encoder, crystals, config.seed)
            _smoothness_figure(out["smoothness"], work / "smoothness.png")
        if "variance" in config.analyses and (curves := variance_over_training(run) if run else {}):
            out["variance_over_training"] = curves
            _variance_figure(curves, work / "variance.png")
        if "invariance" in config.analyses:
            out["invariance"] = invariance(encoder, crystals[:200], config.seed)
            if isinstance(stage, JointStage):
                several = [c for c in crystals[:200] if len(c) > 1]
                out["invariance_denoised"] = invariance(Denoised(stage), several, config.seed)
        if "collapse" in config.analyses:
            out["collapse"] = collapse(found)
        if "map" in config.analyses:
            units = {name: dataset.manifest.targets[name].unit or "" for name in targets}
            out["map"] = {"variance_shares": latent_map(found, units, work / "map.png")}
            projector(found, list(targets), work / "projector")
        write_json(work / "analysis.json", out)
        write_text(work / "analysis.md", page(out, config))
    return out


def asked(config: AnalysisConfig, model: Exported, dataset: Dataset, run: str) -> str:
    """Identifies what is asked for, by settings, weights, data and the log of the run."""
    log = Path(run) / "metrics.jsonl"
    logged = sha256(own_file(log)) if log.is_file() else ""
    facts = [sha256(model.file), dataset.manifest.fingerprint, logged]
    return request_of(config, facts, (*HOW, "checkpoint", "data", "device"))


def analysed_before(output: str | Path, request: str) -> bool:
    """Whether a directory holds the analyses that are asked for."""
    try:
        return read_mapping(Path(output, "analysis.json"), {"request": Name})["request"] == request
    except ValueError:
        return False


def _probes(
    encoder: Encoder, dataset: Dataset, config: AnalysisConfig, found: Latents
) -> dict[str, float]:
    many = sample(dataset, config.fit_split, config.fit_count, config.seed)
    masked = [
        latents(encoder, [c for c in part if len(c) > 1], mask_ratio=config.mask_ratio, seed=s)
        for part, s in ((many, config.seed), (found.crystals, config.seed + 1))
    ]
    return reconstruction(latents(encoder, many), found, *masked)


def _information(found: Latents, config: AnalysisConfig) -> dict[str, dict[str, float]]:
    rows = np.random.default_rng(config.seed).permutation(len(found.atoms))[: config.max_pairs]
    elements = np.eye(int(found.numbers.max()) + 1)[found.numbers]
    elements = elements[:, elements.any(0)]
    parts = {"Z;A": elements, "Z;X": found.frac_coords}
    return {
        name: mutual_information(found.atoms[rows], values[rows], config.seeds)
        for name, values in parts.items()
    }


def _smoothness_figure(found: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    x = np.array([r["sigma"] for r in found["rows"]])
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.0)
        left, right = figure.subplots(1, 2)
        y, spread = (np.array([r[k] for r in found["rows"]]) for k in ("delta", "delta_std"))
        left.errorbar(x, y, spread, color=TRAIN, marker="o", capsize=3)
        slope, jump = found["slope_per_angstrom"], found["jump"]
        left.plot([0, x[-1]], [jump, jump + slope * x[-1]], "--", color="#444444")
        left.set(xlabel="σ (Å)", ylabel="Δ of pooled latents", xlim=(0, None), ylim=(0, None))
        left.set_title(f"straight line: R² {found['r2']:.3f}", loc="left")
        right.plot(x, [r["cosine"] for r in found["rows"]], color=VAL, marker="o")
        right.axhline(0.97, color="#444444", linestyle="--", linewidth=1.2)
        right.set(xlabel="σ (Å)", ylabel="cosine", xlim=(0, None))
        right.set_title("dashed: 0.97", loc="left")
        save_png(figure, path)


def _variance_figure(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.0)
        axes = figure.add_subplot()
        for (name, points), color in zip(sorted(curves.items()), (TRAIN, VAL), strict=False):
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 20 else ""
            axes.plot(x, y, color=color, label=name.split("/")[0], marker=marker)
        axes.set(xlabel="optimiser step", ylabel="latent variance", ylim=(0, None))
        axes.legend()
        save_png(figure, path)
