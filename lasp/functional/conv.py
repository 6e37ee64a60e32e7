"""Short causal convolution, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, get_args, overload

import torch
from torch import Tensor
from torch.nn.functional import silu

from lasp.functional.checks import check_documents, is_packed
from lasp.functional.options import SequenceOptions
from lasp.kernels.arguments import check_choice, check_flags, check_tensors
from lasp.kernels.conv import causal_convolution
from lasp.kernels.precision import exact
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.halo import Halo, bring_halo, share_ends
from lasp.parallel.untraced import untraced

Activation = Literal["silu"]
ACTIVATIONS: tuple[Activation | None, ...] = (None, *get_args(Activation))


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output_final_state: Literal[False] = False,
    activation: Activation | None = None,
    **options: Unpack[SequenceOptions],
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output_final_state: Literal[True],
    activation: Activation | None = None,
    **options: Unpack[SequenceOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output_final_state: bool,
    activation: Activation | None = None,
    **options: Unpack[SequenceOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@untraced
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution, `y_t = sum_i weight[:, i]·x_{t-W+1+i} + bias` (Mamba, arXiv:2312.00752).

    x [B, T, D], weight [D, W], bias [D]. Without a group T is the whole sequence; with one, x is this rank's tokens,
    and everything else speaks of the whole sequence. No token sees another document's. Over a group a rank receives
    only the W - 1 tokens ahead of its own.

    activation: None or "silu". initial_state: the W - 1 tokens before the first, oldest first, [B, D, W - 1], with
    cu_seqlens [documents, D, W - 1]; 0 if None. (The conv_state of transformers and of Mamba has one column more, the
    oldest, which no later token reads: `conv_state[..., 1:]`.) cu_seqlens: bounds of packed documents
    [documents + 1], for B = 1. cut: in the place of group and cu_seqlens, as in `linear_attention`.

    Returns the output [B, T, D] in x's dtype; with output_final_state also the last W - 1 tokens of each sequence or
    document, shaped like initial_state, in x's dtype and the same on every rank. Differentiable in x, weight, bias and
    initial_state, once. Raises ValueError, on every rank of the group, for arguments that do not fit.
    """

    def check() -> Arguments:
        check_tensors(("bias", "initial_state"), x=x, weight=weight, bias=bias, initial_state=initial_state)
        check_flags(output_final_state=output_final_state)
        check_choice("activation", activation, ACTIVATIONS)
        _check_tokens(x)
        bounds = check_documents(x, cu_seqlens, cut)
        options = {"activation": activation, "final_state": output_final_state}
        fields = _check_conv((x, weight, bias, initial_state), None if bounds is None else len(bounds) - 1, options)
        return Arguments(fields, x.shape[1], bounds)

    turn, packed = begin_call(group, "causal_conv1d", check, cut), is_packed(cu_seqlens, cut)
    halo = Halo.of(turn, weight.shape[1] - 1)
    # Convolutions would follow autocast: the output has x's dtype on every device.
    with exact(x):
        state = None
        if initial_state is not None:  # [documents, B, W - 1, D]
            state = initial_state.to(x.dtype).mT.unsqueeze(1 if packed else 0)
        (x,), (before,) = bring_halo(halo, (x,), (state,))
        runs = [run.length for run in halo.plan.runs]
        output, ends = causal_convolution(
            x, before, runs, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        output = silu(output) if activation == "silu" else output
        if not output_final_state:
            return output
        output, final = share_ends(halo, output, ends)
    return output, (final[:, 0] if packed else final[0]).mT.contiguous()


# Checks -------------------------------------------------------------------------------------------------------------


def _check_tokens(x: Tensor) -> None:
    if x.dim() != 3 or min(x.shape[0], x.shape[2]) < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating [batch, tokens, channels], got {x.dtype} {list(x.shape)}")


def _check_conv(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None], documents: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Check x, weight, bias and the initial state of so many documents, and tell what all ranks must share."""
    x, weight, bias, state = tensors
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be [D, W] with D = {channels} channels of x, got {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [channels]:
        raise ValueError(f"bias must be [D] = [{channels}], got {list(bias.shape)}")
    if state is not None:
        rows, what = (x.shape[0], "B") if documents is None else (documents, "documents")
        if list(state.shape) != [rows, channels, weight.shape[1] - 1]:
            raise ValueError(
                f"initial_state must be [{what}, D, W - 1] = [{rows}, {channels}, {weight.shape[1] - 1}], "
                f"got {list(state.shape)}"
            )
    for name, other in (("weight", weight), ("bias", bias), ("initial_state", state)):
        if other is not None and (not other.is_floating_point() or other.device != x.device):
            raise ValueError(
                f"{name} must be floating and on the device of x, {x.device}, got {other.dtype} on {other.device}"
            )
    wanted = [torch.is_grad_enabled() and other is not None and other.requires_grad for other in tensors]
    return options | {
        "device": x.device.type,
        "batch": x.shape[0],
        "weight": list(weight.shape),
        "dtype": str(x.dtype),
        "bias": bias is not None,
        "initial_state": state is not None,
        "backward": [wanted[0], any(wanted)],  # the halo's gradients travel for x alone
    }
