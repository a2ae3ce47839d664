#!/usr/bin/env bash
# The tests: bash tests/run.sh [lint|unit|distributed|slurm] [pytest arguments]. No part: all. Where
# the packages slurm-wlm and munge are missing, the slurm tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

part=all
case "${1:-}" in lint | unit | distributed | slurm) part=$1 && shift ;; esac

lint() { # joined by &&: errexit is off in a function that is itself tested
    "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && "$PYTHON" -m mypy
}

case $part in
lint) lint ;;
all) lint && "$PYTHON" -m pytest tests "$@" ;;
*) "$PYTHON" -m pytest "tests/$part" "$@" ;;
esac
