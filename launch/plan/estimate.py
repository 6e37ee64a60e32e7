"""Estimates: memory and time of a candidate, item by item."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

from lasp.launch.plan.candidate import LEVERS, Candidate, Job
from lasp.launch.plan.footprint import SHORT, Footprints, Run
from lasp.launch.plan.tally import Effort
from lasp.launch.simulate.exchanges import Ways, links_of, scan_ways, sum_of_gradients
from lasp.launch.simulate.machine import Chip, Machine
from lasp.launch.simulate.program import Exchange, Layer, Pass, Stage, Step
from lasp.launch.simulate.timeline import Timeline, play
from lasp.parallel.scan import SCANS
from lasp.parallel.schedule import Sizes
from lasp.parallel.traffic import Traffic

AS_FAST = 0.02
"""Of the least time: what plans may differ by and be as good, since their errors are larger (docs/planning.md)."""
_LOGITS = "rest"  # what is in no part of a layer: the head, and the loss
_OPTIMIZER = "optimizer"
_CLIPPED = 3
"""Times that gradients are read or written to be clipped: for their norm, and to be scaled."""
_REDUCED = {"ddp": 7, "fsdp2": 6}
"""Times that an engine reads or writes them: into a bucket, its norm, its mean, and out of it; or parameters out of
what was gathered, twice, and gradients into what is summed."""


@dataclass(frozen=True)
class Estimate:
    """memory: bytes of a rank at its worst moment; timeline: of one step; flops: of the mathematics, of all ranks."""

    candidate: Candidate
    memory: dict[str, float]
    timeline: Timeline | None
    flops: float
    job: Job
    machine: Machine

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.machine.chip.memory

    @property
    def seconds(self) -> float:
        return float("inf") if self.timeline is None else self.timeline.seconds

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.job.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the chips' operations that the mathematics takes."""
        return self.flops / (self.seconds * self.job.ranks * self.machine.chip.flops)

    @property
    def items(self) -> dict[str, float]:
        """Seconds of a step by what they go to."""
        return {} if self.timeline is None else self.timeline.items()

    def cost(self, price: float) -> float:
        """Of a billion tokens, where a chip costs so much an hour."""
        return 1e9 / self.rate / 3600 * price * self.job.ranks


def ranked(found: Iterable[Estimate]) -> list[Estimate]:
    """Best first, what fits ahead of what does not: by time. But of plans as fast as the fastest the first is the one
    that shares a sequence among fewest ranks, and then the one that pulls fewest levers: less can come otherwise."""
    by_time = sorted(found, key=lambda e: (e.seconds, e.bytes))
    as_fast = [e for e in by_time if e.fits and e.seconds <= (1 + AS_FAST) * by_time[0].seconds]
    simplest = min(as_fast, key=lambda e: (e.candidate.sp, [*LEVERS].index(e.candidate.levers)), default=None)
    return sorted(by_time, key=lambda e: e is not simplest)


def estimate(candidate: Candidate, job: Job, machine: Machine, footprints: Footprints) -> Estimate:
    """Memory first; the time of what fits alone."""
    tokens = ceil(job.seq / candidate.sp)
    levers = LEVERS[candidate.levers]
    held = footprints.of(candidate.sp, tokens, 0, levers, candidate.method)
    memory = memory_of(held, candidate, job.ranks, machine.chip)
    found = Estimate(candidate, memory, None, 0.0, job, machine)
    if not found.fits:
        return found
    sent = footprints.of(candidate.sp, tokens, -1, levers, candidate.method)
    step = _step(candidate, job, machine, sent, sizes_of(footprints))
    node = job.node_size if candidate.sp > job.gpus else None
    timeline = play(step.program(), candidate.sp, Traffic(machine.wires, node, machine.card))
    flops = 3 * (sum(sent.mixing.values()) + _flops(sent, "forward")) * job.ranks * step.repeat
    return Estimate(candidate, memory, timeline, flops, job, machine)


