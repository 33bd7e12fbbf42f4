"""The machine: GPUs, Ray, memory, disk, and the limits that containers set."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sysconfig
from collections.abc import Iterator

from papo.tools.doctor.case import GIB, GPU, Case, Finding, error, in_gib, in_short, ok, warning
from verl.utils.process import OLDEST_DRIVER, driver_gpus, usable_cores

SHARED_MEMORY = "/dev/shm"
SMALLEST_SHARED = GIB  # docker's default is 64 MiB
RAY_SHARE = 0.3  # of main memory is what Ray's object store asks for, ...
RAY_ENOUGH = 10 * 10**9  # ... and with this much of /dev/shm it is content
OPEN_FILES = 4096
RAY_PORT_TIMEOUT_S = 3


def disk_usage(path: str) -> tuple[int, int]:
    """(total, free) bytes of the file system that holds `path`, or will."""
    while not os.path.exists(path):
        path = os.path.dirname(os.path.abspath(path))
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def main_memory() -> int:
    """Bytes of main memory that this machine, or this container, may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            return min(memory, int(file.read()))
    except (OSError, ValueError):  # no limit is set, or not in this way
        return memory


def find_gpus() -> list[GPU]:
    """The GPUs that torch can use; none where torch does not import."""
    try:
        import torch
    except Exception:  # check_imports says why
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        found.append(GPU(properties.name, properties.total_memory, free, (properties.major, properties.minor)))
    return found


def check_gpus(case: Case) -> Iterator[Finding]:
    if case.imagined:
        yield ok("GPU", f"asked about: {len(case.gpus)} x {case.gpus[0].memory / GIB:.0f} GiB, which need not be here")
        return
    seen = driver_gpus()
    if not case.gpus:
        if seen:
            yield error(
                "GPU",
                f"the driver sees {seen[0]}, and torch cannot use it: the driver is older than {OLDEST_DRIVER}, or "
                "torch is a build for CPUs",
                "update the driver, or install again without PAPO_TORCH_INDEX",
            )
        else:
            yield ok("GPU", "none; runs use the CPU (--gpus N --gpu-memory GiB asks about a machine that has some)")
        return
    import torch

    built = torch.cuda.get_arch_list()
    driver = f", driver {seen[0].split(',')[-1].strip()}" if seen else ""
    for index, gpu in enumerate(case.gpus):
        major, minor = gpu.capability
        text = f"{gpu.name}, {gpu.memory / GIB:.0f} GiB, compute capability {major}.{minor}{driver}"
        # Code for x.y runs on x.z with z >= y; PTX, which would run on later ones, is not relied upon.
        if built and not any(arch.startswith(f"sm_{major}") for arch in built):
            yield error(f"GPU {index}", f"{text}: this torch was built for {', '.join(built)}", "install another torch")
        elif major < 8:
            fix = "worker.actor.fsdp.compute_dtype=float32 worker.ref.fsdp.compute_dtype=float32"
            yield warning(f"GPU {index}", f"{text}: it has no bfloat16", fix)
        elif gpu.free < 0.9 * gpu.memory:
            text += f": {(gpu.memory - gpu.free) / GIB:.1f} GiB are taken by other processes"
            yield warning(f"GPU {index}", text, "nvidia-smi shows them; end them, or choose with CUDA_VISIBLE_DEVICES")
        else:
            yield ok(f"GPU {index}", text)


def check_compiler(case: Case) -> Iterator[Finding]:
    """Triton, with which torch and vLLM make kernels on GPUs, compiles a little C against Python."""
    if case.imagined or not case.gpus:
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    missing = [*([] if compiler else ["C compiler"]), *([] if os.path.exists(header) else [header])]
    if missing:
        text = f"there is no {' and no '.join(missing)}: kernels of Triton cannot be built"
        yield error("compiler", text, "install gcc and Python's headers, as apt-get install gcc python3-dev does")
    else:
        yield ok("compiler", f"{compiler} and {header}")


def check_ray(case: Case) -> Iterator[Finding]:
    """A cluster, where RAY_ADDRESS names one, has to answer."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        yield ok("ray", "each run starts its own; RAY_ADDRESS would name a running cluster")
        return
    fix = "start it with `ray start --head`, give its ~/.ray/auth_token as RAY_AUTH_TOKEN, or unset RAY_ADDRESS"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), RAY_PORT_TIMEOUT_S).close()
        except OSError as reason:
            yield error("ray", f"nothing answers at RAY_ADDRESS={address} ({in_short(reason)})", fix)
            return
    import ray

    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except Exception as reason:
        yield error("ray", f"RAY_ADDRESS={address} cannot be joined ({in_short(reason)})", fix)
        return
    resources, nodes = ray.cluster_resources(), len(ray.nodes())
    ray.shutdown()
    text = f"cluster at {address}: {nodes} node(s), {resources.get('GPU', 0):g} GPUs, {resources.get('CPU', 0):g} CPUs"
    wanted = 0
    if case.config and case.device == "cuda":
        trainer = case.config.trainer
        wanted = trainer.nnodes * trainer.n_gpus_per_node + case.config.worker.rollout.dedicated_gpus
    if wanted > resources.get("GPU", 0):
        fix = "add nodes with `ray start --address`, or lower trainer.nnodes or trainer.n_gpus_per_node"
        yield error("ray", f"{text}; the run wants {wanted} GPUs", fix)
    else:
        yield ok("ray", text)


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """NCCL, torch's data loading and Ray's object store all live there."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    size, free = disk_usage(SHARED_MEMORY)
    wanted = min(RAY_ENOUGH, int(RAY_SHARE * main_memory()))
    text = f"{SHARED_MEMORY} has {in_gib(size)}, {in_gib(free)} free"
    gib = -(-wanted // GIB)
    fix = (
        f"docker run --shm-size={gib}g, or --ipc=host; outside of docker: mount -o remount,size={gib}g {SHARED_MEMORY}"
    )
    if free < SMALLEST_SHARED:
        yield error("shared memory", f"{text}: data loading and NCCL die of it", fix)
    elif free < wanted:
        text += f": below {in_gib(wanted)} Ray keeps its objects on disk, which is slow"
        yield warning("shared memory", text, fix)
    else:
        yield ok("shared memory", text)


def check_open_files(case: Case) -> Iterator[Finding]:
    """Ray raises the soft limit to the hard one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        fix = "ulimit -Hn 65536 (docker run --ulimit nofile=65536:65536)"
        yield warning("open files", f"at most {hard} per process; Ray wants {OPEN_FILES} or more", fix)
    else:
        yield ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard} per process")


def check_memory(case: Case) -> Iterator[Finding]:
    yield ok("main memory", f"{in_gib(main_memory())}, {usable_cores()} cores")


def check_disk(case: Case) -> Iterator[Finding]:
    """Room and the right to write where the run's outputs go."""
    folder = case.config.trainer.output_dir if case.config else "outputs"
    parent = os.path.abspath(folder)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        yield error("disk", f"'{parent}' cannot be written, and '{folder}' is to be in it", "set trainer.output_dir")
        return
    _, free = disk_usage(folder)
    if free < GIB:
        yield warning("disk", f"{in_gib(free)} free for {folder}", "make room, or set trainer.output_dir")
    else:
        yield ok("disk", f"{in_gib(free)} free for {folder}")
