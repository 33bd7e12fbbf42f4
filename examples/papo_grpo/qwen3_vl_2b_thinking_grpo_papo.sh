#!/usr/bin/env bash
# PAPO-G on Qwen3-VL-2B-Thinking (arXiv 2507.06448, table 6), 4 GPUs.
# 8192 tokens: with the paper's 2048 most thoughts of such a model are cut off before they reach an answer.
# Squares of 16 pixels, the patch of this vision tower (14 is Qwen2.5-VL's).
#   bash examples/papo_grpo/qwen3_vl_2b_thinking_grpo_papo.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name papo_grpo_3b +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-Qwen/Qwen3-VL-2B-Thinking}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    data.max_response_length=8192 \
    worker.reward.reward_function=examples/reward_function/qwen3_vl_think.py:compute_score \
    algorithm.terms.perception_kl.coef=0.01 \
    algorithm.views.masked.patch_size=16 \
    trainer.n_gpus_per_node=4 \
    trainer.experiment_name=qwen3_vl_2b_thinking_grpo_papo \
    "$@"
