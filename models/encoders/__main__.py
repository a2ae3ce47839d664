"""`python -m crysforge.models.encoders` lists the encoders, one a line: name, parameters, graph.

A plug-in that cannot be used is a line with the reason."""

from __future__ import annotations

import dataclasses

from crysforge.datapipe.schema import GraphSpec
from crysforge.models.encoders import ENCODERS, build_encoder


def describe(name: str) -> str:
    """Name, number of parameters and graph of an encoder with its default settings.

    Raises:
        ValueError: a plug-in that does not load, or does not build.
    """
    try:
        encoder = build_encoder({"name": name})
    except ValueError:
        raise
    except Exception as error:  # a plug-in's own
        raise ValueError(
            f"encoder {name!r} does not build with its default settings: "
            f"{type(error).__name__}: {error}"
        ) from error
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


def main() -> None:
    """Prints all lines."""
    for name in ENCODERS:
        try:
            print(describe(name))
        except ValueError as error:
            print(f"{name:<14} {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
