"""Help needs none of the packages that the work needs, and what parsers spell of others is what those say."""

import argparse
import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

from tools.cli import TOOLS, build_parser, chosen_device
from tools.export import WEIGHTS
from tools.extract import COMPUTE
from trainer.analysis.steering import MODES, WHERE
from trainer.extraction import OUTSIDE
from trainer.language_model.matching import RULES
from trainer.stream.manifest import STORED_DTYPES
from trainer.stream.scan import SUFFIXES

HEAVY = ("torch", "numpy", "transformers", "datasets", "mlflow", "accelerate", "deepspeed", "matplotlib", "omegaconf")


def actions(command: str) -> dict[str, argparse.Action]:
    """The arguments of a subcommand by their flags."""
    (commands,) = (a for a in build_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    return {flag: a for a in commands.choices[command]._actions for flag in a.option_strings}


def test_no_parser_imports_what_takes_long() -> None:
    code = (
        "import sys, json; from tools.cli import TOOLS, build_parser\nfor n in TOOLS: build_parser(n).format_help()\n"
    )
    code += f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("command", TOOLS)
def test_every_command_has_help_and_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser(command).parse_args([command, "--help"])
    assert f"alignsae {command}" in capsys.readouterr().out
    assert callable(importlib.import_module(f"tools.{TOOLS[command][0]}").run)


@pytest.mark.parametrize(
    ("command", "flag", "owned"),
    [
        ("steer", "--mode", MODES),
        ("steer", "--where", WHERE),
        ("swap", "--match", RULES),
        ("ask", "--match", RULES),
        ("export", "--format", WEIGHTS),
        ("extract", "--outside", OUTSIDE),
        ("extract", "--precision", COMPUTE),
        ("extract", "--dtype", STORED_DTYPES),
        ("repack", "--dtype", STORED_DTYPES),
    ],
)
def test_choices_are_those_of_the_code(command: str, flag: str, owned: Any) -> None:
    assert list(actions(command)[flag].choices or ()) == list(owned)


def test_suffixes_are_those_of_the_scan() -> None:
    assert {name: actions("index")[f"--{name}"].default for name in SUFFIXES} == SUFFIXES


def test_the_device_is_chosen_alike() -> None:
    found = [each["--device"] for each in map(actions, TOOLS) if "--device" in each]
    assert len(found) >= 7 and {a.default for a in found} == {None}
    assert chosen_device("cpu") == "cpu" and chosen_device(None) in ("cpu", "cuda")
