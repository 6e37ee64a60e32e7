"""The mean over a whole sequence, and parameter gradients over the axes dp and sp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lasp

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("cut", [(3, 3, 3, 4), (1, 10, 1, 1), (13, 0, 0, 0)])
def test_cross_entropy_is_the_mean_over_the_whole_sequence(world, group_of, cut: tuple[int, ...]) -> None:
    group = group_of(4)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 13, 11, dtype=torch.float64, generator=rng, requires_grad=True)
    labels = torch.randint(11, (2, 13), generator=rng)
    labels[:, 3:6] = -100  # under the first cut, rank 1 has no label at all
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (whole,) = torch.autograd.grad(expected, logits)
    part = slice(sum(cut[: world.rank]), sum(cut[: world.rank + 1]))
    local = logits.detach()[:, part].requires_grad_()
    loss = lasp.cross_entropy(local, labels[:, part], group=group)
    loss.backward()
    assert len(set(world.allgather(loss.item()))) == 1
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(local.grad, whole[:, part], rtol=0, atol=1e-16)


def test_an_infinite_loss_is_infinite_on_every_rank(world, group_of) -> None:
    """A label that is ruled out on one rank: torch's value, and its gradients, which are finite."""
    logits = torch.randn(1, 8, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8).view(1, 8)
    logits[0, 5, 5] = -torch.inf
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten())
    expected.backward()
    part = slice(2 * world.rank, 2 * world.rank + 2)
    local = logits[:, part].clone().requires_grad_()
    loss = lasp.cross_entropy(local, labels[:, part], group=group_of(4))
    loss.backward()
    assert loss.item() == expected.item() == torch.inf
    torch.testing.assert_close(local.grad, whole.grad[:, part], rtol=0, atol=1e-16)
    alone = logits.clone().requires_grad_()
    lasp.cross_entropy(alone, labels).backward()
    torch.testing.assert_close(alone.grad, whole.grad, rtol=0, atol=1e-16)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_the_fused_loss_and_log_probabilities_are_those_of_logits(group_of, size: int, layout: str) -> None:
    if (group := group_of(size, layout)) is None:
        return
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=rng, requires_grad=True)
        for shape in ((2, 13, 5), (11, 5), (11,))
    )
    labels = torch.randint(11, (2, 13), generator=rng)
    labels[:, :8] = -100  # contiguous: nothing on the first ranks
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    rows = -F.cross_entropy(logits.mT, labels, reduction="none")
    scores = torch.linspace(0, 1, 26, dtype=torch.float64).view(2, 13)
    cut = group.cut(13)
    local, targets, factors = (lasp.shard(x.detach(), cut=cut) for x in (hidden, labels, scores))
    local.requires_grad_()
    for whole, told in ((expected, {"group": group}), (expected, {"cut": cut}), ((rows * scores).sum(), {"cut": cut})):
        if whole is expected:
            found = lasp.linear_cross_entropy(local, weight, targets, bias=bias, **told)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        else:
            own = lasp.token_log_probs(local, weight, targets, bias=bias, **told)
            torch.testing.assert_close(lasp.unshard(own.detach(), group), rows.detach(), rtol=0, atol=1e-13)
            found = (own * factors).sum()
        reference = torch.autograd.grad(whole, (hidden, weight, bias), retain_graph=True)
        grads = torch.autograd.grad(found, (local, weight, bias))
        torch.testing.assert_close(lasp.unshard(grads[0], group), reference[0], rtol=0, atol=1e-13)
        for part, total in zip(grads[1:], reference[1:], strict=True):  # the ranks' parts sum to the whole
            summed = lasp.unshard(part.unsqueeze(0).contiguous(), group, 0).sum(0)
            torch.testing.assert_close(summed, total, rtol=0, atol=1e-12)


def test_num_items_is_the_denominator_of_accumulated_steps(group_of) -> None:
    group = group_of(4)
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 12, 7, generator=rng), torch.randint(7, (2, 12), generator=rng)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    halves = [
        lasp.parallel.loss.cross_entropy(
            lasp.shard(logits[i : i + 1], group), lasp.shard(labels[i : i + 1], group), group=group, num_items=24
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(halves), expected)


class Model(nn.Module):
    """Two parameters every rank uses, one that only some do, one that none does, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3))
        self.expert = nn.Parameter(torch.randn(2))
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x: torch.Tensor, expert: bool = True) -> torch.Tensor:
        y = (x @ self.weight).sum() + self.bias.sum() * x.sum().float() + self.frozen.sum()
        return y + self.expert.sum() * x.sum().float() if expert else y


@pytest.mark.parametrize(("dp", "sp"), [(1, 4), (2, 2), (4, 1)])
def test_sync_gradients_sums_over_sp_and_averages_over_dp(world, mesh_of, dp: int, sp: int) -> None:
    group = lasp.SequenceGroup.from_mesh(mesh_of(sp=sp))
    inputs = torch.randn(4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Model()
    model(inputs[world.rank], expert=world.rank == 3).backward()
    with lasp.traffic() as ledger:
        lasp.sync_gradients(model, group)
    whole = Model()
    loss = sum(whole(inputs[rank], expert=rank == 3) for rank in range(4)) / dp
    loss.backward()
    # fp64: sums of 28 terms of size 1, added up in another order.
    torch.testing.assert_close(model.weight.grad, whole.weight.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.bias.grad, whole.bias.grad)
    torch.testing.assert_close(model.expert.grad, whole.expert.grad)
    assert model.unused.grad is None
    assert model.frozen.grad is None
    assert [r.op for r in ledger.of("gradients")] == ["all_reduce"] * 2  # one per dtype


@pytest.mark.parametrize("sp", [2, 4])
def test_data_parallel_gives_the_same_by_itself(world, mesh_of, sp: int) -> None:
    group = lasp.SequenceGroup.from_mesh(mesh_of(sp=sp))
    inputs = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    plain, wrapped = nn.Linear(5, 3), nn.Linear(5, 3)
    wrapped.load_state_dict(plain.state_dict())
    plain(inputs[world.rank]).square().sum().backward()
    lasp.sync_gradients(plain, group)
    parallel = lasp.data_parallel(wrapped, group)
    parallel(inputs[world.rank]).square().sum().backward()
    # fp32: the ranks' gradients, of size 10, in another order.
    torch.testing.assert_close(wrapped.weight.grad, plain.weight.grad, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(wrapped.bias.grad, plain.bias.grad, rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match="kind must be one of ddp, fsdp2, got 'magic'"):
        lasp.data_parallel(nn.Linear(2, 2), group, kind="magic")


def test_clipping_goes_by_the_norm_of_the_whole_gradient(world, mesh_of) -> None:
    group = lasp.SequenceGroup.from_mesh(mesh_of(sp=2))
    inputs = torch.randn(4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, whole = Model(), Model()
    (sum(whole(x) for x in inputs) / 2).backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    model(inputs[world.rank]).backward()
    with pytest.raises(ValueError, match=r"norms .*: lasp\.sync_gradients comes before clipping"):
        lasp.clip_grad_norm_(model, 0.5, group)
    lasp.sync_gradients(model, group)
    norm = lasp.clip_grad_norm_(model.parameters() if world.rank else model, 0.5, group)
    torch.testing.assert_close(norm, expected)
    assert len(set(world.allgather(norm.item()))) == 1
    torch.testing.assert_close(model.weight.grad, whole.weight.grad)
    assert lasp.clip_grad_norm_(model, 1e9) <= 0.5 + 1e-6  # and small ones stay
    torch.testing.assert_close(model.weight.grad, whole.weight.grad)
