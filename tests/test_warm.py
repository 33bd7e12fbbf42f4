"""A fork of the warm server runs, ends and dies as a process that is started does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.fakes.warm import server_socket, warm_python

PROGRAM = """
import os, sys, time
print(__name__, sys.argv, os.getcwd(), os.environ.get("ASKED"), "ray" in sys.modules, flush=True)
{}
"""


@pytest.fixture(autouse=True)
def _server() -> None:
    if server_socket() is None:
        pytest.skip("no warm server: PAPO_TEST_COLD=1, or a system without pidfd")


def run(python: list[str], folder, ending: str) -> tuple[int, str, str]:
    program = folder / "program.py"
    program.write_text(PROGRAM.format(ending))
    words = [*python, str(program), "a word"]
    env = {**os.environ, "ASKED": "yes"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    "ending", ["", "sys.exit(7)", "sys.exit('no')", "raise ValueError('no')", "os.kill(os.getpid(), 11)"]
)
def test_it_ends_as_what_is_started_does(tmp_path, ending):
    assert run(warm_python(), tmp_path, ending) == run([sys.executable], tmp_path, ending)


ASLEEP = """
import os, time
with open("pid.tmp", "w") as file:
    file.write(str(os.getpid()))
os.replace("pid.tmp", "pid")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_it_and_a_kill_does(tmp_path, number):
    words = [*warm_python(), "program.py"]
    (tmp_path / "program.py").write_text(ASLEEP)
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    fork = int((tmp_path / "pid").read_text())
    assert fork != process.pid
    process.send_signal(number)
    assert process.wait(30) == -number
    while psutil.pid_exists(fork):  # of the client, which nothing outlives
        time.sleep(0.01)
