"""The store of an attempt: in torchrun's, which attempts share, lies what ranks that are gone have left."""

import secrets
import time

import torch.distributed as dist

_POLL = 0.02


def own_store(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """A part of a store that the ranks of this attempt have to themselves, whatever lies in the rest of it.

    No number tells attempts apart: each of torchrun's agents counts its own. So the first rank makes up a name, and
    tells it to each of the others in answer to a word which that one has made up, until it has heard. TimeoutError
    where one of them does not come in some seconds: on the first rank, naming those; on the others.
    """
    own, until = secrets.token_hex(8), time.monotonic() + seconds
    missing = set(range(1, size)) if rank == 0 else {rank}
    if rank:
        store.set(f"calls/{rank}", own)
    while missing:
        if time.monotonic() > until:
            raise TimeoutError(", ".join(map(str, sorted(missing))))
        if rank == 0:
            missing = {other for other in missing if not _answered(store, other, own)}
        elif (name := _read(store, f"answers/{rank}").removeprefix(f"{own} ")) and len(name) == len(own):
            store.set(f"hears/{rank}", name)
            return dist.PrefixStore(name, store)
        time.sleep(_POLL)
    return dist.PrefixStore(own, store)


def _answered(store: dist.Store, other: int, name: str) -> bool:
    """Whether a rank knows the name; it is told, in answer to its last word."""
    if _read(store, f"hears/{other}") == name:
        return True
    if word := _read(store, f"calls/{other}"):
        store.set(f"answers/{other}", f"{word} {name}")
    return False


def _read(store: dist.Store, key: str) -> str:
    return bytes(store.get(key)).decode() if store.check([key]) else ""
