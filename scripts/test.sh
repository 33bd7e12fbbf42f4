#!/usr/bin/env bash
# Installs where needed and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Tests start several processes at once; together they must not have more threads than there are cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
source scripts/install.sh
python -m pytest -q --durations=10 "$@"
