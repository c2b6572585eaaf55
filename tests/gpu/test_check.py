"""`make gpu` where there is no device, and the table that it prints."""

import subprocess
import sys

import pytest
import torch

from tests.gpu.check import table
from tests.support.commands import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "tests.gpu.check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert done.stderr == "make gpu: torch finds no CUDA device here\n" and not done.stdout


def test_the_table_names_the_device():
    found = {
        "device": "Some GPU",
        "torch": "2.13.0",
        "shapes": {"rows": 8192, "width": 768, "slots": 100_000, "concepts": 6},
        "mean_l0": 64.2,
        "repeats": 7,
        "encoder_product_s": 0.0018,
        "adam_s": 0.0014,
        "step_s": {"triton/pretrain": 0.005},
        "ratios": {"step / floor (pretrain)": 1.5625},
    }
    text = table(found)
    assert text.startswith("Some GPU, torch 2.13.0; B=8,192 D=768 S=100,006")
    assert "| step, triton/pretrain | 5.00 |" in text and "| step / floor (pretrain) | 1.56 |" in text
