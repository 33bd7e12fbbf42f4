"""A few minutes of PAPO on a laptop: handwritten digits and a vision-language model of a million parameters.

`digits` makes the data, `tiny_vlm` an ordinary (but tiny) Qwen2.5-VL folder, `warm_start` teaches it the
response format and some reading. `python -m papo.quickstart OUT_DIR` does all three; reinforcement learning
then runs through the same trainer, losses and workers as a real model does.
"""
