"""What the pages say of each slot: its line of the table, and its details.

Shapes: n slots at a time, k contexts of a slot.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tools.exploring.contexts import Contexts
from trainer.analysis.lens import decoder_rows, logit_lens, nearest
from trainer.analysis.survey import BINS, Survey
from trainer.language_model import block_part
from trainer.pretrained import Trained

NEIGHBOURS, TOKENS = 8, 10  # shown of a slot


@torch.no_grad()
def slots(
    trained: Trained, survey: Survey, contexts: Contexts, model: Any
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Line of the table and details of every slot, in order."""
    rows = decoder_rows(trained.dictionary)
    # Every part of a block writes to the residual stream; of another module nobody knows.
    lens_fits = model is not None and block_part(trained.hook_point) is not None
    written = logit_lens(model, rows, TOKENS) if lens_fits else None
    auroc, begin = survey.auroc().tolist(), 0
    with tqdm(total=trained.slots, desc="slots", unit="slot") as bar:
        for neighbours, cosines in nearest(rows, NEIGHBOURS):
            part = slice(begin, begin + len(neighbours))
            lines, details = _lines(trained, survey, contexts, part, auroc), _details(survey, contexts, part)
            for detail, near in zip(details, _numbers(neighbours, cosines), strict=True):
                detail["n"] = [[slot, cosine] for slot, cosine in near if cosine > 0]
            if written is not None:
                lens, some = next(written), rows[part].any(dim=1).tolist()
                up, down = _numbers(lens.up, lens.up_logits), _numbers(lens.down, lens.down_logits)
                for detail, there, *tokens in zip(details, some, up, down, strict=True):
                    if there:
                        detail["u"], detail["s"] = ([[contexts.text(t), x] for t, x in one] for one in tokens)
            for line, detail in zip(lines, details, strict=True):
                yield [*line, detail["u"][0][0] if "u" in detail else ""], detail
            begin += len(neighbours)
            bar.update(len(neighbours))


def _numbers(ids: Tensor, values: Tensor) -> list[list[tuple[int, float]]]:
    """Rows of pairs of [n, m] ids and values."""
    rounded = values.double().numpy().round(3).tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), rounded, strict=True)]


def _lines(trained: Trained, survey: Survey, contexts: Contexts, part: slice, auroc: list[float]) -> list[list[Any]]:
    fired, most = survey.fired[part].tolist(), survey.most[part].tolist()
    total, first = survey.total[part].tolist(), survey.top.row[part, 0].tolist()
    names, lines = trained.concepts, []
    for place, slot in enumerate(range(part.start, part.start + len(fired))):
        own: list[Any] = [None, None, None]
        if slot < survey.concepts:
            positive, negative = int(survey.positives[slot]), int(survey.negatives[slot])
            own = [
                round(auroc[slot], 5) if positive and negative else None,
                _ratio(int(survey.false[slot]), negative),
                _ratio(int(survey.missed[slot]), positive),
            ]
        lines.append([
            slot,
            names[slot] if slot < len(names) else None,
            fired[place] / max(survey.rows, 1),
            round(total[place] / fired[place], 4) if fired[place] else 0.0,
            round(most[place], 4),
            *own,
            contexts.peak(first[place]),
        ])  # fmt: skip
    return lines


def _details(survey: Survey, contexts: Contexts, part: slice) -> list[dict[str, Any]]:
    most, top = survey.most[part], survey.top
    shown = contexts.show(top.row[part], top.value[part], top.window[part], most)
    histograms = survey.histogram.view(-1, BINS)[part].tolist()
    details: list[dict[str, Any]] = [{"i": part.start + place} for place in range(len(most))]
    for detail, active, histogram, found in zip(details, (most > 0).tolist(), histograms, shown, strict=True):
        if active:
            detail |= {"h": histogram, "c": found}
    named = slice(part.start, min(part.stop, survey.concepts))
    counts = {"p": survey.positives, "n": survey.negatives, "f": survey.false, "m": survey.missed}
    for detail in details[: max(named.stop - named.start, 0)]:
        one, peak = slice(detail["i"], detail["i"] + 1), survey.most[detail["i"]][None]
        wrong, silent = survey.wrong, survey.silent
        detail["k"] = {name: int(count[one]) for name, count in counts.items()}
        (detail["w"],) = contexts.show(wrong.row[one], wrong.value[one], wrong.window[one], peak)
        (detail["m"],) = contexts.show(silent.row[one], torch.zeros(silent.row[one].shape), None, peak)
    return details


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
