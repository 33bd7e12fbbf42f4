"""Peak memory, in MiB, of what a step does with the images of its rows: python -m tests.fakes.step_memory MODEL N

The driver's half: prompts with pictures of 1,000 pixels a side, n rows each, a masked view, and for each of two ranks
the message that crosses Ray. The rank's half: unpacking it and joining the images of micro-batches.
"""

from __future__ import annotations

import sys

import torch
from ray.cloudpickle import dumps, loads

from papo.corruption.patches import RandomPatchConfig
from tests.data.test_images import encoded, noise
from verl.data.collate import PromptCollator, whole_sequences
from verl.data.images import open_image
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.models.forward import model_inputs
from verl.protocol import DataProto

PROMPTS, RANKS = 2, 2


def memory(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) // 1024


def main(model: str, n: int) -> None:
    vision = VisionProcessor(model, 200704, 1003520)
    vision.encode_prompt(vision.chat_text("<image>"), [noise(28, 28)])  # what libraries load is no image data
    before = memory("VmRSS")
    items = []
    for number in range(PROMPTS):
        images = [open_image(encoded(noise(1000, 1000 - number), "JPEG"), None)]
        item = {"uid": f"a:{number}", "problem": "p", "answer": "7", "images": images, "view_images": {}}
        items.append(item | vision.encode_prompt(vision.chat_text("<image>Add."), images))
    prompts = PromptCollator(vision.special.pad)(items)
    rows = add_view(prompts.repeat_interleave(n), "masked", RandomPatchConfig(), vision, 1, 0, n)
    responses = torch.ones(len(rows), 8, dtype=torch.int64)
    rows = whole_sequences(rows.with_columns({"responses": responses, "response_mask": responses}))
    columns = ["input_ids", "attention_mask", "position_ids", "response_mask", "mm_inputs", "masked_mm_inputs"]
    for shard in rows.select(columns).chunk(RANKS):
        own = loads(dumps(shard, protocol=5))
        for part in own.chunk(max(1, len(own) // 2)):
            masked = DataProto(part.tensors, {"mm_inputs": part.objects["masked_mm_inputs"]})
            assert model_inputs(part, torch.device("cpu"))["images"] is not None
            assert model_inputs(masked, torch.device("cpu"))["images"] is not None
    sys.stdout.write(f"{memory('VmHWM') - before}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
