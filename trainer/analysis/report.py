"""All analyses of one encoder: numbers as JSON, a page of Markdown, figures, projector files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from crysforge.datapipe.common.escape import markdown
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import Encoder
from crysforge.models.registry import nearest
from crysforge.trainer.analysis.geometry import invariance, smoothness
from crysforge.trainer.analysis.health import collapse, variance_over_training
from crysforge.trainer.analysis.information import mutual_information
from crysforge.trainer.analysis.latents import Latents, latents, sample
from crysforge.trainer.analysis.maps import latent_map, projector
from crysforge.trainer.analysis.probes import reconstruction
from crysforge.trainer.base.tensors import new_directory, write_json, write_text
from crysforge.trainer.figures.style import STYLE, TRAIN, VAL, new_figure, save_png

ANALYSES = ("probes", "information", "smoothness", "variance", "invariance", "collapse", "map")


@dataclass(kw_only=True)
class AnalysisConfig:
    """What is analysed, and on how much."""

    split: str = "test"
    """Split that is looked at and judged on."""
    fit_split: str = "train"
    """Split that probes are fitted on."""
    count: int = 1000
    """Crystals looked at, drawn by the seed."""
    fit_count: int = 2000
    """Crystals that probes are fitted on."""
    mask_ratio: float = 0.3
    """Share of the atoms whose element is hidden, for the probe of elements."""
    max_pairs: int = 20000
    """Atoms behind the mutual information."""
    seeds: int = 3
    """Networks that the mutual information is the mean of."""
    seed: int = 0
    """Seed of the draws."""
    targets: list[str] | None = None
    """Labels that colour the map; None: all."""
    analyses: list[str] = field(default_factory=lambda: list(ANALYSES))
    """Which to make."""

    def __post_init__(self) -> None:
        for name in self.analyses:
            if name not in ANALYSES:
                raise ValueError(f"unknown analysis {name!r}: {nearest(name, ANALYSES)}")
        for name, least in (("count", 2), ("fit_count", 20), ("max_pairs", 100), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def analyse(
    encoder: Encoder,
    dataset: Dataset,
    config: AnalysisConfig,
    output: str | Path,
    run: str = "",
) -> dict[str, Any]:
    """Makes the analyses and writes analysis.json, analysis.md, PNG figures and projector/ into a
    directory that appears when it is complete.

    Args:
        run: the encoder's run, whose log says how the latents' variance went.

    Raises:
        ValueError: `output` exists, an unknown target, or an empty split.
    """
    targets = dataset.names if config.targets is None else config.targets
    for name in targets:
        if name not in dataset.names:
            raise ValueError(f"the data has no target {name!r}: {nearest(name, dataset.names)}")
    with new_directory(output) as work:
        crystals = sample(dataset, config.split, config.count, config.seed)
        found = latents(encoder, crystals)
        out: dict[str, Any] = {"crystals": len(crystals), "atoms": len(found.atoms)}
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
        if "collapse" in config.analyses:
            out["collapse"] = collapse(found)
        if "map" in config.analyses:
            units = {name: dataset.manifest.targets[name].unit or "" for name in targets}
            out["map"] = {"variance_shares": latent_map(found, units, work / "map.png")}
            projector(found, list(targets), work / "projector")
        write_json(work / "analysis.json", out)
        write_text(work / "analysis.md", page(out, config))
    return out


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


def page(out: Mapping[str, Any], config: AnalysisConfig) -> str:
    """The numbers as Markdown."""
    lines = [
        "# Analysis of an encoder",
        f"{out['crystals']} crystals of the {config.split} split, {out['atoms']} atoms.",
    ]
    if p := out.get("probes"):
        lines += [
            "## Linear probes of frozen latents",
            f"Fitted on up to {config.fit_count} crystals of the {config.fit_split} split; "
            f"elements of {p['masked_atoms']} masked atoms (ratio {config.mask_ratio}).",
            *_table(
                ("", "probe", "without latents"),
                (
                    "element, accuracy",
                    f"{p['element_accuracy']:.3f}",
                    f"{p['element_accuracy_commonest']:.3f} (commonest)",
                ),
                (
                    "fractional coordinates, MAE",
                    f"{p['coords_mae']:.4f}",
                    f"{p['coords_mae_mean']:.4f} (mean)",
                ),
                (
                    "lattice, MAE (Å)",
                    f"{p['lattice_mae']:.3f}",
                    f"{p['lattice_mae_mean']:.3f} (mean)",
                ),
            ),
        ]
    if info := out.get("information"):
        lines += [
            "## Mutual information",
            "MINE (Donsker–Varadhan lower bound), nats, on pairs it has not learned from; A: "
            "elements, X: fractional coordinates.",
            *_table(
                ("", "nats", "std over networks", "ln(pairs)"),
                *(
                    (f"I({k})", f"{v['nats']:.3f}", f"{v['std']:.3f}", f"{v['ceiling']:.1f}")
                    for k, v in info.items()
                ),
            ),
        ]
    if s := out.get("smoothness"):
        lines += [
            "## Smoothness",
            f"Cartesian displacements of all atoms. Straight line: Δ = {s['jump']:.3g} + "
            f"{s['slope_per_angstrom']:.3g} σ/Å (R² {s['r2']:.3f}); the latents' mean norm "
            f"is {s['mean_norm']:.3g}.",
            *_table(
                ("σ (Å)", "Δ", "cosine"),
                *((f"{r['sigma']}", f"{r['delta']:.4g}", f"{r['cosine']:.5f}") for r in s["rows"]),
            ),
        ]
    if v := out.get("invariance"):
        lines += [
            "## Invariance",
            "Smallest cosine, and largest difference in units of the spread over crystals.",
            *_table(
                ("change", "cosine", "difference"),
                *((k, f"{x['cosine']:.7f}", f"{x['difference']:.2g}") for k, x in v.items()),
            ),
        ]
    if c := out.get("collapse"):
        lines += [
            "## Collapse",
            f"{'Collapsed: ' + c['why'] if c['collapsed'] else 'No sign of collapse'}. Variance "
            f"{c['variance']:.4g}, effective rank {c['effective_rank']:.1f} of {c['channels']}, "
            f"dead channels {c['dead_channels']:.1%}, mean cosine of pairs of crystals "
            f"{c['pairwise_cosine']:.4f}.",
        ]
    if curves := out.get("variance_over_training"):
        ends = "; ".join(
            f"{markdown(k)}: {v[0][1]:.3g} at step {v[0][0]} to {v[-1][1]:.3g} at step {v[-1][0]}"
            for k, v in curves.items()
        )
        lines += ["## Latent variance over stage 2", f"{ends}. ![](variance.png)"]
    if m := out.get("map"):
        shares = " and ".join(f"{x:.0%}" for x in m["variance_shares"])
        lines += [
            "## Map",
            f"Principal components, {shares} of the variance. ![](map.png)",
            "All dimensions: `tensorboard --logdir projector`.",
        ]
    return "\n\n".join(_joined(lines)) + "\n"


def _table(*rows: Sequence[str]) -> list[str]:
    head, *body = rows
    marked = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(row) + " |" for row in marked]


def _joined(lines: Sequence[str]) -> list[str]:
    """Paragraphs; the rows of a table stay together."""
    out: list[str] = []
    for line in lines:
        if out and line.startswith("|") and out[-1].startswith("|"):
            out[-1] += "\n" + line
        else:
            out.append(line)
    return out


def _smoothness_figure(found: Mapping[str, Any], path: Path) -> None:
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
