"""The reward manager and its grader processes: real ones, that sleep, eat, crash and spin."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from verl.config.worker import RewardConfig, RewardFunctionConfig, RewardType
from verl.workers.reward.base import Outcome, RewardError, RewardInput
from verl.workers.reward.functions import load_functions
from verl.workers.reward.manager import RewardManager
from verl.workers.reward.pool import GraderProcess

# What a response does to its grader, and why it has no score.
ENDLESS = {
    "sleep": ("timeout", "no score within worker.reward.timeout_s=2"),
    "regex": ("timeout", "no score within worker.reward.timeout_s=2"),
}
DEADLY = {
    "eat": ("memory", "grew beyond worker.reward.max_memory_gb=0.5"),
    "ask": ("memory", "MemoryError"),
    "segfault": ("died", "its process died of SIGSEGV"),
    "exit": ("died", "its process exited with 3"),
    "leave": ("raised", "SystemExit: 4"),
    "recurse": ("raised", "RecursionError"),
    "raise": ("raised", "KeyError: 'a key that is not there'"),
    "nan": ("not_finite", "returned {'overall': nan}"),
    "infinite": ("not_finite", "returned {'overall': inf}"),
}
ONE = """
import ctypes, os, re, sys, time

def grade(reward_input, unit=1.0):
    match reward_input["response"]:
        case "sleep":
            time.sleep(1e6)
        case "regex":
            re.fullmatch("(a+)+b", "a" * 60)
        case "eat":
            held = []
            while True:
                held.append(bytearray(2**24))
        case "ask":
            return {"overall": float(len(bytearray(2**50)))}
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "leave":
            sys.exit(4)
        case "recurse":
            return grade(reward_input)
        case "raise":
            raise KeyError("a key that is not there")
        case "nan":
            return {"overall": float("nan")}
        case "infinite":
            return {"overall": float("inf")}
        case "own error":
            raise TimeoutError("of the judge")
    return {"overall": unit * len(reward_input["response"])}
"""


def inputs_of(*responses: str) -> list[RewardInput]:
    return [RewardInput(response=r, response_length=5, ground_truth="14") for r in responses]


@pytest.fixture
def make(tmp_path):
    """A ready manager of the function `score` in a file with this text."""
    managers = []

    def make(text: str, more: str = "", kwargs: dict | None = None, **options: object) -> RewardManager:
        path = tmp_path / f"reward_{len(managers)}.py"
        path.write_text(ONE + textwrap.dedent(text))
        settings = {"num_workers": 2, "timeout_s": 60.0, "max_memory_gb": 0.5, "max_failure_frac": 0.95, **options}
        manager = RewardManager(RewardConfig(f"{path}:score", kwargs or {}, **settings))
        managers.append(manager)
        manager.start()
        return manager

    yield make
    for manager in managers:
        manager.close()


SEQUENTIAL = """
REWARD_TYPE = "sequential"
score = grade
"""
BATCH = """
def score(inputs, unit=1.0):
    return [grade(one, unit) for one in inputs]
"""
ASYNC = """
import asyncio

REWARD_TYPE = "sequential"

async def score(reward_input, unit=1.0):
    await asyncio.sleep(1e6 if reward_input["response"] == "sleep" else 0.01)
    return grade(reward_input, unit)
"""
ASYNC_BATCH = """
async def score(inputs, unit=1.0):
    return [grade(one, unit) for one in inputs]
