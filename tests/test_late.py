"""What travels between host and device: rows on a stream of their own, snapshots that are written once there."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import train_here
from trainer.checkpoint import saver
from trainer.late import Mark, Sender


class Device:
    """Stands for torch.cuda: one stream for computation, others for what asks for them, and what was done on each."""

    def __init__(self) -> None:
        self.main = SimpleNamespace(name="main", wait_stream=self.wait)
        self.log: list[str] = []
        self.now = self.main

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(name="own")

    def current_stream(self) -> SimpleNamespace:
        return self.now

    @contextmanager
    def stream(self, one):
        self.now, before = one, self.now
        yield
        self.now = before

    def wait(self, other) -> None:
        self.log.append(f"{self.now.name} waits for {other.name}")


def test_rows_are_sent_on_a_stream_of_their_own_and_computation_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device, copy = Device(), torch.Tensor.to

    def noted(tensor, *args, **options):
        device.log.append(f"copy on {device.now.name}, non_blocking={options['non_blocking']}")
        return copy(tensor, *args, **options)

    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    rows, labels = Sender(torch.device("cpu")).send(torch.arange(6.0).view(2, 3), torch.tensor([1, -1]))
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5]] and labels.tolist() == [1, -1]
    assert device.log == [*["copy on own, non_blocking=True"] * 2, "main waits for own"]


def test_a_cpu_sends_at_once() -> None:
    (rows,) = Sender(torch.device("cpu")).send(torch.ones(2, 3))
    assert rows.sum() == 6
    Mark(torch.device("cpu")).wait()


def test_an_asynchronous_save_is_written_once_the_snapshot_is_there(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    write, capture = saver.TensorFile.write, saver.Saver._capture

    class Noted(Mark):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            events.append("mark")

        def wait(self) -> None:
            events.append("there")

    def written(self, path, metadata):
        events.append("write")
        return write(self, path, metadata)

    def captured(self, unit, old=None):
        events.append("copy")
        return capture(self, unit, old)

    monkeypatch.setattr(saver, "Mark", Noted)
    monkeypatch.setattr(saver.TensorFile, "write", written)
    monkeypatch.setattr(saver.Saver, "_capture", captured)
    assert train_here(tmp_path, small_data, changes={"checkpoint": {"every": 10, "asynchronous": True}}) == 0
    first = events[: events.index("write") + 1]
    assert first[0] == "copy" and first[-3:] == ["mark", "there", "write"] and set(first[:-3]) == {"copy"}
