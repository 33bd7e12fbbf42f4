"""`papo eval`: suites, statistics, and models that answer through each engine and through a real server."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml

from papo.evaluation.command import views_of
from papo.evaluation.conversations import question_of, write_rows
from papo.evaluation.local import plan_of
from papo.evaluation.records import Records
from papo.evaluation.server import text_of
from papo.evaluation.statistics import accuracy, paired
from papo.evaluation.suite import PROTOCOLS, SUITES, DataSet, as_overrides, config_of, load_suite, sampling_of
from tests.conftest import REPOSITORY
from tests.fakes.rows import png, row, write_parquet
from tests.fakes.runs import ENVIRONMENT, free_port, records, shared_cluster, start
from tests.fakes.warm import ray_uses_it, warm_python

T4 = 2.7764451051977987  # the 97.5 % quantile of Student's t with 4 degrees of freedom


def test_accuracy_is_a_mean_over_questions_with_its_interval():
    scores = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0], "d": [0.0, 1.0], "e": []}
    means = [0.5, 1.0, 0.0, 0.5, 0.0]
    mean = sum(means) / 5
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 4)
    found = accuracy(scores)
    assert found["accuracy"] == pytest.approx(mean, abs=1e-12)
    assert found["interval"] == pytest.approx(T4 * spread / math.sqrt(5), abs=1e-12)
    assert found["pass"] == 3 / 5 and found["questions"] == 5


def test_models_are_compared_on_the_questions_that_both_have():
    ours = {"a": [1.0], "b": [1.0, 0.0], "c": [1.0], "d": [0.0], "e": [1.0], "only here": [0.0]}
    theirs = {"a": [0.0], "b": [0.0, 0.0], "c": [1.0], "d": [1.0], "e": [0.0]}
    differences = [1.0, 0.5, 0.0, -1.0, 1.0]
    mean = sum(differences) / 5
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4)
    found = paired(ours, theirs)
    assert found["difference"] == pytest.approx(mean, abs=1e-12)
    assert found["interval"] == pytest.approx(T4 * spread / math.sqrt(5), abs=1e-12)
    assert (found["better"], found["worse"], found["questions"]) == (3, 1, 5)
    by_hand = 2 * (math.comb(4, 3) + math.comb(4, 4)) / 2**4  # as far from the middle, at either end
    assert found["sign_test_p"] == pytest.approx(by_hand, abs=1e-12)
    assert paired(ours, ours)["sign_test_p"] == 1.0
    with pytest.raises(ValueError, match="no question"):
        paired(ours, {"z": [1.0]})


def write_suite(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "no key 'sets'"),
        ({"sets": {}}, "at least one data set"),
        ({"sets": {"mine": {"rows": 3}}}, "set 'mine' has no key 'data'"),
        ({"sets": {"mine": {"data": "a.parquet", "row": 3}}}, "no key 'row': did you mean rows?"),
    ],
)
def test_a_suite_that_is_wrong_is_named(tmp_path, content, named):
    with pytest.raises(ValueError, match="suite") as error:
        load_suite(write_suite(tmp_path / "s.yaml", **content))
    assert named in str(error.value)


def test_a_suite_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="there is no suite 'digit': did you mean digits?"):
        load_suite("digit")


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_the_suites_of_the_repository_load(name):
    assert load_suite(name).sets


def test_the_suite_of_the_paper_has_its_columns_and_groups():
    suite = load_suite("papo")
    assert sum(one.rows for one in suite.sets) == 601 + 1000 + 1740 + 2000 + 2180 + 447 + 200 + 1730 + 1308
    assert {group: len(names) for group, names in suite.groups().items()} == {"general": 5, "vision": 4}


def test_conversations_become_rows(tmp_path):
    asked = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "3"}]
    assert question_of(asked) == ("<image>How many?", "3")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    assert (
        question_of([{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}])[0] == asked[0]["value"]
    )
    lines = [
        {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A"}],
            "images": ["a.png"],
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(lines * 2))
    write_rows(str(tmp_path / "a.json"), "messages", tmp_path / "a.parquet")
    import pyarrow.parquet as pq

    assert (
        pq.read_table(tmp_path / "a.parquet").to_pylist()
        == [{"problem": "<image>?", "answer": "A", "images": ["a.png"]}] * 2
    )
    lines[0]["messages"].append({"role": "user", "content": "And now?"})
    (tmp_path / "b.json").write_text(json.dumps(lines))
    with pytest.raises(ValueError, match=r"b.json', row 0, column 'messages': .* turns user, assistant, user"):
        write_rows(str(tmp_path / "b.json"), "messages", tmp_path / "b.parquet")


def test_settings_reach_the_config_as_they_are(in_repository):
    settings = {"data.image_key": "It's", "worker.rollout.engine_kwargs": {"a": [1, "B"]}, "data.shuffle": False}
    config = config_of(DataSet("s", "a,b.parquet", settings=settings), ["worker.actor.model.model_path=m"])
    assert config.data.val_files == "a,b.parquet" and config.data.image_key == "It's" and not config.data.shuffle
    assert config.worker.rollout.engine_kwargs == {"a": [1, "B"]}


def test_views_have_names():
    assert views_of("blank, dark=random_patch") == {"blank": "blank", "dark": "random_patch"}
    for text in ("blank,blank", "original=blank", "a-b=blank"):
        with pytest.raises(ValueError, match="--views"):
            views_of(text)


def test_reasoning_that_a_server_has_split_off_is_put_back():
    message = {"content": "\\boxed{3}", "reasoning_content": "one, two, three"}
    answer = {"choices": [{"message": message}], "usage": {"completion_tokens": 9}}
    assert text_of(answer) == ("<think>one, two, three</think>\\boxed{3}", 9)


def test_a_line_that_a_kill_has_cut_off_is_taken_away_with_its_question(tmp_path):
    whole = [
        {"set": "s", "uid": f"f:{q}", "view": "original", "sample": k, "accuracy": 1.0} for q in (0, 1) for k in (0, 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    (tmp_path / "samples.jsonl").write_text(text[: -len(json.dumps(whole[-1])) // 2])
    kept = Records(tmp_path, {"n": 2})
    assert kept.keep_whole(2) == {"s": {"f:0"}} and records(tmp_path / "samples.jsonl") == whole[:2]
    with pytest.raises(ValueError, match=r"other settings \(n\)"):
        Records(tmp_path, {"n": 3})


# The command itself.


@pytest.fixture(scope="module")
def suite(assets, tmp_path_factory) -> str:
    """Two groups: digits, and prompts with no, one and two images."""
    folder = tmp_path_factory.mktemp("suite")
    mixed = [row("How much is 1+1?", images=0, answer="2"), row(), row("<image>+<image>", images=2, answer="3")]
    write_parquet(folder / "mixed.parquet", mixed)
    settings = yaml.safe_load((SUITES / "digits.yaml").read_text())["settings"]
    sets = {
        "digits": {"data": str(assets / "val.parquet"), "rows": 6, "group": "seen"},
        "mixed": {"data": str(folder / "mixed.parquet"), "rows": 3, "group": "mixed"},
    }
    return write_suite(folder / "small.yaml", settings={**settings, "data.val_batch_size": 2}, sets=sets)


def words(*arguments: str) -> list[str]:
    return [*warm_python(), "-m", "papo.cli", "eval", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **dict([ray_uses_it()]), "RAY_ADDRESS": shared_cluster()}


def papo_eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(words(*arguments), check=False, **options)


def answers_in(folder: Path) -> dict[tuple, str]:
    """By question, view and sample. A server keeps the bytes of a character back that is not whole at the end."""
    lines = records(folder / "samples.jsonl")
    found = {(x["set"], x["view"], x["doc_id"], x["sample"]): x["resps"][0][0].rstrip("\ufffd") for x in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def by_hf(assets, suite, tmp_path_factory) -> tuple[Path, str]:
    """The model twice, so that there is something to compare, greedy and under a view."""
    out = tmp_path_factory.mktemp("hf")
    models = (f"first={assets / 'model'}", f"again={assets / 'model'}")
    arguments = ("--suite", suite, "--greedy", "--views", "blank", "--engine", "hf", "--export", "vlmevalkit")
    done = papo_eval(*models, *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "small", done.stdout


@pytest.mark.run
def test_every_question_is_answered_with_and_without_the_image(by_hf):
    out, said = by_hf
    found = answers_in(out / "first")
    assert Counter((name, view) for name, view, _, _ in found) == {
        (name, view): rows for name, rows in (("digits", 6), ("mixed", 3)) for view in ("original", "blank")
    }
    (line, *_) = records(out / "first" / "samples.jsonl")
    assert {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts"} <= line.keys()
    assert line["arguments"] == {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "max_tokens": 24}
    assert line["perception_kl"]["blank"] > 0
    text_only = [x for x in records(out / "first" / "samples.jsonl") if (x["set"], x["doc_id"]) == ("mixed", 0)]
    assert [x.get("perception_kl") for x in text_only] == [{"blank": 0.0}, None]
    assert text_only[0]["resps"] == text_only[1]["resps"]
    summary = json.loads((out / "first" / "summary.json").read_text())
    assert summary["groups"].keys() == {"seen", "mixed", "all"} and summary["sets"]["digits"]["not_graded"] == 0
    assert answers_in(out / "again") == found and "| again | digits | +0.0 ± 0.0 | 0 / 0 | 1.000 |" in said
    assert said.startswith((out / "table.md").read_text())
    assert (out / "vlmevalkit" / "first_digits.tsv").read_text().startswith("index\tquestion\tanswer\tprediction\n0\t")
    assert len(list((out / "images").rglob("*.webp"))) == 2 * (6 + 2)


@pytest.mark.run
def test_a_kill_loses_and_repeats_nothing(assets, suite, by_hf, tmp_path):
    arguments = (f"first={assets / 'model'}", "--suite", suite, "--greedy", "--views", "blank", "--engine", "hf")
    arguments = (*arguments, "--out", str(tmp_path))
    path = tmp_path / "small" / "first" / "samples.jsonl"
    process = subprocess.Popen(words(*arguments), cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE)
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = answers_in(path.parent)
    assert 0 < len(before) < 18, "it was to be killed in the middle"
    done = papo_eval(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(answers_in(path.parent).items())[: len(before)] == list(before.items())  # and not asked again
    assert answers_in(path.parent) == answers_in(by_hf[0] / "first")
    assert "every question has been answered" in papo_eval(*arguments).stderr


@pytest.fixture(scope="module")
def server(assets, tmp_path_factory):
    """vLLM's own server. Its pictures have the sizes that the suite asks for."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    sizes = json.dumps({"size": {"shortest_edge": 784, "longest_edge": 12544}})
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    options += ["--generation-config", "vllm", "--skip-mm-profiling", "--mm-processor-kwargs", sizes]
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(assets / "model")]
    settings = {**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with open(log, "wb") as file:
        command = [*module, "--port", str(port), *options]
        process = subprocess.Popen(command, env=settings, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"

    def is_up() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{url}/models").status_code == 200
        return False

    while not is_up():  # until pytest's timeout
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.5)
    yield url, process, log
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own, which would stay
    process.wait()


@pytest.mark.run
@pytest.mark.vllm
def test_engines_and_a_server_give_the_same_greedy_answers(assets, suite, by_hf, server, tmp_path):
    url, process, log = server
    arguments = ("--suite", suite, "--greedy", "--views", "blank", "--out", str(tmp_path))
    offline = papo_eval(f"vllm={assets / 'model'}", *arguments, "--engine", "vllm")
    assert offline.returncode == 0, offline.stderr[-4000:]
    served = papo_eval("tiny", *arguments, "--base-url", url)
    assert served.returncode == 0, served.stderr[-4000:]
    expected = answers_in(by_hf[0] / "first")
    assert answers_in(tmp_path / "small" / "vllm") == expected
    assert answers_in(tmp_path / "small" / "tiny") == expected
    wrong = papo_eval("tinny", *arguments, "--base-url", url)
    assert wrong.returncode == 1 and "has no model 'tinny': did you mean tiny?" in wrong.stderr
    # The server dies: what it has answered by then is kept, and the last line says what has happened.
    long = (
        "tiny",
        "--suite",
        suite,
        "--n",
        "64",
        "--concurrency",
        "1",
        "--base-url",
        url,
        "--out",
        str(tmp_path / "long"),
    )
    before = log.read_text().count("POST ")
    asking = subprocess.Popen(words(*long), cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True)
    while log.read_text().count("POST ") == before:
        assert asking.poll() is None, asking.stderr.read()
        time.sleep(0.05)
    process.kill()
    said = asking.communicate(timeout=300)[1]
    assert asking.returncode == 1 and f"error: --base-url {url} " in said.splitlines()[-1], said[-3000:]


@pytest.mark.run
def test_what_is_wrong_stops_at_once_with_one_line_that_names_it(assets, suite, tmp_path):
    model, out = str(assets / "model"), ("--out", str(tmp_path / "out"))
    blind = tmp_path / "blind"
    shutil.copytree(model, blind)
    for path in blind.glob("*processor*"):
        path.unlink()
    column = {"sets": {"mine": {"data": str(assets / "val.parquet"), "settings": {"data.answer_key": "solution_x"}}}}
    rows = {"sets": {"mine": {"data": str(assets / "val.parquet"), "rows": 7}}}
    url = f"http://127.0.0.1:{free_port()}/v1"
    cases = [
        ((str(blind), "--suite", suite), f"model_path='{blind}'"),
        (
            (model, "--suite", write_suite(tmp_path / "c.yaml", **column)),
            "set 'mine': data.val_files: no column 'solution_x'",
        ),
        ((model, "--suite", write_suite(tmp_path / "r.yaml", **rows)), "has 6 rows, and the suite expects 7"),
        (("tiny", "--suite", suite, "--base-url", url), f"--base-url {url} cannot be reached"),
        ((str(tmp_path / "nowhere" / "model"), "--suite", suite), "nowhere/model"),
        ((model, "--suite", suite, "--protocol", "train"), "--protocol train"),
        ((model, "--suite", suite, "--views", "blnk"), "there is no view 'blnk': did you mean blank or"),
        ((model, model, "--suite", suite), "two models are called"),
    ]
    for arguments, named in cases:
        done = papo_eval(*arguments, *out)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        assert done.returncode == 1 and last.startswith("error: ") and named in last, (arguments, done.stderr[-2000:])
        assert "Traceback" not in done.stderr


def test_files_in_a_folder_stand_for_names_on_the_hub(tmp_path):
    suite = load_suite("vppo")
    with pytest.raises(FileNotFoundError, match=r"has no file of suite 'vppo', such as dynamath.parquet"):
        suite.within(tmp_path)
    (tmp_path / "geometry3k.json").write_text("[]")
    found = {one.name: one.data for one in suite.within(tmp_path).sets}
    assert found["geometry3k"] == str(tmp_path / "geometry3k.json") and found["mmk12"].startswith("PAPO-Galaxy/")
    with pytest.raises(ValueError, match="set 'dynamath': .* give --data FOLDER"):
        suite.within(tmp_path).with_rows(tmp_path)


# Of each benchmark a question in its manner: several images, choices, percent, LaTeX, units.
QUESTIONS = {
    "geometry3k": ("<image>Find x. Put the final answer within \\boxed{}.", "5\\sqrt{2}", 1),
    "mathvista": ("<image>How much of it is blue?", "25%", 1),
    "we_math": ("<image><image>Which is larger?\nA. the first; B. the second; C. uncertain", "B", 2),
    "mmk12": ("As <image> shows, what is the angle?", "60^\\circ", 1),
    "mathverse": ("<image>Question: find the length.\nChoices:\nA:5 cm\nB:10 cm", "A", 1),
    "logicvista": ("<image>Which come next? Select all.", "A, C", 1),
    "clevr_count": ("<image>How many items are there?", "7", 1),
    "mmmu_pro": ("<image>Answer the question in the picture.", "J", 1),
    "mathverse_vision": ("<image>Find the area.", "\\frac{3}{4}\\pi", 1),
}


def test_the_papers_benchmarks_load_through_the_suite(assets, in_repository, tmp_path):
    (tmp_path / "7.png").write_bytes(png())
    for name, (problem, answer, images) in QUESTIONS.items():
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
        line = {"messages": turns, "images": [str(tmp_path / "7.png")] * images}
        (tmp_path / f"{name}.json").write_text(json.dumps([line, line]))
    suite = load_suite("papo").within(tmp_path).with_rows(tmp_path / "rows")
    model = f"worker.actor.model.model_path='{assets / 'model'}'"
    overrides = [*as_overrides(PROTOCOLS["papo-eval"]), model, "worker.rollout.name=hf"]
    for one in suite.sets:
        with pytest.raises(ValueError, match=rf"set '{one.name}': .* has 2 rows, and the suite expects {one.rows}"):
            plan_of(one, overrides)
        plan = plan_of(replace(one, rows=None), overrides)
        (prompts,) = list(plan.val_loader)
        problem, answer, images = QUESTIONS[one.name]
        assert list(prompts["problem"]) == [problem] * 2 and list(prompts["answer"]) == [answer] * 2
        assert [len(row) for row in prompts["mm_inputs"]] == [images] * 2
        sampling = sampling_of(plan.config)
        assert sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_tokens": 2048}
        assert plan.config.data.min_pixels == 1024 and plan.config.data.max_pixels == 589824


@pytest.mark.run
def test_a_run_and_its_checkpoint_are_models_and_keep_how_they_validated(assets, suite, tmp_path):
    run = tmp_path / "run"
    settings = ["trainer.val_freq=0", "trainer.val_before_train=false", "worker.rollout.val_override_config.top_k=7"]
    done = start(assets, run, *settings, "trainer.n_gpus_per_node=1", "trainer.save_model=false")
    assert done.returncode == 0, done.stderr[-4000:]
    validated = json.loads((run / "summary.json").read_text())["val_accuracy_after"]
    arguments = ("--suite", suite, "--n", "4", "--protocol", "train", "--engine", "hf", "--out", str(tmp_path / "out"))
    done = papo_eval(f"run={run}", f"checkpoint={run}/checkpoints/global_step_2/actor", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    out = tmp_path / "out" / "small"
    lines = records(out / "run" / "samples.jsonl")
    assert lines[0]["arguments"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 7, "max_tokens": 24}
    assert answers_in(out / "run") == answers_in(out / "checkpoint")
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["sets"]["digits"]["views"]["original"]["accuracy"] == pytest.approx(validated)
    # The same seeds, and so the very answers of the run's own validation.
    validation = [
        line["response"].rstrip("\ufffd") for line in records(run / "samples.jsonl") if line["split"] == "val"
    ]
    assert validation and set(validation) <= set(answers_in(out / "run").values())
