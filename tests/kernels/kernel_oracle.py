"""One bank by losses.py and autograd, and the same by a kernel: what the kernel tests compare."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import losses
from trainer.dictionary import BankWeights, apply_gate, steps
from trainer.kernels import Orthogonality, RowPairs, RunKernel, StepContext

WEIGHTS = (1.0, 0.3, 0.7, 0.4)  # of rec, sp, perp and pull in the scalar that is differentiated


@dataclass
class Case:
    """Weights of one bank, rows, and the code of the concept slots; R = 0 means no orthogonality term.

    With a bandwidth the thresholds are trained.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    recon: Tensor
    x: Tensor
    z_concept: Tensor
    decoder_norm: str = "free"
    threshold: Tensor | None = None
    perp_weight: Tensor | None = None
    bandwidth: float = 0.0
    dead: Tensor | None = None

    def bank(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, threshold: Tensor) -> BankWeights:
        """These weights with the form of the case."""
        weight = None if self.perp_weight is None else self.perp_weight.to(W_enc.dtype)
        passed = None if self.threshold is None else threshold
        return BankWeights(W_enc, b_enc, W_dec, passed, self.decoder_norm, weight, self.bandwidth, self.dead)

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        threshold = torch.zeros_like(self.b_enc) if self.threshold is None else self.threshold
        named = (self.W_enc, self.b_enc, self.W_dec, threshold, self.recon, self.z_concept)
        return [t.detach().clone().to(dtype).requires_grad_(t is not threshold or self.bandwidth > 0) for t in named]


def make_case(
    rows: int,
    slots: int,
    concepts: int,
    *,
    width: int = 24,
    bias: float = 0.0,
    decoder_norm: str = "free",
    seed: int = 0,
    threshold: tuple[float, float] | None = None,
    bandwidth: float = 0.0,
) -> Case:
    """A random bank.

    `bias` in units of the pre-activations' standard deviation moves the density (-2 is about 2%); `threshold` are the
    ends of the range that the slots' thresholds are drawn from, in the same units; with a bandwidth they are trained
    and every third slot is dead.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g) / width**0.5
    return Case(
        W_enc=torch.randn(slots, width, generator=g),
        b_enc=bias + 0.1 * torch.randn(slots, generator=g),
        W_dec=torch.randn(slots, width, generator=g) / width**0.5,
        recon=torch.randn(rows, width, generator=g) / width**0.5,
        x=x,
        z_concept=torch.relu(torch.randn(rows, concepts, generator=g)),
        decoder_norm=decoder_norm,
        threshold=None if threshold is None else torch.empty(slots).uniform_(*threshold, generator=g),
        perp_weight=torch.rand(slots, generator=g).mul(2).sub(0.5).clamp(0, 1),
        bandwidth=bandwidth,
        dead=torch.arange(slots) % 3 == 0 if bandwidth else None,
    )


def by_oracle(case: Case) -> dict[str, Tensor]:
    """recon, sp, perp, pull and the gradients of their weighted sum, from losses.py on the whole code, in double."""
    W_enc, b_enc, W_dec, threshold, recon, z_concept = leaves = case.leaves(torch.float64)
    x = case.x.double()
    bank = case.bank(W_enc, b_enc, W_dec, threshold)
    pre = x @ W_enc.T + b_enc  # in double, where BankWeights computes in fp32
    z, decoder = apply_gate(pre, bank.threshold, case.bandwidth), bank.decoder()
    out = recon + z @ decoder
    sp = losses.sparsity(z, decoder) * len(case.x)
    pull = z.new_zeros(())
    if case.bandwidth and case.dead is not None:
        sp = steps(pre, threshold, case.bandwidth).sum()
        pull = losses.pull(pre[:, case.dead], threshold[case.dead], decoder[case.dead]) * len(case.x)
    perp = losses.orthogonality(z_concept, z, bank.perp_weight) if z_concept.shape[1] else z.new_zeros(())
    rec = losses.reconstruction(x, out) * len(case.x)
    (WEIGHTS[0] * rec + WEIGHTS[1] * sp + WEIGHTS[2] * perp + WEIGHTS[3] * pull).backward()
    active = pre > (0 if bank.threshold is None else bank.threshold)
    return _figures((out, sp, perp, pull), [_grad(t) for t in leaves], active.sum())


def by_kernel(
    kernel: RunKernel,
    case: Case,
    *,
    bf16: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
    pairs: type[RowPairs] | None = None,
) -> dict[str, Tensor]:
    """The same from a kernel, in fp32 or with bf16 products; `pairs` offers it the correlation over pairs of rows."""
    W_enc, b_enc, W_dec, threshold, recon, z_concept = leaves = case.leaves()
    perp = None
    if z_concept.shape[1]:
        code = z_concept.detach()
        perp = Orthogonality.standardise(code, reduce(code.new_tensor(float(len(code)))), reduce)
        if pairs is not None:
            perp.pairs = pairs(perp.concept, perp.rows, len(b_enc), torch.bfloat16 if bf16 else torch.float32)
    context = StepContext(case.x, case.x.bfloat16() if bf16 else None, perp)
    out, sp, value, pull = kernel([case.bank(W_enc, b_enc, W_dec, threshold)], recon, context)
    rec = (case.x - out).square().sum()
    (WEIGHTS[0] * rec + WEIGHTS[1] * sp + WEIGHTS[2] * value + WEIGHTS[3] * pull).backward()
    if perp is not None:
        z_concept.grad = WEIGHTS[2] * perp.concept_gradient()
    figures = _figures((out, sp, value, pull), [_grad(t) for t in leaves], context.stats[0].active)
    if context.stats[0].squares is not None and case.perp_weight is not None:
        counted = (context.stats[0].squares * case.perp_weight).sum()
        torch.testing.assert_close(counted, value.detach(), equal_nan=True)
    firing = context.stats[0].fired, figures["grad b_enc"] != 0
    assert torch.equal(*firing) or bf16 or not len(case.x) or case.bandwidth
    return figures


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _figures(values: tuple[Tensor, ...], grads: list[Tensor], active: Tensor) -> dict[str, Tensor]:
    found = dict(zip(("recon", "sp", "perp", "pull"), values, strict=True)) | {"active": active.float()}
    names = ("W_enc", "b_enc", "W_dec", "threshold", "recon", "z_concept")
    return found | {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each figure within `tolerance` of the expected one, relative to its norm."""
    for name, want in expected.items():
        got = found[name].detach()
        error = (got.double() - want.detach().double()).norm()
        scale = want.detach().double().norm()
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), name
        assert error <= tolerance * scale + 1e-6, f"{name}: relative error {float(error / scale.clamp_min(1e-30)):.2e}"
