"""Saving: snapshot, write, acknowledge, commit, retain.

A save has two phases that every rank enters and leaves together: `write` (each rank its units, into step-N.tmp) and
`commit` (the main rank: hash manifest, rename, COMPLETE, `latest`). A rank that is done with a phase says so with its
vote, "done" and "failed"; the votes of all ranks are summed, and all ranks act on the sums alike. The training loop
adds the votes to the one small reduction that it makes at every step anyway, so an asynchronous save needs no
collective of its own, no second process group, and cannot get between the collectives of training. Where the loop is
not running (a synchronous save, the last one) `wait` reduces the votes itself.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import clean, seal, sync_folder
from trainer.checkpoint.restore import folder_name, saved, verify
from trainer.checkpoint.state import Best, RunState
from trainer.checkpoint.tensorfile import TensorFile
from trainer.errors import DataError, UserError
from trainer.files import read_json, write_atomically, write_json
from trainer.late import Mark
from trainer.optimizer import MOMENTS
from trainer.strategies import Strategy, UnitState
from trainer.stream import Manifest

log = logging.getLogger(__name__)

_FAILURES = (OSError, DataError, MemoryError)


class UnitFiles:
    """The two files of a unit in memory; `state` is that memory."""

    def __init__(self, state: UnitState, pinned: bool):
        moments = {f"{key}.{name}": t for key in MOMENTS for name, t in getattr(state, key).items()}
        self.weights, self.moments = TensorFile(state.weights, pinned), TensorFile(moments, pinned)
        parts = [{n: self.moments.tensors[f"{key}.{n}"] for n in getattr(state, key)} for key in MOMENTS]
        self.state = UnitState(self.weights.tensors, *parts)


class Saver:
    """Writes the checkpoints of a run. All methods but `votes` are called on all ranks, in the same order.

    Args:
        root: checkpoints folder; unfinished saves of earlier attempts in it are removed.
        config: see CheckpointConfig.
        strategy: whose units are saved.
        manifest: of the training data, stored with each checkpoint.
        trusted: checkpoint that this run resumed from, already verified.
        best: evaluation whose checkpoint is there and kept.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        strategy: Strategy,
        manifest: Manifest,
        trusted: Path | None = None,
        best: Best | None = None,
    ):
        self.root, self.config, self.strategy, self.manifest = root, config, strategy, manifest
        self.topology = strategy.topology
        self.last: Path | None = trusted  # newest checkpoint known to be good
        self.best = best  # as far as its checkpoint is known to be good
        self.last_step = -1  # of the last save that was begun
        self._seconds = 0.0
        self._last = False
        self._snapshot: dict[str, UnitFiles] = {}
        self._verified = {trusted.name} if trusted is not None and trusted.parent == root else set()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._phase = ""
        self._stale = 0  # votes still to be read that are about an earlier phase
        self._task: Future[None] = Future()
        self._state: RunState
        if self.topology.is_main:
            clean(root)

    def due(self, step: int) -> bool:
        """Whether a save begins after `step` steps."""
        return self.config.every > 0 and step % self.config.every == 0

    def save(self, state: RunState, last: bool = False, best: Best | None = None) -> None:
        """Begin a save, and finish it unless saves are asynchronous.

        An earlier one that is still under way is finished first. `last`: of the run. It is finished in any case, and
        its failure raises UserError whatever checkpoint.on_error says. `best`: the evaluation of this step, if none
        before it is as good.
        """
        began = time.perf_counter()
        self.wait()
        self._last = last
        self._save(replace(state, best=best or self.best))
        if last:
            self.wait()
        self._seconds += time.perf_counter() - began

    def _save(self, state: RunState) -> None:
        self._state, self.last_step = state, state.step
        prepared = self._attempt(self._prepare) if self.topology.is_main else _done()
        if self.topology.any_over_world(prepared.exception() is not None):
            self._task = prepared
            self._fail()
            return
        self._phase = "write"
        self.strategy.sync_last_fired()
        if self.config.asynchronous and not self._last:
            for name in self.strategy.unit_names():
                if files := self._capture(name, self._snapshot.get(name)):
                    self._snapshot[name] = files
            copied = Mark(self.topology.device)
            kernels = self.strategy.objective.bank_kernels()
            self._task = self._pool.submit(self._write, list(self._snapshot.items()), kernels, copied)
        else:
            self._snapshot.clear()
            stream = ((name, files) for name in self.strategy.unit_names() if (files := self._capture(name)))
            self._task = self._attempt(self._write, stream, self.strategy.objective.bank_kernels())
            for _ in stream:  # reading a unit may be a collective: a rank that cannot write must still take part
                pass
            self.wait()

    def votes(self) -> list[float]:
        """This rank's (done, failed) of the phase under way."""
        if not self.pending or not self._task.done():
            return [0.0, 0.0]
        return [1.0, float(self._task.exception() is not None)]

    def advance(self, done: float, failed: float) -> None:
        """Go on as the votes, summed over all ranks, say. UserError when a save failed and checkpoint.on_error=stop."""
        if self._stale:
            self._stale -= 1
            return
        if not self.pending or done < self.topology.world:
            return
        self._stale = self.topology.lag  # votes under way are about the phase that ends
        if failed:
            self._fail()
        elif self._phase == "write":
            self._phase = "commit"
            self._task = self._submit(self._commit) if self.topology.is_main else _done()
        else:
            self._phase = ""
            self.last, self.best = self._final, self._state.best

    def wait(self) -> None:
        """Finish the save under way, if there is one. No votes may be under way."""
        self._stale = 0
        while self.pending:
            wait([self._task])
            votes = torch.tensor(self.votes(), dtype=torch.float64, device=self.topology.device)
            self.advance(*self.topology.sum_over_world(votes).tolist())
            self._stale = 0

    def best_so_far(self) -> Best | None:
        """The best evaluation whose checkpoint is there. A save under way is finished first: it may fail."""
        began = time.perf_counter()
        self.wait()
        self._seconds += time.perf_counter() - began
        return self.best

    def take_seconds(self) -> float:
        """Seconds that training stood still for saves since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Stop the writing thread, after what it is writing."""
        self._pool.shutdown(wait=True)

    @property
    def pending(self) -> bool:
        """Whether a save is under way."""
        return bool(self._phase)

    @property
    def _final(self) -> Path:
        return self.root / folder_name(self._state.step)

    @property
    def _best_name(self) -> str:
        return "" if self._state.best is None else folder_name(self._state.best.step)

    @property
    def _work(self) -> Path:
        return self._final.with_suffix(".tmp")

    def _submit(self, action: Callable[[], None]) -> "Future[None]":
        return self._pool.submit(action) if self.config.asynchronous else self._attempt(action)

    @staticmethod
    def _attempt(action: Callable[..., None], *args: Any) -> "Future[None]":
        """Do it now; the failures of a save are kept, not raised."""
        future: Future[None] = Future()
        try:
            action(*args)
            future.set_result(None)
        except _FAILURES as error:
            future.set_exception(error)
        return future

    def _prepare(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        (self._work / "dictionary").mkdir(parents=True, exist_ok=True)
        (self._work / "optimizer").mkdir(exist_ok=True)

    def _capture(self, unit: str, old: UnitFiles | None = None) -> UnitFiles | None:
        """A copy of a unit's state, on the rank that saves it.

        It is made in the memory of the last one: new pages cost more than the copy.
        """
        state = self.strategy.read(unit, into=None if old is None else old.state)
        if state is None:
            return None
        return old or UnitFiles(state, pinned=self.topology.device.type == "cuda")

    def _write(
        self, units: Iterable[tuple[str, UnitFiles]], kernels: dict[str, str], copied: Mark | None = None
    ) -> None:
        if copied is not None:
            copied.wait()
        hashes = {}
        for unit, files in units:
            metadata = {"kernel": kernels[unit]} if unit in kernels else {}
            for name, file in ((f"dictionary/{unit}", files.weights), (f"optimizer/{unit}", files.moments)):
                hashes[f"{name}.safetensors"] = file.write(self._work / f"{name}.safetensors", metadata)
        write_json(self._work / f"hashes-{self.topology.rank}.json", hashes)

    def _commit(self) -> None:
        work, final = self._work, self._final
        write_json(work / "state.json", self._state.to_json())
        self.manifest.save(work)
        hashes = {name: seal(work / name) for name in ("state.json", "manifest.json")}
        for rank in range(self.topology.world):
            part = work / f"hashes-{rank}.json"
            hashes |= read_json(part, dict[str, Any], "the save is given up")
            part.unlink()
        write_json(work / "hashes.json", hashes)
        for folder in (work / "dictionary", work / "optimizer", work):
            sync_folder(folder)
        # A checkpoint of the same step stands aside until the new one is in place (see clean).
        aside = final.with_suffix(".old")
        if final.exists():
            final.rename(aside)
        work.rename(final)
        sync_folder(self.root)
        (final / "COMPLETE").touch()
        sync_folder(final)
        shutil.rmtree(aside, ignore_errors=True)
        write_atomically(self.root / "latest", f"{final.name}\n".encode())
        if self._best_name:
            write_atomically(self.root / "best", f"{self._best_name}\n".encode())
        else:
            (self.root / "best").unlink(missing_ok=True)
        sync_folder(self.root)
        self._verified.add(final.name)
        self._retain()

    def _retain(self) -> None:
        """Delete what is older than the newest `keep` checkpoints that verify, and not the best one.

        Damaged ones between them stay, to be looked at.
        """
        good = 0
        for folder in saved(self.root):
            if good >= self.config.keep and folder.name == self._best_name:
                continue
            if good >= self.config.keep:
                self._verified.discard(folder.name)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            reason = None if folder.name in self._verified else verify(folder)
            if reason is None:
                self._verified.add(folder.name)
                good += 1
            else:
                log.warning("%s does not count as a checkpoint to keep: %s", folder, reason)

    def _fail(self) -> None:
        """All ranks are here: drop the save, report it, go on or stop."""
        self._phase = ""
        error = self._task.exception() if self._task.done() else None
        reason = " ".join(str(error).split()) if error is not None else "another rank failed, see its message"
        if self.topology.is_main:
            if not (self._final / "COMPLETE").exists():
                shutil.rmtree(self._final, ignore_errors=True)
            clean(self.root)
        kept = f"the last good one is {self.last.name}" if self.last is not None else "there is none yet"
        message = f"checkpoint {self._final} was not saved ({reason}); {kept}"
        if self._last:
            raise UserError(
                f"{message}; the run is over, free some space and start it again to repeat the steps since then"
            )
        if self.config.on_error == "stop":
            raise UserError(f"{message}; stopped because checkpoint.on_error=stop")
        if error is not None or self.topology.is_main:
            log.warning("%s; training goes on", message)


def _done() -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None)
    return future
