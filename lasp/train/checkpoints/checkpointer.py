"""Checkpointer: what the loop asks of whoever keeps its states; and the one that keeps a folder per state."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor

from lasp.parallel.collectives import reached
from lasp.train.checkpoints.comparison import RUN, check_checkpoint, check_read
from lasp.train.checkpoints.export import read_weights, write_model
from lasp.train.checkpoints.folders import checkpoint_path, checkpoint_step, partial_path
from lasp.train.checkpoints.manifest import Entry, Manifest, flush_folder, write_manifest
from lasp.train.checkpoints.reader import Saved, read_index, read_into
from lasp.train.checkpoints.retention import Retention
from lasp.train.checkpoints.staging import Copies
from lasp.train.checkpoints.writer import FOLDER, ShardWriter
from lasp.train.engines.engine import Engine, State, compare, flatten
from lasp.train.ranks import Ranks

if TYPE_CHECKING:
    from lasp.train.run import Run

_RANDOM = "random: "
_WRITTEN = "its part is written"
"""Told to a watchdog where training waits for a save, so that it can name who has not written."""


class Checkpointer(Protocol):
    """Keeps the states of a run. All ranks call `save` and `load` together."""

    def save(self, step: int, engine: Engine, last: bool, kept: Callable[[int], None]) -> None:
        """Keep the state after `step` steps; once the `last` of a run has been saved, all are kept. OSError, on every
        rank, where that cannot be done, or could not with the one before.

        kept: called with the step on the main rank, in any thread, when the state is there for good.
        """

    def load(self, path: Path, engine: Engine) -> int:
        """Put a state into an engine that has done nothing; returns the steps behind it. ValueError, on every rank,
        when it cannot be read or is of something else; then nothing of it was loaded."""

    def close(self) -> None:
        """Wait for what is still written. OSError where that cannot be done."""


@dataclass
class Folders:
    """A folder per state, to which every rank writes its part, or rank 0 all of it where they share no folder."""

    run: "Run"
    """Says where, and is written down beside each state."""

    ranks: Ranks
    """Who takes part."""

    _pending: Any = field(default=None, init=False)
    _part: "Future[None]" = field(default_factory=Future, init=False)
    _writing: Path | None = field(default=None, init=False)

    def save(self, step: int, engine: Engine, last: bool, kept: Callable[[int], None]) -> None:
        self._wait()
        path = checkpoint_path(self.run.config.output, step)
        partial = partial_path(path)
        with self._saving(path):
            self.ranks.together(lambda: self._begin(partial))
            weights, optimizer = engine.state()
            state = weights | flatten(optimizer) | self._random()
            if self.ranks.any(not partial.is_dir()):
                state = self._whole(state)

            def finish(written: Mapping[str, Entry]) -> None:
                self._finish(step, partial, path, last, written)
                kept(step)
                self._retention.delete_superseded(path.parent)

            planner = DefaultSavePlanner(flatten_state_dict=False)
            options: dict[str, Any] = {"planner": planner}
            if self.run.config.async_save:
                # Not dcp.async_save, which starts a thread and logs every tensor while training waits.
                staged, options["process_group"] = self._copies.of(state), self._group
                self._part = part = Future[None]()
                writer = ShardWriter(partial, finish, lambda: part.set_result(None))
                self._pending = self._writer.submit(dcp.save, staged, storage_writer=writer, **options)
                self._writing = path
            else:
                writer = ShardWriter(partial, finish, lambda: reached(_WRITTEN))
                dcp.save(state, process_group=self.ranks.everyone.control, storage_writer=writer, **options)
        if last:
            self.close()

    def close(self) -> None:
        self._wait()
        if copies := self.__dict__.pop("_copies", None):
            copies.close()
        if background := self.__dict__.pop("_writer", None):
            background.shutdown()

    def _wait(self) -> None:
        """See that what is written in the background is complete."""
        pending = self._pending
        if pending is None or self._writing is None:
            return
        try:
            with self._saving(self._writing):
                wait([pending, self._part], return_when=FIRST_COMPLETED)
                reached(_WRITTEN)
                pending.result()
        finally:
            if pending.done():  # where an interrupt ends the wait, the copy is still being written
                self._pending = None

    @cached_property
    def _retention(self) -> Retention:
        return Retention(self.run.config)

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """All ranks again: what is said while they train must not meet what training says."""
        return dist.new_group(backend="gloo")

    @cached_property
    def _writer(self) -> ThreadPoolExecutor:
        """The thread that writes in the background."""
        return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @cached_property
    def _copies(self) -> Copies:
        """Of what is written in the background."""
        return Copies()

    @contextmanager
    def _saving(self, path: Path) -> Iterator[None]:
        """Around all that may fail in a save: OSError for it, and nothing is left."""
        try:
            yield
        except (CheckpointException, ValueError) as error:
            if self.ranks.is_main:
                shutil.rmtree(partial_path(path), ignore_errors=True)
            if isinstance(error, CheckpointException) and any(isinstance(e, KeyboardInterrupt) for e in _causes(error)):
                raise KeyboardInterrupt from error
            raise OSError(f"cannot save {str(path)!r}: {_told(error)}") from error

    def load(self, path: Path, engine: Engine) -> int:
        self.ranks.together(lambda: self._check(path))
        manifest = self.ranks.together(lambda: Manifest.read(path))
        index = self.ranks.together(lambda: read_index(manifest))

        def read(target: State) -> None:
            def look() -> dict[str, Tensor]:
                kept = flatten(target.optimizer)
                known = {name: saved for name, saved in index.items() if not name.startswith(_RANDOM)}
                compare(str(path), {name: saved for name, saved in known.items() if ": " not in name}, target.weights)
                compare(str(path), {name: saved for name, saved in known.items() if ": " in name}, kept)
                return target.weights | kept

            tensors = self.ranks.together(look)
            self.ranks.together(lambda: read_into(tensors, index, manifest))

        engine.load(read)
        self.ranks.together(lambda: self._set_random(index, manifest))
        return checkpoint_step(path)

    def _begin(self, partial: Path) -> None:
        if self.ranks.is_main:
            try:
                self._retention.delete_leftovers(partial.parent)
                partial.mkdir(parents=True)
                (partial / FOLDER).mkdir()
            except OSError as error:
                raise ValueError(str(error)) from error

    def _finish(self, step: int, partial: Path, path: Path, last: bool, written: Mapping[str, Entry]) -> None:
        """Complete a checkpoint whose tensors are there: on the main rank."""
        run = self.run
        run.model.config.save_pretrained(partial)
        run.tokenizer.save(partial)
        told = json.dumps({**asdict(run.config), "read": self._read()}, indent=2)
        (partial / RUN).write_text(told + "\n", encoding="utf-8")
        if last:
            write_model(run.model, read_weights(Manifest(partial, dict(written), "")), partial)
        write_manifest(partial, step, written)
        partial.rename(path)
        flush_folder(path.parent)

    def _read(self) -> dict[str, Any]:
        """What a step reads."""
        return {"sequences of a step": self.run.batch(self.ranks), "tokens": self.run.tokens}

    def _whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of a state, on the CPU of the main rank; the others keep nothing."""
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        return {name: value.cpu() for name, value in whole.items()} if self.ranks.is_main else {}

    def _random(self) -> dict[str, Tensor]:
        """The states of this rank's generators, under its place among the ranks."""
        ranks = self.ranks
        of = f"{_RANDOM}{ranks.everyone.rank} of dp {ranks.dp_size} x sp {ranks.sequence.size}"
        states = {f"{of}: cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states[f"{of}: cuda"] = torch.cuda.get_rng_state()
        return states

    def _set_random(self, index: Mapping[str, Saved], manifest: Manifest) -> None:
        """Go on from this rank's random numbers, or from the first rank's where the ranks are others."""
        for name, state in self._random().items():
            kind = name.rpartition(": ")[2]
            first = next((n for n in sorted(index) if n.startswith(_RANDOM) and n.endswith(f": {kind}")), None)
            if (found := name if name in index else first) is None:
                continue  # it was computed on other devices
            compare(str(manifest.path), {found: index[found]}, {found: state})
            read_into({found: state}, index, manifest)
            try:
                torch.set_rng_state(state) if kind == "cpu" else torch.cuda.set_rng_state(state)
            except RuntimeError as error:
                raise ValueError(f"{found} of {str(manifest.path)!r} is no state of a generator") from error

    def _check(self, path: Path) -> None:
        """ValueError for a checkpoint of another model or run, and when a step would not read what it would have read
        there."""
        check_checkpoint(path, self.run.model.config, self.run.config)
        check_read(path, self._read(), self.run.config.allow_change)


def _causes(error: CheckpointException) -> list[BaseException]:
    """What ended the save, rank by rank."""
    return [cause for _, (cause, _) in sorted(error.failures.items(), key=lambda failure: failure[0])]


def _told(error: BaseException) -> str:
    """What went wrong, in one line, and on which rank."""
    if isinstance(error, CheckpointException):
        cause = _causes(error)[0]
        return f"{(str(cause) or type(cause).__name__).splitlines()[0]} (rank {min(error.failures)})"
    return str(error)
