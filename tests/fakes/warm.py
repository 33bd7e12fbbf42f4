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
import functools
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
from pathlib import Path

CLIENT = Path(__file__).with_name("warm_client.py")


def warm_python() -> list[str]:
    """The words to write instead of `sys.executable`; the server starts with the first call."""
    can = hasattr(os, "pidfd_open") and os.environ.get("PAPO_TEST_COLD") != "1"
    return [sys.executable, "-I", "-S", str(CLIENT), start_server().args[-1]] if can else [sys.executable]


def ray_uses_it() -> tuple[str, str]:
    """A variable, and its value, for a driver whose Ray workers are to be forks; `ray job submit` hands its settings
    over in the same."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"py_executable": shlex.join(warm_python())}})


@functools.cache
def start_server() -> subprocess.Popen:
    folder = tempfile.TemporaryDirectory(prefix="warm")
    words = [sys.executable, "-m", __name__, os.path.join(folder.name, "socket")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(words, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    assert server.stdout.readline(), "the server of warm processes did not start; its error is above"
    return server


def serve(path: str) -> dict:
    """Fork for each client and pass exit statuses back; returns in the forks, with what the client wants run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                wanted, files = receive(client)
                pid = os.fork()
                if pid == 0:
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                    os.closerange(3, max(file for file in (*files, client.fileno(), selector.fileno())) + 1)
                    return wanted
                for file in files:
                    os.close(file)
                client.sendall(pid.to_bytes(4, "big"))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
                selector.register(client, selectors.EVENT_READ, pid)
            elif isinstance(key.data, tuple):  # a fork has ended
                pid, client = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                if client in selector.get_map():
                    selector.unregister(client)
                    client.sendall(code.to_bytes(4, "big", signed=True))
                client.close()
            else:  # a client has ended first: it was killed
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def receive(client: socket.socket) -> tuple[dict, list[int]]:
    """What a client wants run, and its standard files."""
    size, files, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "big"))), list(files)


def run(words: list[str]) -> None:
    """As `python WORDS` would."""
    while words[0] == "-u":
        words = words[1:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import tests.fakes.preload  # noqa: F401

    assert "ray" not in sys.modules and len(os.listdir("/proc/self/task")) == 1, "not in a state to fork"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a person who stops the tests: the server is told when to end
    request = serve(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    run(request["words"])
