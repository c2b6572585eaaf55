"""The commands on a finished run, from evaluate to summary, as a user types them."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.language_model import CONCEPTS
from tools import plots
from tools.cli import main
from tools.reporting.oddities import oddities
from tools.summary import collect, compare, read_bars
from tools.swapping import plots as swap_plots
from tools.swapping.table import methods_of
from trainer.analysis.evaluation import density
from trainer.analysis.results import read_metrics
from trainer.errors import UserError
from trainer.files import write_result
from trainer.stream import Manifest, ShardSpec, ShardWriter

SUMMARY_KEYS = {
    "lm_answer_accuracy",
    "binding_diagonal_accuracy",
    "concept_slots_alive",
    "slot_accuracy_heldout",
    "swap_success_best",
    "swap_alpha_best",
    "swap_success_mean_difference",
    "efffeat_concept",
    "efffeat_all",
    "efffeat_unsupervised",
    "top1conc_all",
    "fvu",
    "l0",
    "slots",
    "seconds",
}


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A copy of the tiny runs with evaluation.json, swap.json, plots and report.html."""
    folder = tmp_path_factory.mktemp("finished") / "copy"
    shutil.copytree(tiny_run, folder)
    run, model, prompts = str(folder / "aligned"), str(folder / "lm"), str(folder / "prompts.jsonl")
    train = str(folder / "data" / "train")  # config.yaml names the original
    model_and_prompts = ["--model", model, "--prompts", prompts]
    plain = ["--unsupervised", str(folder / "plain")]
    assert main(["evaluate", "--run", run, "--train", train, *plain, *model_and_prompts]) == 0
    assert (
        main(["swap", "--run", run, *model_and_prompts, "--alphas", "1,2", "--pairs", "12", "--learn-steps", "3"]) == 0
    )
    assert main(["report", "--run", run]) == 0
    return folder


def test_evaluation_holds_both_splits_and_the_unsupervised_run(finished):
    found = json.loads((finished / "aligned" / "evaluation.json").read_text())
    assert found["concepts"] == CONCEPTS
    for split in ("train", "heldout"):
        assert found[split]["rows"] == 12
        assert found[split]["binding"]["slot_accuracy"] == 1
        assert found[split]["reconstruction"]["fvu"] < 0.1
        assert sum(map(sum, found[split]["binding"]["confusion"])) == 12
        assert found[split]["fragmentation"]["concept_slots"]["efffeat"] < 1.2
        for reader in ("probe", "mean_difference"):
            assert found[split][reader]["top1"] == found[split][reader]["auroc"] == 1
        assert found["unsupervised"][split]["binding"]["slots_alive"] == 0
    assert found["unsupervised"]["train"]["fragmentation"]["all"]["efffeat"] > 2
    assert 0.5 < found["loss_recovered"]["recovered_over_mean"] <= 1.1


def test_text_beside_the_splits_is_what_slots_are_to_be_silent_on(finished, tmp_path, capsys):
    manifest = Manifest.load(finished / "data" / "train")
    for name, concepts in (("text", []), ("foreign", ["other"])):
        spec = ShardSpec(width=manifest.width, dtype="float32", concepts=concepts, answers=[])
        with ShardWriter(tmp_path / name, "train", spec) as writer:
            rows = torch.randn(5, manifest.width, generator=torch.Generator().manual_seed(0))
            writer.write(rows, np.full(5, -1), np.full(5, -1))
    train, out = str(finished / "data" / "train"), tmp_path / "evaluation.json"
    command = ["evaluate", "--run", str(finished / "aligned"), "--train", train, "--out", str(out), "--text"]
    assert main([*command, str(tmp_path / "text")]) == 0
    found = json.loads(out.read_text())["heldout"]
    assert found["text"]["rows"] == found["labels"]["rows"]["unknown"] == 5 and found["labels"]["rows"]["listing"] == 12
    shown = capsys.readouterr().out
    assert "of 5 rows without a concept, a slot fires on a share of" in shown
    assert f"of the probe {found['probe']['auroc_against_text']:.4f}" in shown
    assert main([*command, str(tmp_path / "foreign")]) != 0
    assert "concepts other are not among" in capsys.readouterr().err


