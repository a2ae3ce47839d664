"""The data sets of the papers: where each comes from, and the units of their labels.

Nothing is downloaded. A name of this list given as `input=` is answered with the way to the file.
"""

from __future__ import annotations

from collections.abc import Mapping

_CDVAE = "https://github.com/txie-93/cdvae, data/{0} (train.csv, val.csv, test.csv; column `cif`)"
_JARVIS = "https://figshare.com/ndownloader/files/{0}"

ORIGIN: Mapping[str, str] = {
    "carbon-24": _CDVAE.format("carbon_24"),
    "gnome": "https://storage.googleapis.com/gdm_materials_discovery/gnome_data/: "
    "stable_materials_summary.csv and by_id.zip into one folder, input=FOLDER; the subset used for "
    "pretraining is pretraining_data.zip of https://doi.org/10.6084/m9.figshare.32598966",
    "jarvis-dft3d": "JARVIS-DFT 3D of 8-18-2021 (jdft_3d-8-18-2021.json, 55,723 entries; later "
    "releases have other counts): " + _JARVIS.format(29204826),
    "matbench": "https://matbench.materialsproject.org: matbench_<task>.json.gz",
    "megnet": "Materials Project 2018.6.1 as used by MEGNet (69,239 entries): "
    + _JARVIS.format(26724977),
    "mp-20": _CDVAE.format("mp_20"),
    "mpts-52": "https://github.com/sparks-baird/mp-time-split, or the CSV files of "
    "https://github.com/jiaor17/DiffCSP, data/mpts_52",
    "oqmd": "https://oqmd.org/download: entries with `unit_cell`, `sites`, `delta_e`, `stability` "
    "as CSV or JSON (OQMD's API answers {'data': […]}), or a CSV with a `cif` column",
    "oqmd-exp": "Experimental formation energies of Kirklin et al. 2015, as a folder of CIFs with "
    "id_prop.csv (file,formation energy in eV/atom), distributed with CrysXPP and CrysGNN: "
    "https://github.com/kdmsit/crysgnn",
    "perov-5": _CDVAE.format("perov_5"),
    "supercon3d": "https://github.com/pincher-chen/SODNet, the folder datasets/SuperCon; CIFs of "
    "the ICSD must be added",
}
"""Where to get each data set."""

UNITS: Mapping[str, str] = {
    "Bandgap": "eV",
    "Corrected Energy": "eV",
    "Decomposition Energy Per Atom": "eV/atom",
    "Density": "g/cm^3",
    "Formation Energy Per Atom": "eV/atom",
    "K_VRH": "GPa",
    "Volume": "A^3",
    "band_gap": "eV",
    "bulk_modulus_kv": "GPa",
    "delta_e": "eV/atom",
    "density": "g/cm^3",
    "dir_gap": "eV",
    "e_above_hull": "eV/atom",
    "e_form": "eV/atom",
    "ehull": "eV/atom",
    "energy_above_hull": "eV/atom",
    "energy_per_atom": "eV/atom",
    "ewald_energy": "eV/atom",
    "exfoliation_en": "meV/atom",
    "formation_energy_per_atom": "eV/atom",
    "formation_energy_peratom": "eV/atom",
    "gap pbe": "eV",
    "gap_gllbsc": "eV",
    "gap_hse": "eV",
    "gap_pbe": "eV",
    "gap_scan": "eV",
    "heat_all": "eV/atom",
    "heat_ref": "eV/atom",
    "ind_gap": "eV",
    "last phdos peak": "1/cm",
    "log_tc": "ln(K)",
    "log10(G_VRH)": "log10(GPa)",
    "log10(K_VRH)": "log10(GPa)",
    "mbj_bandgap": "eV",
    "optb88vdw_bandgap": "eV",
    "optb88vdw_total_energy": "eV/atom",
    "shear_modulus_gv": "GPa",
    "slme": "%",
    "stability": "eV/atom",
    "tc": "K",
    "volume_per_atom": "A^3/atom",
}
"""Units of labels by the names that the data sets give them."""
