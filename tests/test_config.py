"""Configuration: shipped files load, the command line wins, and mistakes are named in one line."""

from pathlib import Path
from unittest import mock

import pytest

from trainer.assembly import open_tracker
from trainer.config import flatten, load_config, to_yaml
from trainer.curriculum import Curriculum
from trainer.errors import UserError
from trainer.inputs import Inputs
from trainer.losses import StageWeights
from trainer.run_folder import RunFolder
from trainer.strategies import Layout
from trainer.stream import SINGLE, Manifest, Sources
from trainer.topology import Topology

CONFIGS = sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*.yaml") if "bars" not in p.name)

DATA = "data.shards=somewhere"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_configuration_loads_and_has_a_curriculum(path):
    config = load_config(path, [])
    curriculum = Curriculum(config.stages, config.loss, config.optim, [7] * len(config.stages))
    assert curriculum.total > 0
    assert config.data.global_batch % config.data.lanes == 0


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "dictionary: {free_slots: 10}\nstages: [{name: pretrain, epochs: 2}]\n")
    config = load_config(
        path,
        [DATA, "dictionary.free_slots=20", "stages.0.epochs=5", "optim.betas=[0.8,0.9]", "stages.0.loss={sp: 0.2}"],
    )
    assert config.dictionary.free_slots == 20
    assert config.stages[0].epochs == 5 and config.stages[0].loss == StageWeights(sp=0.2)
    assert tuple(config.optim.betas) == (0.8, 0.9)


def test_resolved_configuration_reads_back_the_same(tmp_path):
    config = load_config(
        write(tmp_path, "stages: [{name: align, steps: 3, loss: {perp: 0.5}}]\n"), [DATA, "run.seed=7"]
    )
    again = load_config(write(tmp_path, to_yaml(config)), [])
    assert again == config
    assert flatten(config)["stages.0.steps"] == 3


@pytest.mark.parametrize(
    "text,overrides,expected",
    [
        ("dictionary: {free_slot: 3}\n", [], "'dictionary.free_slots'"),
        ("", ["dictionry.free_slots=3"], "'dictionary"),
        ("stages: [{name: pretrain, epoch: 3}]\n", [], "'stages.epochs'"),
        ("", ["stages.0.stps=3"], "'stages.steps'"),
        ("dictionary: {free_slots: many}\n", [], "free_slots"),
        ("", ["optim.lr=-1"], "optim.lr"),
        ("", ["run.precision=fp8"], "fp32 or bf16"),
        ("", ["loss.bind_on=logits"], "pre or code"),
        ("", ["loss.binding=one"], "softmax or sigmoid"),
        ("", ["loss.binding=sigmoid", "loss.bind_on=code"], "loss.bind_on=pre"),
        ("", ["loss.bind_balance=true"], "loss.binding=sigmoid"),
        ("", ["loss.sp_concept=-1"], "loss.sp_concept"),
        ("", ["data.unlabelled=negative"], "unknown or none"),
        ("", ["loss.sp"], "key=value"),
        ("a: [\n", [], "not YAML"),
        ("- 1\n", [], "mapping"),
        ("", ["stages.3.steps=3"], "stages"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, overrides, expected):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), [DATA, *overrides])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="--config"):
        load_config(tmp_path / "none.yaml", [])


@pytest.mark.parametrize(("key", "source"), [("data.shards", SINGLE), ("data.sources.web.shards", "web")])
def test_what_is_kept_carries_no_credentials(tmp_path, key, source):
    manifest = Manifest(
        width=2, dtype="float32", concepts=[], answers=[], mean=[0.0, 0.0], scale=1.0, rows=0, shards=()
    )
    shards = "https://user:secret@host/data?X-Signature=private"
    config = load_config(write(tmp_path, ""), [f"{key}={shards}", "tracking.uri=off"])
    sources = Sources({source: manifest})
    inputs = Inputs(config, Layout("single"), sources, mock.Mock(), mock.Mock(), config.dictionary.form(2))
    tracker = open_tracker(inputs, RunFolder(tmp_path / "run"), 0, Topology())
    assert tracker is not None
    tracker.close("finished")
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert "https://***@host/data?X-Signature=***" in kept and "secret" not in kept and "private" not in kept
    assert config.data.locations() == {key: shards}


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_weights_of_a_stage_are_numbers(tmp_path, text):
    path = write(tmp_path, f"stages: [{{name: pretrain, epochs: 2, loss: {{sp: {text}}}}}]\n")
    assert load_config(path, [DATA]).stages[0].loss.sp == 0.001
    assert load_config(path, [DATA, f"stages.0.loss.sp={text}"]).stages[0].loss.sp == 0.001


@pytest.mark.parametrize("key", ["bind_on", "binding", "sp_warmup"])
def test_a_stage_may_not_change_the_form_of_the_loss(tmp_path, key):
    path = write(tmp_path, f"stages: [{{name: pretrain, epochs: 2, loss: {{{key}: 5}}}}]\n")
    with pytest.raises(UserError, match=rf"one for the whole run.*set loss\.{key}"):
        load_config(path, [DATA])
    plain = write(tmp_path, "stages: [{name: pretrain, epochs: 2}]\n")
    with pytest.raises(UserError, match=rf"one for the whole run.*set loss\.{key}"):
        load_config(plain, [DATA, f"stages.0.loss.{key}=5"])


@pytest.mark.parametrize("value", ["null", "[1]", "many", "{a: 1}"])
def test_a_weight_that_is_no_number_is_refused_in_one_line(tmp_path, value):
    path = write(tmp_path, "stages: [{name: pretrain, epochs: 2}]\n")
    with pytest.raises(UserError) as caught:
        load_config(path, [DATA, f"loss.sp={value}"])
    assert "\n" not in str(caught.value) and "sp" in str(caught.value)