def test_loss_recovered_on_text_and_what_stands_on_little(finished, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"text": "Q where ann city rome"}\n{"text": "bob law"}\n')
    train, out = str(finished / "data" / "train"), tmp_path / "evaluation.json"
    command = ["evaluate", "--run", str(finished / "aligned" / "checkpoints" / "latest"), "--train", train]
    given = ["--model", str(finished / "lm"), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out)]
    assert main([*command, *given]) == 0
    found = json.loads(out.read_text())
    assert found["text_loss_recovered"]["tokens"] == 5 and found["text_loss_recovered"]["texts"] == 2
    said = capsys.readouterr().out
    assert "text: cross-entropy" in said and "note: The loss recovered on text stands on 5 tokens." in said
    assert found["notes"][0] == "FVU and L0 of training rows stand on 12 rows."
    assert main([*command, "--texts", str(tmp_path / "texts.jsonl")]) == 2
    assert "needs --model" in capsys.readouterr().err


def test_swap_file_has_every_alpha_both_methods_and_a_full_matrix(finished):
    found = json.loads((finished / "aligned" / "swap.json").read_text())
    for method in ("slots", "mean_difference"):
        part = found[method]
        assert [row["alpha"] for row in part["alphas"]] == [1, 2]
        assert part["best_success"] == max(row["success"] for row in part["alphas"])
        assert part["matrix"]["swaps"] == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
        failures = sum(group["count"] for group in part["failures"].values())
        assert failures + sum(map(sum, part["matrix"]["successes"])) == found["pairs"] == 12
        for group in part["failures"].values():
            assert all(set(e) == {"prompt", "source", "target", "expected", "answered"} for e in group["examples"])


def test_swap_file_says_of_every_method_what_it_left_alone(finished):
    found = json.loads((finished / "aligned" / "swap.json").read_text())
    assert found["bystanders"] == {"questions": found["bystanders"]["questions"], "texts": 0}
    for name, part in methods_of(found).items():
        assert set(part["forms"]) == {"always", "when"}
        for form in part["forms"].values():
            assert form["text_kl"] is form["fluency"] is None  # without --texts
            shares = [form[key] for key in ("success", "isolation", "quiet", "joint") if form[key] is not None]
            assert all(0 <= share <= 1 for share in shares)
        assert part["forms"]["always"]["success"] == part["best_success"]
        assert (name == "slots") == ("slots_over" not in part)
    page = (finished / "aligned" / "report.html").read_text()
    assert "where read" in page and "das_3" in page


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"])
        self.links += [found[key] for key in ("href", "src") if key in found and tag != "img"]

    def handle_data(self, data):
        self.text += data


def test_report_is_one_file_with_every_plot_inside(finished):
    page = _Page()
    page.feed((finished / "aligned" / "report.html").read_text())
    plots = {p.stem: p.read_bytes() for p in (finished / "aligned" / "plots").iterdir()}
    training = {"losses", "training", "heldout"}
    swaps = {"swap", "swap_forms", "swap_matrix"}
    assert set(plots) == {"binding", "density", "fragmentation", *swaps, *training}
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    prefix = "data:image/png;base64,"
    assert all(src.startswith(prefix) for src in page.images)
    inside = {base64.b64decode(src.removeprefix(prefix)) for src in page.images}
    assert inside == set(plots.values())
    assert all(image.startswith(b"\x89PNG") and len(image) > 5_000 for image in inside)
    evaluation = json.loads((finished / "aligned" / "evaluation.json").read_text())
    assert f"{evaluation['train']['reconstruction']['fvu']:.4f}" in page.text
    assert "free_slots: 64" in page.text


def test_report_escapes_what_prompts_contain(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "aligned", run)
    swap = json.loads((run / "swap.json").read_text())
    swap["slots"]["failures"]["other"]["examples"][0]["answered"] = "<script>alert(1)</script>"
    write_result(run / "swap.json", swap)
    assert main(["report", "--run", str(run)]) == 0
    assert "<script>" not in (run / "report.html").read_text()


