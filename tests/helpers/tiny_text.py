"""CLIP's tokenizer without merges and a text encoder of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def text_encoder(folder: Path, width: int = 8) -> tuple[Any, Any]:
    """Tokenizer and encoder; every letter is a token."""
    import transformers

    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tokenizer, transformers.CLIPTextModel(config)
