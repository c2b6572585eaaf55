"""Several data sets in one stream: how many rows of each a lane takes at every step, and where that leads in each.

A lane takes a fixed number of rows of each source in a step, so the place in a source is a pure function of the step
and of the stages before it. A source is read epoch by epoch, each with a permutation of its own, whatever the others
do. An epoch is laid out (plan.py) for the share at which it begins. Where the share changes within an epoch, steps take
the rest of every lane's run in the new share; what does not fill a step is dropped, and the next epoch begins.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import UserError
from trainer.stream.plan import BlockLayout, Cut, Part, Plan, remember, resumed_step, step_within


class Stretch(NamedTuple):
    """From global step `start` on, a lane takes rows[name] > 0 rows of each of these sources in a step."""

    start: int
    rows: Mapping[str, int]


class _Place(NamedTuple):
    """Where a source stands: of every lane's run of `epoch`, which was laid out for `layout` rows a step, `first` rows
    are read."""

    epoch: int
    first: int
    layout: int


class _Run(NamedTuple):
    """From global step `start` on a lane takes `share` rows in a step, from `place` on: all of them in the epoch of
    `place`, unless that begins here; then in it and those that follow."""

    start: int
    share: int
    place: _Place


class _Track:
    """One source over all steps. plans: by the rows that a lane takes in a step."""

    def __init__(self, plans: Mapping[int, Plan], stretches: Sequence[tuple[int, int]]):
        self.plans, self.runs = plans, list[_Run]()
        self._laid_out: dict[int, tuple[Plan, tuple[Cut, ...]]] = {}
        place = _Place(0, 0, 0)
        ends = [*(start for start, _ in stretches[1:]), None]
        for (start, share), end in zip(stretches, ends, strict=True):
            if share and place.first:
                steps = (plans[place.layout].rows_per_lane - place.first) // share
                steps = steps if end is None else min(steps, end - start)
                self.runs.append(_Run(start, share, place))
                start += steps
                if start == end:
                    place = place._replace(first=place.first + steps * share)
                    continue
                place = _Place(place.epoch + 1, 0, share)
            run = _Run(start, share, place if place.first else place._replace(layout=share))
            self.runs.append(run)
            if end is not None:
                place = self._after(run, end - start)
        self._starts = [run.start for run in self.runs]

    def _after(self, run: _Run, steps: int) -> _Place:
        """Where a run is after so many of its steps."""
        epoch, first, layout = run.place
        if first or not run.share:
            return _Place(epoch, first + steps * run.share, layout)
        epochs, steps = divmod(steps, self.plans[run.share].steps_per_epoch)
        return _Place(epoch + epochs, steps * run.share, layout)

    def at(self, step: int) -> tuple[int, _Place]:
        """Rows that a lane takes at a global step, and from where on."""
        run = self.runs[bisect_right(self._starts, step) - 1]
        return run.share, self._after(run, step - run.start)

    def epochs(self, step: int) -> float:
        """Epochs read before a global step."""
        _, place = self.at(step)
        return place.epoch + (place.first / self.plans[place.layout].rows_per_lane if place.first else 0)

    def laid_out(self, epoch: int) -> tuple[Plan, tuple[Cut, ...]]:
        """The plan that an epoch was laid out by, and its cuts."""
        if epoch in self._laid_out:
            return self._laid_out[epoch]
        begun = [run for run in self.runs if run.share and not run.place.first and run.place.epoch <= epoch]
        layout = begun[-1].share
        cuts = [Cut(0, layout, 0)]
        for run in self.runs:
            if run.share and run.place.first and run.place.epoch == epoch:
                cuts.append(Cut(run.place.first, run.share, step_within(run.place.first, cuts)))
        found = self.plans[layout], tuple(cuts)
        remember(self._laid_out, epoch, found, 3)
        return found


class Mixture:
    """The order of rows of several data sets.

    sources: by name, in the order in which their rows stand in a lane's part of a batch; row ids count on from one to
    the next. global_batch G, lanes L. window: W blocks of a lane, of which a source has the same part as of the rows,
    so that windows of all sources span as many steps, and a step copies from as many blocks as with one source.
    stretches: who gives how much from which step on; rows of a stretch add up to G/L.
    Raises UserError for a source that is smaller than what one step takes of it.
    """

    def __init__(
        self,
        sources: Mapping[str, BlockLayout],
        seed: int,
        global_batch: int,
        lanes: int,
        window: int,
        stretches: Sequence[Stretch],
    ):
        self.seed, self.global_batch, self.lanes, self.window = seed, global_batch, lanes, window
        self.rows_per_lane_step = global_batch // lanes
        self.digests = {name: data.digest for name, data in sources.items()}
        self.rows = {name: int(data.block_rows.sum()) for name, data in sources.items()}
        self.first_rows = np.cumsum([0, *self.rows.values()])[:-1].tolist()
        self._stretches = list(stretches)
        self._starts = [stretch.start for stretch in stretches]
        self._tracks = {}
        for name, data in sources.items():
            shares = [(stretch.start, stretch.rows.get(name, 0)) for stretch in stretches]
            most = max(share for _, share in shares) * lanes
            if most > self.rows[name]:
                raise UserError(
                    f"data.sources.{name} has {self.rows[name]} rows, fewer than the {most} that one step takes of it; "
                    f"lower its share in the mix, or data.global_batch={global_batch}"
                )
            plans = {
                n: Plan(data, seed, n * lanes, lanes, max(1, round(window * n / self.rows_per_lane_step)))
                for n in {share for _, share in shares}
                if n
            }
            self._tracks[name] = _Track(plans, shares)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of the source that the last stretch names first, at its share there."""
        name, share = next(iter(self._stretches[-1].rows.items()))
        return self._tracks[name].plans[share].steps_per_epoch

    def parts(self, step: int) -> list[Part]:
        """What a global step is made of, in the order of sources."""
        found = []
        for number, track in enumerate(self._tracks.values()):
            share, place = track.at(step)
            if share:
                order, cuts = track.laid_out(place.epoch)
                found.append(Part(number, order, place.epoch, place.first, share, cuts, step_within(place.first, cuts)))
        return found

    def laid_out(self, source: int, epoch: int) -> tuple[Plan, tuple[Cut, ...]]:
        """The plan that an epoch of a source was laid out by, and its cuts into steps."""
        return list(self._tracks.values())[source].laid_out(epoch)

    def step_rows(self, step: int) -> np.ndarray:
        """Row ids of the batch of a global step in position order; int64 [G]."""
        parts = self.parts(step)
        return np.concatenate(
            [
                self.first_rows[part.source] + part.order.part_rows(part, lane)
                for lane in range(self.lanes)
                for part in parts
            ]
        )

    def epochs_at(self, step: int) -> dict[str, float]:
        """Epochs of each source read before a global step; `epoch` is that of the source named first in its mix."""
        read = {name: track.epochs(step) for name, track in self._tracks.items()}
        stretch = self._stretches[bisect_right(self._starts, step) - 1]
        return {"epoch": read[next(iter(stretch.rows))], **{f"epoch/{name}": value for name, value in read.items()}}

    def state(self, step: int) -> dict[str, Any]:
        """Position before global step `step` as a small JSON object that names no rank."""
        places = {name: track.at(step)[1] for name, track in self._tracks.items()}
        # An epoch that has not begun may still be laid out otherwise, by stages that change.
        read = {name: [place.epoch, place.first, place.first and place.layout] for name, place in places.items()}
        sources = {name: {"manifest": self.digests[name], "rows": self.rows[name], "read": read[name]} for name in read}
        return {
            "step": step, "seed": self.seed, "global_batch": self.global_batch, "lanes": self.lanes,
            "window": self.window, "sources": sources,
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> int:
        """The step to continue from; raises UserError when the state belongs to another order of rows.

        Sources may have been added behind those that there were.
        """
        step = resumed_step(state, self.state(0), {"step", "sources"})
        theirs, ours = state.get("sources"), self.state(step)["sources"]
        if not isinstance(theirs, dict) or list(theirs) != list(ours)[: len(theirs)]:
            was = f"in the sources {', '.join(theirs)}" if isinstance(theirs, dict) else "in the rows of data.shards"
            raise UserError(
                f"the saved position is one {was}, this run has data.sources {', '.join(ours)}; restore what it was "
                "made with (further sources may be added behind) or start without resuming"
            )
        for name, then in theirs.items():
            if not isinstance(then, dict) or any(then.get(key) != ours[name][key] for key in ("manifest", "rows")):
                raise UserError(
                    f"data.sources.{name} holds other rows than those of the saved position; restore "
                    f"data.sources.{name}.shards or start without resuming"
                )
        for name, now in ours.items():
            then = theirs[name].get("read") if name in theirs else [0, 0, 0]
            if then != now["read"]:
                raise UserError(
                    f"by the stages of this run step {step} is at {now['read']} of data.sources.{name} (epoch, row of "
                    f"a lane, rows a step when it began), by the saved position at {then!r:.60}; what is past cannot "
                    "change: restore the mix of the stages before that step"
                )
        return step
