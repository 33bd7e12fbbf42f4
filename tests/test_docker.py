"""What of the Dockerfile can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from tests.fakes.pins import setup_values

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
VERSION = re.compile(r"[\w.-]+(\[[\w,-]+\])?\s*(==|~=|>=|<=)\s*\d")  # as pip writes it


def instructions() -> list[tuple[str, str]]:
    """(KEYWORD, the rest) of every instruction, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage name -> its instructions, with those of the stages that it is made from before them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in instructions():
        if keyword == "FROM":
            source, _, name = rest.split()
            found[name] = list(found.get(source, []))
        found[name].append((keyword, rest))
    return found


def final_stages() -> list[str]:
    sources = {rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"}
    return [name for name in stages() if name not in sources]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path` out, by Docker's rules for the patterns that are in it."""
    for pattern in (REPOSITORY / ".dockerignore").read_text().split():
        regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{regex}(/.*)?", path):
            return True
    return False


def copied() -> list[tuple[str, str]]:
    """(stage, path) of everything that COPY takes from the repository."""
    pairs = []
    for name, content in stages().items():
        for keyword, rest in content:
            if keyword == "COPY":
                *sources, _ = [word for word in rest.split() if not word.startswith("--")]
                pairs += [(name, source) for source in sources]
    return pairs


def test_the_recipe_has_the_stages_that_its_comment_names():
    named = set(re.findall(r"--target (\w+)", DOCKERFILE))
    assert named == set(final_stages()) == {"cpu", "gpu"}
    tags = set(re.findall(r"-t (\S+)", DOCKERFILE))
    runs = re.findall(r"^#   docker run .*?(papo:\w+)", DOCKERFILE, re.MULTILINE)
    assert set(runs) == tags


def test_bases_have_a_version_and_bring_neither_cuda_nor_torch():
    bases = [rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"]
    outside = [base for base in bases if base not in stages()]
    assert outside
    for base in outside:
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    minor = int(outside[0].split(".")[1])
    wanted = re.search(r'python_requires=">=3\.(\d+)"', (REPOSITORY / "setup.py").read_text())
    assert minor >= int(wanted[1])


@pytest.mark.parametrize("name", final_stages())
def test_no_image_runs_as_root_and_its_user_owns_what_it_copies(name):
    users = [rest for keyword, rest in stages()[name] if keyword == "USER"]
    assert users and users[-1] not in ("root", "0")
    for keyword, rest in stages()[name]:
        if keyword == "COPY":
            assert f"--chown={users[-1]}:{users[-1]} " in rest
    installs = [rest for keyword, rest in stages()[name] if keyword == "RUN" and "install.sh" in rest]
    home = f"/home/{users[-1]}/.cache"
    made = [rest for keyword, rest in stages()[name] if keyword == "RUN" and "install -d" in rest]
    assert len(installs) == 1 and f"target={home}," in installs[0] and home in made[0]


@pytest.mark.parametrize("path", sorted({path for _, path in copied()}))
def test_what_is_copied_exists_and_is_not_ignored(path):
    assert (REPOSITORY / path).exists() and not ignored(path)


def test_everything_that_runs_is_in_the_image_and_nothing_that_was_made_here():
    kept = [
        path for top in ("verl", "papo", "configs", "scripts", "examples") for path in (REPOSITORY / top).rglob("*")
    ]
    kept = [str(p.relative_to(REPOSITORY)) for p in kept if p.is_file() and "__pycache__" not in p.parts]
    assert len(kept) > 100 and not [path for path in kept if ignored(path)]
    made = [".git/config", ".venv/bin/python", "outputs/papo/run/model", "wandb/latest-run", "mlflow.db"]
    made += ["verl/__pycache__/a.pyc", "papo_rl.egg-info/PKG-INFO", "tests/.pytest_cache/v"]
    assert all(ignored(path) for path in made)


def test_the_installation_has_what_it_reads():
    """The fingerprint of an installation is made of these; another one would install again at every start."""
    script = (REPOSITORY / "scripts/install.sh").read_text()
    assert 'cat "$ROOT"/setup.py "$ROOT"/pyproject.toml "$ROOT"/scripts/{' in script
    base = [path for name, path in copied() if name == "base"]
    packages = [f"{top}/__init__.py" for top in ("verl", "papo")]
    assert set(base) >= {"setup.py", "pyproject.toml", "scripts", *packages}
    entry_points = re.findall(r'"papo = (papo\.plugin):', (REPOSITORY / "setup.py").read_text())
    assert entry_points == ["papo.plugin"] and "papo/plugin.py" in base  # scripts/check_install.py loads it


@pytest.mark.parametrize("name", final_stages())
def test_entry_points_exist_and_parse(name):
    commands = [json.loads(rest) for keyword, rest in stages()[name] if keyword in ("ENTRYPOINT", "CMD")]
    assert commands
    scripts = [word for command in commands for word in command if word.endswith(".sh")]
    scripts += re.findall(r"bash (\S+\.sh)", " ".join(rest for keyword, rest in stages()[name] if keyword == "RUN"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", REPOSITORY / script], check=True)


@pytest.mark.run
def test_the_installation_of_the_cpu_image_runs_on_what_was_copied_before_it_and_holds_afterwards(tmp_path):
    """In a folder in place of /app. The packages come from the tests' own .venv, since the download proves nothing."""
    app = tmp_path / "app"
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", app / ".venv"], check=True)
    site = Path(next((app / ".venv/lib").glob("python3.*"))) / "site-packages"
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    environment = {**os.environ, "PATH": f"{app}/.venv/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    steps = 0
    for keyword, rest in stages()["cpu"]:
        if keyword == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            for source in sources:
                copy(REPOSITORY / source, app / target)
        elif keyword == "RUN" and "install.sh" in rest:
            words = re.sub(r"^(--\S+ )+", "", rest)
            done = subprocess.run(["bash", "-c", words], cwd=app, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "done in" in done.stdout
            steps += 1
    again = subprocess.run(["bash", "scripts/install.sh"], cwd=app, env=environment, capture_output=True, text=True)
    assert steps == 1 and again.returncode == 0 and again.stdout == ""  # the copy of the rest changes nothing
    found = [sys.executable, "-c", "import papo, verl; print(papo.__file__, verl.__file__)"]
    found[0] = str(app / ".venv/bin/python")
    where = subprocess.run(found, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert where.split() == [str(app / "papo/__init__.py"), str(app / "verl/__init__.py")]


def copy(source: Path, target: Path) -> None:
    """As COPY does: the content of a folder, or a file into a folder, without what .dockerignore keeps out."""
    for path in [p for p in source.rglob("*") if p.is_file()] if source.is_dir() else [source]:
        if not ignored(str(path.relative_to(REPOSITORY))):
            name = path.relative_to(source) if source.is_dir() else path.name
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)


def test_versions_of_packages_are_written_in_setup_py_and_nowhere_else():
    for name in ("Dockerfile", ".ci/run", ".pre-commit-config.yaml", "pyproject.toml"):
        text = (REPOSITORY / name).read_text()
        build = [found for found in VERSION.finditer(text) if not found[0].startswith("setuptools")]
        assert not build and "pip install" not in re.sub(r"#.*", "", text), name
    for path in (REPOSITORY / "scripts").glob("*.sh"):
        assert not VERSION.search(path.read_text()), path.name
    extras = setup_values()["EXTRAS"]
    engines = re.findall(r"install\.sh (\w[\w-]*)", " ".join(rest for keyword, rest in instructions()))
    assert engines == ["vllm"] and all(engine in extras for engine in engines)


def test_setup_py_gives_every_package_a_version():
    values = setup_values()
    for text in [*values["REQUIRES"], *(text for extra in values["EXTRAS"].values() for text in extra)]:
        assert Requirement(text).specifier, text
