"""Which labels belong to the cell and not to the material, as their names and units have it."""

from __future__ import annotations

import re

_RELATIVE_UNIT = re.compile(r"(/|per)(atom|site|f\.?u|formula|mol|kg|g|cm|nm|m|a|å|ang)|atom\^?-1")
"""Per something that no choice of a cell changes."""
_UNIT_OF_A_CELL = re.compile(
    r"(/|per)\(?(unit|primitive)?(cell|u\.?c\.?$)|cell\^?-1"
    r"|^(a\^?3|å\^?3|å³|ang(strom)?\^?3|nm\^?3|bohr\^?3|[mµμ]u?_?b|bohrmagnetons?|amu|electrons?)$"
)
"""Per cell, or what hardly anything but a cell is measured in."""
_ENERGY = re.compile(r"^(m?ev|ry|rydberg|ha|hartree|k?j|kcal)$")

_RELATIVE = re.compile(
    r"\b(per|peratom|persite|perfu|density|specific|mean|average|avg|fraction|ratio"
    r"|normali[sz]ed|log|ln|log10)\b"
)
_NOT_OF_ALL_ATOMS = re.compile(
    r"\b(fermi|gap|bandgap|band|activation|migration|barrier|defect|vacancy|adsorption|ionization"
    r"|affinity|phonon|cutoff|surface|work|vbm|cbm|exciton|binding|hull)\b"
)
"""Words with which an energy is not that of all atoms together."""
_TOTAL = re.compile(
    r"(?=.*\btotal\b).*\b(energy|enthalpy|magneti[sz]ation|mag|magmom|moment|mass|charge|spin|atoms"
    r"|electrons|volume)\b"
)
_NAME_OF_A_CELLS = re.compile(
    r"((free|final|(un)?corrected) )?energy( (un)?corrected)?|e ?tot(al)?|toten"
    r"|((unit )?cell )?vol(ume)?|(n|num|number of) ?(atoms|sites|elect|electrons)|mass"
    r"|(magmom|magneti[sz]ation|magnetic moment)( outcar| oszicar)?|dipole( moment)?|polarizability"
)


def of_the_cell(name: str, unit: str | None) -> str | None:
    """Why a label looks like one of the whole cell, in a few words; None if it does not. A gap in
    eV is one of the material; a total energy in eV is one of the cell; one in eV/atom is not."""
    inside = re.search(r"[(\[]([^()\[\]]+)[)\]]$", name.strip())
    if inside and not unit:
        name, unit = name[: inside.start()], inside[1]
    measured = (unit or "").lower().replace(" ", "")
    if _UNIT_OF_A_CELL.search(measured):
        return f"its unit is {unit}"
    if _RELATIVE_UNIT.search(measured):
        return None
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = " ".join(re.findall(r"[^\W_]+", words))
    if _RELATIVE.search(words):
        return None
    if _NAME_OF_A_CELLS.fullmatch(words) or _TOTAL.match(words):
        return "its name says so"
    energy = re.search(r"\b(energy|enthalpy)\b", words) and not _NOT_OF_ALL_ATOMS.search(words)
    if energy and _ENERGY.match(measured):
        return f"its unit is {unit}, not {unit}/atom"
    return None
