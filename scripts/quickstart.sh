#!/usr/bin/env bash
# Trains a tiny vision-language model with reinforcement learning, start to end, on a CPU or a GPU:
#
#   bash scripts/quickstart.sh [hydra overrides, e.g. trainer.max_steps=5]
#
# Installs where needed, makes images and a warm-started model under outputs/quickstart_assets (kept and
# used again by the next run), then trains with configs/quickstart.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh ""

stage() {
    local name="$1" code=0
    shift
    echo "[quickstart] $name"
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "[quickstart] ERROR: the stage \"$name\" failed with exit code $code; its messages are above." >&2
        exit "$code"
    fi
}

if [ "${1:-}" = "+task=misled" ]; then # GRPO and PAPO on a task with a shortcut, side by side
    stage "GRPO and PAPO on a task with a shortcut" python examples/study/study.py --demo
    exit
fi
stage "1/2 data and warm start" python -m papo.quickstart outputs/quickstart_assets
stage "2/2 training" python -m verl.trainer.main --config-name quickstart "$@"
