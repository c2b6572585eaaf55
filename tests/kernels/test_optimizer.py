"""The optimizer against torch's own, and the norm that kernels note."""

import copy

import pytest
import torch

from tests.kernels.kernel_oracle import make_case
from tests.support.runs import assert_same, tensors, train_here
from trainer.dictionary import BankWeights
from trainer.errors import UserError
from trainer.kernels import KernelChoice, StepContext
from trainer.kernels.gradients import gradient_buffer, note_square, noted_square
from trainer.optimizer import OptimConfig, build_optimizer, square_norm


def gradients(*parameters: torch.Tensor) -> list[torch.Tensor]:
    """Their gradients, which must be there."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(found) == len(parameters)
    return found


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
    W_enc, b_enc, W_dec, _, recon, _ = case.leaves()

    def backward():
        out, sp, *_ = KernelChoice("sparse", [1]).runs(0, True)[0][0](
            [BankWeights(W_enc, b_enc, W_dec, None, decoder_norm)], recon, StepContext(case.x, None, None)
        )
        (out.square().sum() + sp).backward()

    def norms():
        grads = gradients(W_enc, b_enc, W_dec)
        return float(square_norm(grads)), sum(float(g.double().square().sum()) for g in grads)

    backward()
    assert noted_square(gradients(W_enc)[0]) is not None
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)
    gradients(W_dec)[0].mul_(3.0)
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)
    backward()  # a second micro-batch adds to what is there
    assert noted_square(gradients(W_enc)[0]) is None
    assert norms()[0] == pytest.approx(norms()[1], rel=1e-5)


def test_a_noted_square_goes_with_the_gradient_alone():
    weight = torch.zeros(7, 11)
    gradient, other = gradient_buffer(weight), torch.zeros(7, 11)
    note_square(gradient, 5.0)
    note_square(other, 5.0)  # memory that is not from a buffer
    assert noted_square(gradient) == noted_square(gradient.view(11, 7)) == 5.0
    assert noted_square(other) is noted_square(gradient[1:]) is None
    where = gradient.data_ptr()
    del gradient
    again = gradient_buffer(weight)
    assert again.data_ptr() == where and noted_square(again) is None


def test_without_a_compiler_gradients_are_fresh_and_nothing_is_noted(monkeypatch):
    monkeypatch.setattr("trainer.kernels.gradients.native.load", lambda: "no compiler at hand")
    gradient = gradient_buffer(torch.zeros(3, 4))
    note_square(gradient, 5.0)
    assert gradient.shape == (3, 4) and noted_square(gradient) is None


@pytest.mark.parametrize(
    "field,value",
    [
        ("lr", -1.0),
        ("clip", float("nan")),
        ("betas", (1.0, 0.9)),
        ("eps", 0.0),
        ("decay", 2.0),
        ("accumulate", 0),
        ("state", "fp8"),
    ],
)
def test_impossible_numbers_are_refused(field, value):
    config = OptimConfig()
    setattr(config, field, value)
    with pytest.raises(UserError, match=field):
        config.validate()


def test_torch_takes_the_step_where_there_are_no_compiled_operators(monkeypatch, caplog):
    monkeypatch.setattr("trainer.optimizer.native.load", lambda: "no compiler at hand")
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    ours, reference = build_optimizer([p], OptimConfig()), torch.optim.AdamW([q], lr=1e-3, weight_decay=0.0)
    for scale in (1.0, 0.5):
        p.grad = torch.tensor([1.0, -2.0, 3.0, 1e-3])
        q.grad = p.grad * scale
        ours.step(grad_scale=scale)
        reference.step()
    torch.testing.assert_close(p, q)
    assert [r.getMessage() for r in caplog.records if "no compiler at hand" in r.getMessage()] == [caplog.messages[0]]


def test_the_norm_of_large_gradients_is_finite():
    """Their squares are beyond fp32, in a kernel's own sum and in the one over the rest."""
    case = make_case(40, 90, 0, bias=-1.0)
    W_enc, b_enc, W_dec, _, recon, _ = case.leaves()
    out, *_ = KernelChoice("sparse", [1]).runs(0, True)[0][0](
        [BankWeights(W_enc, b_enc, W_dec)], recon, StepContext(case.x, None, None)
    )
    (out.sum() * 1e20).backward()
    grads = gradients(W_enc, b_enc, W_dec)
    assert float(square_norm(grads)) == pytest.approx(sum(float(g.double().square().sum()) for g in grads), rel=1e-5)


