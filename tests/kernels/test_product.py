"""The encoder product of the sparse kernel in each arithmetic: what is active is found, whatever the product is rounded to."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.kernels import native

assert native.load() is None
from trainer.kernels.sparse import in_blocks, in_int16  # noqa: E402 - needs the operators

ops = torch.ops.alignsae
HAS_INT16 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ARITHMETICS = [
    "fp32",
    pytest.param("int16", marks=pytest.mark.skipif(not HAS_INT16, reason="int16 products need AVX2")),
    pytest.param("bf16", marks=pytest.mark.skipif(not ops.low_products(), reason="this CPU has no bf16")),
]


def encode(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, arithmetic: str) -> torch.Tensor:
    """The code [B, n] from the entries that the operator finds."""
    reach = float(x.norm(dim=1).max())
    operand = {"fp32": lambda: x, "bf16": x.bfloat16, "int16": lambda: in_int16(x, reach)}[arithmetic]()
    start, row, z = ops.encode(W, b, x, in_blocks(operand), reach)
    code = torch.zeros(len(x), len(W))
    code[row.long(), torch.arange(len(W)).repeat_interleave(start.diff())] = z
    return code


def assert_finds_what_is_active(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, arithmetic: str) -> None:
    pre = x.double() @ W.double().T + b.double()
    # What fp32 may be off by, of which the pre-activations themselves are not free.
    noise = 1e-5 * x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + 1e-6 * b.abs().double()
    found = encode(W, b, x, arithmetic).double()
    assert ((found - pre.clamp_min(0)).abs() <= noise).all()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 70),
    slots=st.integers(1, 140),
    width=st.integers(1, 300),
    exponent_x=st.integers(-12, 12),
    exponent_w=st.integers(-12, 12),
    tail=st.floats(0, 4),
    bias=st.floats(-4, 2),
)
@example(seed=0, rows=16, slots=6, width=2, exponent_x=0, exponent_w=0, tail=0.0, bias=0.0)
def test_finds_what_is_active(
    arithmetic: str,
    seed: int,
    rows: int,
    slots: int,
    width: int,
    exponent_x: int,
    exponent_w: int,
    tail: float,
    bias: float,
) -> None:
    """All sizes and scales, and rows and weights of very unequal norms and with a few very large numbers (`tail`)."""
    g = torch.Generator().manual_seed(seed)

    def heavy(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * torch.exp(tail * torch.randn(*shape, generator=g))

    x, W = heavy(rows, width) * 10.0**exponent_x, heavy(slots, width) * 10.0**exponent_w
    b = bias * (x.norm(dim=1).mean() * W.norm(dim=1)) / width**0.5
    if arithmetic == "bf16":
        # bf16 allows for rounding that spreads over all numbers of a row, so it is not asked for rows of a few large ones.
        x, W = x.sign(), W.sign()
        b = bias * width**0.5 * torch.ones(slots)
    assert_finds_what_is_active(W, b, x, arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("width", [1, 2, 15, 768, 5000])
@pytest.mark.parametrize("direction", ["ones", "one number", "random"])
def test_the_largest_sums(arithmetic: str, width: int, direction: str) -> None:
    """Rows along the weights, where all products of a sum are positive, and against them."""
    w = {"ones": torch.ones(width), "one number": torch.eye(1, width)[0], "random": torch.randn(width)}[direction]
    W = torch.outer(torch.tensor([1.0, -1.0, 3.0, 1e-4, 1e4, -2.0, 0.5]), w)
    assert_finds_what_is_active(W, -0.25 * W.norm(dim=1) * w.norm(), torch.stack([w, 0.5 * w, -w]), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("zero", ["rows", "weights", "both"])
def test_zero_rows_and_weights(arithmetic: str, zero: str) -> None:
    """The biases decide alone."""
    x, W = torch.randn(20, 30), torch.randn(9, 30)
    for tensor in {"rows": [x], "weights": [W], "both": [x, W]}[zero]:
        tensor.zero_()
    b = torch.tensor([-1.0, 0.0, 1.0, -1e-30, 1e-30, -1e30, 1e30, 0.5, -0.5])
    assert torch.equal(encode(W, b, x, arithmetic), b.clamp_min(0).expand(20, 9))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["a row", "a weight", "a bias"])
def test_what_is_not_finite_is_found(arithmetic: str, value: float, where: str) -> None:
    x, W, b = torch.randn(20, 30), torch.randn(9, 30), torch.full((9,), -8.0)
    {"a row": x[7], "a weight": W[3], "a bias": b[3:]}[where][0] = value
    pre = x @ W.T + b
    found = encode(W, b, x, arithmetic)
    expected = torch.where(pre > 0, pre, torch.where(pre.isnan(), pre, 0.0))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
