"""Each mixer against the sum over pairs of tokens that defines it, and the promises all of them share."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lasp.layers import (
    MIXERS,
    ConvolvedMemory,
    KeyValues,
    Lightning,
    LinearAttention,
    Mixer,
    RecurrentMixer,
    Retention,
    ScaledMemory,
    SoftmaxAttention,
    State,
    mixer_class,
)
from lasp.layers.features import elu_plus_one

HIDDEN, HEADS, LENGTH = 24, 4, 13
# Mixers with their options.
CASES = [*((name, {}) for name in MIXERS), ("linear", {"rope_theta": 1e4}), ("softmax", {"window": 4})]
# Those whose weights of pairs of tokens are plain enough to be written down; the others: test_recurrent_mixers.py.
BY_PAIRS = [case for case in CASES if case[0] in ("linear", "lightning", "retention", "softmax")]
BIDIRECTIONAL = [("linear", {}), ("linear", {"rope_theta": 1e4}), ("softmax", {})]


def make(name: str, **options: object) -> Mixer:
    torch.manual_seed(0)
    return mixer_class(name)(HIDDEN, HEADS, layer_idx=1, num_layers=4, **options).double()


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    """Tensors, or tuples of them."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rotate_by_complex_numbers(x: torch.Tensor, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def heads_of(mixer: Mixer, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, projection.weight).unflatten(-1, (-1, mixer.head_dim))


def by_pairs(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """y_t from sum_s w_ts v_s, written as one T x T matrix of weights per head.

    They are λ^(t-s) (q_t · k_s) in a recurrence, and softmax(q_t · k_s) over s in softmax attention.
    """
    q, k, v = (heads_of(mixer, p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    heads = torch.arange(mixer.num_kv_heads, dtype=torch.float64)
    decay, gate = torch.ones_like(heads), None
    if isinstance(mixer, LinearAttention):
        q, k = F.elu(q) + 1, F.elu(k) + 1
    elif isinstance(mixer, Lightning):
        q, k, v, gate = F.silu(q), F.silu(k), F.silu(v), torch.sigmoid
        decay = torch.exp(-(2 ** (-8 * (heads + 1) / mixer.num_kv_heads)) * (1 - 1 / 4))
    elif isinstance(mixer, Retention):
        decay, gate = 1 - 2 ** (-5 - heads), F.silu
    if mixer.rotary is not None:
        q, k = (rotate_by_complex_numbers(x, mixer.rotary.theta) for x in (q, k))
    share = mixer.num_heads // mixer.num_kv_heads
    k, v, decay = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2), decay.repeat_interleave(share)
    weights = torch.einsum("bthd,bshd->bhts", q, k) * mixer.head_dim**-0.5
    steps = torch.arange(x.shape[1])
    distance = steps[:, None] - steps[None, :]
    seen = (
        (distance >= 0) & (distance < (getattr(mixer, "window", None) or LENGTH)) if mixer.causal else distance < LENGTH
    )
    if isinstance(mixer, SoftmaxAttention):
        o = torch.einsum("bhts,bshd->bthd", weights.masked_fill(~seen, -torch.inf).softmax(-1), v)
    else:
        o = torch.einsum("bhts,bshd->bthd", weights * seen * decay[:, None, None] ** distance.clamp(min=0), v)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + mixer.norm.eps)
    if gate is not None:
        o = o * gate(heads_of(mixer, mixer.g_proj, x))
    return F.linear(o.flatten(-2), mixer.out_proj.weight)


def real(state: State) -> object:
    """What is left of a state without padding."""
    return [x[state.shown] for x in state] if isinstance(state, KeyValues) else state


def memory_of(state: State) -> torch.Tensor:
    return state.memory if isinstance(state, ConvolvedMemory | ScaledMemory) else state


def joined(states: list[State]) -> State:
    """States of separate texts as those of packed documents."""
    if isinstance(states[0], torch.Tensor):
        return torch.cat(states)
    return type(states[0])(*(torch.cat(parts) for parts in zip(*states, strict=True)))


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(("name", "options"), BY_PAIRS)
def test_mixer_equals_its_definition(name: str, options: dict, kv_heads: int) -> None:
    mixer, x = make(name, num_kv_heads=kv_heads, **options), tokens()
    y, state = mixer(x, output_final_state=True)
    close(y, by_pairs(mixer, x))
    head_dim = HIDDEN // HEADS
    if isinstance(mixer, RecurrentMixer):
        assert (state.shape, state.dtype) == ((2, kv_heads, head_dim, head_dim), torch.float64)
    else:
        kept = LENGTH if mixer.window is None else mixer.window - 1
        assert state.k.shape == state.v.shape == (2, kept, kv_heads, head_dim)
        assert state.shown.all()


@pytest.mark.parametrize(("name", "options"), BIDIRECTIONAL)
def test_without_direction_every_token_sees_its_whole_document(name: str, options: dict) -> None:
    mixer, x = make(name, causal=False, **options), tokens()
    y, state = mixer(x)
    close(y, by_pairs(mixer, x))
    assert state is None
    ends = [0, 4, 5, LENGTH]
    packed, _ = mixer(x[:1], cu_seqlens=torch.tensor(ends))
    close(packed, torch.cat([by_pairs(mixer, x[:1, a:b]) for a, b in itertools.pairwise(ends)], 1))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_pieces_with_a_carried_state_equal_the_whole(name: str, options: dict) -> None:
    mixer, x = make(name, **options), tokens().requires_grad_()
    whole, final = mixer(x, output_final_state=True)
    positions = torch.arange(LENGTH)[None]
    state, pieces = None, []
    for begin, end in [(0, 5), (5, 6), (6, LENGTH)]:
        y, state = mixer(x[:, begin:end], position_ids=positions[:, begin:end], state=state, output_final_state=True)
        pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    close(state, final)
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, [x, *mixer.parameters()], grad)
    close(torch.autograd.grad(torch.cat(pieces, 1), [x, *mixer.parameters()], grad), expected)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_packed_documents_equal_separate_ones(name: str, options: dict) -> None:
    mixer, x = make(name, **options), tokens(batch=1)
    keeps_state = isinstance(mixer, RecurrentMixer)
    ends = [0, 4, 5, LENGTH]
    packed, states = mixer(x, cu_seqlens=torch.tensor(ends), output_final_state=keeps_state)
    separate = [mixer(x[:, a:b], output_final_state=keeps_state) for a, b in itertools.pairwise(ends)]
    close(packed, torch.cat([y for y, _ in separate], 1))
    if keeps_state:
        close(states, joined([s for _, s in separate]))


