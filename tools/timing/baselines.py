"""The floor of a step, and the step as dense autograd writes it."""

import torch
from torch import Tensor, nn

from tools.timing.rows import bias_for, make_rows
from tools.timing.setting import Setting
from trainer.kernels import usable_precision


class EncoderProduct:
    """x W_enc^T into memory that is already there, by the fastest of three ways to ask for it.

    In bf16; in fp32 on a CPU that emulates bf16.
    """

    def __init__(self, setting: Setting):
        low = usable_precision("bf16", torch.device(setting.device)) == "bf16"
        dtype = torch.bfloat16 if low else torch.float32
        x = make_rows(setting)[0].to(dtype)
        size = setting.slots + setting.concepts
        W = torch.randn(size, setting.width, device=x.device, dtype=dtype)
        out = torch.empty(setting.rows * size, dtype=dtype, device=x.device)
        tall, wide, columns = out.view(size, setting.rows), out.view(setting.rows, size), x.T.contiguous()
        self.ways = [
            lambda: torch.mm(x, W.T, out=wide),
            lambda: torch.mm(W, columns, out=tall),
            lambda: [torch.mm(w, columns, out=o) for w, o in zip(W.split(4096), tall.split(4096), strict=True)],
        ]


class DenseStep(nn.Module):
    """A ReLU dictionary with norm-weighted L1, autograd and fused AdamW: the pretrain stage as everybody writes it.

    Precision bf16 (autocast) or fp32. Learning rate 0.
    """

    def __init__(self, setting: Setting, compiled: bool = False):
        super().__init__()
        self.x = make_rows(setting)[0]
        size = setting.slots + setting.concepts
        device = self.x.device
        W = torch.randn(size, setting.width, device=device)
        W /= W.norm(dim=1, keepdim=True)
        bias = bias_for(self.x, W[:2048], setting.l0, size)
        self.W_enc = nn.Parameter(W)
        self.W_dec = nn.Parameter(W.clone())
        self.b_enc = nn.Parameter(torch.full((size,), bias, device=device))
        self.b_dec = nn.Parameter(torch.zeros(setting.width, device=device))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.0, fused=True)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, x: Tensor, precision: str) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = torch.relu(x @ self.W_enc.T + self.b_enc)
            x_hat = z @ self.W_dec + self.b_dec
            sparsity = (z @ self.W_dec.norm(dim=1).to(z.dtype)).sum()
        return ((x - x_hat).float().square().sum() + 0.05 * sparsity.float()) / len(x)

    def step(self, precision: str) -> None:
        """One optimizer step, without clipping."""
        self.loss(self.x, precision).backward()
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """As before the first backward pass."""
        self.optimizer.zero_grad(set_to_none=True)
