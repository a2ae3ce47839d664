"""How many lanes there are, and who has which."""

from __future__ import annotations

MAX_LANES = 64


def default_lanes(batch_size: int) -> int:
    """Largest divisor of the batch size up to 64: then every step takes equally many crystals
    from every lane."""
    return max(d for d in range(1, min(batch_size, MAX_LANES) + 1) if batch_size % d == 0)


def share(part: int, parts: int, start: int, stop: int) -> tuple[int, int]:
    """Part `part` of `parts` nearly equal contiguous pieces of start … stop - 1."""
    size = stop - start
    return start + size * part // parts, start + size * (part + 1) // parts
