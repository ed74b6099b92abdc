"""Model families: a tiny random checkpoint of each, and the same model in Hugging Face's code with
its attention replaced by the oracle."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gptj import modeling_gptj

from tools.families_table import REFUSED
from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec

TRAINED_LENGTH = 64
NATIVE_WINDOW = 24

Attend = Callable[..., torch.Tensor]
"""``attend(module, query, key, value, scale, **rules)`` on raw queries and keys, each of shape
[1, heads, tokens, head_size]; returns [1, tokens, heads, head_size]."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        title: the name that people know it by.
        config_class: Hugging Face's configuration class, by name.
        settings: what that class is given.
        is_neox_style: how its rotated pairs lie.
        backwards: whether it turns them the other way round.
        oracle_forward: for a model that doesn't use Hugging Face's attention interface: the
            attention module's class, and a function that makes the forward that replaces its own.
        own_attention: which of Hugging Face's implementations is the model as it was meant.
        as_in_vllm: changes Hugging Face's model where vLLM's differs outside of attention.
    """

    title: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    is_neox_style: bool = True
    backwards: bool = False
    oracle_forward: tuple[type[nn.Module], Callable[[Attend], Callable]] | None = None
    own_attention: str = "eager"
    as_in_vllm: Callable[[PreTrainedModel], None] = lambda model: None

    def save(self, folder: Path) -> Path:
        """Writes a random checkpoint without a tokenizer. The vocabulary has 512 tokens."""
        config = make_config(self.config_class, self.settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases, norms and sinks start as constants, which would hide that one is dropped.
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder


_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED_LENGTH,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_GQA = {"num_key_value_heads": 2}
_FULL = {"layer_types": ["full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# vLLM knows these families with tied embeddings alone.
_TIED = {"tie_word_embeddings": True}


def _rope(theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | parameters}


def _longrope(trained_length: int, partial_rotary_factor: float = 1.0) -> dict[str, Any]:
    """Long factors beyond ``trained_length``, short ones up to it."""
    num_pairs = int(8 * partial_rotary_factor)
    return {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": trained_length,
        **_rope(
            rope_type="longrope",
            partial_rotary_factor=partial_rotary_factor,
            short_factor=[1.0 + 0.1 * k for k in range(num_pairs)],
            long_factor=[2.0 + 0.5 * k for k in range(num_pairs)],
            original_max_position_embeddings=trained_length,
        ),
    }


def _gptj_forward(attend: Attend) -> Callable:
    def forward(self: modeling_gptj.GPTJAttention, hidden_states: torch.Tensor, **_: Any) -> tuple:
        query, key, value = (
            self._split_heads(
                project(hidden_states), self.num_attention_heads, self.head_dim, False
            )
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(self, query, key, value, self.head_dim**-0.5)
        return self.out_proj(out.flatten(2)), None

    return forward


def _bloom_forward(attend: Attend) -> Callable:
    def forward(
        self: modeling_bloom.BloomAttention,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        **_: Any,
    ) -> tuple:
        query, key, value = self._reshape(self.query_key_value(hidden))
        slopes = alibi[:, 0, 1] - alibi[:, 0, 0]
        out = attend(self, query, key, value, self.inv_norm_factor, alibi_slopes=slopes)
        return self.dense(out.flatten(2)) + residual, None

    return forward


def _falcon_forward(attend: Attend) -> Callable:
    def forward(
        self: modeling_falcon.FalconAttention,
        hidden: torch.Tensor,
        alibi: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple:
        split = self._split_heads(self.query_key_value(hidden))
        query, key, value = (x.transpose(1, 2) for x in split)
        slopes = None
        if alibi is not None:
            # Falcon scales the bias together with the product of query and key.
            alibi = alibi.view(self.num_heads, -1)
            slopes = (alibi[:, 1] - alibi[:, 0]) * self.inv_norm_factor
        out = attend(self, query, key, value, self.inv_norm_factor, alibi_slopes=slopes)
        return self.dense(out.flatten(2)), None

    return forward


def _exact_gelu(model: PreTrainedModel) -> None:
    """vLLM computes BLOOM's GELU with erf, Hugging Face approximates it with tanh."""
    for block in model.transformer.h:
        block.mlp.gelu_impl = nn.GELU()


