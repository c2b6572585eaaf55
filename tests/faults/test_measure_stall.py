"""measure_stall measures what it says it does."""

import json
import logging

import pytest

from tests.faults.measure_stall import main


def test_it_times_every_step_and_save(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--slots", "500", "--width", "16", "--batch", "32", "--steps", "24", "--every", "8"]
    began = logging.root.level
    try:
        main(sizes)
    finally:
        logging.root.setLevel(began)
    found = json.loads(capsys.readouterr().out)
    assert found["saves"] == 3 and found["slots"] == 506
    assert found["step_s"] > 0 and found["loop_s"] > 0
    assert 0 < found["loop_share"] < 100