def test_report_of_a_run_that_was_not_evaluated(tiny_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(tiny_run / "aligned" / name, run)
    assert main(["report", "--run", str(run)]) == 0
    assert {p.name for p in (run / "plots").iterdir()} == {"losses.png", "training.png", "heldout.png"}


def test_report_of_a_dictionary_without_concepts(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.yaml", "evaluation.json"):
        shutil.copy(finished / "aligned" / name, run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    kept = {
        split: {key: evaluation[split][key] for key in ("rows", "reconstruction")} for split in ("train", "heldout")
    }
    write_result(run / "evaluation.json", {**evaluation, **kept, "concepts": [], "unsupervised": None})
    assert main(["report", "--run", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Reconstruction" in page and "Fragmentation" not in page


def test_steer_prints_both_texts(finished, capsys):
    model = ["--run", str(finished / "aligned"), "--model", str(finished / "lm"), "--prompt", "Q where ann city"]
    assert main(["steer", *model, "--max-new-tokens", "2", "city=0", "work=50"]) == 0
    out = capsys.readouterr().out
    before, after = (re.findall(rf"{word}: +(.*)", out)[0] for word in ("before", "after"))
    assert before and after and before != after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["citty=1"], "did you mean city?"),
        (["city=much"], "'much' is no number"),
        (["city=1", "--max-new-tokens", "99"], "lower --max-new-tokens"),
    ],
)
def test_steer_refuses_bad_settings_in_one_line(finished, capsys, arguments, message):
    model = ["--run", str(finished / "aligned"), "--model", str(finished / "lm"), "--prompt", "Q where ann city"]
    assert main(["steer", *model, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alignsae: error:") and message in error


def test_evaluate_refuses_shards_of_other_concepts(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished / "data" / "train", other)
    manifest = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest.replace('"major"', '"minor"'))
    run = finished / "aligned"
    before = (run / "evaluation.json").read_bytes()
    assert main(["evaluate", "--run", str(run), "--train", str(other)]) == 2
    assert "minor" in capsys.readouterr().err
    assert (run / "evaluation.json").read_bytes() == before


def test_evaluate_without_a_model_for_its_prompts_is_refused(finished, capsys):
    assert main(["evaluate", "--run", str(finished / "aligned"), "--prompts", "p.jsonl"]) == 2
    assert "the loss recovered needs --model" in capsys.readouterr().err


def test_summary_has_the_agreed_keys_and_exits_1_on_a_missed_bar(finished, tmp_path, capsys):
    (finished / "lm" / "lm_report.json").write_text('{"answer_accuracy": 0.75}')
    (tmp_path / "seconds").write_text("321\n")
    run = finished / "aligned"
    command = ["summary", "--run", str(run), "--lm", str(finished / "lm"), "--unsupervised", str(finished / "plain")]
    command += ["--seconds-file", str(tmp_path / "seconds")]
    for bar, code, verdict in ((0.7, 0, "pass"), (0.8, 1, "MISSED")):
        bars = tmp_path / "bars.yaml"
        bars.write_text(f"rows:\n- {{measure: accuracy, value: lm_answer_accuracy, at_least: {bar}}}\n")
        assert main([*command, "--bars", str(bars)]) == code
        assert re.search(rf"accuracy +0\.750 +>= {bar}00 +{verdict}", capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert (summary["seconds"], summary["slots"], summary["concept_slots_alive"]) == (321, 67, 3)
    assert summary["efffeat_unsupervised"] > summary["efffeat_concept"]


def test_summary_refuses_another_unsupervised_run(finished, tmp_path, capsys):
    (tmp_path / "seconds").write_text("1")
    (finished / "lm" / "lm_report.json").write_text('{"answer_accuracy": 1.0}')
    command = ["summary", "--run", str(finished / "aligned"), "--lm", str(finished / "lm")]
    assert main([*command, "--unsupervised", "elsewhere", "--seconds-file", str(tmp_path / "seconds")]) == 2
    assert "elsewhere" in capsys.readouterr().err


def test_demo_bars_are_the_table_of_the_demo(finished):
    evaluation, swap = (json.loads((finished / "aligned" / f"{n}.json").read_text()) for n in ("evaluation", "swap"))
    figures = collect(evaluation, swap, {"answer_accuracy": 1.0}, 60.0)
    rows = read_bars(Path(__file__).parents[1] / "configs" / "demo_bars.yaml")
    good = figures | {
        "l0_share": 0.005,
        "fvu": 0.01,
        "swaps": 600,
        "swap_success_best": 0.8,
        "swap_success_mean_difference": 0.8,
    }
    table, passed = compare(good, rows)
    assert passed, table
    for change in (
        {"seconds": 601.0},
        {"lm_answer_accuracy": 0.979},
        {"binding_diagonal_accuracy": 0.999},
        {"concept_slots_alive": 2},
        {"slot_accuracy_heldout": 0.98},
        {"swaps": 499},
        {"swap_success_best": 0.749},
        {"swap_success_mean_difference": 0.85},
        {"efffeat_concept": 1.21},
        {"efffeat_concept": None},
        {"fvu": 0.021},
        {"l0_share": 0.006},
    ):
        assert not compare(good | change, rows)[1], change


def test_a_bar_on_an_unknown_figure_is_refused():
    with pytest.raises(UserError, match="'fvv'"):
        compare({"fvu": 0.1}, [{"measure": "x", "value": "fvv", "at_most": 1}])


def test_metrics_survive_a_cut_line_and_a_repeated_step(tmp_path):
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_results_are_never_half_written(tmp_path):
    target = tmp_path / "x.json"
    write_result(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_result(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_result(tmp_path / "file" / "x.json", {"a": 1})


def test_plots_show_the_held_out_rows_that_were_evaluated(finished):
    metrics = read_metrics(finished / "aligned")
    figure = plots.training_plot(metrics)
    assert [len(ax.lines) for ax in figure.axes] == [3, 3, 2, 3]  # training, held out, switch of stages
    assert np.asarray(figure.axes[0].lines[1].get_xdata()).tolist() == [30, 60, 90, 120, 150, 170]
    labels = plots.heldout_plot(metrics)
    assert labels is not None and [len(ax.lines) for ax in labels.axes] == [2]  # no text
    without = [{name: value for name, value in line.items() if "heldout" not in name} for line in metrics]
    assert plots.heldout_plot(without) is None and len(plots.training_plot(without).axes[0].lines) == 2


def test_plots_of_many_concepts_and_of_a_silent_one(finished):
    evaluation = json.loads((finished / "aligned" / "evaluation.json").read_text())
    names = [f"concept {i}" for i in range(40)]
    evaluation["concepts"] = names
    for part in (evaluation["train"], evaluation["heldout"], evaluation["unsupervised"]["train"]):
        part["binding"]["confusion"] = [[int(r == c) for c in range(41)] for r in range(40)]
        for spread in part["fragmentation"].values():
            spread["per_concept"] = {name: {"efffeat": 2.0, "top1conc": 0.5} for name in names}
            spread["per_concept"]["concept 7"] = {"efffeat": None, "top1conc": None}
    for draw in (plots.binding_plot, plots.fragmentation_plot):
        figure = draw(evaluation)
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width < 20 and height < 20
        assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)


def test_swap_plot_takes_alpha_zero(finished):
    swap = json.loads((finished / "aligned" / "swap.json").read_text())
    methods = methods_of(swap)
    assert [*methods] == ["slots", "mean_difference", "probe", "erasure", "das_1", "das_3", "slots_learned"]
    for part in methods.values():
        part["alphas"].insert(0, {"alpha": 0.0, "success": 0.0, "category_kept": 0.0})
    lines = swap_plots.swap_plot(swap).axes[0].lines
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[0, 1, 2]] * 9


def test_what_is_odd_is_said():
    lines = [{"step": step, "loss/rec": 1.0 + step % 2 * 0.1} for step in range(20)]
    assert oddities(lines, None, {"status": "finished"}) == []
    lines[15]["loss/rec"] = 9.0
    lines[-1] |= {"skipped_updates": 2, "nonfinite_rows": 1}
    said = oddities(lines, None, {"status": "interrupted"})
    assert [sentence.split()[0] for sentence in said] == ["Training", "2", "1", "The"]
    assert "1 of 20 lines" in said[-1] and "8.6 times" in said[-1] and "at step 15" in said[-1]
    assert "no outcome.json" in oddities([], None, None)[0]
    fit = {"fvu": 0.1, "l0": 8.0, "dead": 0.0, "density": [5] * 22 + [0, 0]}
    split = {"reconstruction": fit, "binding": {"alive": {"a": True, "b": True}}}
    ended = {"status": "finished"}
    assert oddities([], {"train": split, "heldout": split}, ended) == []
    worse = {
        "reconstruction": {**fit, "fvu": 0.2, "dead": 0.5, "density": [0] * 23 + [4]},
        "binding": {"alive": {"a": True, "b": False}},
        "outliers": {"rows": 3},
    }
    plain = {"heldout": {"reconstruction": {**fit, "fvu": 0.15}}}
    said = oddities([], {"train": split, "heldout": worse, "unsupervised": plain}, ended)
    expected = (
        "50.0% of the slots",
        "4 free slots",
        "2.00 times",
        "0.2000 instead of 0.1500",
        "row: b.",
        "giant norms",
    )
    assert len(said) == len(expected) and all(part in sentence for part, sentence in zip(expected, said, strict=True))


def test_the_density_of_slots():
    share = torch.tensor([0.0, 1e-9, 10**-5.9, 0.09, 0.11, 1.0]).double()
    counts = density(share)
    assert len(counts) == 24 and sum(counts) == 5
    assert {place: count for place, count in enumerate(counts) if count} == {0: 2, 19: 1, 20: 1, 23: 1}
