"""Python processes that are forked from one that has imported the large libraries, where new ones would import them.

Those imports take some eight seconds of a core, and a small run has up to eight processes; their work takes two. In a
test session the command that trains and Ray's workers are such forks. What is forked is as fresh as what is started:
nothing but imports has happened in the server, it has one thread, and Ray, whose settings are read when it is imported,
is not among them. PAPO_TEST_COLD=1 starts every process in the ordinary way.

    python -m tests.fakes.warm SOCKET                    the server
    python -I -S tests/fakes/warm_client.py SOCKET ...   stands for `python ...`, without its imports
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

CLIENT = Path(__file__).with_name("warm_client.py")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def warm_python() -> list[str]:
    """The words to write instead of `sys.executable`."""
    path = server_socket()
    return [sys.executable, "-I", "-S", str(CLIENT), path] if path else [sys.executable]


def ray_uses_it() -> tuple[str, str]:
    """A variable, and its value, for a driver whose Ray workers are to be forks; `ray job submit` hands its settings
    over in the same."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"py_executable": shlex.join(warm_python())}})


@functools.cache
def server_socket() -> str | None:
    """Where the server, which the first call starts, listens; None, with a warning, where it cannot run."""
    if os.environ.get("PAPO_TEST_COLD") == "1":
        return None
    folder = tempfile.TemporaryDirectory(prefix="warm")
    path = os.path.join(folder.name, "socket")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", __name__, path]
    server = subprocess.Popen(words, env=environment, cwd=root, stdout=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    if server.stdout.readline():
        return path
    warnings.warn("processes cannot be forked warm here, the error is above: every run starts cold", stacklevel=2)
    return None


def serve(path: str) -> dict:
    """Fork for each client and tell it how the fork has ended; returns in the forks, with what is to be run."""
    gc.collect()
    gc.freeze()  # a fork's collector would visit, and so copy, all that was imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        key = selector.select()[0][0]  # one at a time: what is done for it may end another's reason
        if key.fileobj is listener:
            client, _ = listener.accept()
            try:
                wanted, files = receive(client)
            except (OSError, ValueError):  # it has been killed
                client.close()
                continue
            pid = os.fork()
            if pid == 0:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the server
                for number, file in enumerate(files):
                    os.dup2(file, number)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                return wanted
            for file in files:
                os.close(file)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
            selector.register(client, selectors.EVENT_READ, pid)
            tell(client, pid)
        elif isinstance(key.data, tuple):  # a fork has ended
            pid, client = key.data
            selector.unregister(key.fileobj)
            os.close(key.fileobj)
            if client in selector.get_map():
                selector.unregister(client)
            tell(client, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            client.close()
        else:  # a client has ended before its fork: it was killed
            selector.unregister(key.fileobj)
            os.kill(key.data, signal.SIGKILL)


def receive(client: socket.socket) -> tuple[dict, list[int]]:
    """What a client wants run, and its standard files."""
    size, files, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "big"))), list(files)


def tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it has been killed
        client.sendall(number.to_bytes(4, "big", signed=True))


def run(words: list[str]) -> None:
    """Do as `python WORDS` would, but end without freeing memory: a fork copies what it frees, for two seconds. An
    exception other than SystemExit ends in the ordinary way."""
    while words[0] == "-u":
        words = words[1:]
    status = None
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as reason:
        status = reason.code
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    import tests.fakes.preload  # noqa: F401

    if find_spec("vllm") is not None:  # it imports Ray itself, but these, two fifths of its start, do not
        import compressed_tensors  # noqa: F401
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import scipy.signal  # noqa: F401
        import scipy.stats  # noqa: F401
        import torch._inductor.lowering  # noqa: F401

    os.close(os.pidfd_open(os.getpid()))  # fails where the system has none
    assert "ray" not in sys.modules and len(os.listdir("/proc/self/task")) == 1, "not in a state to fork"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a person who stops the tests: the server is told when to end
    request = serve(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(gc.unfreeze)  # or nanobind reports leaks behind a command's last line
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    run(request["words"])
