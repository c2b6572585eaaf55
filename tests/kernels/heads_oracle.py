"""The heads of the concept slots as a device computes them, against plain PyTorch in value and gradient."""

from types import ModuleType

import torch
from torch import Tensor

from tests.kernels.kernel_oracle import assert_same
from trainer import heads
from trainer.dictionary import BankWeights, SlotBank
from trainer.kernels import BankStats
from trainer.losses import LossForm

WIDTH, ANSWERS, FREE = 12, 7, 11


def compare_heads(fast: ModuleType | None, rows: int, concepts: int, bf16: bool, device: torch.device) -> None:
    """Fails where they differ."""
    assert fast is not None
    found, expected = (_found(way, rows, concepts, bf16, device) for way in (fast, None))
    assert any(t.abs().max() > 0 for t in expected.values())
    assert_same(found, expected, 2e-2 if bf16 else 2e-5)


def _found(fast: ModuleType | None, rows: int, concepts: int, bf16: bool, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(concepts)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    weights = BankWeights(drawn(concepts, WIDTH), drawn(concepts), drawn(concepts, WIDTH))
    x = drawn(rows, WIDTH).detach()
    label = torch.randint(-2, concepts, (rows, 1), generator=generator).to(device)
    answer = torch.randint(-1, ANSWERS, (rows,), generator=generator).to(device)
    head = torch.nn.Linear(concepts, ANSWERS).to(device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    operand = x.bfloat16() if bf16 else x
    labelled = (label >= 0).sum()
    z, x_hat, sp, bind, bound = heads.concept_slots(weights, operand, label, LossForm(), labelled, None, fast)
    val = heads.value(head, z, answer, False, fast)
    # One concept slot that is constant: its correlation is 0.
    code = torch.cat([z.detach(), torch.full((rows, 1), 0.7, device=device)], dim=1)
    perp = heads.orthogonality(code, torch.tensor(float(rows), device=device), lambda sums: sums, fast)
    (0.3 * sp + 0.7 * bind + 1.3 * val + (x_hat * x).sum()).backward()
    values = {"z": z, "x_hat": x_hat, "sp": sp, "bind": bind, "val": val, "bound": bound.float()}
    learned = {"W_enc": weights.W_enc, "b_enc": weights.b_enc, "W_dec": weights.W_dec, **dict(head.named_parameters())}
    figures = {f"gradient of {name}": torch.zeros(0) if t.grad is None else t.grad for name, t in learned.items()}
    of_code = {"concept": perp.concept, "inv_norm": perp.inv_norm, "rows": perp.rows}
    return values | figures | of_code | _dependence(fast, perp, device)


def _dependence(fast: ModuleType | None, perp: heads.Orthogonality, device: torch.device) -> dict[str, Tensor]:
    """After an update that was made and one that was not."""
    banks = [SlotBank(FREE - 4, WIDTH).to(device), SlotBank(4, WIDTH).to(device)]
    followed = heads.Dependence(banks, fast)
    squares = torch.linspace(0, 30, FREE, device=device).split([FREE - 4, 4])
    for made in (True, False):
        stats = [BankStats(part > 0, part.sum(), part * (200.0 if made else 1.0)) for part in squares]
        followed.note(stats, perp)
        followed.follow(torch.tensor(made, device=device))
    return {"dependence": torch.cat([bank.dependence for bank in banks]), "counted": torch.cat(followed.counted())}