def test_bf16_moments_are_the_same_bits_compiled_and_in_plain_torch(monkeypatch):
    torch.manual_seed(0)
    shapes = [(33, 17), (5,), (40_000,), ()]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    config = OptimConfig(lr=3e-3, betas=(0.8, 0.99), weight_decay=0.1, state="bf16")
    first, second = build_optimizer(ours, config), build_optimizer(plain, config)
    for scale in (1.0, 0.25, 0.7, 1.0, 0.1):
        for p, q in zip(ours, plain, strict=True):
            p.grad = torch.randn_like(p) * torch.rand(()) ** 4
            q.grad = p.grad.clone()
        first.step(grad_scale=scale)
        with monkeypatch.context() as patch:
            patch.setattr("trainer.optimizer.native.load", lambda: "no compiler")
            second.step(grad_scale=scale)
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq"):
            assert first.state[p][key].dtype == torch.bfloat16 and first.state[p][key].shape == p.shape
            assert torch.equal(first.state[p][key], second.state[q][key])


def distance_left(state: str) -> float:
    """From the minimum of a noisy quadratic, after steps of large gradients that exp_avg_sq has to forget.

    It loses 1/1000 of itself a step.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.full((300,), 10.0))
    optimizer = build_optimizer([p], OptimConfig(state=state))
    for number in range(3000):
        noise = torch.randn(300, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.0 if number < 500 else 0.02 * (1 - number / 3000)
        p.grad = 10 * noise if number < 500 else p.detach() + 0.3 * noise
        optimizer.step()
    return float(p.detach().norm())


def test_bf16_moments_converge_like_fp32_and_not_without_random_rounding(monkeypatch):
    wanted = distance_left("fp32")
    assert distance_left("bf16") == pytest.approx(wanted, rel=0.05)
    monkeypatch.setattr("trainer.optimizer.native.load", lambda: "no compiler")
    monkeypatch.setattr("trainer.optimizer._mixed", lambda x: torch.full_like(x, 0x80008000))  # to the nearest
    assert distance_left("bf16") > 1.5 * wanted


def test_a_state_dict_converts_to_the_dtype_of_the_optimizer():
    p = torch.nn.Parameter(torch.ones(300))
    full, half = build_optimizer([p], OptimConfig()), build_optimizer([p], OptimConfig(state="bf16"))
    p.grad = torch.randn(300)
    full.step()
    half.load_state_dict(copy.deepcopy(full.state_dict()))
    assert torch.equal(half.state[p]["exp_avg"], full.state[p]["exp_avg"].bfloat16())
    half.step()
    kept = half.state[p]["exp_avg_sq"].clone()
    half.load_state_dict(copy.deepcopy(half.state_dict()))
    assert kept.dtype == torch.bfloat16 and torch.equal(half.state[p]["exp_avg_sq"], kept)
    full.load_state_dict(copy.deepcopy(half.state_dict()))
    assert torch.equal(full.state[p]["exp_avg_sq"], kept.float())


def test_bf16_moments_are_refused_under_zero():
    OptimConfig(state="bf16").refuse_sharding(0)
    OptimConfig().refuse_sharding(3)
    with pytest.raises(UserError, match=r"optim\.state=bf16.*zero3"):
        OptimConfig(state="bf16").refuse_sharding(3)


def test_a_run_with_bf16_moments_resumes_bitwise_and_converts_others(tmp_path, small_data):
    whole, again, other = tmp_path / "whole", tmp_path / "again", tmp_path / "other"
    few = ("optim.state=bf16", "stages.1.epochs=1", "checkpoint.keep=9", "kernel=sparse")
    assert train_here(whole, small_data, *few) == 0
    saved = tensors(whole)
    moments = {name: t for name, t in saved.items() if name.startswith("optimizer/")}
    assert moments and all(t.dtype == torch.bfloat16 for t in moments.values())
    middle = whole / "run" / "checkpoints" / "step-00000014"
    assert train_here(again, small_data, *few, f"checkpoint.resume={middle}") == 0
    assert_same(tensors(again), saved)
    assert train_here(other, small_data, *few, f"checkpoint.resume={middle}", "optim.state=fp32") == 0
    assert all(t.dtype == torch.float32 for name, t in tensors(other).items() if name.startswith("optimizer/"))


def test_clipping_leaves_the_buffers_of_gradients_to_the_next_step():
    weight = torch.zeros(33, 7)
    gradient = gradient_buffer(weight).fill_(1.0)
    where = gradient.data_ptr()
    assert float(square_norm([gradient])) == pytest.approx(33 * 7)
    del gradient
    assert gradient_buffer(weight).data_ptr() == where