"""


def check(outcome: Outcome, response: str) -> None:
    if response not in ENDLESS | DEADLY:
        assert outcome.score == {"overall": len(response)} and outcome.failure is None
        return
    reason, detail = (ENDLESS | DEADLY)[response]
    assert outcome.score is None and outcome.failure.reason == reason
    assert detail in outcome.failure.detail and ":score: " in outcome.failure.detail


@pytest.mark.parametrize("text", [SEQUENTIAL, BATCH, ASYNC, ASYNC_BATCH], ids=["sequential", "batch", "async", "both"])
@pytest.mark.parametrize(("bad", "timeout_s"), [(ENDLESS, 2.0), (DEADLY, 60.0)], ids=["endless", "deadly"])
def test_what_one_sample_does_to_its_grader_costs_only_its_own_score(make, text, bad, timeout_s):
    manager = make(text, timeout_s=timeout_s, batch_timeout_s=timeout_s)
    responses = ["fine", *(word for deadly in bad for word in (deadly, "good"))]
    for outcome, response in zip(manager.score(inputs_of(*responses)), responses, strict=True):
        check(outcome, response)
    # and the processes that took their place work
    assert [o.score for o in manager.score(inputs_of("a", "ab", "abc"))] == [{"overall": n} for n in (1, 2, 3)]


def test_the_clock_of_a_sample_counts_its_own_work_alone(make):
    """Seven samples of a second, one process: the last one waits longer than its limit."""
    manager = make(
        """
        REWARD_TYPE = "sequential"

        def score(reward_input):
            time.sleep(1.0)
            return {"overall": 1.0}
        """,
        num_workers=1,
        timeout_s=5.0,
    )
    outcomes = manager.score(inputs_of(*"abcdefg"))
    assert all(outcome.score for outcome in outcomes) and all(1 <= outcome.seconds < 5 for outcome in outcomes)


def test_calls_of_an_async_function_overlap_and_its_own_timeouts_are_errors(make):
    """Forty calls that all wait for each other: one process has them under way at the same time."""
    manager = make(
        """
        import asyncio

        REWARD_TYPE = "sequential"
        waiting, everyone = [], asyncio.Event()

        async def score(reward_input):
            waiting.append(reward_input)
            if len(waiting) == 40:
                everyone.set()
            await everyone.wait()
            return grade(reward_input)
        """,
        num_workers=1,
        async_concurrency=40,
    )
    *good, bad = manager.score(inputs_of(*["a"] * 39, "own error"))
    assert all(outcome.score == {"overall": 1.0} for outcome in good)
    assert bad.failure.reason == "raised" and "TimeoutError: of the judge" in bad.failure.detail


def test_a_call_that_holds_up_the_others_costs_them_nothing(make):
    manager = make(ASYNC, num_workers=1, timeout_s=2.0)
    outcomes = manager.score(inputs_of("a", "regex", "b", "c"))
    assert [outcome.score is None for outcome in outcomes] == [False, True, False, False]


def test_a_batch_function_gets_the_whole_batch(make):
    manager = make(
        """
        def score(inputs, unit=1.0):
            return [{"overall": unit * len(inputs)} for _ in inputs]
        """,
        kwargs={"unit": 0.5},
    )
    assert [o.score["overall"] for o in manager.score(inputs_of("a", "b", "c"))] == [1.5] * 3
    assert manager.score([]) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [{'overall': 1.0}]", "1 for 2 inputs.*'first'"),
        ("return {'overall': 1.0}", "a dict, not a list for 2 inputs"),
        (
            "return [{'accuracy': 1.0}] * 2",
            r"\{'accuracy': 1.0\} \(a score is a dict with at least 'overall'.*first",
        ),
        ("return [{'overall': 1.0}, 1.0]", r"1.0 \(a score is a dict.*'second'"),
        ("return [{'overall': '1'}] * 2", "every component a number or None.*first"),
        (
            "return [{'overall': 1.0}, {'overall': 1.0, 'x': 1.0}]",
            r"components differ: \['overall', 'x'\] here.*second",
        ),
    ],
)
def test_what_no_reward_function_may_return_stops_the_run_and_shows_the_sample(make, body, message):
    manager = make(f"def score(inputs):\n    {body}\n")
    with pytest.raises(RewardError, match=f"(?s)reward_0.py:score .*{message}"):
        manager.score(inputs_of("first", "second"))


def test_plain_numbers_of_numpy_are_numbers(make):
    manager = make(
        """
        import numpy as np

        def score(inputs):
            return [{"overall": np.float32(0.5), "n": np.int64(3), "flag": True} for _ in inputs]
        """
    )
    (outcome,) = manager.score(inputs_of("a"))
    assert outcome.score == {"overall": 0.5, "n": 3.0, "flag": 1.0} and set(map(type, outcome.score.values())) == {
        float
    }


def test_too_many_failures_stop_the_run_and_show_a_sample(make):
    """The share is that of a step or a whole validation, in however many calls, and a few failures are no share."""
    manager = make(SEQUENTIAL, max_failure_frac=0.25)
    manager.begin(8)
    assert sum(o.failure is not None for o in manager.score(inputs_of("raise", "raise"))) == 2
    assert sum(o.failure is not None for o in manager.score(inputs_of("raise", "a", "b", "c"))) == 1
    with pytest.raises(RewardError) as caught:
        manager.score(inputs_of("raise", "a", "b", "raise"))
    text = str(caught.value)
    assert "of 10 responses of this step or validation could not be graded (raised " in text
    assert "more than worker.reward.max_failure_frac=0.25 allows" in text
    assert "KeyError: 'a key that is not there'" in text and "response: 'raise'" in text and "Traceback" in text
    assert {record["response"] for record in caught.value.failures} == {"raise"}
    assert caught.value.failures[0]["reason"] == "raised"
    manager.begin(40)
    assert manager.score(inputs_of("a"))[0].score == {"overall": 1.0}  # nothing of the call that was ended is left
    assert len(manager.score(inputs_of(*["raise"] * 9))) == 9  # of 40, over all calls
    with pytest.raises(RewardError, match="11 of 40 responses of this step"):
        manager.score(inputs_of("raise", "raise"))


def test_a_step_in_which_nothing_could_be_graded_is_one_too_many(make):
    manager = make(SEQUENTIAL, max_failure_frac=0.9)
    manager.begin(2)
    manager.score(inputs_of("raise"))
    with pytest.raises(RewardError, match="2 of 2 responses"):
        manager.score(inputs_of("raise"))


def test_a_run_does_not_wait_for_a_grader_that_always_hangs(make):
    """The first failure is one too many: the other thousand are not tried."""
    manager = make(SEQUENTIAL, max_failure_frac=0.0, timeout_s=1.0)
    with pytest.raises(RewardError, match="1 of 1000 responses of this step or validation could not be graded"):
        manager.score(inputs_of(*["sleep"] * 1000))


def test_rewards_add_up_with_their_weights(make, tmp_path):
    (tmp_path / "short.py").write_text(
        "def score(inputs, longest):\n"
        "    return [{'overall': float(len(i['response']) <= longest), 'slack': 2.0} for i in inputs]\n"
    )
    (tmp_path / "sum.py").write_text(
        "REWARD_TYPE = 'sequential'\n"
        "def score(i):\n"
        "    return {'overall': 2.0, 'accuracy': 1 / (i['response'] != 'bad')}\n"
    )
    extra = {"short": RewardFunctionConfig(f"{tmp_path}/short.py:score", {"longest": 2}, weight=-0.5)}
    extra["more"] = RewardFunctionConfig(f"{tmp_path}/sum.py:score", weight=0.25)
    manager = make(SEQUENTIAL, extra=extra, weight=3.0)
    first, second, bad = manager.score(inputs_of("ab", "abc", "bad"))
    assert first.score == {
        "overall": pytest.approx(3 * 2 - 0.5 + 0.25 * 2),
        **{"main": 2.0, "short": 1.0, "short/slack": 2.0, "more": 2.0, "more/accuracy": 1.0},
    }
    assert second.score["overall"] == pytest.approx(3 * 3 + 0.25 * 2) and second.score["short"] == 0
    assert bad.score is None and "sum.py:score: " in bad.failure.detail and "ZeroDivisionError" in bad.failure.detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score = 1 / 0", "(?s)could not be imported.*reward_0.py.*ZeroDivisionError: division by zero"),
        ("os._exit(7)", "could not load .*reward_0.py:score: its process exited with 7"),
        ("REWARD_TYPE = 'parallel'\nscore = grade", "REWARD_TYPE = 'parallel': one of batch, sequential is needed"),
    ],
)
def test_functions_that_cannot_be_loaded_are_an_error_and_no_hang(make, text, message):
    with pytest.raises(RewardError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("/nowhere/reward.py:score", FileNotFoundError, "worker.reward.reward_function names '/nowhere/reward.py'"),
        (f"{__file__}:scores", ValueError, "has no function 'scores'; functions there: .*inputs_of"),
        (__file__, ValueError, "write it as path/to/file.py:function"),
    ],
)
def test_mistyped_reward_functions_are_named(reference, error, message):
    with pytest.raises(error, match=message):
        load_functions(RewardConfig(reference))
    extra = {"more": RewardFunctionConfig(reference)}
    (main,) = load_functions(RewardConfig(f"{__file__}:inputs_of")).values()
    assert main.type == RewardType.batch and not main.concurrent
    with pytest.raises(error, match=message.replace("worker.reward.", "worker.reward.extra.more.")):
        load_functions(RewardConfig(f"{__file__}:inputs_of", extra=extra))


def test_the_files_own_word_on_its_type_counts(tmp_path):
    (tmp_path / "a.py").write_text("def score(i): ...\n")
    (tmp_path / "b.py").write_text("REWARD_TYPE = 'batch'\ndef score(i): ...\n")
    for name, expected in (("a", "sequential"), ("b", "batch")):
        config = RewardConfig(f"{tmp_path}/{name}.py:score", reward_type=RewardType.sequential)
        assert load_functions(config)["worker.reward"].type == expected


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_spinning_grader_ends_with_its_parent(tmp_path):
    """A run that is killed leaves no process behind that eats a core for ever."""
    (tmp_path / "spin.py").write_text(ONE + SEQUENTIAL)
    program = f"""
