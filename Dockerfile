# Two images from one recipe; all package versions come from setup.py.
#
#   docker build --target cpu -t papo:cpu .     docker run --rm --init papo:cpu [hydra overrides]
#   docker build --target gpu -t papo:gpu .     docker run --rm --init --gpus all --shm-size 16g papo:gpu COMMAND
#
# The torch wheels bring the CUDA libraries, so the GPU image needs no CUDA base: only the driver and the
# NVIDIA container toolkit on the host.
FROM python:3.11.13-slim-bookworm AS base
# A compiler: Triton and torch.compile build kernels while they run.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 papo && mkdir /app && chown papo:papo /app
USER papo
WORKDIR /app
COPY --chown=papo:papo . .
ENV PATH=/app/.venv/bin:$PATH

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/home/papo/.cache,uid=1000,gid=1000 bash scripts/install.sh vllm
CMD ["bash"]

FROM base AS cpu
# An index with CPU-only torch wheels makes the image several GB smaller.
ARG PAPO_TORCH_INDEX=""
RUN --mount=type=cache,target=/home/papo/.cache,uid=1000,gid=1000 PAPO_TORCH_INDEX="$PAPO_TORCH_INDEX" bash scripts/install.sh
ENTRYPOINT ["bash", "scripts/quickstart.sh"]