# Memory -------------------------------------------------------------------------------------------------------------


def memory_of(run: Run, candidate: Candidate, ranks: int, chip: Chip) -> dict[str, float]:
    """Bytes by item, of the moment at which most is held."""
    shares = 1 if candidate.engine == "ddp" else ranks
    own = run.parameters
    always = {"parameters": own.all / shares + own.buffers, "optimizer": own.optimizer / shares}
    if candidate.engine == "ddp":
        always["gradient buckets"] = own.trained
    else:
        always["gathered parameters"] = 2 * own.unit
    peak = run.moments.most(lambda item: 1 / shares if item in ("gradients", "optimizer") else 1.0)
    worst = _told(peak)
    found = always | worst
    found["allowance"] = chip.reserve + chip.fragments * sum(worst.values())
    return found


def _told(peak: dict[str, float]) -> dict[str, float]:
    """By what readers know: what a backward node has made is in flight."""
    found: dict[str, float] = defaultdict(float)
    for item, size in peak.items():
        if item == "gradients":
            found[item] += size
        elif item == "optimizer":
            found["optimizer's scratch"] += size
        elif item == "exchange":
            found["states and keys exchanged"] += size
        elif item == _LOGITS:
            found["logits and loss"] += size
        elif "Backward" in item:
            found["backward"] += size
        else:
            found[f"activations: {item}"] += size
    return dict(found)


# Time ---------------------------------------------------------------------------------------------------------------


def sizes_of(footprints: Footprints) -> Sizes:
    """Of the states that a layer's scan shares: what two ranks gather there are maps, and back states."""
    run = footprints.of(2, SHORT, 0)
    layers = max(1, sum(kind not in run.softmax for kind in run.kinds))
    there, back = (run.sent.get(("all_gather", phase), (0.0, 0.0))[0] / layers for phase in ("forward", "backward"))
    return Sizes(round(back), round(max(there - back, 0)), 128)


def _flops(run: Run, direction: str) -> float:
    return sum(e.flops for (place, way), e in run.effort.items() if way == direction and place != _OPTIMIZER)


def tokenwise(run: Run, direction: str, chip: Chip) -> float:
    """Seconds of a step's products and passes over memory in its layers, or of as many kernels as there are: of mixers
    whose time has been measured, only what was taken off it: products, of softmax attention all but its kernels, and
    what a core takes between operations."""
    own = {place: e for (place, way), e in run.effort.items() if way == direction}
    for place in (_LOGITS, _OPTIMIZER):
        own.pop(place, None)
    alone = {"bytes": 0.0, "fresh": 0.0} | ({"calls": 0.0} if chip.overlap else {})
    linear = chip.mixers.keys() - run.softmax
    efforts = [replace(e, **alone) if place in linear else e for place, e in own.items()]
    return max(sum(busy(e, chip) for e in efforts), chip.launch * sum(e.calls for e in efforts))


def busy(effort: Effort, chip: Chip) -> float:
    """Seconds of products, of passes over memory, and until new memory is there; and of launching, where nothing is
    computed meanwhile."""
    products = effort.flops - effort.half + effort.half / chip.half
    passes = effort.bytes / (chip.stream * chip.bandwidth) + effort.fresh * chip.fresh
    launches = 0.0 if chip.overlap else effort.calls * chip.launch
    return products / (chip.matmul * chip.flops) + passes + launches