PADDED = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]]).bool()
PADDED_POSITIONS = (PADDED.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_anywhere_changes_nothing(name: str) -> None:
    """Padding before, between and after the real tokens: outputs and state are those of the real tokens alone."""
    mixer, x = make(name), tokens(batch=1)
    y, state = mixer(x, attention_mask=PADDED, position_ids=PADDED_POSITIONS, output_final_state=True)
    alone, alone_state = mixer(x[PADDED][None], output_final_state=True)
    close(y[PADDED][None], alone)
    close(real(state), real(alone_state))


@pytest.mark.parametrize(("name", "options"), BIDIRECTIONAL)
def test_padding_anywhere_changes_nothing_without_direction(name: str, options: dict) -> None:
    mixer, x = make(name, causal=False, **options), tokens(batch=1)
    y, _ = mixer(x, attention_mask=PADDED, position_ids=PADDED_POSITIONS)
    close(y[PADDED][None], mixer(x[PADDED][None])[0])


@pytest.mark.parametrize("name", MIXERS)
def test_padding_is_remembered_from_piece_to_piece(name: str) -> None:
    """Pieces of nothing but padding included; every output stays finite, for the layers above."""
    mixer, x = make(name), tokens(batch=1)
    state, pieces = None, []
    for begin, end in [(0, 1), (1, 2), (2, 6), (6, 7), (7, LENGTH)]:
        mask, positions = PADDED[:, begin:end], PADDED_POSITIONS[:, begin:end]
        y, state = mixer(
            x[:, begin:end],
            position_ids=positions,
            attention_mask=None if mask.all() else mask,
            state=state,
            output_final_state=True,
        )
        pieces.append(y)
    y = torch.cat(pieces, 1)
    assert y.isfinite().all()
    close(y[PADDED][None], mixer(x[PADDED][None])[0])


@pytest.mark.parametrize(("name", "options"), [("linear", {"rope_theta": 1e4}), ("retention", {}), ("softmax", {})])
def test_only_differences_of_rotary_positions_matter(name: str, options: dict) -> None:
    mixer, x = make(name, **options), tokens()
    positions = torch.arange(LENGTH)[None]
    close(mixer(x, position_ids=positions + 1_000_000)[0], mixer(x)[0], 1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    mixer, x = make(name), tokens().requires_grad_()
    mixer(x)[0].square().sum().backward()
    for parameter in [x, *mixer.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_keeps_states_and_decays_in_fp32(name: str) -> None:
    mixer, x = make(name).to(torch.bfloat16), tokens().to(torch.bfloat16)
    y, state = mixer(x, output_final_state=True)
    assert y.dtype == torch.bfloat16
    if isinstance(mixer, RecurrentMixer):
        assert memory_of(state).dtype == torch.float32
        log_decay = mixer.log_decay(x)
        assert log_decay is None or log_decay.dtype == torch.float32
        if log_decay is not None and log_decay.dim() == 1:  # a constant, not learned
            close(log_decay.double(), make(name).log_decay(tokens()), 1e-6)
    exact = make(name)
    exact.load_state_dict(mixer.state_dict())
    reference = exact(x.double())[0]
    assert (y.double() - reference).norm() < 2e-2 * reference.norm()


def test_lightning_decays() -> None:
    x = torch.empty(1, 1, HIDDEN)
    last = Lightning(HIDDEN, 4, layer_idx=3, num_layers=4)
    close(last.log_decay(x), -torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) / 4, 1e-6)
    printed = Lightning(HIDDEN, 4, layer_idx=0, num_layers=4, slopes="linear")
    close(printed.log_decay(x), -torch.tensor([2.0, 4.0, 6.0, 8.0]), 1e-6)


def test_elu_plus_one_keeps_small_values_in_bfloat16() -> None:
    x = torch.tensor([-8.0, -1.0, 0.0, 2.0], requires_grad=True)
    close(elu_plus_one(x), F.elu(x) + 1, 1e-6)
    close(torch.autograd.grad(elu_plus_one(x).sum(), x)[0], torch.tensor([-8.0, -1.0, 0.0, 0.0]).exp(), 1e-6)
    assert elu_plus_one(x.bfloat16())[0].item() == pytest.approx(3.35e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: mixer_class("lightening"), "'lightening'; known: based, delta_product, "),
        (lambda: Lightning(HIDDEN, 4, num_kv_heads=3), "got 3 and 4"),
        (lambda: Lightning(HIDDEN, 5), "got 5, 24"),
        (lambda: Lightning(HIDDEN, 4, head_dim=0), "24 and 0"),
        (lambda: Lightning(HIDDEN, 4, layer_idx=2, num_layers=2), "layer_idx 2, num_layers 2"),
        (lambda: Lightning(HIDDEN, 4, slopes="steep"), "'steep'"),
        (lambda: Retention(HIDDEN, 8), "even, got 3"),
        (lambda: Retention(HIDDEN, 4, rope_theta=-1.0), "got -1.0"),
        (lambda: Retention(HIDDEN, 4, causal=False), "Retention .* got causal=False"),
        (lambda: Lightning(HIDDEN, 4, causal=False), "Lightning .* got causal=False"),
        (lambda: LinearAttention(HIDDEN, 8, rope_theta=1e4), "even, got 3"),
        (lambda: LinearAttention(HIDDEN, 4, feature_map="relu"), "'relu'; known: elu, hedgehog"),
        (lambda: LinearAttention(HIDDEN, 4, feature_map="silu", normalise=True), "got feature_map 'silu'"),
        (lambda: LinearAttention(HIDDEN, 4, rope_theta=1e4, normalise=True), "rope_theta 10000.0"),
        (lambda: SoftmaxAttention(HIDDEN, 4, window=0), "got 0"),
        (lambda: SoftmaxAttention(HIDDEN, 4, window=8, causal=False), "got 8 and causal=False"),
    ],
)
def test_mistakes_in_building_are_value_errors(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


RANK_1_OF_2 = SimpleNamespace(rank=1, size=2)
POSITIONS = torch.arange(LENGTH)[None]


def key_values(batch: int = 2) -> KeyValues:
    zeros = torch.zeros(batch, 3, HEADS, HIDDEN // HEADS, dtype=torch.float64)
    return KeyValues(zeros, zeros, torch.ones(batch, 3).bool())


@pytest.mark.parametrize(
    ("name", "keywords", "words"),
    [
        ("retention", {"state": torch.zeros(2, HEADS, 6, 6, dtype=torch.float64)}, "needs position_ids"),
        ("retention", {"group": RANK_1_OF_2}, "rank 1 of 2"),
        ("retention", {"attention_mask": torch.ones(2, LENGTH)}, "bool of shape \\(2, 13\\)"),
        ("retention", {"attention_mask": torch.ones(2, 5).bool()}, "shape \\(2, 5\\)"),
        ("retention", {"state": key_values(), "position_ids": POSITIONS}, "got KeyValues"),
        ("softmax", {"state": torch.zeros(2, HEADS, 6, 6), "position_ids": POSITIONS}, "got Tensor"),
        ("softmax", {"state": key_values(batch=1), "position_ids": POSITIONS}, "keys \\(1, 3, 4, 6\\)"),
        ("softmax", {"state": key_values()}, "needs position_ids"),
        ("softmax", {"group": RANK_1_OF_2}, "rank 1 of 2"),
        (
            "softmax",
            {"group": RANK_1_OF_2, "position_ids": POSITIONS, "output_final_state": True},
            "ranks=2",
        ),
        ("softmax", {"cu_seqlens": torch.tensor([0, LENGTH]), "output_final_state": True}, "packed=True"),
    ],
)
def test_mistakes_in_calling_are_value_errors(name: str, keywords: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name)(tokens(), **keywords)


def test_softmax_without_direction_keeps_no_state() -> None:
    with pytest.raises(ValueError, match="causal=False"):
        make("softmax", causal=False)(tokens(), output_final_state=True)


def test_options_of_a_mixer_are_its_own_keywords() -> None:
    assert Lightning.option_names() == {"slopes"}
    assert LinearAttention.option_names() == {"feature_map", "normalise", "rope_theta"}
    assert Retention.option_names() == {"rope_theta"}
    assert SoftmaxAttention.option_names() == {"rope_theta", "window"}
