"""The optimizer against torch's own, and the norm that kernels note."""

import copy

import pytest
import torch
from kernel_oracle import make_case

from trainer.errors import UserError
from trainer.kernels import BankStep, KernelChoice
from trainer.optimizer import OptimConfig, build_optimizer, square_norm


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_like_torch_with_scaled_gradients(weight_decay):
    torch.manual_seed(0)
    shapes = [(33, 17), (5,), (40_000,), ()]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    config = OptimConfig(lr=3e-3, betas=(0.8, 0.99), weight_decay=weight_decay)
    optimizer = build_optimizer(ours, config)
    reference = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.8, 0.99), weight_decay=weight_decay)
    for number in range(5):
        scale = 1.0 if number == 0 else 0.25
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad * scale
        optimizer.step(grad_scale=scale)
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][key], reference.state[q][key], rtol=1e-5, atol=1e-7)


def test_state_goes_through_a_state_dict():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    first, second = build_optimizer([a], OptimConfig()), build_optimizer([b], OptimConfig())
    a.grad = torch.tensor([1.0, 2.0, 3.0])
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        b.copy_(a)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    first.step()
    second.step()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_the_noted_norm_is_the_norm_and_is_forgotten_on_change(decoder_norm):
    case = make_case(40, 90, 0, bias=-1.0, decoder_norm=decoder_norm)
    W_enc, b_enc, W_dec, recon, _ = case.leaves()

    def backward():
        out, sp, _ = KernelChoice("sparse", 1).kernel(0)(
            W_enc, b_enc, W_dec, recon, BankStep(case.x, None, decoder_norm, None)
        )
        (out.square().sum() + sp).backward()

    def norms():
        grads = [W_enc.grad, b_enc.grad, W_dec.grad]
        return float(square_norm(grads)), float(sum(g.double().square().sum() for g in grads))

    backward()
    assert torch.ops.alignsae.noted_square(W_enc.grad) is not None
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)
    W_dec.grad.mul_(3.0)
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)
    backward()  # a second micro-batch adds to what is there
    assert torch.ops.alignsae.noted_square(W_enc.grad) is None
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)


@pytest.mark.parametrize(
    "field,value",
    [("lr", -1.0), ("clip", float("nan")), ("betas", (1.0, 0.9)), ("eps", 0.0), ("decay", 2.0), ("accumulate", 0)],
)
def test_impossible_numbers_are_refused(field, value):
    config = OptimConfig()
    setattr(config, field, value)
    with pytest.raises(UserError, match=field):
        config.validate()


def test_torch_takes_the_step_where_there_are_no_compiled_operators(monkeypatch):
    monkeypatch.setattr("trainer.optimizer.native.load", lambda: "no compiler")
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    ours, reference = build_optimizer([p], OptimConfig()), torch.optim.AdamW([q], lr=1e-3, weight_decay=0.0)
    for scale in (1.0, 0.5):
        p.grad = torch.tensor([1.0, -2.0, 3.0, 1e-3])
        q.grad = p.grad * scale
        ours.step(grad_scale=scale)
        reference.step()
    torch.testing.assert_close(p, q)
