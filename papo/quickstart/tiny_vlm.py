"""A Qwen2.5-VL of about a million parameters, saved as an ordinary Hugging Face folder.

Nothing about it is special to the trainer: `AutoProcessor` and `AutoModelForImageTextToText` load it, and so does
vLLM. Its vocabulary is a byte-level BPE learnt from the task's own texts, so prompts stay short.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from papo.quickstart.artifacts import is_current, new_folder

logger = logging.getLogger(__name__)

VOCAB_SIZE = 384
PATCH_PIXELS = 14
MERGE_SIZE = 2
TOKEN_PIXELS = (PATCH_PIXELS * MERGE_SIZE) ** 2
MAX_IMAGE_TOKENS = 64
# The usual 0.02 is meant for wide layers; at a width of 96 it costs twice the warm-start steps.
INITIALIZER_RANGE = 0.05

PAD, EOS = "<|endoftext|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", EOS, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
# Whole tokens, as in Qwen3, but not special: a decoded response must still show them to the reward function.
THINK_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(out_dir: str | Path, corpus_texts: Iterable[str], seed: int = 0) -> Path:
    """Write an untrained model with its processor, or reuse the folder made from the same texts and seed.

    Args:
        out_dir: A folder of its own; it is replaced as a whole.
        corpus_texts: Prompts and responses of the task, from which the vocabulary is learnt.
        seed: Of the initial weights.

    Returns:
        The folder.

    Raises:
        ValueError: `out_dir` holds files that the quickstart did not make.
    """
    out_dir = Path(out_dir)
    corpus = sorted(set(corpus_texts))
    digest = hashlib.sha256("\0".join(corpus).encode()).hexdigest()
    recipe = {"kind": "tiny_vlm", "version": 2, "seed": seed, "vocab_size": VOCAB_SIZE, "corpus_sha256": digest}
    if is_current(out_dir, recipe):
        logger.info("Reusing the untrained model in %s.", out_dir)
        return out_dir

    processor = _processor(_tokenizer(corpus))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(processor.tokenizer))
    model.generation_config = _generation_config(processor.tokenizer)
    with new_folder(out_dir, recipe) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    logger.info("Wrote a model of %.2fM parameters to %s.", model.num_parameters() / 1e6, out_dir)
    return out_dir


def _tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """Learn a byte-level BPE; splitting, merging and special tokens work as in Qwen's own tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    # Qwen's own splitting, or the merges learnt here would not be those applied later. Digits stay single.
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.train_from_iterator(
        _plain_pieces(corpus),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[*SPECIAL_TOKENS, *THINK_TOKENS],
            show_progress=False,
        ),
    )
    vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=EOS, pad_token=PAD, unk_token=PAD)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return tokenizer


def _plain_pieces(corpus: list[str]) -> list[str]:
    """Cut the whole tokens out, as the finished tokenizer will, and add the words of the chat template."""
    whole = "|".join(re.escape(token) for token in (*SPECIAL_TOKENS, *THINK_TOKENS))
    return ["user", "assistant", *(piece for text in corpus for piece in re.split(whole, text) if piece)]


def _processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    patches = {"patch_size": PATCH_PIXELS, "merge_size": MERGE_SIZE, "temporal_patch_size": 2}
    # The default lower bound of 56x56 pixels would blow up a row of digits.
    size = {"shortest_edge": TOKEN_PIXELS, "longest_edge": MAX_IMAGE_TOKENS * TOKEN_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, **patches),
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Text and vision: 3 layers of 96 each. Heads of 32 are the smallest that vLLM runs on a CPU."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": 512,
        # Temporal, height and width share the 16 rotary frequencies of a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "initializer_range": INITIALIZER_RANGE,
        "patch_size": PATCH_PIXELS,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        # A window is one vision token, hence one digit; the last layer sees the whole picture.
        "window_size": PATCH_PIXELS * MERGE_SIZE,
        "fullatt_block_indexes": [2],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )


def _generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    return GenerationConfig(do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
