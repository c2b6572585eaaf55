"""The normalisation of activations, x = (h - mean) / scale, and weights with it folded in or taken out.

Shapes: B rows, D model width, n slots of a bank. mean [D], scale a scalar.
"""

from torch import Tensor

from trainer.dictionary.bank import BankWeights


def normalise(h: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Raw activations [B, D] of any float dtype -> x [B, D] fp32."""
    return (h.float() - mean) / scale


def denormalise(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `normalise`."""
    return x * scale + mean


def fold(weights: BankWeights, mean: Tensor, scale: Tensor) -> BankWeights:
    """Weights that act on raw activations and give a share of the raw reconstruction; codes stay what they are.

    From x = (h - mean) / scale and h_hat = scale x_hat + mean: the encoder is divided by scale, its bias takes up the
    mean, the decoder rows, as they are used, are multiplied by scale.
    """
    return BankWeights(
        weights.W_enc / scale,
        (weights.b_enc.double() - _shift(weights.W_enc, mean) / scale).float(),
        weights.decoder() * scale,
        weights.threshold,
    )


def unfold(weights: BankWeights, mean: Tensor, scale: Tensor) -> BankWeights:
    """Inverse of `fold`: weights that act on normalised activations, from such as act on raw ones."""
    return BankWeights(
        weights.W_enc * scale,
        (weights.b_enc.double() + _shift(weights.W_enc, mean)).float(),
        weights.decoder() / scale,
        weights.threshold,
    )


def fold_output(b_dec: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The output bias [D] of a raw reconstruction."""
    return b_dec * scale + mean


def unfold_output(b_dec: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `fold_output`."""
    return (b_dec - mean) / scale


def _shift(W_enc: Tensor, mean: Tensor) -> Tensor:
    """W_enc mean [n], in fp64: the mean of a residual stream can be far larger than what is left after subtracting
    it."""
    return W_enc.double() @ mean.double()
