"""`python -m papo.quickstart OUT_DIR`: make the digits, the tiny model and its warm start, or reuse them.

Leaves in OUT_DIR: `data/*.parquet`, `base/` (untrained) and `model/`, where reinforcement learning
starts.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pyarrow.parquet as pq
import torch

from papo.quickstart.digits import build_data
from papo.quickstart.hints import TASKS, build_hinted_data
from papo.quickstart.tiny_vlm import build_model
from papo.quickstart.warm_start import WarmStartSettings, given_start, warm_start
from verl.data.rows import IMAGE_MARKER, load_template
from verl.utils.process import LOG_FORMAT, keep_freed_memory, quiet_libraries

logger = logging.getLogger("papo.quickstart")

# What the study began with: how well a start reads at its last loss depends on the machine's rounding, and what
# reinforcement learning makes of it depends on that.
STARTS = Path(__file__).resolve().parents[2] / "examples" / "study" / "starts"
FORMAT_PROMPT = Path(__file__).resolve().parents[2] / "examples" / "format_prompt" / "math_perception.jinja"


def prepare(out_dir: Path, format_prompt: Path, seed: int = 0, task: str = "digits") -> Path:
    """Make whatever is missing in `out_dir` or was made with other settings, and return the model's folder.

    Raises:
        ValueError, FileNotFoundError: the template is none, or a folder holds files that are not the quickstart's.
    """
    template = load_template(str(format_prompt))
    folder = out_dir / "data"
    data = build_data(folder, seed) if task == "digits" else build_hinted_data(folder, TASKS[task], seed)
    sft = data / "sft.parquet"
    rows = pq.read_table(sft, columns=["problem", "solution"]).to_pylist()
    corpus = {template.render(content=row["problem"]).replace(IMAGE_MARKER, "") for row in rows}
    corpus |= {row["solution"] for row in rows}
    base = build_model(out_dir / "base", corpus, seed=seed)
    start = STARTS / f"{task}.safetensors"
    if start.is_file() and seed == 0:
        return given_start(base, start, out_dir / "model")
    settings = WarmStartSettings() if task == "digits" else WarmStartSettings(target_loss=TASKS[task].target_loss)
    return warm_start(base, sft, out_dir / "model", format_prompt, seed, settings)


def main() -> None:
    """Parse the command line and prepare the quickstart's inputs."""
    parser = argparse.ArgumentParser(prog="python -m papo.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="folder for the data and the models")
    parser.add_argument(
        "--seed", type=int, default=0, help="of pictures, weights and warm start; RL has its own (default: %(default)s)"
    )
    parser.add_argument("--task", choices=("digits", *TASKS), default="digits", help="(default: %(default)s)")
    parser.add_argument(
        "--format-prompt", type=Path, default=FORMAT_PROMPT, help="jinja template of the prompt (default: %(default)s)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    logging.getLogger("papo").setLevel(logging.INFO)
    quiet_libraries()
    # A second thread gains nothing on so small a model, and the same number everywhere gives the same weights.
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        prepare(arguments.out_dir, arguments.format_prompt, arguments.seed, arguments.task)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
