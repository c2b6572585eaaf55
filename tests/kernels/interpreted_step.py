"""A whole training step as on a device: what it asks of the host, and how many kernels it launches.

Run by test_triton.py in a process of its own (TRITON_INTERPRET=1). Tensors are on the CPU, and the step takes the path
of a device, on which figures are read later (Topology.lag). What would launch a kernel there is counted as one launch:
every operator that is no view and has something to compute, and every launch of Triton.
"""

import math
import traceback
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from trainer import late, stepping
from trainer.curriculum import StepSettings
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.guard import Guard, GuardConfig, GuardState
from trainer.losses import LossWeights
from trainer.metrics import Metrics
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.strategies.local import LocalStrategy
from trainer.sums import MicroBatch
from trainer.topology import Topology

# Launches of a step, beside those by which AdamW takes more than one (eight on 154M parameters).
LAUNCHES = {"pretrain": 60, "align": 90}
TRAINER = str(Path(stepping.__file__).parent)
PRECISION = "bf16"  # as on a device: there are casts to count
SLOTS, WIDTH, ROWS, CONCEPTS, ANSWERS = 9, 8, 6, 3, 2
# What makes the host wait for the device, or has a shape that the host would have to ask for.
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "lift_fresh",  # numbers of the host that become a tensor, other than by late.to_device
}
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "set_", "resize_"}
TENSORS_OF_A_LAUNCH = 36  # of torch's fused AdamW


class Watch(TorchDispatchMode):
    """Counts launches by operator and caller, and notes what waits, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.trusted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.trusted:
            return result
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_", "index_put") else []
        if name in WAITS or any(index.dtype == torch.bool for index in indices):
            self.waits.append(f"{func} in {traceback.extract_stack()[-2]}")
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        written = outputs or [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        if not is_view and name not in NO_LAUNCH and any(t.numel() for t in written):
            self.count(name, math.ceil(len(args[0]) / TENSORS_OF_A_LAUNCH) if name == "_fused_adamw_" else 1)
        return result

    def count(self, name: str, many: int = 1) -> None:
        """Launches of an operator, beside the line of the trainer that asks for it."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(TRAINER)]
        node = torch._C._current_autograd_node()
        asks = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        self.launches[f"{name} {asks} {'' if node is None else node.name()}".strip()] += many


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """As on a device, with launches of Triton and copies of late.to_device counted too."""
    watch, launch, send = Watch(), GridExecutor.__call__, late.to_device

    def launched(self: GridExecutor, *args: Any, **options: Any) -> None:
        watch.count(self.fn.__name__)
        watch.trusted = True
        launch(self, *args, **options)
        watch.trusted = False

    def sent(*args: Any) -> torch.Tensor:
        watch.count("copy to the device")
        watch.trusted = True
        result = send(*args)
        watch.trusted = False
        return result

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(Topology, "lag", 1)
    for room in ("objective", "sums", "metrics", "kernels.triton.table"):
        monkeypatch.setattr(f"trainer.{room}.to_device", sent)
    return watch


def prepared(bank_slots: int, gate: str = "relu") -> Any:
    """What a step needs of a run: SLOTS slots in banks of so many, on the Triton kernel."""
    form = DictionaryConfig(SLOTS, bank_slots, gate=gate, value_hidden=4).form(WIDTH, ["a", "b", "c"], ANSWERS)
    topology, optim = Topology(), OptimConfig()
    objective = AlignObjective(ConceptDictionary(form), topology, kernel="triton", precision=PRECISION)
    strategy = LocalStrategy(topology)
    strategy.prepare(objective, optim, 0)
    return SimpleNamespace(
        config=SimpleNamespace(optim=optim, dictionary=SimpleNamespace(target_l0=0.0)),
        strategy=strategy,
        guard=Guard(GuardConfig(), None, None, GuardState()),  # type: ignore[arg-type]
        late=late.Late(topology.lag),
        under_way=deque(),
    )


def settings(stage: str, gate: str) -> StepSettings:
    weights = LossWeights(pull=0.1 if gate == "jumprelu" else 0.0)
    return StepSettings(stage, stage == "align", weights, 1e-3, 3.0 if gate == "batch_topk" else None)


def batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    concept = torch.randint(0, CONCEPTS, (ROWS, 1), generator=generator)
    answer = torch.randint(0, ANSWERS, (ROWS,), generator=generator)
    counts = [float(ROWS)] * 3
    acts = torch.randn(ROWS, WIDTH, generator=generator)
    return MicroBatch(acts, concept, answer, torch.tensor(counts), known=tuple(counts), own=(*counts, float(ROWS)))


def steady(watch: Watch, bank_slots: int, stage: str, gate: str = "relu") -> Counter[str]:
    """Launches of the second step of a run."""
    run, rows = prepared(bank_slots, gate), batch()
    for number in range(2):
        watch.launches.clear()
        watch.waits.clear()
        with watch:
            stepping.take(run, stepping.Step(number, settings(stage, gate), rows, [0.0] * 4))
    return watch.launches


@pytest.mark.parametrize("stage", LAUNCHES)
def test_a_step_waits_for_nothing_and_launches_as_much_for_any_number_of_banks(watch: Watch, stage: str) -> None:
    one = steady(watch, SLOTS, stage).copy()
    assert not watch.waits
    three = steady(watch, SLOTS // 3, stage)
    assert not watch.waits
    assert one == three
    listing = "\n".join(f"{many} {name}" for name, many in one.items())
    assert sum(one.values()) <= LAUNCHES[stage], f"{sum(one.values())} launches:\n{listing}"


@pytest.mark.parametrize("gate", ["batch_topk", "jumprelu"])
def test_gates_wait_for_nothing(watch: Watch, gate: str) -> None:
    assert steady(watch, SLOTS, "pretrain", gate) and not watch.waits


def test_what_waits_is_seen(watch: Watch) -> None:
    vector = torch.arange(3.0)
    for ask in (
        lambda: float(vector[0]),
        lambda: bool(vector[0] > 0),
        lambda: int(vector[1]),
        lambda: vector[vector > 0],
        lambda: vector.nonzero(),
        lambda: vector[0].item(),
        lambda: torch.tensor(1.0),
        lambda: vector.new_tensor([1.0]),
        lambda: torch.masked_select(vector, vector > 0),
    ):
        watch.waits.clear()
        with watch:
            ask()
        assert watch.waits
    watch.waits.clear()
    watch.launches.clear()
    with watch:
        vector[1:].sum().add(1.0)
    assert not watch.waits and watch.launches == {"sum": 1, "add": 1}


def test_a_step_without_room_changes_nothing_and_is_taken_again(watch: Watch) -> None:
    run, rows = prepared(SLOTS), batch()
    choice = run.strategy.objective.choice
    run.saver = SimpleNamespace(advance=lambda done, failed: None)
    run.interrupt = SimpleNamespace(code=lambda *stops: 0)
    run.state = SimpleNamespace(sparsity=1.0, updates=0)
    run.metrics, run.cramped = Metrics(), 0
    choice.room = lambda rows: 4 if choice.needed is None else 256
    before = [p.clone() for p in run.strategy.objective.parameters()]

    def same() -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, run.strategy.objective.parameters(), strict=True))

    stepping.take(run, stepping.Step(0, settings("align", "relu"), rows, [0.0] * 4))
    assert same()
    stepping.settle(run, everything=True)
    assert (run.cramped, run.state.updates, run.guard.skipped, len(run.under_way)) == (1, 1, 0, 0)
    assert not same()
