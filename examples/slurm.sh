#!/usr/bin/env bash
# Trains on several nodes under SLURM: starts Ray on every node of the job, runs the command given as arguments on the
# first one, and stops Ray when it ends.
#
#   sbatch --nodes=4 --gpus-per-node=8 examples/slurm.sh python -m verl.trainer.main --config-name papo_grpo \
#       trainer.nnodes=4 trainer.n_gpus_per_node=8 data.train_files=... worker.actor.model.model_path=...
#
# Submit it from the repository root, on a file system that all nodes see, after `bash scripts/install.sh vllm`.
#
# HEAD_IP          address of the first node that the others can reach (default: the first that it has)
# RAY_PORT         port of Ray's head (default: 6379)
# START_TIMEOUT_S  how long the nodes may take to join (default: 300)
#SBATCH --job-name=papo
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

say() { echo "[slurm] $*"; }

die() {
    echo "[slurm] ERROR: $*" >&2
    exit 1
}

# A step on one node, with all that the job has there; --nodelist follows.
step=(srun --nodes=1 --ntasks=1 --overlap --cpu-bind=none)
ray_steps=()

start_ray() {
    "${step[@]}" --nodelist="$1" ray start --block "${@:2}" &
    ray_steps+=("$!")
}

# Ends these steps, and nobody else's Ray.
stop_ray() {
    local code=$?
    trap - EXIT
    say "stopping Ray"
    kill "${ray_steps[@]}" 2>/dev/null || true
    wait || true
    exit "$code"
}

# How many nodes are in the cluster; ray.init would wait for minutes for a head that is not there.
joined_nodes() {
    timeout 60 python -c 'import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))' \
        2>/dev/null || echo 0
}

wait_for_nodes() {
    local deadline=$((SECONDS + ${START_TIMEOUT_S:-300})) pid
    until [ "$(joined_nodes)" -ge "$1" ]; do
        [ "$SECONDS" -lt "$deadline" ] \
            || die "after ${START_TIMEOUT_S:-300} s (START_TIMEOUT_S) not all of $1 node(s) have joined Ray at $RAY_ADDRESS"
        sleep 2
        for pid in "${ray_steps[@]}"; do
            kill -0 "$pid" 2>/dev/null || die "Ray has ended on a node; its messages are above"
        done
    done
}

[ "$#" -gt 0 ] || die "no command was given: sbatch --nodes=N examples/slurm.sh COMMAND ..."
[ -n "${SLURM_JOB_NODELIST:-}" ] || die "this is no SLURM job: submit it with sbatch"
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
command -v ray >/dev/null || die "there is no ray in $PWD/.venv or on PATH: run bash scripts/install.sh vllm first"

nodes=()
while read -r node; do nodes+=("$node"); done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip="${HEAD_IP:-$("${step[@]}" --nodelist="${nodes[0]}" hostname -I | awk '{print $1}')}"
export RAY_ADDRESS="$head_ip:${RAY_PORT:-6379}" RAY_USAGE_STATS_ENABLED=0
# One secret for all nodes; without it anybody on the network could run code in this cluster.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

trap stop_ray EXIT
say "starting Ray on ${#nodes[@]} node(s), its head on ${nodes[0]} at $RAY_ADDRESS"
start_ray "${nodes[0]}" --head --node-ip-address="$head_ip" --port="${RAY_PORT:-6379}" --include-dashboard=false
wait_for_nodes 1
for node in "${nodes[@]:1}"; do start_ray "$node" --address="$RAY_ADDRESS"; done
wait_for_nodes "${#nodes[@]}"
say "running: $*"
"${step[@]}" --nodelist="${nodes[0]}" "$@"
