"""A tiny model whose next token can mostly be told, and drafters that tell it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.oracle_model import save_tiny_llama

TRAINED_LENGTH = 64
CYCLE = 32
"""Tokens that the model counts through before it starts over."""

VOCABULARY, HIDDEN = 512, 96
NUM_MEDUSA_HEADS = 3


def following(steps: int = 1) -> torch.Tensor:
    """For every token, the one that the model says next, or so many steps later, if nothing that
    it attends to changes its mind."""
    token = torch.arange(VOCABULARY)
    return token - token % CYCLE + (token + steps) % CYCLE


def save_counting_model(folder: Path) -> Path:
    """A Llama that counts within groups of tokens, and leaves them where its attention says so.

    So the drafts that the tests are about are right again and again, and wrong in between.
    """
    save_tiny_llama(folder, 4, 2, 64, trained_length=TRAINED_LENGTH)
    weights = _load(folder)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * 0.07
    weights["lm_head.weight"] = _head(weights, steps=1)
    _save(folder, weights)
    return folder


def ngram(model: Path) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }


def draft_model(model: Path) -> dict[str, Any]:
    """The model itself, its weights moved a little."""
    folder = model.with_name("draft")
    shutil.copytree(model, folder)
    weights = _load(folder)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0)
        weights[name] = weight + 0.3 * noise if weight.dim() > 1 else weight
    _save(folder, weights)
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4}


def short_draft_model(model: Path) -> dict[str, Any]:
    """A model with other heads, trained on half the length, that counts and does nothing else."""
    folder = save_tiny_llama(
        model.with_name("short-draft"), 2, 1, 32, trained_length=TRAINED_LENGTH // 2, num_layers=1
    )
    counting, weights = _load(model), _load(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = counting[name]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * 0.08
    _save(folder, weights)
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 5}


def eagle(model: Path) -> dict[str, Any]:
    """One layer over the token and the hidden state that led to it."""
    folder = save_tiny_llama(
        model.with_name("eagle"), 4, 2, 64, trained_length=TRAINED_LENGTH, num_layers=1
    )
    layer = {
        name.removeprefix("model."): weight * (0.08 if "o_proj" in name or "down" in name else 1.0)
        for name, weight in _load(folder).items()
        if name.startswith("model.layers.") and "input_layernorm" not in name
    }
    token, hidden = torch.eye(HIDDEN), 0.02 * torch.eye(HIDDEN)
    _save(folder, layer | {"fc.weight": torch.cat((token, hidden), dim=1)})
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": 3}


def medusa(model: Path) -> dict[str, Any]:
    """Heads that count further from the hidden state."""
    folder = model.with_name("medusa")
    folder.mkdir()
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "truncated_vocab_size": VOCABULARY,
        "num_heads": NUM_MEDUSA_HEADS,
        "num_hidden_layers": 1,
        "max_position_embeddings": TRAINED_LENGTH,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    counting = _load(model)
    weights = {}
    for head in range(NUM_MEDUSA_HEADS):
        weights[f"blocks.{head}.layers.0.weight"] = torch.zeros(HIDDEN, HIDDEN)
        weights[f"lm_heads.{head}.weight"] = _head(counting, steps=head + 2)
    _save(folder, weights)
    return {"method": "medusa", "model": str(folder), "num_speculative_tokens": NUM_MEDUSA_HEADS}


def _head(weights: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """An output head that finds a token's own embedding and names the one so many steps later."""
    embedding = weights["model.embed_tokens.weight"]
    head = torch.empty_like(embedding)
    head[following(steps)] = embedding
    return head


def _load(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return weights


def _save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
