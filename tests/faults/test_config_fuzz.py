"""Configurations that cannot be, made at random over all keys: each is taken or refused in one line, and quickly.

A fixed seed, so that a failure is the same on every machine; FUZZ_SEED tries others.
"""

import os
import random
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from tests.support.runs import CONFIG
from trainer.config import Config, load_config
from trainer.errors import UserError
from trainer.inputs import read_inputs

SECONDS = 5.0
NUMBERS = [
    *("0", "1", "-1", "2", "3", "7", "48", "1e-3", "0.5", "-0.0", "1e300", "1e12", "1000000000000", str(10**30)),
    *(
        ".nan",
        ".inf",
        "-.inf",
        "nan",
        "1e400",
        str(2**31),
        str(2**63),
        str(-(2**63) - 1),
        "9" * 5000,
        "0x10",
        "1_000",
        "1:30",
    ),
]
WORDS = [
    *(
        "null",
        "~",
        "true",
        "false",
        "",
        "''",
        "' '",
        "auto",
        "none",
        "off",
        "[]",
        "[1]",
        "[1, 2]",
        "{}",
        "{a: 1}",
        "{1: 2}",
        "[[[[1]]]]",
    ),
    *(
        "x" * 300,
        "a/" + "b" * 300,
        "x" * 5000,
        '"a\\0b"',
        '"\\ud800"',
        '"a\\nb"',
        "~nobody/x",
        "~",
        "/",
        ".",
        "..",
        "/dev/null",
        "-",
    ),
    *(
        "${run.dir}",
        "${nowhere}",
        "${oc.env:HOME}",
        "${",
        "???",
        "2001-01-01",
        "!!binary aGk=",
        "!!set {a}",
        "!!int x",
        "!!python/none x",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "[" * 400,
        "{a: " * 50 + "1" + "}" * 50,
        "\x00",
        "\x07",
        "'",
        "%",
        "@",
        "a: b: c",
        "- 1",
        "pretrain",
    ),
    *(
        "align",
        "single",
        "ddp",
        "zero3",
        "dictionary",
        "fp32",
        "bf16",
        "unit",
        "dense",
        "sparse",
        "http://[",
        "pipe:cat {name}",
        "s3://",
    ),
]
TEXTS = [
    *(
        "",
        "[]",
        "3",
        "null",
        "a",
        "run: {}",
        "run: {seed: 1}\nrun: {seed: 2}",
        "1: 2",
        "? [1, 2]\n: 3",
        "a: &a [*a]",
        "a: &a {b: *a}",
    ),
    *(
        "run: &r {dir: *r}",
        "- " * 400 + "1",
        "{" * 300,
        "\t",
        "\x00",
        "run: !!python/object:os.system {}",
        "stages: &s [*s]",
        "x: !x y",
    ),
    "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" if i else "a0: &a0 [1]" for i in range(12)]),
    *(
        "<<: {run: {seed: 3}}",
        "<<: 3",
        "data: {<<: [1]}",
        "run: {seed: 1, seed: 2}",
        "stages: [{name: pretrain, name: align}]",
    ),
]


def keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every key that a command line can set, the sections too; of stages the first one's."""
    found = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        name, kinds = f"{prefix}{field.name}", (hints[field.name], *get_args(hints[field.name]))
        found.append(name)
        for kind in kinds:
            if is_dataclass(kind):
                found += keys(kind, f"{name}.0." if kind is not hints[field.name] else f"{name}.")
    return found


def configurations(count: int, seed: int):
    """(text of the file, overrides), most of them of a run that works but for one to three keys."""
    generator, known = random.Random(seed), keys()
    values = NUMBERS + WORDS
    for number in range(count):
        text = yaml.safe_dump(CONFIG)
        if number % 10 == 0:
            text = generator.choice(TEXTS) + ("\n" + text if generator.random() < 0.3 else "")
        elif number % 10 == 1:
            value = generator.choice(values)
            for part in reversed(generator.choice(known).split(".")):
                value = f"[{value}]" if part.isdigit() else f"{{{part}: {value}}}"
            text = f"{text}\n--- \n{value}" if generator.random() < 0.2 else value
        overrides = []
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            key = generator.choice(known)
            if generator.random() < 0.05:
                key = generator.choice(
                    (key[:-1], key + ".x", key + ".0", f"{key}[0]", key.replace(".", ".."), "", ".", "stages.7.steps")
                )
            overrides.append(f"{key}={generator.choice(values)}")
        yield text, overrides