import os, signal
from verl.config.worker import RewardConfig
from verl.workers.reward.pool import GraderProcess, Task
grader = GraderProcess(RewardConfig("{tmp_path}/spin.py:score"))
grader.connection.recv()
grader.begin(Task("worker.reward", [0], [dict(response="regex")]), 1.0, "")
os.write(1, str(grader.process.pid).encode())
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    # It returns when every holder of the output has closed it, and the grader is one.
    assert int(done.stdout) > 0 and done.returncode == -9


def test_what_a_grader_has_started_ends_with_the_process_that_grades(tmp_path):
    """Children of a grader, and one that spins, whether the worker is killed or only the grader dies."""
    (tmp_path / "child.py").write_text(
        "import os, subprocess\nREWARD_TYPE = 'sequential'\n"
        "def score(one):\n"
        "    child = subprocess.Popen(['sleep', 'infinity'])\n"
        "    open(one['response'], 'w').write(str(child.pid))\n"
        "    os._exit(1) if one['ground_truth'] == 'die' else child.wait()\n"
    )
    program = f"""
import os, signal, sys, time
from verl.config.worker import RewardConfig
from verl.workers.reward.manager import RewardManager
from verl.workers.reward.pool import GraderProcess, Task

def child_of(file):
    while not (os.path.exists(file) and open(file).read()):
        time.sleep(0.01)
    return int(open(file).read())

config = RewardConfig("{tmp_path}/child.py:score", num_workers=1)
manager = RewardManager(config)
manager.start()
manager.begin(9)
(outcome,) = manager.score([dict(response="{tmp_path}/one", ground_truth="die")])
print(child_of("{tmp_path}/one"), outcome.failure.detail, flush=True)
grader = GraderProcess(config)
grader.connection.recv()
grader.begin(Task("worker.reward", [0], [dict(response="{tmp_path}/two", ground_truth="")]), 1.0, "")
print(child_of("{tmp_path}/two"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # It returns when every holder of the output has closed it: graders and their children, too.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    one, two = done.stdout.splitlines()
    assert done.returncode == -9 and one.endswith("its process exited with 1"), done.stderr
    assert not is_running(int(one.split()[0])) and not is_running(int(two))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_was_waited_for_is_not_signalled(make, monkeypatch):
    """Its number may be another's by then, and a whole group would get the signal."""
    manager = make(SEQUENTIAL)
    grader = manager.pool.graders[0]
    os.kill(grader.process.pid, 9)
    grader.process.wait()
    signalled = []
    monkeypatch.setattr(os, "killpg", lambda *arguments: signalled.append(arguments))
    grader.kill()
    assert not signalled
    monkeypatch.undo()
    manager.pool.graders[0] = GraderProcess(manager.config)


def test_an_idle_process_that_was_killed_is_replaced(make):
    manager = make(SEQUENTIAL)
    for grader in manager.pool.graders:
        os.kill(grader.process.pid, 9)
        os.waitid(os.P_PID, grader.process.pid, os.WEXITED | os.WNOWAIT)  # the pool still has to see its end
    assert [o.score for o in manager.score(inputs_of("a", "ab"))] == [{"overall": 1.0}, {"overall": 2.0}]
    assert all(isinstance(grader, GraderProcess) and grader.process.poll() is None for grader in manager.pool.graders)
