"""`LMInfinite` against the oracle: values, gradients, memory, and what it refuses."""

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vllm_lminf
from tests.kernels.batches import make_rotary, turn
from vllm_lminf import LMInfinite, nn
from vllm_lminf.kernels.oracle import lambda_attention

EXACT = 1e-11
"""Both sides compute in float64, angles stay below 2e3 rad, and sums have some thousand terms."""
CLOSE = 1e-5
"""In float32, with angles that are good to 1e-6 rad, and queries, keys and values of size 1."""

# batch, seq, d_model, num_heads, n_global, n_local, distance_limit
SHAPES = [
    # Lengths: one token, below the window, at its edge, where the prefix leaves the window, beyond.
    (1, 1, 32, 2, 4, 48, 48),
    (1, 20, 32, 2, 4, 48, 48),
    (1, 47, 32, 2, 4, 48, 48),
    (1, 48, 32, 2, 4, 48, 48),
    (1, 49, 32, 2, 4, 48, 48),
    (1, 51, 32, 2, 4, 48, 48),
    (1, 52, 32, 2, 4, 48, 48),
    (1, 53, 32, 2, 4, 48, 48),
    # Lengths around a tile, whole tiles, many windows.
    (1, 63, 32, 2, 4, 48, 48),
    (1, 64, 32, 2, 4, 48, 48),
    (1, 65, 32, 2, 4, 48, 48),
    (1, 256, 32, 2, 4, 48, 48),
    (1, 700, 32, 2, 10, 20, 20),
    (1, 1300, 16, 1, 10, 400, 400),
    # Prefixes: none, one token, odd, a tile's edge, larger than the window, than the sequence.
    (1, 150, 32, 2, 0, 48, 48),
    (1, 150, 32, 2, 1, 48, 48),
    (1, 150, 32, 2, 13, 48, 48),
    (1, 300, 32, 2, 64, 48, 48),
    (1, 300, 32, 2, 100, 20, 20),
    (1, 150, 32, 2, 500, 20, 20),
    # Windows: the token itself, two tokens, longer than the sequence.
    (1, 150, 32, 2, 5, 1, 1),
    (1, 150, 32, 2, 0, 1, 1),
    (1, 150, 32, 2, 5, 2, 2),
    (1, 150, 32, 2, 5, 1000, 1000),
    # Limits beyond the window: by one, by a tile and more, beyond the sequence.
    (1, 150, 32, 2, 20, 37, 38),
    (1, 300, 32, 2, 20, 37, 150),
    (1, 300, 32, 2, 100, 20, 50),
    (1, 150, 32, 2, 20, 37, 1000),
    (1, 150, 32, 2, 5, 1, 9),
    # Batches and heads.
    (3, 150, 32, 1, 4, 48, 48),
    (2, 150, 48, 3, 4, 48, 60),
    (2, 150, 64, 32, 4, 48, 48),
]
STYLES = pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(shape: tuple[int, ...], is_neox_style: bool = True) -> LMInfinite:
    _, _, d_model, num_heads, n_global, n_local, limit = shape
    return LMInfinite(
        d_model,
        n_global,
        n_local,
        num_heads,
        distance_limit=limit,
        is_neox_style=is_neox_style,
    )


def draw(batch: int, seq: int, d_model: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seq)
    return torch.randn(4, batch, seq, d_model, dtype=torch.float64, generator=generator).unbind()


def oracle(module: LMInfinite, *qkv: torch.Tensor) -> torch.Tensor:
    """The oracle's output, every step of it in the dtype of its inputs."""
    rotary = make_rotary(
        module.d_model // module.num_heads, module.is_neox_style, theta=module.rope_theta
    )
    outputs = [
        lambda_attention(
            *(x.unflatten(-1, (module.num_heads, -1)) for x in sequence),
            module.pattern,
            scale=module.scale,
            rotary=rotary,
        ).flatten(-2)
        for sequence in zip(*qkv, strict=True)
    ]
    return torch.stack(outputs)


