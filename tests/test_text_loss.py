"""Loss recovered on all tokens of text, and which figures of an evaluation stand on little."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.language_model import exact_dictionary, random_dictionary, tiny_model, tiny_tokenizer
from trainer.analysis import text_loss
from trainer.analysis.evidence import notes
from trainer.analysis.text_loss import text_loss_recovered, text_windows
from trainer.errors import UserError
from trainer.language_model import capture

TEXTS = ["Q where ann city rome", "bob major law law", "Q", "which cem work acme zeta oslo lima bonn art"]


def windows(context: int = 4, most: int = 100) -> tuple[list[list[int]], int]:
    return text_windows(tiny_tokenizer(), TEXTS, context, most)


def plain_loss(found: list[list[int]]) -> float:
    """Token by token, a window at a time."""
    each = []
    for window in found:
        ids = torch.tensor([window])
        each.append(cross_entropy(tiny_model()(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(each).mean().detach())


def test_windows_hold_what_can_be_predicted() -> None:
    found, texts = windows()
    assert [len(window) for window in found] == [4, 4, 4, 4] and texts == 3  # windows of one token are left out
    assert [len(window) for window in windows(most=11)[0]] == [4, 4]
    with pytest.raises(UserError, match="no text has two tokens"):
        text_windows(tiny_tokenizer(), ["Q", ""], 4, 100)


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
def test_the_loss_is_that_of_every_token(monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    monkeypatch.setattr(text_loss, "BATCH_TOKENS", batch_tokens)
    found, _ = windows(context=5)
    result = text_loss_recovered(tiny_model(), found, 0, exact_dictionary())
    assert result["tokens"] == sum(len(window) - 1 for window in found)
    assert result["cross_entropy_original"] == pytest.approx(plain_loss(found), rel=1e-5)
    assert result["recovered_over_zero"] == pytest.approx(1, abs=1e-4)
    assert result["cross_entropy_zero"] != pytest.approx(result["cross_entropy_original"], abs=1e-3)
    bad = text_loss_recovered(tiny_model(), found, 0, random_dictionary())
    assert bad["recovered_over_zero"] != pytest.approx(1, abs=1e-2)


def test_giant_activations_stay() -> None:
    found, _ = windows()
    model = tiny_model()
    norms = torch.cat([capture(model, torch.tensor([w]), torch.ones(1, len(w)), [0])[0][0].norm(dim=1) for w in found])
    limit = float(norms.median())
    result = text_loss_recovered(model, found, 0, random_dictionary(), limit)
    assert result["left_alone"] == (norms > limit).sum() == len(norms) // 2
    everything = text_loss_recovered(model, found, 0, random_dictionary(), 0.0)
    assert everything["left_alone"] == len(norms)
    assert everything["cross_entropy_zero"] == pytest.approx(everything["cross_entropy_original"])


def evaluation(rows: int, own: int, text: int | None, documents: int) -> dict[str, Any]:
    labels = {
        "per_concept": {"city": {"rows": own}, "work": {"rows": 9000}},
        "documents": {"city": documents, "work": 9},
    }
    part = {"rows": rows, "labels": labels, **({} if text is None else {"text": {"rows": text}})}
    losses = {"loss_recovered": {"prompts": rows}, "text_loss_recovered": {"tokens": 10 * rows}}
    return {"heldout": part, **losses}


def test_what_stands_on_little_is_told() -> None:
    assert notes(evaluation(5000, 300, 4000, 40), {"heldout": 4, "train": 0}) == []
    few = notes(evaluation(50, 1, 40, 1), {"heldout": 1})
    words = [
        "on 50 rows",
        "city (1 row).",
        "city (1 document).",
        "below 2.5%",
        "1 template:",
        "50 prompts",
        "500 tokens",
    ]
    assert len(few) == len(words) and all(word in note for word, note in zip(words, few, strict=True)), few
    assert "whether slots are silent" in notes(evaluation(5000, 300, None, 40))[0]
    assert notes({"train": {"rows": 5000}}) == []
