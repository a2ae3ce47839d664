#!/usr/bin/env bash
# The main job on synthetic crystals: prepare, pretrain, finetune, predict; ends with a table.
#   bash launch/demo.sh [DIR]      DIR: where it is kept, default runs/demo
set -euo pipefail
out=$(realpath -m "${1:-runs/demo}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" launch/demo.py "out=$out"
