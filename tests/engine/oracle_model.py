"""Hugging Face's own Llama with the oracle in place of its attention: the whole model, to compare
an engine's log-probabilities with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec


def save_tiny_llama(
    folder: Path,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    trained_length: int = 64,
    num_layers: int = 2,
) -> Path:
    """A random Llama without a tokenizer. The vocabulary has 512 tokens."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        max_position_embeddings=trained_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.15,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def _oracle_attention(
    pattern: LambdaPattern, rotary: RotarySpec, middle: Middle | None, prompt_len: int
) -> Iterator[None]:
    """Makes Llama hand raw queries and keys to its attention, and that attention the oracle."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        recalled = middle if middle is not None and middle.recalls(module.layer_idx + 1) else None
        # One key head at a time: the oracle materialises every score.
        group = query.shape[1] // key.shape[1]
        heads = [
            lambda_attention(
                query[0, h * group : (h + 1) * group].transpose(0, 1),
                key[0, h : h + 1].transpose(0, 1),
                value[0, h : h + 1].transpose(0, 1),
                pattern,
                scale=scaling,
                rotary=rotary,
                middle=recalled,
                prompt_len=prompt_len,
            )
            for h in range(key.shape[1])
        ]
        return torch.cat(heads, dim=1)[None], None

    AttentionInterface.register("lminf_oracle", attend)
    original = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, **_: (q, k)
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original


def oracle_logprobs(
    model_path: Path,
    token_ids: list[int],
    pattern: LambdaPattern,
    dtype: torch.dtype,
    middle: Middle | None = None,
    prompt_len: int = 0,
) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it; [len(token_ids) - 1]."""
    targets = torch.tensor(token_ids[1:])[:, None]
    given = oracle_distributions(model_path, token_ids, pattern, dtype, middle, prompt_len)
    return given.gather(1, targets)[:, 0]


@torch.inference_mode()
def oracle_distributions(
    model_path: Path,
    token_ids: list[int],
    pattern: LambdaPattern,
    dtype: torch.dtype,
    middle: Middle | None = None,
    prompt_len: int = 0,
) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary in place of every token but the first; float64
    [len(token_ids) - 1, vocabulary]."""
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=dtype)
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    rotary = RotarySpec(inv_freq.double(), is_neox_style=True)
    with _oracle_attention(pattern, rotary, middle, prompt_len):
        model.set_attn_implementation("lminf_oracle")
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)
