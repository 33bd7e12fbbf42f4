"""Start of a worker process: logging, threads, quiet libraries."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import warnings

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Set to 1 for a worker that has no use for plugins, transformers and torch.
WITHOUT_MODEL = "VERL_WITHOUT_MODEL"
OLDEST_DRIVER = 580  # of CUDA 13, which torch 2.13 is built for


def usable_cores() -> int:
    """Cores that this process may run on, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver_gpus() -> list[str]:
    """Name and driver version of the GPUs that the driver sees, whether or not torch can use them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def start_logging(role: str) -> None:
    """Let a worker process say who it is when it has something to say."""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s")


def start_model_worker(role: str, threads: int) -> None:
    """Set up logging and the number of compute threads of a process with a model.

    More threads in sum than cores make every process wait for the others, by an order of magnitude.
    """
    import torch

    start_logging(role)
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation, instead of handing it back to the system.

    A forward and backward pass on a CPU allocates the same gigabytes again in each micro-batch, and the system clears
    every page anew: a third of an update's time. Threads share one arena, so that what one frees another can use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
        for option, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
            libc.mallopt(option, value)


def prepare_gloo(host: str) -> None:
    """Let gloo use the interface that has the address `host` of this machine, loopback where a run stays on it.

    By itself it looks its interface up by host name, which many laptops and containers cannot resolve, and which on
    many nodes of clusters is 127.0.1.1; and processes that chose differently wait for each other.
    """
    if (interface := interface_of(host)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None where none has, or it is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def quiet_libraries() -> None:
    """Silence what libraries would put between our lines. Call it before they are imported, where that can be."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
    lighten_transformers()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def lighten_transformers() -> None:
    """Let transformers believe that scikit-learn and SciPy are not installed.

    It wants them for assisted generation and for losses of object detection, which nobody uses here, and importing them
    takes a quarter of what importing a model with torch does. It asks once and remembers; others find them as ever.
    """
    hidden = [name for name in ("scipy", "sklearn") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # what maps to None is not found
    try:
        from transformers.utils import is_scipy_available, is_sklearn_available

        is_scipy_available(), is_sklearn_available()
    finally:
        for name in hidden:
            del sys.modules[name]
