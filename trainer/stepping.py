"""One step, and what is booked of it once its figures are read: on a device some steps later (Topology.lag)."""

from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trainer.checkpoint import RunState, Saver
from trainer.config import Config
from trainer.curriculum import Curriculum, StepSettings
from trainer.guard import Guard
from trainer.heldout import Evaluations
from trainer.interrupt import Interrupt
from trainer.late import Late, Sender
from trainer.losses import TERMS
from trainer.metrics import Metrics, StepSums
from trainer.run_folder import RunFolder
from trainer.strategies import Strategy
from trainer.stream import Order, RowDigest, Sources, Stream, lanes_of_rank
from trainer.sums import ACTIVE, CRAMPED, ROWS, SUMS, MicroBatch
from trainer.tracking import Tracker

# Batches that the wake-up of the concept slots averages over, at most: enough for stable means of thousands of
# concepts.
WAKE_BATCHES = 256
MORE_EPOCHS = 3


@dataclass
class Step:
    """One step whose figures the host has not read yet."""

    number: int
    settings: StepSettings
    batch: MicroBatch
    votes: list[float]  # of this rank, about saves and stops


@dataclass
class Run:
    """All that the loop works with; built by trainer.assembly, the same on all ranks but for the tracker (main rank
    only)."""

    config: Config
    folder: RunFolder
    sources: Sources
    plan: Order
    curriculum: Curriculum
    strategy: Strategy
    tracker: Tracker | None
    state: RunState
    digest: RowDigest
    guard: Guard
    saver: Saver
    interrupt: Interrupt
    evaluations: Evaluations
    late: Late
    sender: Sender
    metrics: Metrics = field(default_factory=Metrics)
    under_way: deque["Step"] = field(default_factory=deque)  # steps whose figures are still to be read
    settings: StepSettings | None = None  # of the last step whose figures were read
    grad_norm: float = 0.0  # before clipping, of the last update
    cramped: int = 0  # steps that were taken again, since there was no room for their entries
    tokens: int = 0  # that language models of all data ranks have read for live sources
    recorded_tokens: int = 0  # of them those that a line of the metrics counts
    outliers: int = 0  # rows of this rank that were left out for their norms and are not in the state's number yet

    def stream(self, step: int) -> Stream:
        """Batches of this rank from global step `step` on."""
        topology = self.strategy.topology
        lanes = lanes_of_rank(self.config.data.lanes, topology.data_rank, topology.data_world)
        return Stream(self.config.data, self.sources, self.plan, lanes, step, pin=topology.device.type == "cuda")

    def labelled_batches(self, step: int) -> list[int]:
        """How many batches from global step `step` on concept slots are woken from and measured on: an epoch of every
        source that names concepts; and where a concept was not met in those, MORE_EPOCHS, if that is more. WAKE_BATCHES
        at most.

        An epoch leaves out the rows that do not fill a batch, which can be all that a concept has; each other ones.
        """
        named = [bool(manifest.concepts) for manifest in self.sources.manifests.values()]
        lengths = [part.order.rows_per_lane // part.share for part in self.plan.parts(step) if named[part.source]]
        epoch = max(lengths, default=0)
        return sorted({min(epochs * epoch, WAKE_BATCHES) for epochs in (1, MORE_EPOCHS)})


def take(run: Run, step: Step) -> None:
    """Forward, backward and update of one step, as far as the device allows it; what came of it is read by `settle`."""
    config, strategy, settings = run.config, run.strategy, step.settings
    sums = StepSums(strategy.topology, config.optim.accumulate)
    for number, part in enumerate(step.batch.split(config.optim.accumulate), start=1):
        loss, part_sums = strategy.forward(part, settings.weights, settings.align, step.number + 1)
        strategy.backward(loss, last=number == config.optim.accumulate)
        sums.add(part_sums)
    total = sums.reduce(step.votes)
    run.late.put(torch.cat([total, *clip_and_update(run, total, settings)]))
    run.under_way.append(step)


def clip_and_update(run: Run, total: Tensor, settings: StepSettings) -> list[Tensor]:
    """The optimizer's step from the gradients that were accumulated, unless the guard says no.

    `total`: sums of the global batch. Returns loss, norm before clipping, 1 where weights were updated, and what is
    multiplied with the weight of sparsity from now on, fp64 [1] each. Waits for nothing on a device.
    """
    objective, guard = run.strategy.objective, run.guard
    loss = objective.coefficients @ total[: len(TERMS)]
    allowed = guard.judge(loss, settings.stage) > total[CRAMPED]  # a yes is 1, and above 0 alone
    norm, made = run.strategy.update(settings.lr, run.config.optim.clip, allowed)
    guard.follow(loss, made)
    rows = total[ROWS]
    if settings.l0 is None:
        objective.take_up(made)
    else:
        weighted = settings.weights.sp > 0 and run.config.dictionary.target_l0 > 0
        l0 = total[ACTIVE] / rows.clamp_min(1.0)
        objective.take_up(made & (rows > 0), l0, settings.l0, weighted=weighted)
    followed = () if objective.sparsity is None else (objective.sparsity,)
    return [figure.view(1) for figure in (loss, norm, made.double(), *followed)]


def settle(run: Run, everything: bool = False) -> int:
    """Book the steps whose figures are due (`everything`: of all that were taken): guard, metrics, saves, stops.

    A step whose entries had no room is taken again at once. Returns the exit code of trainer.interrupt.
    """
    code, again = 0, []
    for figures in run.late.due(all_of_them=everything):
        step, total = run.under_way.popleft(), dict(zip(SUMS, figures, strict=False))
        rest = figures[len(SUMS) :]
        if run.strategy.topology.world == 1:
            rest = [*step.votes, *rest]
        votes, rest = rest[: len(step.votes)], rest[len(step.votes) :]
        loss, norm, made, *followed = rest
        done, failed, *stops = votes
        run.saver.advance(done, failed)
        code = run.interrupt.code(*stops) or code
        run.settings = step.settings.with_sparsity(run.state.sparsity)
        run.state.sparsity = followed[0] if followed else run.state.sparsity
        if total["cramped"]:
            again.append(step)
        elif not made:
            run.guard.skip(step.number, run.guard.problem(loss, norm, step.settings.stage), loss, norm)
        else:
            run.guard.accept(loss, step.settings.stage)
            run.metrics.add(total)
            run.grad_norm = norm
            run.state.updates += 1
    for step in again:
        run.cramped += 1
        run.strategy.objective.choice.catch_up()
        take(run, replace(step, votes=[0.0] * len(step.votes)))
        code = settle(run, everything=True) or code
    return code
