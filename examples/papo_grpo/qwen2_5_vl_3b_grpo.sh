#!/usr/bin/env bash
# The baseline GRPO on Qwen2.5-VL-3B (arXiv 2507.06448, table 6), 2 GPUs as in the paper.
#   bash examples/papo_grpo/qwen2_5_vl_3b_grpo.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name grpo +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    trainer.n_gpus_per_node=2 \
    trainer.experiment_name=qwen2_5_vl_3b_grpo \
    "$@"
