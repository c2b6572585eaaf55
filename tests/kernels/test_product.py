"""The encoder product in each arithmetic: what is active is found, whatever the product is rounded to."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.dictionary import apply_gate
from trainer.kernels import native

assert native.load() is None
from trainer.kernels.sparse import in_blocks, in_int16  # noqa: E402 - needs the operators

ops = torch.ops.alignsae
HAS_INT16 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ARITHMETICS = [
    "fp32",
    pytest.param("int16", marks=pytest.mark.skipif(not HAS_INT16, reason="int16 products need AVX2")),
    pytest.param("bf16", marks=pytest.mark.skipif(not ops.bf16_products(), reason="this CPU has no bf16")),
]


def encode(
    W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, arithmetic: str, threshold: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The code [B, n] from the entries that the operator finds, and where there is an entry."""
    largest = float(x.norm(dim=1).max())
    operand = {"fp32": lambda: x, "bf16": x.bfloat16, "int16": lambda: in_int16(x, largest)}[arithmetic]()
    start, row, z = ops.encode(W, b, threshold, 0.0, x, in_blocks(operand), largest)
    code, found = torch.zeros(len(x), len(W)), torch.zeros(len(x), len(W), dtype=torch.bool)
    place = row.long(), torch.arange(len(W)).repeat_interleave(start.diff())
    code[place], found[place] = z, True
    return code, found


def assert_finds_what_is_active(
    W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, arithmetic: str, threshold: torch.Tensor | None = None
) -> None:
    pre = x.double() @ W.double().T + b.double()
    theta = torch.zeros_like(b) if threshold is None else threshold
    # What fp32 may be off by, of which the pre-activations themselves are not free.
    noise = 1e-5 * x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
    noise = noise + 1e-6 * (b.abs() + theta.abs()).double()
    code, found = encode(W, b, x, arithmetic, threshold)
    above = pre - theta.double()
    assert found[above > noise].all()
    assert not found[above < -noise].any()
    assert ((code.double() - pre).abs() <= noise)[found].all()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@settings(deadline=None)  # the first call of an operator takes longer than all others
@given(
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 300)),
    exponents=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
    tail=st.floats(0, 4),
    bias=st.floats(-4, 2),
    thresholds=st.none() | st.tuples(st.floats(-2, 4), st.floats(0, 3), st.sampled_from([0.0, 1.0, 1e6])),
)
@example(seed=0, sizes=(16, 6, 2), exponents=(0, 0), tail=0.0, bias=0.0, thresholds=None)
@example(seed=0, sizes=(16, 6, 2), exponents=(0, 0), tail=0.0, bias=0.0, thresholds=(2.0, 0.0, 1.0))
def test_finds_what_is_active(
    arithmetic: str,
    seed: int,
    sizes: tuple[int, int, int],
    exponents: tuple[int, int],
    tail: float,
    bias: float,
    thresholds: tuple[float, float, float] | None,
) -> None:
    """All sizes and scales, and rows and weights of very unequal norms and with a few very large numbers (`tail`).

    sizes: rows, slots and width. exponents: of ten, of rows and weights. thresholds: mean and spread over slots, and
    what a shift of bias and threshold alike is multiplied with.
    """
    g = torch.Generator().manual_seed(seed)
    rows, slots, width = sizes

    def heavy(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * torch.exp(tail * torch.randn(*shape, generator=g))

    x, W = heavy(rows, width) * 10.0 ** exponents[0], heavy(slots, width) * 10.0 ** exponents[1]
    b = bias * (x.norm(dim=1).mean() * W.norm(dim=1)) / width**0.5
    if arithmetic == "bf16":
        # bf16 allows for rounding that spreads over all numbers of a row, so it is not asked for rows of a few large
        # ones.
        x, W = x.sign(), W.sign()
        b = bias * width**0.5 * torch.ones(slots)
    threshold = None
    if thresholds is not None:
        # In the units of the bias; both shifted, so that what is decided by a small difference of large numbers is
        # tried too.
        mean, spread, shift = thresholds
        scale = (x.norm(dim=1).mean() * W.norm(dim=1)) / width**0.5
        threshold = scale * (mean + spread * torch.rand(slots, generator=g) + shift)
        b = b + scale * shift
    assert_finds_what_is_active(W, b, x, arithmetic, threshold)


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
    assert torch.equal(encode(W, b, x, arithmetic)[0], b.clamp_min(0).expand(20, 9))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("zero", ["rows", "weights", "both"])
def test_the_bias_is_compared_with_the_threshold_exactly(arithmetic: str, zero: str) -> None:
    x, W = torch.randn(20, 30), torch.randn(9, 30)
    for tensor in {"rows": [x], "weights": [W], "both": [x, W]}[zero]:
        tensor.zero_()
    b = torch.tensor([1.0, 1.0 + 2**-23, 1e30, 1e30, -2.0, -1.0, 0.0, 3.0, 3.0])
    threshold = torch.tensor([1.0, 1.0, 1e30, 9e29, -1.0, -2.0, -0.5, float("inf"), -float("inf")])
    code, found = encode(W, b, x, arithmetic, threshold)
    assert torch.equal(found, (b > threshold).expand(20, 9))
    assert torch.equal(code, apply_gate(b.expand(20, 9), threshold))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["a row", "a weight", "a bias"])
def test_what_is_not_finite_is_found(arithmetic: str, value: float, where: str) -> None:
    x, W, b = torch.randn(20, 30), torch.randn(9, 30), torch.full((9,), -8.0)
    {"a row": x[7], "a weight": W[3], "a bias": b[3:]}[where][0] = value
    for threshold in (None, torch.full((9,), 3.0)):
        code, _ = encode(W, b, x, arithmetic, threshold)
        torch.testing.assert_close(code, apply_gate(x @ W.T + b, threshold), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_threshold_that_is_not_a_number_lets_everything_pass(arithmetic: str) -> None:
    x, W, threshold = torch.randn(20, 30), torch.randn(9, 30), torch.zeros(9)
    threshold[4] = float("nan")
    _, found = encode(W, torch.zeros(9), x, arithmetic, threshold)
    assert found[:, 4].all()


def test_thresholds_are_one_for_each_slot() -> None:
    with pytest.raises(RuntimeError, match="one threshold for each slot"):
        encode(torch.randn(9, 30), torch.zeros(9), torch.randn(20, 30), "fp32", torch.zeros(1))