def _step(candidate: Candidate, job: Job, machine: Machine, run: Run, sizes: Sizes) -> Step:
    chip, count = machine.among(job.gpus, candidate.sp), len(run.kinds)
    ahead, again = tokenwise(run, "forward", chip) / count, tokenwise(run, "again", chip) / count
    back = tokenwise(run, "backward", chip) / count + again
    of_logits = sum(busy(run.effort.get((_LOGITS, way), Effort()), chip) for way in ("forward", "backward"))
    optimizer = busy(run.effort.get((_OPTIMIZER, "forward"), Effort()), chip)
    repeated = LEVERS[candidate.levers].checkpoint_every is not None
    gradients = _gradients(candidate, job, machine, run)
    layers = []
    for kind in run.kinds:
        mixing = _mixing(run, kind, chip)
        ways = _ways(candidate, job, replace(machine, chip=chip), run, kind, sizes)
        _, back_times = chip.mixers.get(kind, (0.0, 2.5 if kind in run.softmax else 2.0))
        times = back_times + repeated
        forward = Pass(ahead / 2, (Stage(0.3 * mixing, ways.there, 0.4 * mixing),), 0.3 * mixing, ahead / 2)
        backward = Pass(
            back / 2, (Stage(0.3 * times * mixing, ways.back, 0.4 * times * mixing),), 0.3 * times * mixing, back / 2
        )
        layers.append(Layer(kind, forward, backward, gradients if chip.overlap else None))
    shares = 1 if candidate.engine == "ddp" else job.ranks
    passed = (_CLIPPED / shares + _REDUCED[candidate.engine]) * run.parameters.trained
    optimizer = optimizer / shares + passed / (chip.stream * chip.bandwidth)
    behind = (
        None if gradients is None or chip.overlap else gradients._replace(collectives=[*gradients.collectives] * count)
    )
    return Step(layers, of_logits, optimizer, gradients=behind, repeat=candidate.repeat(job))


def _mixing(run: Run, kind: str, chip: Chip) -> float:
    """Seconds of one mixer of a kind, forward."""
    share, _ = chip.mixers.get(kind, (chip.attention if kind in run.softmax else chip.mixing, 0.0))
    return run.mixing.get(kind, 0.0) / run.kinds.count(kind) / (share * chip.flops)


def _ways(candidate: Candidate, job: Job, machine: Machine, run: Run, kind: str, sizes: Sizes) -> Ways:
    """What a layer exchanges: the schedule of its scan, or as many bytes and steps as its rank has counted."""
    if candidate.sp == 1:
        return Ways(None, None)
    node = job.node_size if candidate.sp > job.gpus else None
    if kind not in run.softmax:
        scan, neighbours = SCANS[candidate.scan](), min(candidate.sp, job.gpus)
        scan.check(candidate.sp, neighbours)
        links = links_of(candidate.sp, candidate.layout, neighbours)
        return scan_ways(scan, sizes, links, machine.wires, machine.chip.relay)
    wire = machine.wires.network if node is not None else machine.wires.node
    count, found = sum(kind in run.softmax for kind in run.kinds), []
    for phase in ("forward", "backward"):
        size, steps = _keys(run, phase, candidate.sp, sizes)
        found.append(Exchange("keys", collectives=[size / count / wire.bandwidth + steps / count * wire.latency]))
    return Ways(*found)


def _keys(run: Run, phase: str, ranks: int, sizes: Sizes) -> tuple[float, float]:
    """Bytes and steps of all exchanges one way but those of maps, which the runs have gathered."""
    linear = sum(kind not in run.softmax for kind in run.kinds)
    maps = linear * (ranks - 1) * (sizes.state + (sizes.transfer if phase == "forward" else 0))
    told = [found for (_, way), found in run.sent.items() if way == phase]
    return max(sum(size for size, _ in told) - maps, 0.0), max(sum(steps for _, steps in told) - linear, 0.0)


def _gradients(candidate: Candidate, job: Job, machine: Machine, run: Run) -> Exchange | None:
    """The sum of a layer's; with sharded parameters also their two gathers, which are as long as half of it each."""
    size = run.parameters.trained / len(run.kinds)
    found = sum_of_gradients(size, job.ranks, machine.wires, job.node_size)
    if found is None or candidate.engine == "ddp":
        return found
    return found._replace(collectives=[1.5 * seconds for seconds in found.collectives])
