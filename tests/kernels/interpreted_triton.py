"""The Triton kernel against losses.py in Triton's interpreter.

Run by test_triton.py in a process of its own (TRITON_INTERPRET=1).
"""

import pytest
import torch

from tests.kernels.kernel_oracle import assert_same, by_kernel, by_oracle, make_case
from trainer.kernels import KernelChoice, StepContext


@pytest.fixture(scope="module")
def kernel():
    return KernelChoice("triton", [1]).kernels()[0]


@pytest.mark.parametrize(
    "shape,decoder_norm",
    [((1, 1, 1), "free"), ((5, 6, 1), "unit"), ((9, 70, 6), "free"), ((5, 6, 150), "unit"), ((6, 65, 0), "free")],
)
def test_matches_the_oracle_in_fp32(kernel, shape, decoder_norm):
    case = make_case(*shape, bias=-1.0, decoder_norm=decoder_norm)
    assert_same(by_kernel(kernel, case), by_oracle(case), 5e-5)


@pytest.mark.parametrize(
    "threshold,decoder_norm,bf16",
    [
        ((0.0, 2.0), "unit", True),
        ((50.0, 90.0), "free", False),
        ((0.0, 1.0), "unit", False),
    ],
)
def test_thresholds(kernel, threshold, decoder_norm, bf16):
    case = make_case(5, 66, 2, bias=-0.2, decoder_norm=decoder_norm, threshold=threshold)
    assert_same(by_kernel(kernel, case, bf16=bf16), by_oracle(case), 1e-3 if bf16 else 5e-5)


@pytest.mark.parametrize("bias", [-9.0, 9.0], ids=["all dead", "all active"])
def test_banks_at_the_ends(kernel, bias):
    """All active: more entries than the first attempt has room for."""
    case = make_case(8, 40, 3, bias=bias)
    assert_same(by_kernel(kernel, case), by_oracle(case), 5e-5)


def test_bf16_products(kernel):
    case = make_case(16, 66, 4, width=80, bias=-1.5)
    assert_same(by_kernel(kernel, case, bf16=True), by_oracle(case), 1e-3)


def test_a_rank_without_rows(kernel):
    figures = by_kernel(kernel, make_case(0, 20, 2))
    assert figures["sp"] == 0 and not figures["grad W_enc"].any()


@pytest.mark.parametrize("threshold", [None, (5.0, 9.0)])
def test_weights_that_are_not_numbers_reach_the_loss(kernel, threshold):
    case = make_case(4, 10, 0, bias=-3.0, threshold=threshold)
    case.W_enc[3, 5] = float("nan")
    W_enc, b_enc, W_dec, recon, _ = case.leaves()
    out, _, _ = kernel(case.bank(W_enc, b_enc, W_dec), recon, StepContext(case.x, None, None))
    assert not torch.isfinite(out).all()
