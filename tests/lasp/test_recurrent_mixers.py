"""The mixers with learned gates, features or erasure, each against its paper's formulas, token by token."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.kernels import reference
from lasp.layers import MIXERS, Mixer, mixer_class
from lasp.layers.features import FEATURE_MAPS, Hedgehog, LearnedQuadratic, TransformerToRnn, softmax, taylor
from lasp.layers.hgrn2 import rising_bounds
from lasp.layers.recurrent import RecurrentMixer
from lasp.parallel.work import work
from lasp.train.flops import weight_flops

HIDDEN, HEADS, LENGTH, DIM = 24, 4, 13, 6


def project(layer: nn.Linear, x: Tensor, dim: int = DIM) -> Tensor:
    return (x @ layer.weight.T).unflatten(-1, (-1, dim))


def convolved(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """Projections after the short convolution, one tap at a time."""
    parts = [x @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    out = taps(torch.cat(parts, -1), mixer.short_conv.weight)
    return [F.silu(part).unflatten(-1, (-1, DIM)) for part in out.split([p.shape[-1] for p in parts], -1)]


def taps(channels: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(channels)
    for t in range(channels.shape[1]):
        for tap in range(weight.shape[1]):
            source = t - (weight.shape[1] - 1 - tap)
            if source >= 0:
                out[:, t] = out[:, t] + weight[:, tap] * channels[:, source]
    return out


def normed(mixer: Mixer, o: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()


def gated(mixer: Mixer, x: Tensor, o: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    return (normed(mixer, o) * gate(project(mixer.g_proj, x))).flatten(-2) @ mixer.out_proj.weight.T


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def mamba_gate(mixer: Mixer, x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    step = torch.log1p(torch.exp(x @ layer.weight.T + mixer.dt_bias))
    return step, -mixer.A_log.exp() * step


def gla(mixer: Mixer, x: Tensor) -> Tensor:
    q, k = (project(p, x, mixer.key_dim) for p in (mixer.q_proj, mixer.k_proj))
    narrow, wide = mixer.decay_proj
    alpha = torch.sigmoid(x @ narrow.weight.T @ wide.weight.T + wide.bias) ** (1 / 16)
    o, _ = reference.linear_attention(q, k, project(mixer.v_proj, x), alpha.log().unflatten(-1, (-1, mixer.key_dim)))
    return gated(mixer, x, o, F.silu)


def hgrn2(mixer: Mixer, x: Tensor) -> Tensor:
    q, k, v = (project(p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    forget = 0.25 + 0.75 * torch.sigmoid(k)
    o, _ = reference.linear_attention(F.silu(q), 1 - forget, v, forget.log(), scale=1.0)
    return normed(mixer, o).flatten(-2) @ mixer.out_proj.weight.T


def convolved_channels(mixer: Mixer, x: Tensor) -> Tensor:
    """Those of the one projection, of mixers whose queries and keys are no projections of x."""
    channels, weight = F.pad(x @ mixer.v_proj.weight.T, (0, 0, 3, 0)), mixer.short_conv.weight
    return F.silu(sum(weight[:, tap] * channels[:, tap : tap + x.shape[1]] for tap in range(4)))


def mamba(mixer: Mixer, x: Tensor) -> Tensor:
    u = convolved_channels(mixer, x)
    narrow, wide = mixer.dt_proj
    step = torch.log1p(torch.exp(u @ narrow.weight.T @ wide.weight.T + mixer.dt_bias))
    b, c = u @ mixer.k_proj.weight.T, u @ mixer.q_proj.weight.T
    o, _ = reference.selective_scan(u, step, -mixer.A_log.exp(), b, c)
    return ((o + mixer.D * u) * F.silu(x @ mixer.g_proj.weight.T)) @ mixer.out_proj.weight.T


def mamba2(mixer: Mixer, x: Tensor) -> Tensor:
    c, b, u = convolved(mixer, x)
    step, log_decay = mamba_gate(mixer, x, mixer.dt_proj)
    o, _ = reference.linear_attention(c, b, step.unsqueeze(-1) * u, log_decay, scale=1.0)
    o = (o + mixer.D[:, None] * u) * F.silu(project(mixer.g_proj, x))
    return normed(mixer, o).flatten(-2) @ mixer.out_proj.weight.T


def by_weights(mixer: Mixer, v: Tensor, weights: Tensor) -> Tensor:
    """The output from weights [B, H, T, T] of pairs, of which those before the diagonal count."""
    share = mixer.num_heads // mixer.num_kv_heads
    o = torch.einsum("bhts,bshd->bthd", weights.tril(), v.repeat_interleave(share, 2))
    return o.flatten(-2) @ mixer.out_proj.weight.T


def products(mixer: Mixer, q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, 2))


def divided(weights: Tensor) -> Tensor:
    return weights.tril() / weights.tril().sum(-1, keepdim=True)


def based(mixer: Mixer, x: Tensor) -> Tensor:
    q, k = (project(p, x, 16) for p in (mixer.q_proj, mixer.k_proj))
    s = products(mixer, q, k) / 4
    return by_weights(mixer, project(mixer.v_proj, x), divided(1 + s + s**2 / 2))


def rebased(mixer: Mixer, x: Tensor) -> Tensor:
    def features(layer: nn.Linear, learned: LearnedQuadratic) -> Tensor:
        y = project(layer, x)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (learned.norm.weight * y + learned.norm.bias) ** 2

    q, k = features(mixer.q_proj, mixer.q_features), features(mixer.k_proj, mixer.k_features)
    return by_weights(mixer, project(mixer.v_proj, x), divided(products(mixer, q, k)))


def hedgehog(mixer: Mixer, x: Tensor) -> Tensor:
    def features(layer: nn.Linear, learned: Hedgehog) -> Tensor:
        y = torch.stack([project(layer, x)[:, :, h] @ learned.weight[h] for h in range(len(learned.weight))], 2)
        return torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], -1)

    q, k = features(mixer.q_proj, mixer.q_features), features(mixer.k_proj, mixer.k_features)
    return by_weights(mixer, project(mixer.v_proj, x), divided(products(mixer, q, k)))


def inline(mixer: Mixer, x: Tensor) -> Tensor:
    q, k, v = (project(p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    s = products(mixer, q, k).tril() / DIM**0.5
    seen = torch.arange(1, LENGTH + 1, dtype=s.dtype)[:, None]
    return by_weights(mixer, v, s - s.sum(-1, keepdim=True) / seen + 1 / seen)


def lightnet(mixer: Mixer, x: Tensor) -> Tensor:
    q, k, v = (project(p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    share = mixer.num_heads // mixer.num_kv_heads
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    o = torch.stack([torch.einsum("bhk,bshk,bshv->bhv", F.silu(q[:, t]), k[:, : t + 1].softmax(1), v[:, : t + 1])
                     for t in range(x.shape[1])], 1)  # fmt: skip
    return gated(mixer, x, o, F.silu)


def delta_inputs(mixer: Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = convolved(mixer, x)
    return unit(q), unit(k), v, mixer.most * torch.sigmoid(x @ mixer.beta_proj.weight.T)


def deltanet(mixer: Mixer, x: Tensor) -> Tensor:
    o, _ = reference.delta_rule(*delta_inputs(mixer, x))
    return normed(mixer, o).flatten(-2) @ mixer.out_proj.weight.T


def gated_deltanet(mixer: Mixer, x: Tensor) -> Tensor:
    o, _ = reference.delta_rule(*delta_inputs(mixer, x), mamba_gate(mixer, x, mixer.decay_proj)[1])
    return gated(mixer, x, o, F.silu)


def kda(mixer: Mixer, x: Tensor) -> Tensor:
    narrow, wide = mixer.decay_proj
    logits = (x @ narrow.weight.T @ wide.weight.T).unflatten(-1, (-1, DIM))
    log_decay = -mixer.A_log.exp() * torch.log1p(torch.exp(logits + mixer.dt_bias))
    o, _ = reference.delta_rule(*delta_inputs(mixer, x), log_decay)
    return gated(mixer, x, o, torch.sigmoid)


def delta_product(mixer: Mixer, x: Tensor) -> Tensor:
    """Two rows to a token: the first decays, the second is read."""
    q, k, v, beta = delta_inputs(mixer, x)
    log_decay = mamba_gate(mixer, x, mixer.decay_proj)[1]
    k, v, beta = (y.unflatten(2, (2, -1)).flatten(1, 2) for y in (k, v, beta))
    gates = torch.stack([log_decay, torch.zeros_like(log_decay)], 2).flatten(1, 2)
    o, _ = reference.delta_rule(q.repeat_interleave(2, 1), k, v, beta, gates)
    return gated(mixer, x, o[:, 1::2], F.silu)


def rwkv7(mixer: Mixer, x: Tensor) -> Tensor:
    q, k, v = convolved(mixer, x)
    narrow, _, wide = mixer.decay_proj
    decay = -(torch.tanh(x @ narrow.weight.T) @ wide.weight.T + wide.bias).sigmoid() * torch.tensor(-0.5).double().exp()
    narrow, wide = mixer.rate_proj
    rate = (x @ narrow.weight.T @ wide.weight.T + wide.bias).sigmoid().unflatten(-1, (-1, DIM))
    read, written = unit(k * mixer.erase_scale), k * (1 + (rate - 1) * mixer.write_scale)
    o, _ = reference.dplr_delta_rule(q, written, v, read, rate * read, decay.unflatten(-1, (-1, DIM)), scale=1.0)
    share = mixer.num_heads // mixer.num_kv_heads
    bonus = (q * (written * mixer.bonus).repeat_interleave(share, 2)).sum(-1, keepdim=True)
    o = normed(mixer, o) + bonus * v.repeat_interleave(share, 2)
    return (o * torch.sigmoid(project(mixer.g_proj, x))).flatten(-2) @ mixer.out_proj.weight.T


def mlstm(mixer: Mixer, x: Tensor) -> Tensor:
    """Not stabilised."""
    q, k, v = (project(p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    enters = (x @ mixer.input_proj.weight.T + mixer.input_bias).exp()
    forgets = (x @ mixer.forget_proj.weight.T + mixer.forget_bias).sigmoid().log()
    o, _ = reference.linear_attention(q, k, F.pad(v, (0, 1), value=1.0) * enters.unsqueeze(-1), forgets)
    return gated(mixer, x, o[..., :-1] / o[..., -1:].abs().clamp(min=1), torch.sigmoid)


def s4d(mixer: Mixer, x: Tensor) -> Tensor:
    u = convolved_channels(mixer, x)
    a, step = torch.complex(-mixer.A_log.exp(), mixer.A_imag), mixer.step_log.exp()[:, None]
    weights = torch.complex(*mixer.C.unbind(-1)) * ((step * a).exp() - 1) / a
    y, _ = reference.diagonal_state_space(u, step * a, weights)
    y = F.gelu(y + mixer.D * u) * torch.sigmoid(x @ mixer.g_proj.weight.T)
    return y @ mixer.out_proj.weight.T


def slstm(mixer: Mixer, x: Tensor) -> Tensor:
    u = convolved_channels(mixer, x).unflatten(-1, (-1, DIM))
    heads = [torch.stack([u[:, :, h] @ mixer.enters[g, h] for h in range(HEADS)], 2) for g in range(4)]
    gates = torch.stack(heads, 2) + mixer.bias
    c, n, h, outputs = 0, 0, torch.zeros_like(gates[:, 0, 0]), []
    for t in range(x.shape[1]):
        z, i, f, o = (gates[:, t] + torch.einsum("bhd,ghde->bghe", h, mixer.recurrent)).unbind(1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outputs.append(h)
    return normed(mixer, torch.stack(outputs, 1)).flatten(-2) @ mixer.out_proj.weight.T


def mom(mixer: Mixer, x: Tensor) -> Tensor:
    """Each memory by itself, over the tokens that are sent to it."""
    widths = [p.out_features for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    q_taps, *kv_taps = mixer.short_conv.weight.split(widths)
    q = unit(F.silu(taps(x @ mixer.q_proj.weight.T, q_taps)).unflatten(-1, (-1, DIM)))
    beta, log_decay = torch.sigmoid(x @ mixer.beta_proj.weight.T), mamba_gate(mixer, x, mixer.decay_proj)[1]
    scores = (x @ mixer.router.weight.T).softmax(-1)
    total = torch.zeros_like(q)
    for row in range(x.shape[0]):
        for memory in range(mixer.num_memories + 1):
            heads = slice(memory * mixer.num_kv_heads, (memory + 1) * mixer.num_kv_heads)
            for_it = [
                t
                for t in range(LENGTH)
                if memory == mixer.num_memories or memory in scores[row, t].argsort(descending=True)[: mixer.top_k]
            ]
            if not for_it:
                continue
            rows, own = x[row : row + 1, for_it], slice(heads.start * DIM, heads.stop * DIM)
            k, v = (
                F.silu(taps(rows @ p.weight[own].T, weight[own])).unflatten(-1, (-1, DIM))
                for p, weight in zip((mixer.k_proj, mixer.v_proj), kv_taps, strict=True)
            )
            gates = (y[row : row + 1, for_it, heads] for y in (beta, log_decay))
            o, _ = reference.delta_rule(q[row : row + 1, for_it], unit(k), v, *gates)
            best = scores[row, for_it].topk(mixer.top_k).values.sum(-1)
            weight = torch.ones(len(for_it)) if memory == mixer.num_memories else scores[row, for_it, memory] / best
            total[row, for_it] = total[row, for_it] + weight[:, None, None] * o[0]
    return gated(mixer, x, total, F.silu)


DEFINITIONS = {f.__name__: f for f in (
    gla, hgrn2, mamba, mamba2, based, rebased, hedgehog, inline, lightnet, deltanet, gated_deltanet, kda,
    delta_product, rwkv7, mlstm, s4d, slstm, mom,
)}  # fmt: skip


def make(name: str, **options: object) -> Mixer:
    torch.manual_seed(0)
    return mixer_class(name)(HIDDEN, HEADS, layer_idx=1, num_layers=4, **options).double()


def test_every_mixer_has_a_definition_and_a_line_in_the_docs() -> None:
    elsewhere = {"linear", "lightning", "retention", "softmax"}  # tests/lasp/test_layers.py
    assert MIXERS.keys() == DEFINITIONS.keys() | elsewhere
    page = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text(encoding="utf-8")
    assert [name for name in MIXERS if f"`{name}`" not in page] == []


def test_the_mixer_that_the_docs_add() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text(encoding="utf-8")
    lines = page.split("    class ToyDecay")[1].split("\n`gate =")[0]
    found: dict[str, Any] = {"RecurrentMixer": RecurrentMixer, "nn": torch.nn, "F": F, "torch": torch}
    exec(textwrap.dedent("    class ToyDecay" + lines), found)
    torch.manual_seed(0)
    mixer = found["ToyDecay"](HIDDEN, HEADS, num_kv_heads=2).double()
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    q, k, v = (
        part.unflatten(-1, (-1, HIDDEN // HEADS)) for part in (mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    )
    q, k, v = F.silu(q), F.silu(k).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    decay = (-F.softplus(mixer.decay_proj(x))).exp().repeat_interleave(2, 2)[..., None, None]
    state, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(LENGTH):
        state = decay[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] * (HIDDEN // HEADS) ** -0.5)
    expected = mixer.out_proj(mixer.norm(torch.stack(outputs, 1)).flatten(-2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_mixer_equals_its_definition(name: str, kv_heads: int) -> None:
    mixer = make(name, num_kv_heads=kv_heads)
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], DEFINITIONS[name](mixer, x), rtol=1e-10, atol=1e-10)


def test_gla_with_half_width_keys() -> None:
    mixer, x = make("gla", expand_k=0.5, num_kv_heads=2), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    y, state = mixer(x, output_final_state=True)
    torch.testing.assert_close(y, gla(mixer, x), rtol=1e-10, atol=1e-10)
    assert state.shape == (2, 2, DIM // 2, DIM)


def test_hgrn2_with_a_bound_that_it_is_told() -> None:
    mixer, x = make("hgrn2", learned_bounds=True), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    bounds = rising_bounds(torch.randn(3, HIDDEN, dtype=torch.float64))
    assert not bounds[0].any()
    assert (bounds[1:] > bounds[:-1]).all()
    assert bounds.max() < 1
    q, k, v = (project(p, x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    for bound in bounds:
        lowest = bound.unflatten(-1, (-1, DIM))
        forget = lowest + (1 - lowest) * torch.sigmoid(k)
        o, _ = reference.linear_attention(F.silu(q), 1 - forget, v, forget.log(), scale=1.0)
        expected = normed(mixer, o).flatten(-2) @ mixer.out_proj.weight.T
        torch.testing.assert_close(mixer(x, lower_bound=bound)[0], expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="give forward its lower_bound"):
        mixer(x)


def test_beta_reaches_two_where_eigenvalues_may_be_negative() -> None:
    x = torch.randn(1, 50, HIDDEN, dtype=torch.float64) * 20
    assert 0.9 < make("deltanet").beta(x).max() <= 1
    assert 1.9 < make("deltanet", allow_neg_eigval=True).beta(x).max() <= 2


def test_a_memory_without_tokens_stays_as_it_is() -> None:
    mixer, x = make("mom"), torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)
    _, state = mixer(x, output_final_state=True)
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[2:] = -1.0  # memories 2 and 3 never win
    _, after = mixer(x.abs(), state=state, output_final_state=True)
    assert torch.equal(after.memory[:, 2 * HEADS : 4 * HEADS], state.memory[:, 2 * HEADS : 4 * HEADS])
    assert (after.memory[:, :HEADS] - state.memory[:, :HEADS]).abs().min() > 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mom", {"top_k": 5}, "got 5 and 4"),
        ("mom", {"balance": -1.0}, "got -1.0"),
        ("delta_product", {"num_householder": 0}, "got 0"),
        ("gla", {"expand_k": 0.4}, "head_dim 6, got 0.4"),
        ("mamba", {"state_size": 0}, "got 0"),
        ("s4d", {"state_size": 0}, "got 0"),
        ("gated_deltanet", {"causal": False}, "GatedDeltaNet .* got causal=False"),
    ],
)
def test_mistakes_in_building_are_value_errors(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name, **options)


def test_convolution_refuses_padding_in_packed_documents() -> None:
    x, mask = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64), torch.ones(1, LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="only for one text on one device"):
        make("mamba2")(x, attention_mask=mask, cu_seqlens=torch.tensor([0, 5, LENGTH]))
    with pytest.raises(ValueError, match="got Tensor"):
        make("mamba2")(x, state=torch.zeros(1))


def test_feature_maps() -> None:
    x, y = torch.randn(2, 1, 3, 4, 6, dtype=torch.float64).unbind()
    s = torch.linalg.vecdot(x, y) / 6**0.5
    torch.testing.assert_close(torch.linalg.vecdot(taylor(x), taylor(y)), 1 + s + s**2 / 2)
    torch.testing.assert_close(softmax(x), x.exp() / x.exp().sum(-1, keepdim=True))
    t2r = TransformerToRnn(4, 6).double()
    nn.init.normal_(t2r.weight)
    nn.init.normal_(t2r.bias)
    heads = [(x[:, :, h] @ t2r.weight[h] + t2r.bias[h]).clamp(min=0) for h in range(4)]
    torch.testing.assert_close(t2r(x), torch.stack(heads, 2))


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_linear_attention_takes_any_feature_map(name: str, kv_heads: int) -> None:
    mixer = make("linear", feature_map=name, num_kv_heads=kv_heads)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    q = mixer.q_features(project(mixer.q_proj, x))
    k, v = mixer.k_features(project(mixer.k_proj, x)), project(mixer.v_proj, x)
    weights = products(mixer, q, k).tril()
    share = mixer.num_heads // mixer.num_kv_heads
    o = torch.einsum("bhts,bshd->bthd", weights * q.shape[-1] ** -0.5, v.repeat_interleave(share, 2))
    o = normed(mixer, o) * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0], o.flatten(-2) @ mixer.out_proj.weight.T, rtol=1e-10, atol=1e-10)
    if not FEATURE_MAPS[name].positive:
        return
    assert weights.min() >= 0
    divided_mixer = make("linear", feature_map=name, num_kv_heads=kv_heads, normalise=True)
    divided_mixer.load_state_dict(mixer.state_dict(), strict=False)
    sums = weights.sum(-1, keepdim=True)
    expected = by_weights(mixer, v, weights / sums.masked_fill(sums == 0, 1))
    torch.testing.assert_close(divided_mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_an_mlstm_bears_gates_of_any_size() -> None:
    """Input gates from e^-300 to e^300, where what is not stabilised overflows in fp32."""
    mixer, x = make("mlstm").float(), torch.randn(1, 40, HIDDEN, requires_grad=True)
    with torch.no_grad():
        mixer.input_proj.weight.mul_(200)
    y, _ = mixer(x)
    y.square().sum().backward()
    exact = make("mlstm")
    exact.load_state_dict(mixer.state_dict())
    z = x.detach().double().requires_grad_()
    reference_y = mlstm(exact, z)
    reference_y.square().sum().backward()
    assert (y - reference_y).norm() < 1e-4 * reference_y.norm()
    assert (x.grad - z.grad).norm() < 1e-3 * z.grad.norm()


def test_lightnet_bears_logits_of_any_size() -> None:
    """Keys that outgrow all before them by e^400, and fade to nothing after them."""
    mixer, x = make("lightnet").float(), torch.randn(1, 40, HIDDEN, requires_grad=True)
    with torch.no_grad():
        mixer.k_proj.weight.mul_(300)
    y, _ = mixer(x)
    y.square().sum().backward()
    exact = make("lightnet")
    exact.load_state_dict(mixer.state_dict())
    z = x.detach().double().requires_grad_()
    reference_y = lightnet(exact, z)
    reference_y.square().sum().backward()
    assert (y - reference_y).norm() < 1e-4 * reference_y.norm()
    assert (x.grad - z.grad).norm() < 1e-3 * z.grad.norm()


# Of a token: weights that it passes, and the recurrence's own operations (lasp/parallel/work.py).
WIDE = HIDDEN * HIDDEN
OPERATIONS = {
    ("gla", 0.5): (4 * WIDE + HIDDEN * (16 + 8), 4 * HEADS * 3 * DIM),
    ("hgrn2", None): (4 * WIDE, 4 * HEADS * DIM * DIM),
    ("mamba", None): (3 * WIDE + HIDDEN * (2 * 16 + 2 * 2 + 4), 4 * HIDDEN * 16),
    ("rwkv7", None): (5 * WIDE + HIDDEN * (4 * 16 + 3 * 4), 6 * HEADS * DIM * DIM),
    ("mlstm", None): (5 * WIDE + 2 * HIDDEN * HEADS, 4 * HEADS * DIM * (DIM + 1)),
    ("s4d", None): (3 * WIDE + HIDDEN * 4, 16 * HIDDEN * 32),
    ("slstm", None): (2 * WIDE + HIDDEN * 4 + 4 * HEADS * DIM * DIM, 2 * 4 * HEADS * DIM * DIM),
    # Of four memories two, and the shared one: keys, values and their filters; gates of all.
    ("mom", None): (
        (3 + 3 * 2) * WIDE + 4 * HIDDEN * (1 + 3 * 2) + HIDDEN * (4 + 2 * 5 * HEADS), 3 * 6 * HEADS * DIM * DIM,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "expand_k"), OPERATIONS)
def test_operations_are_those_counted_by_hand(name: str, expand_k: float | None) -> None:
    mixer = make(name, **({} if expand_k is None else {"expand_k": expand_k}))
    weights, own = OPERATIONS[name, expand_k]
    with work() as counted:
        mixer(torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64))
    assert counted.flops == 2 * LENGTH * own
    assert weight_flops(mixer) == pytest.approx(6 * weights)
