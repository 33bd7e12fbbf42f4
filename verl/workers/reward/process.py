"""A grader process: loads the reward functions, then grades what comes through its pipe until that closes.

It is started as a program of its own. multiprocessing would execute the main module of its parent again, which in a Ray
worker is Ray's.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from verl.config.worker import RewardConfig
from verl.utils.process import start_logging
from verl.workers.reward.functions import LONGEST_TRACEBACK, ContractError, RewardFunction, load_functions


def end_with_parent(lifeline: int, descriptor: int) -> None:
    """Fork a guard that kills this process group when the parent, which holds the other end of `lifeline`, has ended: a
    grader may never look at its own pipe, `descriptor`, and may have started processes of its own."""
    if os.fork():
        os.close(lifeline)
        return
    os.close(descriptor)  # or the parent would not see its grader's end
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def limit_memory(max_memory_gb: float) -> None:
    """The parent watches and kills; this stops what is faster than it looks. It is twice as high, because what an
    allocation that fails raises here, a grader may take for a wrong answer."""
    if sys.platform == "linux":
        limit = int(2 * max_memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(connection: Connection, functions: dict[str, RewardFunction], timeout_s: float) -> None:
    """Answer requests (key, inputs) with list[Answer], or with the message of a ContractError."""
    with asyncio.Runner() as runner:
        while True:
            try:
                key, inputs = connection.recv()
            except EOFError:
                return
            try:
                reply: object = functions[key](inputs, runner, timeout_s)
            except ContractError as error:
                reply = str(error)
            connection.send(reply)


def main(descriptor: int, lifeline: int) -> None:
    """Says {key: (type, concurrent)} when the functions are loaded, or why they cannot be."""
    end_with_parent(lifeline, descriptor)
    start_logging("reward")
    connection = Connection(descriptor)
    config: RewardConfig = connection.recv()
    limit_memory(config.max_memory_gb)
    try:
        functions = load_functions(config)
    except (ValueError, FileNotFoundError) as error:
        connection.send(str(error))
        return
    except BaseException:  # the user's file runs on import and may raise anything
        connection.send(f"a reward function could not be imported\n{traceback.format_exc()[-LONGEST_TRACEBACK:]}")
        return
    connection.send({key: (f.type, f.concurrent) for key, f in functions.items()})
    serve(connection, functions, config.timeout_s)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
