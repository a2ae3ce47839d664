"""An analysis as a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crysforge.trainer.analysis.config import AnalysisConfig


def page(out: Mapping[str, Any], config: AnalysisConfig) -> str:
    """The numbers as Markdown."""
    lines = [
        "# Analysis of an encoder",
        f"{out['crystals']} crystals of the {config.split} split, {out['atoms']} atoms.",
    ]
    for name, part in _PARTS.items():
        if found := out.get(name):
            lines += part(found, config)
    return "\n\n".join(_joined(lines)) + "\n"


def _probes_part(p: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    commonest = f"{p['element_accuracy_commonest']:.3f} (commonest)"
    coords, lattice = f"{p['coords_mae_mean']:.4f} (mean)", f"{p['lattice_mae_mean']:.3f} (mean)"
    return [
        "## Linear probes of frozen latents",
        f"Fitted on up to {config.fit_count} crystals of the {config.fit_split} split; "
        f"elements of {p['masked_atoms']} masked atoms (ratio {config.mask_ratio}).",
        *_table(
            ("", "probe", "without latents"),
            ("element, accuracy", f"{p['element_accuracy']:.3f}", commonest),
            ("fractional coordinates, MAE", f"{p['coords_mae']:.4f}", coords),
            ("lattice, MAE (Å)", f"{p['lattice_mae']:.3f}", lattice),
        ),
    ]


def _information_part(info: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    rows = (
        (f"I({k})", f"{v['nats']:.3f}", f"{v['std']:.3f}", f"{v['ceiling']:.1f}")
        for k, v in info.items()
    )
    return [
        "## Mutual information",
        "MINE (Donsker–Varadhan lower bound), nats, on pairs it has not learned from; A: "
        "elements, X: fractional coordinates.",
        *_table(("", "nats", "std over networks", "ln(pairs)"), *rows),
    ]


def _smoothness_part(s: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    rows = ((f"{r['sigma']}", f"{r['delta']:.4g}", f"{r['cosine']:.5f}") for r in s["rows"])
    return [
        "## Smoothness",
        f"Cartesian displacements of all atoms. Straight line: Δ = {s['jump']:.3g} + "
        f"{s['slope_per_angstrom']:.3g} σ/Å (R² {s['r2']:.3f}); the latents' mean norm "
        f"is {s['mean_norm']:.3g}.",
        *_table(("σ (Å)", "Δ", "cosine"), *rows),
    ]


def _invariance_part(v: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    rows = ((k, f"{x['cosine']:.7f}", f"{x['difference']:.2g}") for k, x in v.items())
    return [
        "## Invariance",
        "Smallest cosine, and largest difference in units of the spread over crystals.",
        *_table(("change", "cosine", "difference"), *rows),
    ]


def _denoised_part(v: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    return [
        "## Invariance of the denoised latents",
        "The same of what stage 2's denoiser makes of latents that are half noise, with the same "
        "noise before and after. Another order of atoms, or a larger cell, gets other noise.",
        *_invariance_part(v, config)[2:],
    ]


def _collapse_part(c: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    return [
        "## Collapse",
        f"{'Collapsed: ' + c['why'] if c['collapsed'] else 'No sign of collapse'}. Variance "
        f"{c['variance']:.4g}, effective rank {c['effective_rank']:.1f} of {c['channels']}, "
        f"dead channels {c['dead_channels']:.1%}, mean cosine of pairs of crystals "
        f"{c['pairwise_cosine']:.4f}.",
    ]


def _variance_part(curves: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    ends = "; ".join(
        f"{k}: {v[0][1]:.3g} at step {v[0][0]} to {v[-1][1]:.3g} at step {v[-1][0]}"
        for k, v in curves.items()
    )
    return ["## Latent variance over stage 2", f"{ends}. ![](variance.png)"]


def _map_part(m: Mapping[str, Any], config: AnalysisConfig) -> list[str]:
    shares = " and ".join(f"{x:.0%}" for x in m["variance_shares"])
    return [
        "## Map",
        f"Principal components, {shares} of the variance. ![](map.png)",
        "All dimensions: `tensorboard --logdir projector`.",
    ]


_PARTS: Mapping[str, Callable[[Mapping[str, Any], AnalysisConfig], list[str]]] = {
    "probes": _probes_part,
    "information": _information_part,
    "smoothness": _smoothness_part,
    "invariance": _invariance_part,
    "invariance_denoised": _denoised_part,
    "collapse": _collapse_part,
    "variance_over_training": _variance_part,
    "map": _map_part,
}


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
