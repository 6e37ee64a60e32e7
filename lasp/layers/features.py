"""Feature maps: what takes the place of the softmax's exponential in linear attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def identity(x: Tensor) -> Tensor:
    """x as it is."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above zero, exp(x) below: elu(x) + 1 without rounding small values of exp(x) against the 1.

    (Transformers are RNNs, arXiv 2006.16236, equation 7.)
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def taylor(x: Tensor) -> Tensor:
    """[..., D] to [..., 1 + D + D²], whose dot products are 1 + s + s²/2 with s = q·k/√D: exp to second order.

    (Based, arXiv 2402.18668, section 3.1.)
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 2**-0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the head's dim."""
    return x.softmax(-1)


class Hedgehog(nn.Module):
    """[B, T, H, D] to [B, T, H, 2D]: softmax of Wx and of -Wx, with one learned W [D, D] per head.

    (The Hedgehog & the Porcupine, arXiv 2402.04347, equation 6, and its normalisation over the feature dim.)
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bthd,hde->bthe", x, self.weight.to(x.dtype))
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


class TransformerToRnn(nn.Module):
    """relu(Wx + b) with one learned W [D, D] and b [D] per head (T2R, arXiv 2103.13076, equation 5)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.einsum("bthd,hde->bthe", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype))


class LearnedQuadratic(nn.Module):
    """(γ·norm(x) + β)², elementwise, with γ and β [D] learned (ReBased, arXiv 2402.10644, equation 9)."""

    def __init__(self, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(head_dim, eps=eps)  # its weight and bias are γ and β

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).square()


class FeatureMap(NamedTuple):
    """A kind of feature map, by what it can be told."""

    build: Callable[[int, int], Callable[[Tensor], Tensor]]
    """Makes the map of [B, T, H, D] from H and D: a function, or a module with parameters of its own."""

    positive: bool
    """Whether no dot product of two features is negative, so that it may be divided by their sum."""


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": FeatureMap(lambda heads, dim: identity, positive=False),
    "elu": FeatureMap(lambda heads, dim: elu_plus_one, positive=True),
    "silu": FeatureMap(lambda heads, dim: F.silu, positive=False),
    "softmax": FeatureMap(lambda heads, dim: softmax, positive=True),
    "taylor": FeatureMap(lambda heads, dim: taylor, positive=True),
    "quadratic": FeatureMap(lambda heads, dim: LearnedQuadratic(dim), positive=True),
    "hedgehog": FeatureMap(Hedgehog, positive=True),
    "t2r": FeatureMap(TransformerToRnn, positive=True),
}


def feature_map(name: str) -> FeatureMap:
    """The feature map called `name`.

    Raises:
        ValueError: there is none; the message lists the known names.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {name!r}; known: {', '.join(sorted(FEATURE_MAPS))}")
    return FEATURE_MAPS[name]
