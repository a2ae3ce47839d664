"""The encoder of a job, as it suits a data set, and the graph that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crysforge.datapipe.crystals.cells import PRIMITIVE, cells_of
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.models.encoders import build_encoder
from crysforge.models.encoders.base import for_primitive_cells
from crysforge.trainer.base.command_line import read_yaml


def suited(section: Mapping[str, Any], manifest: Manifest) -> Mapping[str, Any]:
    """An encoder's section, with what suits the cells of a data set where it does not say."""
    primitive = cells_of(manifest.provenance).rule == PRIMITIVE
    return for_primitive_cells(section) if primitive else section


def graph_of(encoder: str, manifest: Manifest) -> GraphSpec:
    """The graph that a training on a data set asks for.

    Args:
        encoder: a name, or a config file (.yaml) with an `encoder` section.
    """
    if not encoder.endswith((".yaml", ".yml")):
        return build_encoder(suited({"name": encoder}, manifest)).graph
    section = read_yaml(encoder).get("encoder")
    if not section:
        raise ValueError(f"{encoder} has no section 'encoder'")
    return build_encoder(suited(section, manifest)).graph