def with_gradients(function: Any, *inputs: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output of ``function(q, k, v)``, then the gradients of q, k and v."""
    *qkv, grad = (x.to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in qkv]
    output = function(*leaves)
    assert output.dtype == dtype
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """The largest difference of the output and of each gradient."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert x.isfinite().all()
    return [(x.double() - y).abs().max().item() for x, y in zip(actual, expected, strict=True)]


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@STYLES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exactly_the_oracle(shape: tuple[int, ...], is_neox_style: bool) -> None:
    """Values and gradients in float64: one key too many or too few would show by far."""
    module = build(shape, is_neox_style)
    inputs = draw(*shape[:3])
    actual = with_gradients(module, *inputs, dtype=torch.float64)
    expected = with_gradients(lambda *x: oracle(module, *x), *inputs, dtype=torch.float64)
    assert max(errors(actual, expected)) <= EXACT


@pytest.mark.parametrize("max_scores", [1, 50_000])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 100 < s[1] < 500], ids=str)
def test_tiles_of_other_sizes(
    shape: tuple[int, ...], max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are with more heads and larger batches: the smallest tile, and an odd one."""
    monkeypatch.setattr(nn, "_MAX_SCORES", max_scores)
    module = build(shape)
    inputs = draw(*shape[:3])
    actual = with_gradients(module, *inputs, dtype=torch.float64)
    expected = with_gradients(lambda *x: oracle(module, *x), *inputs, dtype=torch.float64)
    assert max(errors(actual, expected)) <= EXACT


@LOW
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_low_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Three times what the oracle itself loses, in values and gradients, in this dtype."""
    module = build(shape)
    inputs = draw(*shape[:3])

    def by_oracle(*qkv: torch.Tensor) -> torch.Tensor:
        return oracle(module, *qkv)

    exact = with_gradients(by_oracle, *inputs, dtype=torch.float64)
    losses = errors(with_gradients(by_oracle, *inputs, dtype=dtype), exact)
    found = errors(with_gradients(module, *inputs, dtype=dtype), exact)
    for name, error, loss in zip(("output", "q", "k", "v"), found, losses, strict=True):
        assert error <= 3 * loss, f"{name} is off by {error:.3g}, {3 * loss:.3g} allowed"


def test_gradients_of_the_prefix_add_up_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile adds to a global key's gradient: a running sum in bfloat16 would stop at 128."""
    monkeypatch.setattr(nn, "_MAX_SCORES", 1)
    monkeypatch.setattr(nn, "_MIN_ROWS", 1)
    zeros, ones = torch.zeros(1, 511, 2), torch.ones(1, 511, 2)
    # Without scores, each token takes one half of itself and one half of the first token.
    _, _, _, grad_v = with_gradients(
        LMInfinite(2, 1, 1), zeros, zeros, zeros, ones, dtype=torch.bfloat16
    )
    assert grad_v[0, 0].tolist() == [1 + 510 / 2] * 2
    assert grad_v[0, 1:].unique().item() == 0.5


@STYLES
def test_gradcheck(is_neox_style: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, over several tiles, with far keys and keys between."""
    monkeypatch.setattr(nn, "_MAX_SCORES", 1)
    monkeypatch.setattr(nn, "_MIN_ROWS", 4)
    module = LMInfinite(4, 3, 4, distance_limit=6, is_neox_style=is_neox_style)
    qkv = [x.requires_grad_() for x in draw(1, 14, 4)[:3]]
    assert torch.autograd.gradcheck(module, qkv)


def test_only_the_wanted_gradients_are_given() -> None:
    q, k, v, grad = draw(1, 30, 8)
    k.requires_grad_()
    LMInfinite(8, 2, 5)(q, k, v).backward(grad)
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None


def test_second_derivatives_are_refused() -> None:
    q, k, v, _ = draw(1, 30, 8)
    q.requires_grad_()
    output = LMInfinite(8, 2, 5)(q, k, v)
    (grad,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="tiled_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("changed", [2, 19, 64, 150])
def test_the_future_changes_nothing(changed: int) -> None:
    """Bit for bit; and no gradient reaches a later token."""
    module = LMInfinite(16, 4, 20, 2)
    qkv = draw(1, 200, 16)[:3]
    before = module(*qkv)
    later = [x.clone() for x in qkv]
    for x in later:
        x[:, changed:] += 1
    after = module(*(x.requires_grad_() for x in later))
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert not torch.equal(after[:, changed], before[:, changed])
    for grad in torch.autograd.grad(after[:, :changed].sum(), later):
        assert not grad[:, changed:].any()
        assert grad[:, :changed].any()


def test_hidden_tokens_have_no_say() -> None:
    """Behind the window and after the prefix: tokens 4 to 179 for the query at 199."""
    module = LMInfinite(16, 4, 20, 2)
    q, k, v, _ = draw(1, 200, 16)
    before = module(q, k, v)[:, 199]
    k[:, 4:180] += 1
    v[:, 4:180] += 1
    assert torch.equal(module(q, k, v)[:, 199], before)
    k[:, 180] += 1
    assert not torch.equal(module(q, k, v)[:, 199], before)


@STYLES
@pytest.mark.parametrize("seq", [1, 2, 63, 100])
def test_up_to_the_window_it_is_plain_causal_attention(seq: int, is_neox_style: bool) -> None:
    q, k, v, _ = draw(2, seq, 32)
    rotary = make_rotary(16, is_neox_style)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [turn(s.unflatten(-1, (2, 16)), torch.arange(seq), rotary).transpose(0, 1) for s in x]
        )

    plain = F.scaled_dot_product_attention(
        rotated(q), rotated(k), v.unflatten(-1, (2, 16)).transpose(1, 2), is_causal=True
    )
    for n_global in (0, 3, 1000):
        output = LMInfinite(32, n_global, 100, 2, is_neox_style=is_neox_style)(q, k, v)
        torch.testing.assert_close(output, plain.transpose(1, 2).flatten(-2), rtol=0, atol=EXACT)


def test_sequences_of_a_batch_are_independent() -> None:
    module = LMInfinite(16, 4, 20, 2)
    q, k, v, _ = draw(3, 100, 16)
    together = module(q, k, v)
    for row in range(3):
        alone = module(q[row : row + 1], k[row : row + 1], v[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=EXACT)


def test_settings_reach_the_scores() -> None:
    module = LMInfinite(16, 4, 30, 2, n_local=20, rope_theta=500, scale=0.7)
    assert module.pattern.n_local == 20
    assert module.pattern.distance_limit == 30
    q, k, v, _ = draw(1, 100, 16)
    torch.testing.assert_close(module(q, k, v), oracle(module, q, k, v), rtol=0, atol=EXACT)
    other = LMInfinite(16, 4, 30, 2, n_local=20)
    assert other.scale == 8**-0.5
    assert (module(q, k, v) - other(q, k, v)).abs().max() > 0.1


def test_positions_stay_exact_in_float32() -> None:
    """A text that repeats itself reads the same after 50 000 tokens. Angles from a float32 product
    are off by 2e-3 rad there."""
    period, seq = 500, 50_000
    module = LMInfinite(8, 10, 64)
    q, k, v = (x.float().repeat(1, seq // period, 1) for x in draw(1, period, 8)[:3])
    with torch.inference_mode():
        output = module(q, k, v)
    torch.testing.assert_close(
        output[:, -period:], output[:, period : 2 * period], rtol=0, atol=CLOSE
    )


def test_casting_the_module_does_not_round_its_angles() -> None:
    q, k, v = (x.float() for x in draw(1, 3000, 16)[:3])
    module = LMInfinite(16, 4, 20, 2)
    before = module(q, k, v)
    assert torch.equal(module.to(torch.bfloat16)(q, k, v), before)


def test_autocast_leaves_the_dtype_alone() -> None:
    """Otherwise the forward would compute in another dtype than the backward."""
    module = LMInfinite(16, 4, 20, 2)
    inputs = draw(1, 100, 16)
    plain = with_gradients(module, *inputs, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(module, *inputs, dtype=torch.float32)
    for x, y in zip(cast, plain, strict=True):
        assert torch.equal(x, y)


def test_compiles_as_one_graph() -> None:
    module = LMInfinite(16, 4, 20, 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for seq in (10, 100):
        inputs = draw(2, seq, 16)
        actual = with_gradients(compiled, *inputs, dtype=torch.float32)
        expected = with_gradients(module, *inputs, dtype=torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "seq_first", "expanded"])
def test_operator_is_sound(layout: str) -> None:
    """Schema, autograd registration, and shapes and strides of the fake version."""
    inputs = [torch.randn(2, 30, 2, 8) for _ in range(3)]
    if layout == "seq_first":
        inputs = [torch.randn(30, 2, 2, 8).transpose(0, 1) for _ in range(3)]
    if layout == "expanded":
        inputs = [torch.randn(1, 30, 2, 8).expand(2, -1, -1, -1) for _ in range(3)]
    qkv = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.lminf.tiled_attention, (*qkv, 3, 10, 12, 1e4, True, 0.3))


def test_no_memory_on_the_meta_device() -> None:
    q, k, v = torch.empty(3, 4, 10**9, 16, device="meta")
    assert LMInfinite(16, 4, 20, 2)(q, k, v).shape == (4, 10**9, 16)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=str)
def test_nothing_of_nothing(shape: tuple[int, ...]) -> None:
    qkv = [torch.empty(shape, requires_grad=True) for _ in range(3)]
    output = LMInfinite(8, 2, 4)(*qkv)
    output.sum().backward()
    assert output.shape == shape
    assert all(x.grad is not None and x.grad.shape == shape for x in qkv)


def test_there_is_no_state() -> None:
    module = LMInfinite(16, 4, 20, 2, is_neox_style=False)
    assert not module.state_dict()
    assert not list(module.parameters())
    q, k, v, _ = draw(1, 60, 16)
    copy = pickle.loads(pickle.dumps(module))
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(q, k, v), module(q, k, v))
    assert repr(copy) == repr(module)
    assert "n_global=4, n_local=20, distance_limit=20" in repr(module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_on_cuda(shape: tuple[int, ...]) -> None:
    module = build(shape)
    inputs = draw(*shape[:3])
    on_device = with_gradients(module, *(x.cuda() for x in inputs), dtype=torch.float64)
    expected = with_gradients(module, *inputs, dtype=torch.float64)
    assert max(errors([x.cpu() for x in on_device], expected)) <= EXACT


class TestMemory:
    PEAKS = """
import re, torch
from vllm_lminf import LMInfinite

torch.set_num_threads(1)

def peak():
    # getrusage would begin with the peak of the process that started this one.
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

def run(seq):
    q, k, v = (torch.randn(1, seq, 256, requires_grad=True) for _ in range(3))
    module(q, k, v).sum().backward()

module = LMInfinite(256, 10, 64, num_heads=2)
run(128)
before = peak()
for seq in (2048, 4096, 8192):
    run(seq)
    print(peak() - before)
"""

    def test_grows_with_the_length_and_no_faster(self) -> None:
        """The peak of both passes, as the system sees it. A single matrix of seq × seq scores for
        the two heads would take 512 MiB at the last length, and four times as much per doubling."""
        # So that memory goes back to the system when it is freed, and a peak is one of use.
        output = run_python(self.PEAKS, MALLOC_MMAP_THRESHOLD_="1000000")
        peaks = [int(line) for line in output.split()]
        assert peaks[1] <= 2.3 * peaks[0]
        assert peaks[2] <= 2.3 * peaks[1]
        # q, k, v, the output and the gradients of q, k and v, and as much again to spare.
        assert peaks[2] <= 14 * 8192 * 256 * 4

    def test_between_the_passes_only_the_inputs_are_kept(self) -> None:
        qkv = [x.requires_grad_() for x in draw(2, 300, 16)[:3]]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            LMInfinite(16, 4, 20, 2)(*qkv)
        assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in qkv]


class TestImport:
    def test_without_vllm_and_no_sooner_than_asked_for(self) -> None:
        run_python(
            "import sys; sys.modules['vllm'] = None\n"
            "import vllm_lminf\n"
            "assert not {'torch', 'numpy', 'vllm_lminf.nn'} & sys.modules.keys()\n"
            "from vllm_lminf import LMInfinite\n"
            "loaded = {m for m in sys.modules if m.startswith('vllm_lminf.')}\n"
            "assert loaded == {'vllm_lminf.nn', 'vllm_lminf.pattern', 'vllm_lminf.rope'}, loaded\n"
            "import torch\n"
            "x = torch.randn(3, 1, 40, 16, requires_grad=True)\n"
            "LMInfinite(16, 2, 8)(*x).sum().backward()\n"
            "assert x.grad.isfinite().all()\n"
        )

    def test_is_the_class(self) -> None:
        assert vllm_lminf.LMInfinite is nn.LMInfinite
        assert vllm_lminf.__all__ == ["LMInfinite"]

    def test_other_names_are_unknown(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'LMInfinity'"):
            _ = vllm_lminf.LMInfinity


GOOD = {"d_model": 16, "n_global": 4, "l_pretrain": 20, "num_heads": 2}


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            ({"d_model": 15}, "d_model is 15: it must be a multiple of num_heads, which is 2"),
            ({"d_model": 6}, "so heads have 3 dimensions: it must be an even number"),
            ({"d_model": 0}, "d_model is 0: it must be a whole number, 1 or more"),
            ({"d_model": 16.0}, "d_model is 16.0: it must be a whole number, 1 or more"),
            ({"num_heads": 0}, "num_heads is 0: it must be a whole number, 1 or more"),
            ({"num_heads": True}, "num_heads is True: it must be a whole number"),
            ({"n_global": -1}, "n_global is -1: it must be a whole number, 0 or more"),
            ({"n_global": 1.5}, "n_global is 1.5: it must be a whole number, 0 or more"),
            ({"n_global": None}, "n_global is None: it must be a whole number, 0 or more"),
            ({"l_pretrain": 0}, "l_pretrain is 0: it must be a whole number, 1 or more"),
            ({"l_pretrain": "20"}, "l_pretrain is '20': it must be a whole number, 1 or more"),
            ({"n_local": 0}, "n_local is 0: it must be a whole number, 1 or more"),
            ({"n_global": 10**19}, "n_global is 10000000000000000000: it must be a whole number"),
            ({"n_global": 2**31}, "0 or more, and 2147483647 at most"),
            ({"distance_limit": 2**64}, "distance_limit is 18446744073709551616: it must be"),
            ({"rope_theta": 10**400}, "it must be a finite number above 0"),
            ({"n_local": 21}, "distance_limit is 20, below n_local, which is 21"),
            ({"distance_limit": 19}, "distance_limit is 19, below n_local, which is 20"),
            ({"distance_limit": 2.5}, "distance_limit is 2.5: it must be a whole number"),
            ({"rope_theta": 0}, "rope_theta is 0: it must be a finite number above 0"),
            ({"rope_theta": math.inf}, "rope_theta is inf: it must be a finite number above 0"),
            ({"rope_theta": None}, "rope_theta is None: it must be a finite number above 0"),
            ({"scale": -1.0}, "scale is -1.0: it must be a finite number above 0"),
            ({"scale": math.nan}, "scale is nan: it must be a finite number above 0"),
        ],
        ids=str,
    )
    def test_argument(self, wrong: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match="LMInfinite can't be built") as refusal:
            LMInfinite(**GOOD | wrong)
        assert reason in str(refusal.value)
        assert "; " not in str(refusal.value), "one argument is wrong, and one reason is enough"

    def test_every_wrong_argument_is_named(self) -> None:
        with pytest.raises(ValueError, match="can't be built") as refusal:
            LMInfinite(0, -1, 0, 0, n_local=-5, distance_limit=-6, rope_theta=-7, scale=-8)
        for name in ("d_model", "n_global", "l_pretrain", "num_heads", "n_local", "distance_limit"):
            assert f"{name} is " in str(refusal.value)
        assert "rope_theta is -7" in str(refusal.value)
        assert "scale is -8" in str(refusal.value)

    @pytest.mark.parametrize(
        ("name", "wrong", "reason"),
        [
            ("q", torch.zeros(5, 16), "q has the shape [5, 16]: it must be [batch, seq, 16]"),
            ("k", torch.zeros(1, 5, 17), "k has the shape [1, 5, 17]: it must be [batch, seq, 16]"),
            ("v", torch.zeros(1, 5, 2, 8), "v has the shape [1, 5, 2, 8]"),
            ("k", torch.zeros(1, 4, 16), "shapes differ: q has [1, 5, 16], k has [1, 4, 16]"),
            ("v", torch.zeros(2, 5, 16), "v has [2, 5, 16]"),
            ("q", torch.zeros(1, 5, 16).long(), "q is torch.int64: it must be one of torch.float"),
            ("k", torch.zeros(1, 5, 16).double(), "dtypes differ: q is torch.float32, k is"),
            ("v", torch.zeros(1, 5, 16, device="meta"), "devices differ: q is on cpu, k is on cpu"),
        ],
        ids=str,
    )
    def test_tensor(self, name: str, wrong: torch.Tensor, reason: str) -> None:
        inputs = {x: torch.zeros(1, 5, 16) for x in "qkv"} | {name: wrong}
        with pytest.raises(ValueError, match="LMInfinite can't attend") as refusal:
            LMInfinite(**GOOD)(**inputs)
        assert reason in str(refusal.value)

    def test_every_wrong_tensor_is_named(self) -> None:
        with pytest.raises(ValueError, match="can't attend") as refusal:
            LMInfinite(**GOOD)(torch.zeros(5), torch.zeros(1, 5, 8).long(), torch.zeros(1, 5, 16))
        for reason in ("q has the shape [5]", "k has the shape [1, 5, 8]", "k is torch.int64"):
            assert reason in str(refusal.value)
