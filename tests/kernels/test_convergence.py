"""The demo's dictionary ends where it ends whatever computes it: dense in fp32, or sparse with bf16 products."""

from pathlib import Path

import numpy as np
import pytest

from trainer import train
from trainer.analysis.evaluation import evaluate_split
from trainer.analysis.results import rows_of
from trainer.checkpoint import load_dictionary
from trainer.stream import ShardSpec, ShardWriter

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
RELATIONS = ["birth date", "birth city", "university", "major", "employer", "work city"]


def planted(folder: Path) -> Path:
    """2,400 rows of planted directions: a person's, a relation's and a template's, with as much noise.

    One label in twenty is wrong.
    """
    rng = np.random.default_rng(0)
    person, relation, template = (rng.standard_normal((n, 128)) for n in (200, len(RELATIONS), 2))
    who, what, how = (grid.ravel() for grid in np.meshgrid(range(200), range(len(RELATIONS)), range(2)))
    acts = person[who] + 0.7 * relation[what] + 0.5 * template[how] + rng.standard_normal((len(who), 128))
    label = np.where(rng.random(len(who)) < 0.05, rng.integers(0, len(RELATIONS), len(who)), what)
    answer = (7 * who + what) % 100
    answers = [f"answer {i}" for i in range(100)]
    spec = ShardSpec(width=128, dtype="float16", concepts=RELATIONS, answers=answers)
    with ShardWriter(folder, "train", spec, rows_per_block=64) as writer:
        writer.write(acts.astype(np.float16), label.astype(np.int32), answer.astype(np.int32))
    return folder


def ended(folder: Path, data: Path, *overrides: str) -> list[float]:
    """FVU, diagonal binding accuracy and slot accuracy after a run of the demo, three quarters as long, with a quarter
    of the slots."""
    settings = [f"data.shards={data}", f"run.dir={folder}", "checkpoint.every=0", "tracking.uri=off"]
    settings += ["stages.0.epochs=20", "stages.1.epochs=60", "optim.decay=0.7"]
    settings += ["dictionary.free_slots=1024", "dictionary.bank_slots=512"]
    assert train.main(["--config", str(DEMO), *settings, *overrides]) == 0
    dictionary, _ = load_dictionary(folder)
    rows, _ = rows_of([str(data)], dictionary)
    found = evaluate_split(dictionary, rows, dictionary.concept_names)
    bound = found["binding"]
    return [found["reconstruction"]["fvu"], bound["diagonal_accuracy"], bound["slot_accuracy"]]


@pytest.mark.slow
def test_sparse_in_bf16_ends_where_dense_in_fp32_ends(tmp_path):
    """Means of three seeds within 1%: rounding alone moves the FVU of a run by about as much (docs/performance.md)."""
    data = planted(tmp_path / "train")
    means = {}
    for kernel, precision in (("dense", "fp32"), ("sparse", "bf16")):
        chosen = (f"kernel={kernel}", f"run.precision={precision}")
        runs = [ended(tmp_path / f"{kernel}-{seed}", data, *chosen, f"run.seed={seed}") for seed in range(3)]
        means[kernel] = np.mean(runs, axis=0)
    assert means["sparse"] == pytest.approx(means["dense"], rel=0.01)
    fvu, diagonal, _ = means["dense"]
    assert fvu < 0.1 and diagonal > 0.9  # both have learned something
