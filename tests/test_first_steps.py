"""What one meets first: --version, the keys of a configuration, a configuration and a launch file to begin with."""

import tomllib
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tools.cli import main
from tools.config import markdown, sections
from trainer.config import flatten, load_config

ROOT = Path(__file__).parents[1]


def test_docs_configuration_is_what_the_command_writes(capsys):
    assert main(["config", "--markdown"]) == 0
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert capsys.readouterr().out == written, "alignsae config --markdown > docs/configuration.md"


def test_every_key_has_its_default_and_a_meaning(tmp_path):
    keys = {key.name: key for section in sections() for key in section.keys}
    assert [name for name, key in keys.items() if not key.meaning] == []
    keys = {name: key for name, key in keys.items() if key.default != "{}" and ".NAME." not in name}
    (tmp_path / "least.yaml").write_text("stages: [{name: align, steps: 1}]\ndata: {shards: x}\n")
    config = flatten(load_config(tmp_path / "least.yaml", []))
    absent = tuple(f"{name}." for name, value in config.items() if value is None)  # sections that are not there
    keys = {name: key for name, key in keys.items() if not name.startswith(absent)}
    config = {name.replace("stages.0.", "stages.N."): value for name, value in config.items()}
    assert keys.keys() == config.keys()
    set_here = {"data.shards", "stages.N.name", "stages.N.steps"}
    shown = {name: yaml.safe_load(key.default) for name, key in keys.items() if name not in set_here}
    wanted = {name: list(v) if isinstance(v := config[name], tuple) else v for name in shown}
    # YAML 1.1 takes a number without a point for a text.
    assert {n: float(v) if isinstance(wanted[n], float) else v for n, v in shown.items()} == wanted
    assert "data.shards" in markdown(list(sections()))


def test_keys_by_name(capsys):
    assert main(["config", "optim.lr", "guard"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr=0.001" in out and "guard.window" in out and "optim.eps" not in out
    assert main(["config", "nothing"]) == 2


@pytest.mark.parametrize("config", ["paper", "demo", "demo_unsupervised", "large", "own"])
def test_a_beginning_is_a_configuration_that_loads(tmp_path, capsys, config):
    folder = tmp_path / "it's mine"
    assert main(["init", str(folder), "--config", config, "--launch", "zero3", "--data", "s3://b/train"]) == 0
    found = load_config(folder / "train.yaml", [])
    assert (found.run.dir, found.data.shards) == (str(folder / "run"), "s3://b/train")
    assert found.data.heldout == ("s3://b/heldout" if config == "own" else "")
    assert (folder / "launch.yaml").read_text() == (ROOT / "launch" / "accelerate" / "zero3.yaml").read_text()
    assert main(["init", str(folder)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_names_of_no_file_are_refused(tmp_path, capsys):
    assert main(["init", str(tmp_path / "a"), "--config", "demo_bars"]) == 2
    assert main(["init", str(tmp_path / "a"), "--launch", "zero"]) == 2
    assert "the nearest is zero" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_the_wheel_takes_what_the_tools_read():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    held = {path.relative_to(ROOT) for name, globs in data.items() for g in globs for path in (ROOT / name).glob(g)}
    for folder in ("configs", "launch/accelerate", "launch/deepspeed"):
        assert {Path("tools") / folder / path.name for path in (ROOT / folder).iterdir()} <= held
    assert {Path("tools/templates") / path.name for path in (ROOT / "tools" / "templates").iterdir()} <= held
    assert Path("trainer/py.typed") in held


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("alignsae ")


def test_the_demo_replaces_nothing_unasked(tmp_path, monkeypatch, capsys):
    (tmp_path / "data" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert "data/demo would be replaced; give --again" in capsys.readouterr().err
    asked = []

    def noted(command, **_):
        asked.append(command)
        return CompletedProcess(command, 3)

    monkeypatch.setattr("subprocess.run", noted)
    assert main(["demo", "--again"]) == 3
    assert Path(asked[0][1]).read_bytes() == (ROOT / "configs" / "demo.sh").read_bytes()
