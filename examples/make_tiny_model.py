#!/usr/bin/env python3
"""Writes a small Llama with random weights, to try a deployment with: no hub, some megabytes.

    make_tiny_model.py FOLDER [--layers 8] [--dtype bfloat16] [--seed 1]

Its words are t0, t1, ... and stand for the tokens 0, 1, ...; it answers with nonsense: greedy output depends on the weights (the seed) and on every token of the prompt. Two deployments
can be compared token by token where both serve it with --dtype float32. In bfloat16 a server that computes the prompt in
other steps, or on another processor, rounds differently, and an answer soon differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, HEAD_SIZE, INTERMEDIATE = 256, 4, 64, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--max-tokens", type=int, default=16384, help="longest sequence")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--window", type=int, help="make it a Mistral whose layers see only so many tokens")
    given = parser.parse_args()
    make(given.folder, given.layers, given.vocabulary, given.dtype, given.max_tokens, given.seed, given.window)
    make_tokenizer(given.folder, given.vocabulary)


def make(
    folder: Path, layers: int, vocabulary: int, dtype: str, max_tokens: int, seed: int, window: int | None = None
) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    if window is not None:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    random = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * gain / columns**0.5).to(getattr(torch, dtype))

    ones = torch.ones(HIDDEN, dtype=getattr(torch, dtype))
    tensors = {
        "model.embed_tokens.weight": weight(vocabulary, HIDDEN, 16.0),
        "lm_head.weight": weight(vocabulary, HIDDEN, 4.0),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        # Sharp attention: what is at which place in the cache has to show in the tokens.
        for name, rows, columns, gain in (
            ("self_attn.q_proj", HEADS * HEAD_SIZE, HIDDEN, 2.0),
            ("self_attn.k_proj", HEADS * HEAD_SIZE, HIDDEN, 2.0),
            ("self_attn.v_proj", HEADS * HEAD_SIZE, HIDDEN, 2.0),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_SIZE, 2.0),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN, 1.0),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN, 1.0),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE, 1.0),
        ):
            tensors[f"{at}{name}.weight"] = weight(rows, columns, gain)
        tensors[f"{at}input_layernorm.weight"] = ones.clone()
        tensors[f"{at}post_attention_layernorm.weight"] = ones.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: a text is words between spaces, a chat what is said one after the
    other.
    """
    words = {f"t{token}": token for token in range(vocabulary)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
