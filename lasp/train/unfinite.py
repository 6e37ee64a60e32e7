"""Which rank and which parameter it lies on that a loss or gradients are not finite."""

import torch

from lasp.parallel import collectives
from lasp.parallel.parameters import local_part, some
from lasp.train.engines import Engine
from lasp.train.ranks import Ranks


@torch.no_grad()
def blame(engine: Engine, ranks: Ranks) -> str:
    """After an update that was none: the ranks that have parameters which are not finite, else those whose gradients
    are not, each with its first; the same on every rank, which call this together."""
    named = dict(engine.model.named_parameters())
    weights = [name for name, value in named.items() if not local_part(value).isfinite().all()]
    names = list(named)
    firsts = [names.index(found[0]) if found else len(names) for found in (weights, engine.unfinite())]
    rows = collectives.all_gather(torch.tensor(firsts), ranks.everyone.control, "control").wait().T.tolist()
    for what, found in zip(("parameters", "gradients"), rows, strict=True):
        if told := [f"rank {rank} (first {names[i]})" for rank, i in enumerate(found) if i < len(names)]:
            return f"not finite are {what} of {some(told)}"
    return "parameters and gradients of every rank are finite, as far as they are seen"
