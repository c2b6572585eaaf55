"""Pages about slots: what they say is what whole codes say, in parts of bounded size, with nothing taken for markup."""

import json
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.language_model import CONCEPTS, WIDTH, random_dictionary, tiny_model, words
from tools import explore
from tools.cli import main
from tools.exploring.pages import PART, script
from trainer import load
from trainer.analysis.lens import decoder_rows, logit_lens, nearest, outermost
from trainer.analysis.survey import BINS, Survey, bin_of
from trainer.labels import NONE, UNKNOWN
from trainer.stream import ShardSpec, ShardWriter

CONTEXTS, WINDOW = 3, 2


def parts(folder: Path, name: str) -> list[Any]:
    """Items of the parts of a folder of pages, in order."""
    items: list[Any] = []
    for number, path in enumerate(sorted((folder / "data").glob(f"{name}-*.js"))):
        assert path.stat().st_size < 300_000
        found = re.fullmatch(rf"alignsae\.{name}\({number},(.*)\);\n", path.read_text(), re.DOTALL)
        assert found
        items += json.loads(found[1])
    return items


@pytest.mark.parametrize("batch", [7, 64, 200])
def test_the_survey_is_what_whole_codes_say(batch: int) -> None:
    torch.manual_seed(0)
    dictionary, rows = random_dictionary(), 200
    h = torch.randn(rows, WIDTH) * 2
    concept = torch.randint(-2, 3, (rows, 1), dtype=torch.int32)
    concept = torch.cat([concept, torch.where(concept == 0, 2, UNKNOWN)], dim=1).int()
    valid = torch.rand(rows) > 0.1
    survey = Survey(dictionary, len(CONCEPTS), CONTEXTS, WINDOW)
    for part in torch.arange(rows).split(batch):
        survey.add(h[part], concept[part], valid[part])
    z = dictionary.encode(h) * valid[:, None]
    assert survey.rows == int(valid.sum())
    assert torch.equal(survey.fired, (z > 0).sum(dim=0))
    torch.testing.assert_close(survey.total, z.double().sum(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(survey.most, z.amax(dim=0), rtol=1e-5, atol=1e-6)
    histogram = survey.histogram.view(-1, BINS)
    assert torch.equal(histogram.sum(dim=1), survey.fired)
    assert int((histogram[5] - torch.bincount(bin_of(z[:, 5][z[:, 5] > 0]), minlength=BINS)).abs().sum()) <= 2
    best = z.topk(CONTEXTS, dim=0)
    torch.testing.assert_close(survey.top.value, best.values.T, rtol=1e-5, atol=1e-6)
    for slot in range(z.shape[1]):
        for value, row, window in zip(
            survey.top.value[slot], survey.top.row[slot], survey.top.window[slot], strict=True
        ):
            if value > 0:
                torch.testing.assert_close(z[row, slot], value, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(window[WINDOW].float(), value, rtol=1e-3, atol=1e-3)
                first = int(row) // batch * batch
                if first < row and valid[row - 1]:
                    torch.testing.assert_close(window[WINDOW - 1].float(), z[row - 1, slot], rtol=1e-3, atol=1e-3)
    told = valid & (concept[:, 0] != UNKNOWN)
    for slot in range(len(CONCEPTS)):
        has = (concept == slot).any(dim=1)
        with_it, without = z[has & told, slot], z[~has & told, slot]
        assert (int(survey.positives[slot]), int(survey.negatives[slot])) == (len(with_it), len(without))
        assert int(survey.false[slot]) == int((without > 0).sum()) and int(survey.missed[slot]) == int(
            (with_it == 0).sum()
        )
        pairs = with_it[:, None] - without[None]
        auroc = ((pairs > 0).double() + (pairs == 0).double() / 2).mean()
        assert float(survey.auroc()[slot]) == pytest.approx(float(auroc), abs=0.01)
        silent = [row for row in survey.silent.row[slot].tolist() if row >= 0]
        assert silent == torch.nonzero(has & told & (z[:, slot] == 0)).flatten().tolist()[:CONTEXTS]


def test_the_lens_is_the_logits_that_a_direction_adds() -> None:
    model, rows = tiny_model(), decoder_rows(random_dictionary())
    found = next(logit_lens(model, rows, 4))
    norm = model.transformer.ln_f
    with torch.no_grad():
        x = torch.nn.functional.layer_norm(rows[7], (WIDTH,)) * norm.weight
        logits = model.lm_head.weight @ x
    assert found.up[7].tolist() == logits.topk(4).indices.tolist()
    assert found.down[7].tolist() == (-logits).topk(4).indices.tolist()
    near, cosine = next(nearest(rows, 3))
    expected = rows[7] @ rows.T
    expected[7] = -2
    assert near[7].tolist() == expected.topk(3).indices.tolist() and cosine[7, 0] < 1


def test_the_outermost_of_many_are_those_of_all() -> None:
    scores = torch.randn(5, 5003).bfloat16()  # with ties, and more places than groups hold
    for largest in (True, False):
        found = scores.gather(1, outermost(scores, 32, largest)).sort(dim=1).values
        assert torch.equal(found, scores.topk(32, dim=1, largest=largest).values.sort(dim=1).values)


def write_tokens(folder: Path, rows: int = 120) -> Path:
    """Shards whose rows say which tokens they are of: documents of 20 tokens, one of them a piece of markup."""
    generator = torch.Generator().manual_seed(1)
    spec = ShardSpec(
        width=WIDTH, dtype="float32", concepts=CONCEPTS, answers=[], model="tiny", hook_point="blocks.1.hook_resid_post"
    )
    number = np.arange(rows)
    token = np.stack([number % len(words()), number // 20, number % 20], axis=1)
    concept = torch.where(torch.arange(rows) % 3 == 0, torch.arange(rows) % len(CONCEPTS), NONE)
    with ShardWriter(folder, "train", spec, rows_per_block=50) as writer:
        writer.write(torch.randn(rows, WIDTH, generator=generator) * 3, concept, torch.full((rows,), -1), token)
    return folder


def test_pages_of_a_run(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = write_tokens(tmp_path / "shards"), tmp_path / "pages"
    command = ["explore", "--run", str(tiny_run / "aligned"), "--out", str(out)]
    asked = ["--shards", str(shards), "--model", str(tiny_run / "lm"), "--contexts", "4", "--window", "3"]
    assert main([*command, *asked]) == 0
    assert {p.name for p in out.iterdir()} == {"index.html", "base.css", "explore.css", "explore.js", "data"}
    lines, details = parts(out, "lines"), parts(out, "details")
    dictionary = load(tiny_run / "aligned")
    assert len(lines) == len(details) == dictionary.slots
    assert [line[:2] for line in lines[:4]] == [[0, "city"], [1, "major"], [2, "work"], [3, None]]
    active = next(line for line in lines if line[2] > 0)
    detail = details[active[0]]
    first = detail["c"][0]
    assert first["v"] == pytest.approx(active[4], abs=1e-3)
    assert first["t"][first["f"]] == active[8] == words()[first["r"] % len(words())]
    assert first["a"][first["f"]] == "9" and len(first["t"]) == len(first["a"]) <= 7
    assert all(first["d"] == (first["r"] + near) // 20 for near in (-first["f"], len(first["t"]) - 1 - first["f"]))
    assert sum(detail["h"]) == round(active[2] * 120)
    assert detail["u"][0][0] == active[9] and len(detail["n"]) <= 8
    own = details[0]["k"]
    assert own["p"] == 40 and own["n"] == 80 and lines[0][6] == own["f"] / 80 and lines[0][7] == own["m"] / 40
    assert main([*command, *asked]) == 2
    assert "already exists" in capsys.readouterr().err


def test_rows_that_say_nothing_of_their_tokens_and_other_concepts(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explore", "--run", str(tiny_run / "aligned"), "--shards", str(tiny_run / "data" / "train")]
    assert main([*command, "--out", str(tmp_path / "a"), "--rows", "5"]) == 0
    details = parts(tmp_path / "a", "details")
    shown = [context for detail in details for context in detail.get("c", [])]
    assert shown and all("t" not in context and context["r"] < 5 for context in shown)
    assert any("l" in context for context in shown)
    assert main([*command, "--out", str(tmp_path / "b"), "--rows", "0"]) == 2
    assert main(["explore", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path / "c")]) == 2
    assert "--shards" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_nothing_is_taken_for_markup(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>\u2028"
    text = script({"t": hostile})
    assert "<" not in text and "\u2028" not in text and json.loads(text) == {"t": hostile}
    assert "innerHTML" not in (Path(explore.__file__).parent / "templates" / "explore.js").read_text()
    about = {
        "name": hostile,
        "rows": "1",
        "columns": explore.COLUMNS,
        "facts": [hostile],
        "notes": [hostile],
    }
    many = (
        ([slot, hostile, 0.1, 1.0, 1.0, None, None, None, "", ""], {"i": slot, "c": ["x" * 900]}) for slot in range(900)
    )
    explore.write(tmp_path / "out", about, many)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<img" not in page and "&lt;img" in page and len(page) < 300_000
    assert [line[0] for line in parts(tmp_path / "out", "lines")] == list(range(900))
    assert max(p.stat().st_size for p in (tmp_path / "out" / "data").iterdir()) < PART + 2_000


def test_pages_are_served_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("here")
    servers: list[Any] = []
    started = threading.Event()
    kind = explore.http.server.ThreadingHTTPServer
    plain = kind.serve_forever

    def noted(self: Any) -> None:
        servers.append(self)
        started.set()
        plain(self, 0.05)

    monkeypatch.setattr(kind, "serve_forever", noted)
    command = ["explore", "--run", str(tmp_path), "--out", str(tmp_path), "--serve", "--port", "0"]
    thread = threading.Thread(target=main, args=[command])
    thread.start()
    assert started.wait(60)
    with urllib.request.urlopen(f"http://127.0.0.1:{servers[0].server_port}/", timeout=60) as answer:
        assert answer.read() == b"here" and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert servers[0].server_address[0] == "127.0.0.1"
    servers[0].shutdown()
    thread.join(60)
