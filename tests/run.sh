#!/usr/bin/env bash
# The tests: bash tests/run.sh [lint|unit|distributed|slurm] [pytest arguments]. No part: all. Where
# the packages slurm-wlm and munge are missing, the slurm tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

part=all
case "${1:-}" in lint | types | unit | distributed | slurm) part=$1 && shift ;; esac

types() { # of the package as it is installed: from the folders alone, mypy would not know that
    # crysforge.models is models
    rm -rf build/typed && mkdir -p build/typed/crysforge
    ln -s "$PWD"/crysforge/* "$PWD"/{datapipe,models,trainer,launch} build/typed/crysforge/
    "$PYTHON" -m mypy
}

lint() { # joined by &&: errexit is off in a function that is itself tested
    "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && types
}

case $part in
lint) lint ;;
types) types ;;
all) lint && "$PYTHON" -m pytest tests "$@" ;;
unit) "$PYTHON" -m pytest tests/{house,datapipe,models,trainer,launch} "$@" ;;
*) "$PYTHON" -m pytest "tests/$part" "$@" ;;
esac
