"""The experiment of arXiv 2512.02004: one language model, an aligned and an unsupervised dictionary at every layer.

Settings that the paper gives are its own where `paper` is the scale; the others are named beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.reproducing.stages import Stage, read_done
from tools.synthetic.sentences import RELATIONS
from trainer.analysis.results import read_result
from trainer.run_folder import RunFolder

ALPHAS = "0.1,0.5,1,1.5,2,3,5,10,20,100"
STAGES_FILE = "stages.json"
REMEDY = "run `alignsae reproduce` to its end first"


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    persons: int
    layers: int  # blocks of the language model
    model: str  # the other options of finetune-lm
    free_slots: int
    epochs: tuple[int, int]  # of both stages
    pairs: int  # swaps per strength
    settings: tuple[str, ...] = ()  # of the dictionaries


SCALES = {
    # Batches of 96 and 80,000 steps as in the paper; a vocabulary of the corpus in place of GPT-2's.
    "paper": Scale(
        1000,
        12,
        "--width 768 --heads 12 --vocabulary 8192 --steps 80000 --questions-per-step 64 --texts-per-step 32 --lr 1e-3 "
        "--warmup 1000 --precision bf16",
        100_000,
        (50, 100),
        600,
    ),
    # The same experiment on a language model that two CPU cores train.
    "cpu": Scale(
        1000,
        12,
        "--width 256 --heads 8 --vocabulary 4096 --steps 3000 --lr 2e-3 --warmup 200 --precision bf16",
        100_000,
        (50, 100),
        600,
    ),
    # All layers on two CPU cores that have no bf16: a narrower model, a twelfth of the slots.
    "sweep": Scale(
        1000,
        12,
        "--width 128 --heads 4 --vocabulary 4096 --steps 3000 --lr 2e-3 --warmup 200",
        8192,
        (50, 100),
        600,
    ),
    # Whether it all runs.
    "tiny": Scale(
        12,
        2,
        "--width 32 --heads 2 --vocabulary 300 --steps 20",
        64,
        (1, 1),
        12,
        ("data.global_batch=16", "data.lanes=2", "dictionary.bank_slots=64", "loss.sp_warmup=1", "optim.warmup=1"),
    ),
}


def stages(out: Path, scale: Scale, layers: Sequence[int], config: Path, launch: str | None) -> Iterator[Stage]:
    """All commands in order; those of a layer together. config: the dictionaries' configuration."""
    data, model = out / "data", out / "model"
    yield Stage("biographies", ["biographies", "--out", str(data), "--persons", str(scale.persons)])
    lm = ["--data", str(data), "--out", str(model), "--layers", str(scale.layers), *scale.model.split()]
    yield Stage("language model", ["finetune-lm", *lm])
    questions, chosen = str(data / "questions.jsonl"), ",".join(map(str, layers))
    read = ["--model", str(model), "--prompts", questions]
    yield Stage("activations", ["extract", *read, "--layers", chosen, "--out", str(out / "activations")])
    pretrain, align = scale.epochs
    for layer in layers:
        shards = out / "activations" / f"layer-{layer:02d}"
        aligned, plain = layer_runs(out, layer)
        launched = ["--launch", launch] if launch else []
        common = [*launched, "--config", str(config), f"data.shards={shards / 'train'}", *scale.settings]
        yield Stage(
            f"aligned, layer {layer}",
            [
                "train",
                *common,
                f"run.dir={aligned}",
                f"dictionary.free_slots={scale.free_slots}",
                f"stages.0.epochs={pretrain}",
                f"stages.1.epochs={align}",
            ],
        )
        yield Stage(
            f"unsupervised, layer {layer}",
            [
                "train",
                *common,
                f"run.dir={plain}",
                f"dictionary.free_slots={scale.free_slots + len(RELATIONS)}",
                f"stages=[{{name: pretrain, epochs: {pretrain + align}}}]",
            ],
        )
        run = ["--run", str(aligned), *read]
        yield Stage(f"evaluation, layer {layer}", ["evaluate", *run, "--unsupervised", str(plain)])
        rivals = ["--rivals", "probe,erasure", "--unsupervised", str(plain)]
        yield Stage(f"swaps, layer {layer}", ["swap", *run, "--alphas", ALPHAS, "--pairs", str(scale.pairs), *rivals])


def layer_runs(out: Path, layer: int) -> tuple[Path, Path]:
    """Run folders of a layer: aligned, unsupervised."""
    return out / f"layer-{layer:02d}" / "aligned", out / f"layer-{layer:02d}" / "unsupervised"


def collect(out: Path, layers: Sequence[int]) -> dict[str, Any]:
    """Figures of all layers, the layer that is reported, and how long every stage took.

    The layer, like alpha, is chosen by the swaps of the training templates; what is reported of it are held-out ones.
    """
    found = {str(layer): _figures(out, layer) for layer in layers}  # as a JSON file names them
    best = max(found, key=lambda layer: (found[layer]["swap_validation"], -int(layer)))
    seconds = {name: done.seconds for name, done in read_done(out / STAGES_FILE).items()}
    model = read_result(out / "model" / "lm_report.json", REMEDY)
    return {"best_layer": best, "layers": found, "answer_accuracy": model["answer_accuracy"], "seconds": seconds}


def _figures(out: Path, layer: int) -> dict[str, Any]:
    aligned, _ = layer_runs(out, layer)
    evaluation = read_result(RunFolder(aligned).evaluation, REMEDY)
    swap = read_result(RunFolder(aligned).swap, REMEDY)
    slots, heldout, plain = swap["slots"], evaluation["heldout"], evaluation["unsupervised"]["heldout"]
    failed = 1 - slots["best_success"]
    return {
        "diagonal_accuracy": heldout["binding"]["diagonal_accuracy"],
        "slot_accuracy": heldout["binding"]["slot_accuracy"],
        "swap": slots["best_success"],
        "swap_error": slots["standard_error"],
        "swap_validation": max(point["success"] for point in slots["alphas"]),
        "alpha": slots["best_alpha"],
        "category_kept_of_failures": (slots["category_kept"] - slots["best_success"]) / failed if failed else None,
        "mean_difference": swap["mean_difference"]["best_success"],
        "mean_difference_error": swap["mean_difference"]["standard_error"],
        "efffeat_concept_slots": heldout["fragmentation"]["concept_slots"]["efffeat"],
        "top1conc_concept_slots": heldout["fragmentation"]["concept_slots"]["top1conc"],
        "efffeat": heldout["fragmentation"]["all"]["efffeat"],
        "top1conc": heldout["fragmentation"]["all"]["top1conc"],
        "efffeat_unsupervised": plain["fragmentation"]["all"]["efffeat"],
        "top1conc_unsupervised": plain["fragmentation"]["all"]["top1conc"],
        "fvu": heldout["reconstruction"]["fvu"],
        "l0": heldout["reconstruction"]["l0"],
        "fvu_unsupervised": plain["reconstruction"]["fvu"],
        "alphas": {str(point["alpha"]): point["success"] for point in slots["alphas"]},
        "categories": {str(point["alpha"]): point["category_kept_of_failures"] for point in slots["alphas"]},
    }
