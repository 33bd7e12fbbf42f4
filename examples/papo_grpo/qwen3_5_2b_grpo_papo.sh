#!/usr/bin/env bash
# PAPO-G on Qwen3.5-2B, 1 GPU with 80 GiB each by the arithmetic of `papo doctor`; not yet run on one.
# Squares of 16 pixels, the patch of this vision tower. 8192 tokens, since its thoughts are long.
#   bash examples/papo_grpo/qwen3_5_2b_grpo_papo.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name papo_grpo_3b +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-Qwen/Qwen3.5-2B}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    data.max_response_length=8192 \
    worker.reward.reward_function=examples/reward_function/qwen3_vl_think.py:compute_score \
    algorithm.views.masked.patch_size=16 \
    worker.rollout.gpu_memory_utilization=0.45 \
    trainer.n_gpus_per_node=1 \
    trainer.experiment_name=qwen3_5_2b_grpo_papo \
    "$@"
