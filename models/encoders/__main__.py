"""`python -m models.encoders` lists the encoders, one a line: name, parameters, graph."""

from __future__ import annotations

import dataclasses

from datapipe.schema import GraphSpec
from models.encoders import ENCODERS, build_encoder


def describe(name: str) -> str:
    """Name, number of parameters and graph of an encoder with its default settings."""
    encoder = build_encoder({"name": name})
    parameters = sum(p.numel() for p in encoder.parameters())
    return f"{name:<14} {parameters:>12,}  {_graph(encoder.graph)}"


def _graph(spec: GraphSpec) -> str:
    """The settings that differ from the defaults."""
    chosen = [
        f"{f.name}={getattr(spec, f.name)}"
        for f in dataclasses.fields(spec)
        if getattr(spec, f.name) != f.default
    ]
    return " ".join(chosen)


if __name__ == "__main__":
    for name in ENCODERS:
        print(describe(name))
