"""Every kernel against losses.py: value and gradient, odd sizes, all densities, several data ranks."""

import threading
from dataclasses import replace

import pytest
import torch

from tests.kernels.kernel_oracle import Case, assert_same, by_kernel, by_oracle, make_case
from trainer.dictionary import apply_gate, steps
from trainer.kernels import KernelChoice, Orthogonality, RowPairs, RunKernel, StepContext

FP32 = 2e-5
# bf16 keeps 8 bits: rows of products are off by about 2^-9 each, and entries near 0 change sides.
BF16 = {"dense": 3e-2, "sparse": 1e-3}
SHAPES = [(1, 1, 1), (1, 70, 3), (5, 6, 1), (33, 130, 6), (64, 6, 1500), (130, 1, 2), (40, 257, 0)]
KERNELS = ("dense", "sparse")


def kernel_named(name: str) -> RunKernel:
    return KernelChoice(name, [1]).runs(0, True)[0][0]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [-2.0, -0.5, 0.5])
def test_matches_the_oracle_in_fp32(name: str, decoder_norm: str, shape: tuple[int, int, int], bias: float) -> None:
    case = make_case(*shape, bias=bias, decoder_norm=decoder_norm)
    # With 1,500 concepts a column with one active entry gets a small difference of large sums, in any fp32 arithmetic.
    tolerance = FP32 if shape[2] < 100 else 1e-4
    assert_same(by_kernel(kernel_named(name), case), by_oracle(case), tolerance)


class Always(RowPairs):
    """Pairs of rows whatever they cost."""

    def cheaper(self, per_slot: torch.Tensor) -> bool:
        return True


THRESHOLDS = {
    "some": (0.0, 2.0),
    "high": (1.5, 3.0),
    "out of reach": (50.0, 90.0),
    "zero": (0.0, 0.0),
    "signs": (-1.0, 1.0),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_thresholds(name: str, decoder_norm: str, shape: tuple[int, int, int], threshold: tuple[float, float]) -> None:
    case = make_case(*shape, bias=-0.2, decoder_norm=decoder_norm, threshold=threshold)
    assert_same(by_kernel(kernel_named(name), case), by_oracle(case), FP32 if shape[2] < 100 else 1e-4)


TRAINED = {
    "narrow": (0.0, 2.0, 1e-2),
    "wide": (0.5, 2.0, 1.5),
    "all around": (0.0, 0.3, 9.0),
    "dead": (50.0, 90.0, 1.0),
}


@pytest.mark.parametrize("pairs", [None, Always], ids=["columns", "pairs"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 1), (33, 130, 6), (40, 257, 0)])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_thresholds_that_are_trained(
    name: str,
    decoder_norm: str,
    shape: tuple[int, int, int],
    trained: tuple[float, float, float],
    pairs: type[RowPairs] | None,
) -> None:
    """The pseudo-gradient of thresholds, and the term that pulls dead slots towards them."""
    *ends, bandwidth = trained
    case = make_case(*shape, decoder_norm=decoder_norm, threshold=(ends[0], ends[1]), bandwidth=bandwidth)
    expected = by_oracle(case)
    assert expected["pull"] > 0 or shape[0] == 1
    assert_same(by_kernel(kernel_named(name), case, pairs=pairs), expected, FP32)


def test_the_pseudo_gradient_of_a_threshold_by_hand() -> None:
    """Rows at -0.1, 0.1 and 0.3 of the threshold 1 with a bandwidth of 0.5: the first two are in the window."""
    pre, threshold = torch.tensor([[0.9], [1.1], [1.3]]), torch.tensor([1.0], requires_grad=True)
    slopes = torch.tensor([[2.0], [3.0], [5.0]])
    (apply_gate(pre, threshold, 0.5) * slopes).sum().backward()
    assert threshold.grad == pytest.approx(-(1.0 / 0.5) * (2.0 + 3.0))
    threshold.grad = None
    assert steps(pre, threshold, 0.5).flatten().tolist() == [0.0, 1.0, 1.0]
    steps(pre, threshold, 0.5).sum().backward()
    assert threshold.grad == pytest.approx(-2 / 0.5)


