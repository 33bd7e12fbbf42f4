# Two images from one recipe; all Python packages get their versions from setup.py.
#
#   docker build --target cpu -t papo:cpu .     trains the quickstart
#   docker build --target gpu -t papo:gpu .     for GPU nodes, with vLLM
#
#   docker run --rm --init papo:cpu [hydra overrides]
#   docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 papo:gpu COMMAND
#
# --ipc=host: Ray's object store and the loaders' batches share /dev/shm, of which a container has 64 MiB by itself. GPUs
# need driver 580 or newer.
#
# Runs are kept with -v "$PWD/outputs:/app/outputs", a folder that uid 1000 may write, and models that the hub gave with
# -v SOME_FOLDER:/home/papo/.cache/huggingface. With InfiniBand: --network host --device /dev/infiniband.
#
# The torch wheels bring the CUDA libraries, so the GPU image needs no CUDA base: only the driver and the
# NVIDIA container toolkit on the host.
FROM python:3.11.13-slim-bookworm AS base
# A compiler: Triton and torch.compile build kernels while they run. The rest is what NCCL opens to use InfiniBand;
# without it several nodes talk over TCP, and nothing says so.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
# The folder for caches too: the cache mounts below would leave it to root.
RUN useradd --create-home --uid 1000 papo && install -d -o papo -g papo /app /home/papo/.cache
USER papo
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
# All that the installation reads; the packages then stay as they are when other code changes.
COPY --chown=papo:papo setup.py pyproject.toml ./
COPY --chown=papo:papo scripts scripts
COPY --chown=papo:papo verl/__init__.py verl/
COPY --chown=papo:papo papo/__init__.py papo/plugin.py papo/

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/home/papo/.cache,uid=1000,gid=1000 bash scripts/install.sh vllm
COPY --chown=papo:papo . .
CMD ["bash"]

FROM base AS cpu
# An index with CPU-only torch wheels makes the image several GB smaller.
ARG PAPO_TORCH_INDEX=""
RUN --mount=type=cache,target=/home/papo/.cache,uid=1000,gid=1000 PAPO_TORCH_INDEX="$PAPO_TORCH_INDEX" bash scripts/install.sh
COPY --chown=papo:papo . .
ENTRYPOINT ["bash", "scripts/quickstart.sh"]