def attempt(path: Path, text: str, overrides: list[str], data: Path) -> str:
    """How a configuration fares: "taken", "refused", or what is wrong with the answer."""
    path.write_text(text)
    began = time.thread_time()
    try:
        read_inputs(load_config(path, [f"data.shards={data}", *overrides]))
        answer = "taken"
    except UserError as error:
        message = str(error)
        answer = "refused" if message and "\n" not in message and len(message) < 2000 else f"message {message[:200]!r}"
    except BaseException as error:
        answer = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.thread_time() - began
    return answer if seconds < SECONDS else f"{answer} after {seconds:.1f} s"


MANY = int(os.environ.get("ALIGNSAE_FUZZ_CONFIGURATIONS", "10000"))


@pytest.mark.parametrize("count", [150, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_configurations_are_taken_or_refused_in_one_line(
    count: int, small_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers: dict[str, int] = {}
    for text, overrides in configurations(count, int(os.environ.get("FUZZ_SEED", "7"))):
        answer = attempt(tmp_path / "c.yaml", text, overrides, small_data)
        assert answer in ("taken", "refused"), (
            answer,
            text[:500] if text != yaml.safe_dump(CONFIG) else "",
            [o[:200] for o in overrides],
        )
        answers[answer] = answers.get(answer, 0) + 1
    assert answers["taken"] > count / 60 and answers["refused"] > count / 3  # the generator makes both


# What was found by hand, each with the word that its refusal must have.
FOUND = [
    (["stages.0.epochs=.nan"], "stages.0.epochs"), (["stages.0.epochs=.inf"], "stages.0.epochs"),
    (["stages.0.epochs=1e300"], "stages.0.epochs"),
    (["dictionary.value_hidden=0"], "value_hidden"),
    (["dictionary.free_slots=1000000000000", "dictionary.bank_slots=1"], "bank_slots"),
    ([f"guard.window={10**30}"], "guard.window"), (["1=2"], "'1'"), (["run.dir='a\\0b'", 'run.dir="a\\0b"'], "run.dir"),
    ([f"run.dir={'x' * 300}"], "run.dir"), (["run.dir=''"], "run.dir"), (["loss.sp_warmup=-1"], "sp_warmup"),
    (["optim.eps=.inf"], "optim.eps"),
    (["parallel.timeout=.nan"], "parallel.timeout"), (["loss.sp=.nan"], "loss.sp"),
    (["stages.0.loss.sp=.nan"], "stages.0.loss.sp"),
    (["data.threads=10000"], "data.threads"), (["optim.accumulate=1000000"], "optim.accumulate"),
    (["optim.accumulate=49"], "optim.accumulate"),
    (["optim.lr=.nan"], "optim.lr"), (["revival.until=.nan"], "revival.until"), (["revival.until=-1"], "revival.until"),
    (["data.lanes=1000000007"], "data.lanes"), ([f"data.global_batch={2**29 + 1}"], "global_batch"),
    (["run.log_every=0"], "log_every"),
    (["kernel=nope"], "kernel"), (["checkpoint.resume=''"], "checkpoint.resume"),
    (["data.shards=~nobody/x"], "data.shards"),
    (["run.wall_minutes=.inf"], "wall_minutes"), (["checkpoint.keep=0"], "checkpoint.keep"),
    ([f"run.seed={2**64}"], "run.seed"),
    (["stages.0.steps=0"], "steps"), ([f"stages.0.steps={2**60}", "stages.0.epochs=null"], "steps"),
    (["optim.betas=[0.9, .nan]"], "betas"),
]  # fmt: skip


@pytest.mark.parametrize("overrides,word", FOUND, ids=lambda value: str(value)[:40])
def test_what_was_found_by_hand_is_refused_by_name(
    overrides: list[str], word: str, small_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_inputs(load_config(path, [f"data.shards={small_data}", *overrides]))
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "text,word",
    [
        ("run: {seed: 1}\nrun: {seed: 2}\n", "'run' stands twice"),
        ("run: {seed: 1, seed: 2}\n", "'seed' stands twice"),
        ("run: &r {dir: *r}\n", "contains itself"), ("a: " + "[" * 60 + "]" * 60, "nested"),
        ("a: " + "[" * 2000, "nested"), (TEXTS[19], "values"), ("x: \x00", "not YAML"),
        ("#" * (1 << 21), "larger"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_files_that_are_no_configuration(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, ["data.shards=x"])
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path, ["data.shards=x"])
