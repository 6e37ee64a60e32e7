"""The token-mixing operations of lasp, on one device or with the sequence cut over a group of ranks."""

from lasp.functional.conv import causal_conv1d
from lasp.functional.delta import delta_product, delta_rule
from lasp.functional.diagonal import diagonal_state_space
from lasp.functional.dplr import dplr_delta_rule
from lasp.functional.hybrid import hybrid_attention
from lasp.functional.linear import linear_attention
from lasp.functional.logcumsumexp import logcumsumexp
from lasp.functional.maximum import running_maximum
from lasp.functional.memories import routed_delta_rule
from lasp.functional.selective import selective_scan
from lasp.functional.slstm import slstm
from lasp.functional.softmax import softmax_attention

__all__ = [
    "causal_conv1d",
    "delta_product",
    "delta_rule",
    "diagonal_state_space",
    "dplr_delta_rule",
    "hybrid_attention",
    "linear_attention",
    "logcumsumexp",
    "routed_delta_rule",
    "running_maximum",
    "selective_scan",
    "slstm",
    "softmax_attention",
]
