"""Undocumented names of other packages: the installed versions have them; one that goes gives one clear line."""

import ast
import importlib.util
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import distributed_c10d

from trainer import private
from trainer.errors import UserError

ROOT = Path(__file__).parents[1]
# Name -> the file of DeepSpeed that defines it.
DEEPSPEED = {
    "fp32_partitioned_groups_flat": "runtime/zero/stage3.py",
    "fp16_partitioned_groups_flat": "runtime/zero/stage3.py",
    "single_partition_of_fp32_groups": "runtime/zero/stage_1_and_2.py",
    "_lazy_init_hp_params_optimizer_state": "runtime/zero/stage_1_and_2.py",
    "ds_tensor": "runtime/zero/partition_parameters.py",
}
TORCH = {"_is_avx512_bf16_supported", "_is_mkldnn_bf16_supported", "_set_pg_timeout", "_world"}
# Undocumented by their underscore only; the standard library documents these.
DOCUMENTED = {"_asdict", "_replace", "_exit"}


def defined(path: Path) -> set[str]:
    """Methods and attributes that a file defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def foreign_private_names(path: Path) -> Iterator[str]:
    """`x._name` where x is not the object or class itself, and the names of DeepSpeed that have no underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            hidden = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in DOCUMENTED
            if node.attr in DEEPSPEED or (hidden and not own):
                yield node.attr


@pytest.mark.parametrize("name", DEEPSPEED)
def test_the_installed_deepspeed_has_the_name(name):
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    assert name in defined(package / DEEPSPEED[name]), (
        f"deepspeed {version('deepspeed')} has no {name}: trainer/private.py must be adapted"
    )


def test_the_installed_gcsfs_has_the_name():
    core = pytest.importorskip("gcsfs.core", reason="needs the extra `remote`")
    assert callable(private.reach(core.GCSFileSystem, "_request", "gcsfs"))


def test_the_installed_torch_has_the_names():
    assert private.has_avx512_bf16() in (True, False)
    assert private.has_mkldnn_bf16() in (True, False)
    private.limit_groups(timedelta(seconds=1))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda none: private.zero_masters(none, 1), "single_partition_of_fp32_groups"),
        (lambda none: private.zero_masters(none, 3), "fp32_partitioned_groups_flat"),
        (private.zero3_weights, "fp16_partitioned_groups_flat"),
        (private.link_moments, "_lazy_init_hp_params_optimizer_state"),
        (private.zero3_shard, "ds_tensor"),
        (private.answer_once, "_request"),
    ],
)
def test_a_name_that_goes_is_reported(call, name):
    with pytest.raises(
        UserError, match=rf"^(deepspeed|gcsfs) [\d.]+ has no {name}: trainer/private\.py must be adapted"
    ):
        call(SimpleNamespace())


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch.cpu, "_is_avx512_bf16_supported", private.has_avx512_bf16),
        (distributed_c10d, "_set_pg_timeout", lambda: private.limit_groups(timedelta(seconds=1))),
        (distributed_c10d, "_world", lambda: private.limit_groups(timedelta(seconds=1))),
    ],
)
def test_a_name_of_torch_that_goes_is_reported(monkeypatch, owner, name, call):
    monkeypatch.delattr(owner, name)
    with pytest.raises(UserError, match=rf"^torch \S+ has no {name}: trainer/private\.py must be adapted"):
        call()


def test_private_names_of_others_are_used_in_one_file():
    files = {*(ROOT / "trainer").rglob("*.py"), *(ROOT / "tools").rglob("*.py")} - {Path(private.__file__)}
    for path in sorted(files):
        found = sorted(foreign_private_names(path))
        assert not found, f"{path.relative_to(ROOT)}: reach {', '.join(found)} through trainer/private.py"
    used = {
        node.value for node in ast.walk(ast.parse(Path(private.__file__).read_text())) if isinstance(node, ast.Constant)
    }
    assert set(DEEPSPEED) | TORCH <= used


def test_the_rule_finds_what_it_forbids(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("torch.cpu._on()\np.ds_tensor.copy_(x)\nself._own\ncls._own\nparts._replace(a=1)\nx.__class__\n")
    assert sorted(foreign_private_names(path)) == ["_on", "ds_tensor"]
