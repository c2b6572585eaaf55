"""The Triton kernel against losses.py in Triton's interpreter.

Run by test_triton.py in a process of its own (TRITON_INTERPRET=1).
"""

import pytest
import torch

from tests.kernels.heads_oracle import compare_heads
from tests.kernels.kernel_oracle import assert_same, by_kernel, by_oracle, make_case
from trainer.kernels import KernelChoice, StepContext
from trainer.kernels.gradients import split_noted

SLOT_WISE = ("W_enc", "b_enc", "W_dec", "threshold", "perp_weight", "dead")


@pytest.fixture(scope="module")
def kernel():
    return KernelChoice("triton", [1]).runs(0, True)[0][0]


@pytest.mark.parametrize(
    "shape,decoder_norm",
    [((1, 1, 1), "free"), ((5, 6, 1), "unit"), ((7, 37, 6), "free"), ((5, 6, 150), "unit"), ((35, 9, 0), "free")],
)
def test_matches_the_oracle_in_fp32(kernel, shape, decoder_norm):
    case = make_case(*shape, bias=-1.0, decoder_norm=decoder_norm)
    assert_same(by_kernel(kernel, case), by_oracle(case), 5e-5)


@pytest.mark.parametrize(
    "threshold,decoder_norm,bf16",
    [
        pytest.param((0.0, 2.0), "unit", True, marks=pytest.mark.slow),
        ((50.0, 90.0), "free", False),
        ((0.0, 1.0), "unit", False),
    ],
)
def test_thresholds(kernel, threshold, decoder_norm, bf16):
    case = make_case(5, 18, 2, bias=-0.2, decoder_norm=decoder_norm, threshold=threshold)
    assert_same(by_kernel(kernel, case, bf16=bf16), by_oracle(case), 4e-3 if bf16 else 5e-5)


@pytest.mark.parametrize(
    "shape,decoder_norm,ends",
    [((7, 20, 3), "free", (0.0, 2.0)), ((6, 17, 0), "unit", (0.3, 1.0)), ((3, 9, 2), "free", (50.0, 90.0))],
)
def test_thresholds_that_are_trained(kernel, shape, decoder_norm, ends):
    """Entries in the window below a threshold count for its gradient alone; every third slot is dead and pulled."""
    case = make_case(*shape, decoder_norm=decoder_norm, threshold=ends, bandwidth=0.5)
    assert_same(by_kernel(kernel, case), by_oracle(case), 5e-5)


@pytest.mark.slow
def test_banks_of_two_sizes_with_trained_thresholds(kernel):
    """The places that a smaller bank leaves empty have no part in anything."""
    case = make_case(6, 11, 0, threshold=(0.0, 2.0), bandwidth=0.5)
    W_enc, b_enc, W_dec, threshold, recon, _ = leaves = case.leaves()
    whole = case.bank(W_enc, b_enc, W_dec, threshold)
    parts = [
        whole._replace(
            **{n: getattr(whole, n)[c].detach().requires_grad_(n not in ("perp_weight", "dead")) for n in SLOT_WISE}
        )
        for c in (slice(0, 7), slice(7, 11))
    ]
    out, sp, _, pull = kernel(parts, recon, StepContext(case.x, None, None))
    (out.square().sum() + 0.3 * sp + 0.4 * pull).backward()
    found = {n: [getattr(part, n).grad for part in parts] for n in ("W_enc", "b_enc", "W_dec", "threshold")}
    squares, rest = split_noted([g for name in ("W_enc", "b_enc", "W_dec") for g in found[name]])
    assert not rest
    one, one_sp, _, one_pull = kernel([whole], recon, StepContext(case.x, None, None))
    (one.square().sum() + 0.3 * one_sp + 0.4 * one_pull).backward()
    for name, leaf, square in zip(found, leaves, [*squares, None], strict=False):
        assert leaf.grad is not None
        torch.testing.assert_close(torch.cat(found[name]), leaf.grad)
        if square is not None:
            torch.testing.assert_close(float(square), float(leaf.grad.double().square().sum()))


@pytest.mark.slow
def test_trained_thresholds_in_bf16(kernel):
    case = make_case(9, 20, 2, threshold=(0.0, 2.0), bandwidth=0.5)
    assert_same(by_kernel(kernel, case, bf16=True), by_oracle(case), 4e-3)


@pytest.mark.parametrize("bias", [-9.0, pytest.param(9.0, marks=pytest.mark.slow)], ids=["all dead", "all active"])
def test_banks_at_the_ends(kernel, bias):
    """All active: more entries than the first attempt has room for."""
    case = make_case(8, 12, 3, bias=bias)
    assert_same(by_kernel(kernel, case), by_oracle(case), 5e-5)


@pytest.mark.slow
def test_bf16_products(kernel):
    case = make_case(12, 20, 4, width=80, bias=-1.5)
    assert_same(by_kernel(kernel, case, bf16=True), by_oracle(case), 4e-3)


def test_a_rank_without_rows(kernel):
    figures = by_kernel(kernel, make_case(0, 6, 2))
    assert figures["sp"] == 0 and not figures["grad W_enc"].any()


@pytest.mark.parametrize("threshold", [None, (5.0, 9.0)])
def test_weights_that_are_not_numbers_reach_the_loss(kernel, threshold):
    case = make_case(4, 10, 0, bias=-3.0, threshold=threshold)
    case.W_enc[3, 5] = float("nan")
    *weights, recon, _ = case.leaves()
    out, *_ = kernel([case.bank(*weights)], recon, StepContext(case.x, None, None))
    assert not torch.isfinite(out).all()


@pytest.mark.parametrize(("rows", "concepts", "bf16"), [(1, 1, False), (37, 5, False), (9, 40, True)])
def test_heads_match_plain_pytorch(rows, concepts, bf16):
    compare_heads(KernelChoice("triton", [1]).heads, rows, concepts, bf16, torch.device("cpu"))
