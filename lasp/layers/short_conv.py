"""The short convolution ahead of a recurrence: each channel sees the last few tokens."""

import torch
from torch import Tensor, nn

from lasp.functional import causal_conv1d
from lasp.layers.context import Context
from lasp.layers.state import ConvolvedMemory


class ShortConv(nn.Module):
    """A depthwise causal convolution with SiLU over channels [B, T, channels] (Mamba, arXiv 2312.00752).

    Args:
        channels: how many.
        size: tokens that an output sees, its own included.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, x: Tensor, context: Context, channels: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Convolve x [B, T, channels], which may be some of them; the state of the context is a `ConvolvedMemory` or
        None.

        Returns the output and, if asked for, the tail [B or documents, channels, size - 1] after the last token.

        Raises:
            ValueError: padding together with a group or packed documents, and what `causal_conv1d` raises.
        """
        state = context.state
        assert state is None or isinstance(state, ConvolvedMemory), "checked by the mixer"
        tail, weight = None if state is None else state.tail[:, channels].to(x.dtype), self.weight[channels]
        if context.attention_mask is not None:
            if context.packed or context.ranks > 1:
                raise ValueError(
                    "a short convolution takes an attention_mask only for one text on one device: pack documents with "
                    "cu_seqlens, and let labels of -100 hide padding at the end"
                )
            return _skip_padding(x, weight, tail, context.attention_mask, context.output_final_state)
        result = causal_conv1d(
            x,
            weight,
            activation="silu",
            initial_state=tail,
            output_final_state=context.output_final_state,
            **context.sequence,
        )
        return result if isinstance(result, tuple) else (result, None)


def _skip_padding(
    x: Tensor, weight: Tensor, tail: Tensor | None, mask: Tensor, keep_tail: bool
) -> tuple[Tensor, Tensor | None]:
    """As if the padding were not there: real tokens are moved together, convolved, and moved back."""
    order = torch.argsort(~mask, dim=1, stable=True)  # real tokens first, in their order
    index = order.unsqueeze(-1).expand_as(x)
    together = x.gather(1, index)
    output = causal_conv1d(together, weight, activation="silu", initial_state=tail)
    output = torch.zeros_like(output).scatter(1, index, output)
    if not keep_tail:
        return output, None
    width = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], x.shape[2], width) if tail is None else tail
    # The last tokens before the padding that now stands at the end of each row.
    ends = mask.sum(1, keepdim=True) + torch.arange(width, device=x.device)
    return output, torch.cat([before.mT, together], 1).gather(1, ends.unsqueeze(-1).expand(-1, -1, x.shape[2])).mT
