"""Weights in other forms than a plain checkpoint's: LoRA adapters, and four bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from tests.engine.conftest import Engine
from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

PATTERN = LambdaPattern(n_global=10, n_local=64, distance_limit=64)
LAMBDA = {"n_global": 10, "n_local": 64, "max_model_len": 1000, "block_size": 16}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def copy_with(
    model: Path, folder: Path, weights: dict[str, torch.Tensor], **config: object
) -> Path:
    """A checkpoint like another, with some weights and settings of its own."""
    folder.mkdir()
    settings = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_adapter(model: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """A random LoRA adapter of rank 8 (arXiv 2106.09685) on every projection.

    Returns:
        The adapter's folder, and that of a checkpoint with the adapter merged into its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model / "model.safetensors")
    adapter = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PROJECTIONS:
            continue
        a = 0.1 * torch.randn(8, weight.shape[1], generator=generator)
        b = 0.1 * torch.randn(weight.shape[0], 8, generator=generator)
        adapter[f"base_model.model.{module}.lora_A.weight"] = a
        adapter[f"base_model.model.{module}.lora_B.weight"] = b
        weights[name] = weight + 2.0 * b @ a
    path = folder / f"adapter {seed}"
    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, copy_with(model, folder / f"merged {seed}", weights)


def test_lora_equals_merged_weights(engine: Engine, tmp_path: Path) -> None:
    """Two adapters in one batch, on prompts of several windows; then each other's prompts, which
    must not be served from the other's prefix cache; and the bare model between them.

    The bare model has a batch of its own, because vLLM 0.32 on the CPU, with LMINF or without,
    applies an adapter to requests without one that share a batch with it.
    """
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64)
    (first, first_merged), (second, second_merged) = (
        save_adapter(model, tmp_path, seed) for seed in (1, 2)
    )
    adapters = [LoRARequest("first", 1, str(first)), LoRARequest("second", 2, str(second))]
    one, other = random_prompts([200, 300])
    sampling = SamplingParams(
        temperature=0, max_tokens=16, logprobs=0, detokenize=False, ignore_eos=True
    )
    with engine(
        model, **LAMBDA, max_num_batched_tokens=96, enable_lora=True, max_loras=2, max_lora_rank=8
    ) as llm:
        for prompts, lora_requests, equivalents in (
            ([one, other], adapters, [first_merged, second_merged]),
            ([one, other], [None, None], [model, model]),
            ([other, one], adapters, [first_merged, second_merged]),
        ):
            requests = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(requests, sampling, use_tqdm=False, lora_request=lora_requests)
            for output, equivalent in zip(outputs, equivalents, strict=True):
                assert output.num_cached_tokens == 0
                completion = output.outputs[0]
                chosen = zip(completion.logprobs, completion.token_ids, strict=True)
                got = torch.tensor([s[t].logprob for s, t in chosen], dtype=torch.float64)
                tokens = [*output.prompt_token_ids, *completion.token_ids]
                expected = oracle_logprobs(equivalent, tokens, PATTERN, torch.float32)[-16:]
                torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def quantise(model: Path, folder: Path, group_size: int = 32) -> tuple[Path, Path]:
    """Every projection in four bits, in groups with a scale each, as GPTQ checkpoints have them.

    Returns:
        That checkpoint, and one with the weights that its bits stand for.
    """
    packed, plain = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PROJECTIONS:
            packed[name] = plain[name] = weight.bfloat16()
            continue
        rows = weight.T.contiguous()  # [in, out]
        groups = rows.view(-1, group_size, rows.shape[1])
        scales = (groups.abs().amax(dim=1, keepdim=True) / 7).half()
        levels = (groups / scales.float()).round().clamp(-8, 7).int()
        plain[name] = (levels * scales.float()).view(rows.shape).T.contiguous()
        # Eight levels in one int32, the first in the lowest bits; 0 is stored as 8.
        unsigned = (levels + 8).view(-1, 8, rows.shape[1]).long()
        shifts = torch.arange(0, 32, 4)[None, :, None]
        packed[f"{module}.qweight"] = (unsigned << shifts).sum(dim=1).to(torch.int32)
        zeros = torch.full((len(groups), rows.shape[1] // 8), 0x77777777, dtype=torch.int32)
        packed[f"{module}.qzeros"] = zeros
        packed[f"{module}.scales"] = scales[:, 0].contiguous()
        packed[f"{module}.g_idx"] = torch.arange(len(rows), dtype=torch.int32) // group_size
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    return (
        copy_with(model, folder / "packed", packed, quantization_config=settings),
        copy_with(model, folder / "plain", {k: v.float() for k, v in plain.items()}),
    )


def root_mean_square_error(
    llm: LLM, plain: Path, prompts: list[list[int]], pattern: LambdaPattern
) -> float:
    errors = [
        logprobs - oracle_logprobs(plain, tokens, pattern, torch.float64)
        for tokens, logprobs in engine_logprobs(llm, prompts, 4)
    ]
    return float(torch.cat(errors).square().mean().sqrt())


def test_four_bit_weights(engine: Engine, tmp_path: Path) -> None:
    """vLLM's kernel for them runs in 16 bits alone. Against the weights that the bits stand for, in
    float64: inside the window LMINF may be no further off than stock vLLM is, and beyond it no
    further than LMINF is on those weights unpacked, times what the kernel for 4 bits costs stock
    vLLM (2.6 where it uses AMX, nothing elsewhere)."""
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's own kernel for 4-bit weights needs AVX-512, which this CPU lacks")
    packed, plain = quantise(save_tiny_llama(tmp_path / "model", 4, 2, 64), tmp_path)
    inside, beyond = random_prompts([60] * 6), random_prompts([150, 300, 400])
    ours = LAMBDA | {"dtype": "bfloat16"}
    with engine(packed, backend=None, dtype="bfloat16", max_model_len=64) as llm:
        stock = root_mean_square_error(llm, plain, inside, PATTERN)
    with engine(plain, backend=None, dtype="bfloat16", max_model_len=64) as llm:
        cost = max(1.0, stock / root_mean_square_error(llm, plain, inside, PATTERN))
    with engine(packed, **ours) as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization is not None
        assert root_mean_square_error(llm, plain, inside, PATTERN) < 1.25 * stock
        packed_beyond = root_mean_square_error(llm, plain, beyond, PATTERN)
    with engine(plain, **ours) as llm:
        unpacked = root_mean_square_error(llm, plain, beyond, PATTERN)
        assert packed_beyond < 1.25 * cost * unpacked