@pytest.mark.parametrize("name", KERNELS)
def test_thresholds_that_are_held_get_no_gradient(name: str) -> None:
    case = make_case(20, 60, 2, threshold=(0.0, 2.0), bandwidth=0.5)
    W_enc, b_enc, W_dec, threshold, recon, _ = case.leaves()
    with torch.no_grad():
        out, sp, _, pull = kernel_named(name)(
            [case.bank(W_enc, b_enc, W_dec, threshold)], recon, StepContext(case.x, None, None)
        )
    expected = by_oracle(case)
    torch.testing.assert_close(out.double(), expected["recon"].detach(), rtol=1e-5, atol=1e-5)
    assert sp == expected["active"] and pull.item() == pytest.approx(expected["pull"].item(), rel=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_no_threshold_is_a_threshold_of_zero(name: str) -> None:
    case = make_case(40, 90, 3, bias=-1.0)
    without = by_kernel(kernel_named(name), case)
    case.threshold = torch.zeros(90)
    found = by_kernel(kernel_named(name), case)
    for figure, value in without.items():
        assert torch.equal(found[figure], value), figure


@pytest.mark.parametrize("name", KERNELS)
def test_one_threshold_for_all_slots_may_come_expanded(name: str) -> None:
    case = make_case(40, 90, 3)
    case.threshold = torch.tensor(0.7).expand(90)
    assert_same(by_kernel(kernel_named(name), case), by_oracle(case), FP32)


@pytest.mark.parametrize("threshold", [(0.0, 2.0), (1.0, 3.0)])
@pytest.mark.parametrize("name", KERNELS)
def test_thresholds_with_bf16_products(name: str, threshold: tuple[float, float]) -> None:
    """An entry that the dense kernel's rounding moves over its threshold appears or disappears as a whole."""
    case = make_case(96, 300, 6, width=160, threshold=threshold)
    assert_same(by_kernel(kernel_named(name), case, bf16=True), by_oracle(case), {"dense": 1e-1, "sparse": 1e-3}[name])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_an_entry_on_its_threshold_is_idle_and_one_at_zero_may_be_active(name: str, bf16: bool) -> None:
    """z = pre where pre > threshold, to the letter."""
    W = torch.eye(4)
    case = Case(W, torch.zeros(4), W, torch.zeros(1, 4), torch.tensor([[2.0, 2.0, 0.0, -1.0]]), torch.zeros(1, 0))
    case.threshold = torch.tensor([2.0, 1.0, -1.0, -2.0])
    found = by_kernel(kernel_named(name), case, bf16=bf16)
    assert found["recon"].tolist() == [[0.0, 2.0, 0.0, -1.0]]
    assert found["active"] == 3
    assert (found["grad b_enc"] != 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bias", [-9.0, 9.0], ids=["all dead", "all active"])
@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_banks_at_the_ends(name: str, bias: float, decoder_norm: str) -> None:
    case = make_case(48, 100, 5, bias=bias, decoder_norm=decoder_norm)
    expected = by_oracle(case)
    assert expected["active"] in (0, 4800)
    assert_same(by_kernel(kernel_named(name), case), expected, FP32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bias", [-3.0, -2.0, -1.5, -1.0, 0.0])
def test_bf16_products(name: str, bias: float) -> None:
    case = make_case(96, 300, 6, width=160, bias=bias)
    assert_same(by_kernel(kernel_named(name), case, bf16=True), by_oracle(case), BF16[name])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rows", [1, 31, 32, 63, 64, 65, 97, 128, 2100])
@pytest.mark.parametrize("width", [1, 7, 33, 64])
def test_blocks_of_the_sparse_product(bf16: bool, rows: int, width: int) -> None:
    """Rows and widths around the sizes of its blocks, and more rows than a full chunk of slots is for."""
    case = make_case(rows, 150, 2, width=width, bias=-1.5, seed=1)  # of seed 0 one entry lies within fp32 rounding of 0
    assert_same(by_kernel(kernel_named("sparse"), case, bf16=bf16), by_oracle(case), BF16["sparse"] if bf16 else FP32)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own switch warns of another of its settings
@pytest.mark.parametrize("bf16", [False, True])
def test_sparse_without_onednn(bf16: bool) -> None:
    """As on processors that torch has no block product for."""
    case = make_case(70, 150, 2, width=33, bias=-1.5)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same(by_kernel(kernel_named("sparse"), case, bf16=bf16), by_oracle(case), FP32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_rank_without_rows(name: str, bf16: bool) -> None:
    case = make_case(0, 50, 4)
    figures = by_kernel(kernel_named(name), case, bf16=bf16)
    assert figures["recon"].shape == (0, 24)
    assert figures["sp"] == 0 and figures["active"] == 0
    for part in ("grad W_enc", "grad b_enc", "grad W_dec"):
        assert not figures[part].any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("concepts", [1, 6])
def test_correlations_are_those_of_all_data_ranks(name: str, concepts: int) -> None:
    """Two ranks with unequal rows: the sum of their gradients is the gradient over all rows."""
    case = make_case(50, 90, concepts, bias=-1.0)
    halves = [slice(0, 20), slice(20, 50)]
    ranks = Ranks(len(halves))

    def work(rank: int) -> dict[str, torch.Tensor]:
        h = halves[rank]
        part = replace(case, recon=case.recon[h], x=case.x[h], z_concept=case.z_concept[h])
        return by_kernel(kernel_named(name), part, reduce=ranks.reduce)

    first, second = ranks.run(work)
    joined = {
        key: torch.cat([first[key], second[key]])
        if key in ("recon", "grad recon", "grad z_concept")
        else first[key] + second[key]
        for key in first
    }
    joined["perp"] = first["perp"]
    assert_same(joined, by_oracle(case), FP32)


class Ranks:
    """Threads that stand for data ranks, with a sum over them."""

    def __init__(self, count: int):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.parts: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.parts.append(tensor.detach().clone())
        self.barrier.wait()
        total = torch.stack(self.parts).sum(dim=0)
        if self.barrier.wait() == 0:
            self.parts.clear()
        self.barrier.wait()
        return tensor.copy_(total)

    def run(self, work):
        results = [None] * self.count
        threads = [threading.Thread(target=lambda r=r: results.__setitem__(r, work(r))) for r in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2]])
@pytest.mark.parametrize("bias", [-9.0, -2.0, -0.5, 9.0])
@pytest.mark.parametrize("threshold", [None, (0.0, 1.0)])
def test_correlations_over_pairs_of_rows(
    decoder_norm: str, shape: tuple[int, int, int], bias: float, threshold: tuple[float, float] | None
) -> None:
    case = make_case(*shape, bias=bias, decoder_norm=decoder_norm, threshold=threshold)
    found = by_kernel(kernel_named("sparse"), case, pairs=Always)
    # Where all rows are active the sums over pairs are small differences too.
    assert_same(found, by_oracle(case), FP32 if shape[2] < 100 and bias < 0 else 1e-4)


@pytest.mark.parametrize("concepts", [6, 1000])
def test_correlations_over_pairs_of_rows_in_bf16(concepts: int) -> None:
    """The two products of a step round; the rest of the term is fp32."""
    case = make_case(96, 300, concepts, width=160, bias=-2.0)
    assert_same(by_kernel(kernel_named("sparse"), case, bf16=True, pairs=Always), by_oracle(case), 2e-2)


@pytest.mark.parametrize("rows,bias,taken", [(64, -3.0, False), (64, -1.0, True), (64, 1.5, False), (150, -1.0, False)])
def test_pairs_of_rows_are_taken_where_they_cost_less(rows: int, bias: float, taken: bool) -> None:
    """Too few active entries for dense products, enough, slots active on too many rows, and more pairs than [n, R]."""
    used = []

    class Watched(RowPairs):
        def cheaper(self, per_slot: torch.Tensor) -> bool:
            used.append(super().cheaper(per_slot))
            return used[-1]

    case = make_case(rows, 200, 100, bias=bias)
    found = by_kernel(kernel_named("sparse"), case, pairs=Watched)
    assert used == [taken]
    assert_same(found, by_oracle(case), FP32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("threshold", [None, (5.0, 9.0)])
def test_weights_that_are_not_numbers_reach_the_loss(name: str, threshold: tuple[float, float] | None) -> None:
    case = make_case(8, 20, 0, bias=-3.0, threshold=threshold)
    case.W_enc[3, 5] = float("nan")
    *weights, recon, _ = case.leaves()
    out, *_ = kernel_named(name)([case.bank(*weights)], recon, StepContext(case.x, case.x.bfloat16(), None))
    assert not torch.isfinite(out).all()


@pytest.mark.parametrize("name", KERNELS)
def test_two_backward_passes_add_up(name: str) -> None:
    """Gradient accumulation: the buffers of the first pass are still in use in the second."""
    case = make_case(30, 64, 3, bias=-1.0)
    W_enc, b_enc, W_dec, threshold, recon, z_concept = case.leaves()
    grads = []
    for _ in range(2):
        orthogonality = Orthogonality.standardise(z_concept.detach(), torch.tensor(30.0), lambda t: t)
        context = StepContext(case.x, None, orthogonality)
        out, sp, perp, _ = kernel_named(name)([case.bank(W_enc, b_enc, W_dec, threshold)], recon, context)
        (out.square().sum() + sp + perp).backward()
        grads.append([t.grad.clone() for t in (W_enc, b_enc, W_dec) if t.grad is not None])
    for once, twice in zip(*grads, strict=True):
        torch.testing.assert_close(twice, 2 * once)