def _activation_in_bfloat16(model: PreTrainedModel) -> None:
    """vLLM keeps what Apertus' activation has learned in bfloat16, whatever the model's dtype and
    its attention, and computes with it in that. In float32, log-probabilities differ by 2e-3."""
    for layer in model.model.layers:
        layer.mlp.act_fn.to(torch.bfloat16)


_ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": NATIVE_WINDOW,
    "head_dim": 32,
    **_GQA,
}

_MINISTRAL_3 = {
    "head_dim": 16,
    **_GQA,
    **_rope(llama_4_scaling_beta=0.1, **_YARN),
    # vLLM 0.32 looks for it in this place alone, where Mistral's own checkpoints have it.
    "llama_4_scaling": {"original_max_position_embeddings": 32, "beta": 0.1},
}

FAMILIES = {
    "llama-2": Family("Llama 2", "LlamaConfig", _rope()),
    "llama-3": Family(
        "Llama 3.x",
        "LlamaConfig",
        {
            **_GQA,
            **_rope(
                500000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "mistral": Family("Mistral", "MistralConfig", {"sliding_window": None, **_GQA, **_rope()}),
    "mistral-windowed": Family(
        "Mistral with its window",
        "MistralConfig",
        {"sliding_window": NATIVE_WINDOW, **_GQA, **_rope()},
    ),
    "qwen-2.5": Family("Qwen 2.5", "Qwen2Config", {**_GQA, **_rope(1000000.0)}),
    "qwen-3": Family("Qwen 3", "Qwen3Config", {"head_dim": 32, **_GQA, **_rope(1000000.0)}),
    "gemma-3": Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            **_ALTERNATING,
            **_TIED,
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "gemma-2": Family(
        "Gemma 2",
        "Gemma2Config",
        {
            **_ALTERNATING,
            **_TIED,
            **_rope(),
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt-neox": Family("GPT-NeoX, Pythia", "GPTNeoXConfig", _rope(partial_rotary_factor=0.25)),
    "gpt-j": Family(
        "GPT-J",
        "GPTJConfig",
        {"rotary_dim": 8},
        is_neox_style=False,
        oracle_forward=(modeling_gptj.GPTJAttention, _gptj_forward),
    ),
    "bloom": Family(
        "BLOOM",
        "BloomConfig",
        _TIED,
        oracle_forward=(modeling_bloom.BloomAttention, _bloom_forward),
        as_in_vllm=_exact_gelu,
    ),
    "falcon": Family(
        "Falcon",
        "FalconConfig",
        _rope(),
        oracle_forward=(modeling_falcon.FalconAttention, _falcon_forward),
    ),
    "falcon-rw": Family(
        "Falcon-RW",
        "FalconConfig",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        oracle_forward=(modeling_falcon.FalconAttention, _falcon_forward),
        # The eager one adds the ALiBi bias twice: to the scores, and within the mask.
        own_attention="sdpa",
    ),
    "phi-3": Family("Phi-3, Phi-4", "Phi3Config", _rope(partial_rotary_factor=1.0)),
    "phi-3-longrope-short": Family(
        "Phi-3 with LongRoPE, short factors",
        "Phi3Config",
        _longrope(trained_length=TRAINED_LENGTH),
    ),
    "phi-3-longrope-long": Family(
        "Phi-3 with LongRoPE, long factors",
        "Phi3Config",
        _longrope(trained_length=TRAINED_LENGTH // 2),
    ),
    "phi-4-mini": Family(
        "Phi-4-mini",
        "Phi3Config",
        {**_GQA, **_longrope(trained_length=TRAINED_LENGTH // 2, partial_rotary_factor=0.75)},
    ),
    "phi-2": Family("Phi-2", "PhiConfig", _rope(partial_rotary_factor=0.5)),
    "olmo-2": Family("OLMo 2", "Olmo2Config", {**_GQA, **_rope(500000.0)}),
    "stablelm": Family(
        "StableLM",
        "StableLmConfig",
        {"use_qkv_bias": True, **_GQA, **_rope(partial_rotary_factor=0.25)},
    ),
    "glm": Family(
        "GLM",
        "GlmConfig",
        {"head_dim": 16, **_GQA, **_rope(partial_rotary_factor=0.5)},
        is_neox_style=False,
    ),
    "granite": Family("Granite", "GraniteConfig", {**_GQA, **_rope(), **_MULTIPLIERS}),
    "gpt-oss": Family(
        "gpt-oss",
        "GptOssConfig",
        {
            **_ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **_rope(
                150000.0,
                rope_type="yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama-yarn": Family("Llama with YaRN", "LlamaConfig", {**_GQA, **_rope(**_YARN)}),
    "llama-dynamic": Family(
        "Llama with dynamic NTK", "LlamaConfig", {**_GQA, **_rope(rope_type="dynamic", factor=4.0)}
    ),
    "llama-biases": Family(
        "Llama with biases and heads of 24",
        "LlamaConfig",
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True, **_GQA, **_rope()},
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralConfig",
        {"sliding_window": None, **_LOCAL_EXPERTS, **_GQA, **_rope()},
    ),
    "qwen-2-moe": Family(
        "Qwen 2 MoE",
        "Qwen2MoeConfig",
        {"shared_expert_intermediate_size": 32, **_EXPERTS, **_GQA, **_rope()},
    ),
    "qwen-3-moe": Family(
        "Qwen 3 MoE", "Qwen3MoeConfig", {"head_dim": 32, **_EXPERTS, **_GQA, **_rope()}
    ),
    "glm-4": Family(
        "GLM-4",
        "Glm4Config",
        {"head_dim": 16, **_GQA, **_rope(partial_rotary_factor=0.5)},
        is_neox_style=False,
    ),
    "glm-4.5": Family(
        "GLM-4.5",
        "Glm4MoeConfig",
        {
            "head_dim": 16,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            **_ROUTED_EXPERTS,
            **_GQA,
            **_rope(partial_rotary_factor=0.5),
        },
    ),
    "command-r": Family(
        "Command R",
        "CohereConfig",
        {"logit_scale": 0.5, **_GQA, **_TIED, **_rope()},
        is_neox_style=False,
    ),
    "command-r+": Family(
        "Command R+",
        "CohereConfig",
        {"logit_scale": 0.5, "use_qk_norm": True, **_GQA, **_TIED, **_rope()},
        is_neox_style=False,
    ),
    "ernie-4.5": Family(
        "ERNIE 4.5", "Ernie4_5Config", {"head_dim": 16, **_GQA, **_rope()}, is_neox_style=False
    ),
    "ernie-4.5-moe": Family(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeConfig",
        {
            "head_dim": 16,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 1,
            **_GQA,
            **_rope(),
        },
        is_neox_style=False,
    ),
    "laguna": Family(
        "Laguna",
        "LagunaConfig",
        {
            "head_dim": 16,
            # vLLM 0.32 runs its experts on GPUs alone.
            "mlp_layer_types": ["dense"] * 2,
            **_FULL,
            **_GQA,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "ministral-3": Family(
        "Ministral 3",
        "Ministral3Config",
        {
            **_MINISTRAL_3,
            # The factor on the queries is served up to the trained length.
            "max_position_embeddings": 1024,
        },
    ),
    "granite-moe": Family(
        "Granite MoE",
        "GraniteMoeConfig",
        {**_LOCAL_EXPERTS, **_GQA, **_rope(), **_MULTIPLIERS},
    ),
    "granite-moe-shared": Family(
        "Granite MoE with a shared expert",
        "GraniteMoeSharedConfig",
        {"shared_intermediate_size": 32, **_LOCAL_EXPERTS, **_GQA, **_rope(), **_MULTIPLIERS},
    ),
    "nemotron": Family(
        "Nemotron",
        "NemotronConfig",
        {"head_dim": 16, **_GQA, **_rope(partial_rotary_factor=0.5)},
    ),
    "exaone-4-full": Family(
        "EXAONE 4 without windows",
        "Exaone4Config",
        {"sliding_window": None, **_FULL, **_GQA, **_rope()},
    ),
    "gemma-1": Family("Gemma 1", "GemmaConfig", {"head_dim": 32, **_GQA, **_TIED, **_rope()}),
    "vaultgemma": Family(
        "VaultGemma",
        "VaultGemmaConfig",
        {**_ALTERNATING, **_TIED, **_rope(), "query_pre_attn_scalar": 48},
    ),
    "olmo-1": Family("OLMo", "OlmoConfig", {**_GQA, **_rope()}),
    "olmo-3": Family("OLMo 3", "Olmo3Config", {**_ALTERNATING, **_rope(500000.0)}),
    "olmoe": Family(
        "OLMoE",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, **_GQA, **_rope()},
    ),
    "flex-olmo": Family(
        "FlexOlmo",
        "FlexOlmoConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, **_GQA, **_rope()},
    ),
    "starcoder-2": Family(
        "Starcoder 2",
        "Starcoder2Config",
        {"use_bias": True, "sliding_window": None, **_GQA, **_rope()},
    ),
    "seed-oss": Family(
        "Seed-OSS", "SeedOssConfig", {"head_dim": 32, "attention_bias": True, **_GQA, **_rope()}
    ),
    "persimmon": Family(
        "Persimmon",
        "PersimmonConfig",
        {"qk_layernorm": True, **_rope(partial_rotary_factor=0.5)},
    ),
    "apertus": Family(
        "Apertus",
        "ApertusConfig",
        {**_GQA, **_rope()},
        as_in_vllm=_activation_in_bfloat16,
    ),
    "arcee": Family("Arcee", "ArceeConfig", {"head_dim": 16, **_GQA, **_rope()}),
    "helium": Family(
        "Helium", "HeliumConfig", {"head_dim": 16, **_GQA, **_rope()}, is_neox_style=False
    ),
    "smollm-3-all": Family(
        "SmolLM3 with RoPE in all layers",
        "SmolLM3Config",
        {"no_rope_layers": [1, 1], **_GQA, **_rope()},
    ),
    "bitnet": Family("BitNet", "BitNetConfig", {**_GQA, **_rope()}),
    "jais-2": Family("Jais 2", "Jais2Config", {"head_dim": 16, **_GQA, **_rope()}),
    "mellum": Family(
        "Mellum",
        "MellumConfig",
        {
            **_ALTERNATING,
            **_EXPERTS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ),
    "ministral": Family("Ministral", "MinistralConfig", {**_ALTERNATING, **_rope()}),
    "cwm": Family(
        "CWM", "CwmConfig", {**_ALTERNATING, **_rope(), "bos_token_id": 1, "eos_token_id": 2}
    ),
    "dots.llm1": Family(
        "dots.llm1",
        "Dots1Config",
        {"head_dim": 16, "first_k_dense_replace": 1, **_ROUTED_EXPERTS, **_GQA, **_rope()},
    ),
    "nanochat": Family("nanochat", "NanoChatConfig", _rope(), backwards=True),
    "solar-open": Family(
        "Solar Open",
        "SolarOpenConfig",
        {"head_dim": 16, **_ROUTED_EXPERTS, **_GQA, **_rope(partial_rotary_factor=1.0)},
    ),
    "hyperclova-x": Family(
        "HyperCLOVA X", "HyperCLOVAXConfig", {**_GQA, **_rope(), **_MULTIPLIERS}
    ),
}


@dataclass(frozen=True)
class RefusedFamily:
    """An architecture that LMINF, or vLLM itself, turns away.

    Attributes:
        title: the name that people know it by.
        encoding: where its attention takes positions from.
        config_class: Hugging Face's configuration class, by name.
        settings: what that class is given.
        message: what the refusal says; a regular expression.
        status: what docs/families.md says of it.
        max_model_len: the engine's.
    """

    title: str
    encoding: str
    config_class: str
    settings: dict[str, Any]
    message: str
    status: str = REFUSED
    max_model_len: int = TRAINED_LENGTH

    def save(self, folder: Path) -> Path:
        """Writes the configuration: the weights, if it comes to them, are left to vLLM."""
        make_config(self.config_class, self.settings).save_pretrained(folder)
        return folder


_LEARNED = r"layers \S+\.0\.\S*attn, \S+\.1\.\S*attn: its values depend on the position"
_UNTURNED = "its queries and keys don't depend on the position"
_BOTH_LAYERS = "layers 0 to 1: "

REFUSED_FAMILIES = {
    "gpt-2": RefusedFamily("GPT-2", "learned absolute positions", "GPT2Config", _TIED, _LEARNED),
    "opt": RefusedFamily(
        "OPT",
        "learned absolute positions",
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, **_TIED},
        _LEARNED,
    ),
    "m-rope": RefusedFamily(
        "models with M-RoPE, as Qwen2-VL",
        "RoPE on multimodal positions",
        "Qwen2Config",
        {**_GQA, **_rope(mrope_section=[2, 3, 3])},
        _BOTH_LAYERS + "M-RoPE: a multimodal position is no single distance",
    ),
    "dual-chunk": RefusedFamily(
        "Qwen 2.5-1M",
        "RoPE, dual chunk attention",
        "Qwen2Config",
        {
            **_GQA,
            **_rope(),
            "dual_chunk_attention_config": {"chunk_size": 64, "local_size": 16},
        },
        _BOTH_LAYERS + "dual chunk attention",
    ),
    "mla": RefusedFamily(
        "DeepSeek V2",
        "RoPE, multi-head latent attention (MLA)",
        "DeepseekV2Config",
        {},
        _BOTH_LAYERS + r"multi-head latent attention \(MLA\)",
    ),
    "fope": RefusedFamily(
        "models with Fourier position embedding",
        "RoPE of learned frequencies",
        "LlamaConfig",
        _rope(
            use_fope=True,
            num_key_value_heads=4,
            num_inv_freq=8,
            fope_sep_head=True,
            fope_init_factor=0.1,
        ),
        r"model\.layers\.0\.self_attn\.rotary_emb: the rotation of FourierRotaryEmbedding",
    ),
    "command-r7b": RefusedFamily(
        "Command R7B",
        "interleaved RoPE in windowed layers, none in the others",
        "Cohere2Config",
        {**_ALTERNATING, **_TIED, **_rope()},
        rf"layers model\.layers\.1\.self_attn\.attn, model\.layers\.3\S+: {_UNTURNED}",
    ),
    "exaone-4": RefusedFamily(
        "EXAONE 4 with windows",
        "RoPE in windowed layers, none in the others",
        "Exaone4Config",
        {**_ALTERNATING, **_rope()},
        rf"layers model\.layers\.1\.self_attn\.attn, model\.layers\.3\S+: {_UNTURNED}",
    ),
    "smollm-3": RefusedFamily(
        "SmolLM3",
        "RoPE in three layers of four",
        "SmolLM3Config",
        {"num_hidden_layers": 4, **_GQA, **_rope()},
        rf"layer model\.layers\.3\.self_attn\.attn: {_UNTURNED}",
    ),
    "hunyuan": RefusedFamily(
        "Hunyuan",
        "RoPE, with norms behind it that stretch each dimension on its own",
        "HunYuanDenseV1Config",
        {"head_dim": 16, **_GQA, **_rope()},
        r"layers \S+\.0\.\S*attn, \S+\.1\.\S*attn: its queries and keys, 16 dimensions each, "
        r"aren't rotated by a rotation",
    ),
    "ministral-3-beyond": RefusedFamily(
        "Ministral 3 beyond its trained length",
        "YaRN; a factor on the queries that grows with the position",
        "Ministral3Config",
        _MINISTRAL_3,
        r"its queries are multiplied by a factor .*; --max-model-len 64 serves",
        max_model_len=1000,
    ),
    "llama-4": RefusedFamily(
        "Llama 4",
        "RoPE in chunks, none in the other layers",
        "Llama4TextConfig",
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96, **_GQA, **_rope()},
        "a KV cache of kind ChunkedLocalAttentionSpec",
    ),
    "gpt-bigcode": RefusedFamily(
        "Starcoder 1", "learned absolute positions", "GPTBigCodeConfig", _TIED, _LEARNED
    ),
    "mpt": RefusedFamily(
        "MPT",
        "ALiBi",
        "MptConfig",
        {},
        r"MPTForCausalLM was supported in vLLM until v0\.28",
        status="vLLM itself has not run it since 0.28",
    ),
}


def make_config(config_class: str, settings: dict[str, Any]) -> transformers.PreTrainedConfig:
    """A tiny model's configuration, with the architecture by which vLLM knows it."""
    config = getattr(transformers, config_class)(**(_SHAPE | settings))
    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    # vLLM knows MPT by the name that its own authors gave it.
    config.architectures = [architecture.replace("Mpt", "MPT")]
    return config


class OracleModel:
    """A checkpoint in Hugging Face's code, with or without the oracle as its attention."""

    def __init__(self, family: Family, path: Path) -> None:
        self.family = family
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=family.own_attention
        )
        family.as_in_vllm(self.model)
        # Where vLLM runs Hugging Face's code, it changes the class of the decoder for its compiler,
        # which then looks for this in every instance, and so in one made before as well.
        self.model.base_model.do_not_compile = True

    @torch.inference_mode()
    def logprobs(
        self,
        token_ids: list[int],
        pattern: LambdaPattern | None,
        middle: Middle | None = None,
        prompt_len: int = 0,
    ) -> torch.Tensor:
        """Log-probability of every token but the first, given those before it.

        Args:
            token_ids: the tokens.
            pattern: the Λ; None for the model as Hugging Face made it.
            middle: what its layers recall, but for those with a window of their own.
            prompt_len: how many of the tokens are the prompt.

        Returns:
            float64 of shape [len(token_ids) - 1].
        """
        tokens = torch.tensor([token_ids])
        if pattern is None:
            logits = self.model(tokens, use_cache=False).logits
        else:
            with self._oracle(pattern, middle, prompt_len):
                logits = self.model(tokens, use_cache=False).logits
        return logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]

    @contextmanager
    def _oracle(
        self, pattern: LambdaPattern, middle: Middle | None, prompt_len: int
    ) -> Iterator[None]:
        def attend(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            scale: float,
            *,
            window: int | None = None,
            **rules: Any,
        ) -> torch.Tensor:
            own, recalled = pattern, {}
            if window is not None:
                own = LambdaPattern(0, window, window)
            elif middle is not None and middle.recalls(module.layer_idx + 1):
                recalled = {"middle": middle, "prompt_len": prompt_len}
            rotary = self._rotary(module, pattern)
            tokens_first = (x[0].transpose(0, 1) for x in (query, key, value))
            return lambda_attention(
                *tokens_first, own, scale=scale, rotary=rotary, **rules, **recalled
            )[None]

        if self.family.oracle_forward is not None:
            attention_class, make_forward = self.family.oracle_forward
            with mock.patch.object(attention_class, "forward", make_forward(attend)):
                yield
            return

        def interface(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float,
            sliding_window: int | None = None,
            softcap: float | None = None,
            s_aux: torch.Tensor | None = None,
            **_: Any,
        ) -> tuple[torch.Tensor, None]:
            rules = {"window": sliding_window, "softcap": softcap, "sinks": s_aux}
            return attend(module, query, key, value, scaling, **rules), None

        AttentionInterface.register("lminf_oracle", interface)
        code = sys.modules[type(self.model).__module__]
        self.model.set_attn_implementation("lminf_oracle")
        try:
            with mock.patch.object(code, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k)):
                yield
        finally:
            self.model.set_attn_implementation(self.family.own_attention)

    def _rotary(self, module: nn.Module, pattern: LambdaPattern) -> RotarySpec | None:
        """What Hugging Face's own rotary module says of this layer."""
        config = self.model.config
        if config.model_type == "gptj":
            exponents = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
            return RotarySpec((1.0 / 10000**exponents).double(), is_neox_style=False)
        if getattr(config, "alibi", config.model_type == "bloom"):
            return None
        (rotary,) = (m for n, m in self.model.named_modules() if n.endswith("rotary_emb"))
        prefix = ""
        if not hasattr(rotary, "inv_freq"):
            prefix = f"{config.layer_types[module.layer_idx]}_"
        inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
        if getattr(rotary, "rope_type", None) == "longrope":
            # Short or long factors: the largest distance that is scored decides.
            longrope = ROPE_INIT_FUNCTIONS["longrope"]
            inv_freq, _ = longrope(config, seq_len=pattern.distance_limit)
        return RotarySpec(
            -inv_freq.double() if self.family.backwards else inv_freq.double(),
            self.family.is_neox_style,
            getattr(rotary, f"{prefix}attention_scaling"),
        )
