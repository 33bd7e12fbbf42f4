"""What every worker process does first."""

from __future__ import annotations

import logging
import os
import socket
import warnings

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def usable_cores() -> int:
    """Cores that this process may run on, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_logging(role: str) -> None:
    """Let a worker process say who it is when it has something to say."""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s")


def start_model_worker(role: str, threads: int) -> None:
    """Set up logging and the number of compute threads of a process with a model.

    More threads in sum than cores make every process wait for the others, by an order of magnitude.
    """
    import torch

    start_logging(role)
    quiet_libraries()
    torch.set_num_threads(threads)


def prepare_gloo(host: str) -> None:
    """Let gloo use the loopback interface in every process of a run that stays on this machine.

    By itself it looks its interface up by host name, which many laptops and containers cannot resolve; and processes
    that chose differently wait for each other.
    """
    if host == "127.0.0.1" and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def quiet_libraries() -> None:
    """Silence progress bars and hints of libraries that would interrupt ours."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
