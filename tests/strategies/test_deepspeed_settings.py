"""JSON files that tune DeepSpeed: those of launch/deepspeed change no number, and what would change one is refused."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies.curriculum_runs import CURRICULUM, TERMS
from tests.support.commands import ROOT
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, metrics, train_here, train_rank
from trainer.dictionary import DictionaryConfig
from trainer.errors import UserError
from trainer.strategies import ParallelConfig
from trainer.strategies.deepspeed_settings import Tuning, engine_config, read_tuning

SHIPPED = sorted((ROOT / "launch" / "deepspeed").glob("*.json"))
SHORT = ["stages.0.steps=2", "stages.1.steps=2"]


def strategy_of(path: Path) -> str:
    return path.stem.split("-")[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_read_and_win_over_what_is_computed(path):
    resolved = ParallelConfig(strategy_of(path), deepspeed=str(path)).resolve(2, 5)
    assert resolved.offload == path.stem.endswith("offload")
    tuning = read_tuning(str(path), resolved.zero_stage)
    config = engine_config(resolved.zero_stage, False, tuning, DictionaryConfig(96, 20).form(16), 1)
    written = json.loads(path.read_text())["zero_optimization"]
    assert config["zero_optimization"] | written == config["zero_optimization"]
    assert config["gradient_clipping"] == 0.0 and "fp16" not in config and "bf16" not in config


@pytest.fixture(scope="module")
def single(small_data, tmp_path_factory) -> dict[int, dict]:
    """What a single process wrote."""
    folder = tmp_path_factory.mktemp("single")
    assert train_here(folder, small_data, *SHORT, changes=CURRICULUM) == 0
    return metrics(folder)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_train_to_the_numbers_of_a_single_process(path, single, small_data, tmp_path):
    settings = [f"parallel.strategy={strategy_of(path)}", f"parallel.deepspeed={path}", *SHORT]
    run_ranks(2, train_rank, arguments(tmp_path, small_data, *settings, changes=CURRICULUM))
    for step, ours in metrics(tmp_path).items():
        assert ours.keys() == single[step].keys()
        for term in {*TERMS, "grad_norm"} & ours.keys():  # some are of one stage alone
            assert ours[term] == pytest.approx(single[step][term], rel=1e-5), (step, term)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "is for stage 2, but parallel.strategy=zero3"),
        ({"zero_optimization": {}, "gradient_clipping": 1.0}, "gradient_clipping .* set optim.clip instead"),
        ({"zero_optimization": {}, "bf16": {"enabled": True}}, "bf16 .* set run.precision instead"),
        ({"zero_optimization": {}, "gradient_accumulation_steps": 2}, "set optim.accumulate instead"),
        ({"zero_optimization": {}, "optimizer": {"type": "Adam"}}, "set optim instead"),
        ({"zero_optimization": {}, "scheduler": {}}, "set optim.warmup and optim.decay instead"),
        ({"zero_optimization": {}, "nothing": 1}, "nothing would change more than time and memory, or is not known"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is not one of"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 9}}, "is not one of"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "'auto' is not a whole number"),
        ({"zero_optimization": {"sub_group_size": -1}}, "is not a whole number"),
        ({"zero_optimization": {"overlap_comm": 1}}, "is not true or false"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "use cpu or none"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, "ratio is not one of"),
        ([], "must be an object with zero_optimization"),
        ({}, "must be an object with zero_optimization"),
    ],
)
def test_what_would_change_numbers_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        ParallelConfig("zero3", deepspeed=str(path)).resolve(2, 5)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["cpu", "none"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["device", "pin_memory", "a\nb"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*Tuning.__annotations__, "stage", "a\nb"]), _VALUE, max_size=4) | _VALUE)
def test_any_section_is_taken_as_it_is_or_refused_in_one_line(section):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        path.write_text(json.dumps({"zero_optimization": section}))
        try:
            tuning = read_tuning(str(path), 3)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
            return
    assert tuning == {key: value for key, value in section.items() if key != "stage"}
    for key, value in tuning.items():
        if key.startswith("offload_"):
            assert value["device"] in ("cpu", "none") and value.get("pin_memory", False) in (True, False)
        else:
            assert type(value) in (int, bool) and value >= 0


def test_files_belong_to_a_stage_and_a_strategy(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text('{"zero_optimization": {"stage3_max_live_parameters": 9}}')
    with pytest.raises(UserError, match="stage3_max_live_parameters is for stage 3, not 2"):
        ParallelConfig("zero2", deepspeed=str(path)).resolve(2, 5)
    with pytest.raises(UserError, match=r"needs parallel\.strategy=zero1, zero2 or zero3, not ddp"):
        ParallelConfig("ddp", deepspeed=str(path)).resolve(2, 5)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        ParallelConfig("zero3", deepspeed=str(path)).resolve(2, 5)
    with pytest.raises(UserError, match="cannot be read"):
        ParallelConfig("zero3", deepspeed=str(tmp_path / "none.json")).resolve(2, 5)


def test_a_file_may_turn_offload_off(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text('{"zero_optimization": {"offload_optimizer": {"device": "none"}}}')
    assert not ParallelConfig("zero1", offload=True, deepspeed=str(path)).resolve(2, 5).offload


def test_a_launch_file_with_a_deepspeed_file_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine.json")
    with pytest.raises(UserError, match=r"give parallel\.deepspeed=mine\.json"):
        ParallelConfig().resolve(2, 5)
