"""The report: what it takes from runs, and the page in a real browser."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from papo.cli import main
from papo.report.read import charts, chosen, names_of, read_run

CHROMIUM = shutil.which("chromium")
EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"


def sample(step: int, split: str, uid: str, accuracy: float | None, text: str = "a b") -> dict:
    record = {
        "step": step, "split": split, "uid": uid, "prompt": f"<image>Add. {EVIL}", "response": text, "answer": "5",
        "score": {"overall": accuracy, "accuracy": accuracy, "extra": None}, "tokens": [text, "<|end|>"],
        "log_prob": [-0.5, -2.0],
    }  # fmt: skip
    if split == "train":
        record |= {"advantage": [1.0, -1.0], "views": {"masked": {"log_prob": [-3.0, -2.0], "kl": [2.5, 0.0]}}}
        record["pictures"] = {"image": "pictures/a.jpg", "masked": "pictures/b.jpg"}
    return record


def make_run(folder: Path, steps: int, samples: list[dict], **settings: object) -> Path:
    (folder / "pictures").mkdir(parents=True)
    for name, color in (("a", "white"), ("b", "black")):
        Image.new("RGB", (60, 40), color).save(folder / "pictures" / f"{name}.jpg")
    names = ["train/reward", "actor/perception_kl", "actor/entropy", "timing_s/step", "timing_s/update"]
    names += [f"actor/more_{i}" for i in range(40)]
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            values = {name: math.sin(step / 50 + place) for place, name in enumerate(names)}
            values |= {"val/accuracy": step / steps} if step % 10 == 0 else {}
            file.write(json.dumps({"step": step, **values, "reward/nothing": None}) + "\n")
        file.write('{"step": 9999, "train/rew')  # a run that is writing
    with open(folder / "samples.jsonl", "w") as file:
        file.writelines(json.dumps(one) + "\n" for one in samples)
    (folder / "events.jsonl").write_text(json.dumps({"step": 3, "metric": "actor/entropy"}) + "\n")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"trainer": {"seed": 1, **settings}, "algorithm": {"views": {}}})
    )
    (folder / "summary.json").write_text(json.dumps({"steps": steps, "val_accuracy_after": 0.5}))
    return folder


def two_runs(tmp_path: Path) -> list[str]:
    rows = [sample(step, "train", f"t:{step}", float(step % 2), EVIL) for step in range(1, 21)]
    rows += [sample(step, "val", "v:1", float(step == 10)) for step in (5, 10, 15)]
    first = make_run(tmp_path / "one" / "run", 60, rows, max_steps=60)
    second = make_run(tmp_path / "two" / "run", 60, [sample(1, "train", "t:1", None)], max_steps=70)
    return [str(first), str(second)]


def test_a_run_is_read(tmp_path):
    first, second = two_runs(tmp_path)
    assert names_of([first, second]) == ["one/run", "two/run"]
    run = read_run(first, "one/run", 100)
    assert run.series["val/accuracy"][0] == [10, 20, 30, 40, 50, 60] and len(run.series["train/reward"][0]) == 60
    assert run.series["train/reward"][1][0] == float(f"{math.sin(1 / 50):.5g}")
    assert run.settings == {"trainer.seed": 1, "trainer.max_steps": 60, "algorithm.views": {}}
    assert set(run.pictures) == {"pictures/a.jpg", "pictures/b.jpg"} and run.events[0]["step"] == 3
    groups = {group["title"]: group["metrics"] for group in charts([run])}
    assert list(groups) == ["Does it learn?", "Does it look?", "Is it stable?", "Is it fast?"]
    assert groups["Does it look?"] == ["actor/perception_kl"] and groups["Is it stable?"][0] == "actor/entropy"
    constant = [name for group in charts([run]) for name, _ in group["constant"]]
    assert constant == ["reward/nothing"]
    assert sorted([*constant, *(name for metrics in groups.values() for name in metrics)]) == sorted(run.series)
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        read_run(str(tmp_path), "x", 1)
    with pytest.raises(ValueError, match="named twice"):
        names_of([first, first])


def test_samples_are_spread_and_marked():
    rows = [sample(step, "train", f"t:{step}", 1.0) for step in range(1, 1001) for _ in range(4)]
    rows += [sample(step, "val", "v:1", float(step > 20)) for step in range(0, 60, 10)]
    found = chosen(lambda: rows, 100)
    train = sorted({one["step"] for one in found if one["split"] == "train"})
    assert (train[0], train[-1], len(train)) == (1, 1000, 12)
    assert [one["changed"] for one in found if one["split"] == "val"] == [False, False, False, True, False, False]
    assert chosen(lambda: [sample(1, "train", "t", None)], 10)[0]["right"] is None


def test_a_long_run_stays_small(tmp_path):
    tokens = {"tokens": ["word "] * 500, "log_prob": [-1.2345] * 500, "advantage": [0.1234] * 500}
    tokens["views"] = {"masked": {"log_prob": [-2.3456] * 500, "kl": [0.1234] * 500}}
    rows = [sample(step, "train", f"t:{step}", 1.0) | tokens for step in range(1, 5001, 5)]
    path = make_run(tmp_path / "run", 5000, rows)
    main(["report", str(path), "--out", str(tmp_path / "report.html")])
    assert (tmp_path / "report.html").stat().st_size < 20e6


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def test_the_page_in_a_browser(tmp_path, browser):
    """No error, no request, no foreign script; filter, colours, curves and tables do what they say."""
    page_file = tmp_path / "report.html"
    main(["report", *two_runs(tmp_path), "--out", str(page_file)])
    page, said, asked = browser.new_page(viewport={"width": 1300, "height": 900}), [], []
    page.set_default_timeout(300_000)  # a browser beside other tests is slow
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.wait_for_selector(".chart .main-svg")
    assert page.locator(".chart").count() == 46 and page.locator("h2").first.text_content() == "Does it learn?"
    lines = "document.querySelector('.chart').data.filter(t => t.showlegend === false && t.name).map(t => t.name)"
    assert page.evaluate(lines) == ["one/run", "two/run"]
    before = page.evaluate("document.querySelector('.chart').data.at(-1).y.slice(0, 30)")
    page.fill("#smooth", "20")
    assert page.evaluate("document.querySelector('.chart').data.at(-1).y.slice(0, 30)") != before
    page.check("#log")
    assert page.evaluate("document.querySelector('.chart').layout.yaxis.type") == "log"
    assert page.evaluate("document.querySelector('.chart').layout.shapes.length") == 2, "the watchdog's events"

    page.click("[data-tab=samples]")
    assert page.locator(".card").count() == 21, "training samples, which show what this is about"
    token = "getComputedStyle(document.querySelector('.card .token')).backgroundColor"
    kl = page.evaluate(token)
    assert kl.startswith("rgba(234, 118, 20, 0.7")
    assert page.locator(".card img").count() == 42
    assert "perception KL (masked): 2.5 nats" in page.locator(".token").first.get_attribute("title")
    page.select_option("#f-colour", "log_prob")
    assert page.evaluate(token).startswith("rgba(207, 34, 46")
    page.select_option("#f-colour", "none")
    assert page.evaluate(token) == "rgba(0, 0, 0, 0)"
    page.select_option("#f-answer", "wrong")
    assert set(page.eval_on_selector_all(".card", "all => all.map(one => one.dataset.right)")) == {"false"}
    page.select_option("#f-split", "val")
    page.select_option("#f-answer", "changed")
    assert page.locator(".card").count() == 2
    page.select_option("#f-answer", "")
    page.select_option("#f-split", "")
    assert EVIL in page.locator(".card .token").first.text_content(), "what the model wrote is text"

    page.click("[data-tab=about]")
    differing = page.locator("#about table").first.text_content()
    assert "trainer.max_steps" in differing and "trainer.seed" not in differing
    page.wait_for_selector("#phases .main-svg")
    assert page.evaluate("window.hacked") is None
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()
