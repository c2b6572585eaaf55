"""Steering against a hook that edits whole codes, on six architectures; load, gains, and what the command prints."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2LMHeadModel

from tests.support.language_model import CONCEPTS, WIDTH, random_dictionary, tiny_model, tiny_tokenizer
from tools.cli import main
from tools.lm_training.models import build_model
from trainer import Trained, load, steer
from trainer.analysis.evaluation import concept_slot_means
from trainer.analysis.results import rows_of
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import DataError, UserError
from trainer.gains import measure_concepts
from trainer.language_model import capture, encode_prompts, find_blocks, last_token, load_language_model
from trainer.pretrained import Facts
from trainer.topology import Topology

LAYER, NEW = 0, 4
PROMPTS = ["Q where ann city", "Q bob", "Q which cem work"]
GAINS = {"city": 2.0, "work": 0.5}


def trained(dictionary: ConceptDictionary | None = None) -> Trained:
    """A random dictionary after the first block; the gain of `major` is unknown."""
    facts = Facts("alignsae", "relu", "here", "tiny", f"blocks.{LAYER}.hook_resid_post", gains=dict(GAINS))
    return Trained(dictionary or random_dictionary(), facts)


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral", "qwen2", "gpt_neox", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Random weights far from the start, so that a prompt matters."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    model = build_model(request.param, tokenizer, layers=2, width=WIDTH, heads=2, context=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * (parameter.ndim > 1))
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts with NEW tokens behind them, the attention mask of the prompts, and the logits [B, NEW, V]
    of the new tokens."""
    ids, mask = encode_prompts(tiny_tokenizer(), PROMPTS, side="left")
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **options)
    return out.sequences, mask, torch.stack(out.logits, dim=1)


def by_whole_codes(model: Any, dictionary: Trained, change: Any, sequence: Tensor, mask: Tensor, place: Tensor) -> Any:
    """Logits of one plain pass over whole sequences, with `change(z [N, S])` at the tokens of `place` [B, T]."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        z = dictionary.encode(h[place])
        h[place] += dictionary.decode(change(z)) - dictionary.decode(z)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    whole = torch.cat([mask, mask.new_ones(len(mask), sequence.shape[1] - mask.shape[1])], dim=1)
    handle = find_blocks(model)[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(
                input_ids=sequence, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0)
            ).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["prompt_end", "all", "generated"])
def test_generation_is_that_of_whole_codes_edited_at_those_tokens(model: Any, where: Any) -> None:
    dictionary = trained()

    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, 0], z[:, 2], z[:, 30] = 30.0 * GAINS["city"], 0.0, 40.0
        return z

    plain, mask, unsteered = generate(model)
    with steer(model, dictionary, {"city": 30.0, "work": 0, "30": 40.0}, where=where) as s:
        found, _, steered = generate(model)
    prompt, columns = mask.shape[1], torch.arange(found.shape[1]).expand_as(found)
    real = torch.cat([mask.bool(), torch.ones(len(mask), NEW, dtype=torch.bool)], dim=1)
    place = {"prompt_end": columns == prompt - 1, "all": real, "generated": columns >= prompt}[where]
    logits = by_whole_codes(model, dictionary, change, found, mask, place)
    torch.testing.assert_close(steered, logits[:, prompt - 1 : -1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(steered, unsteered, rtol=0.1, atol=0.1)
    assert torch.equal(generate(model)[0], plain)  # nothing is left behind
    read, new = s.trace["city"], s.steered["city"]
    assert read.shape == (len(PROMPTS), prompt + NEW - 1)
    assert torch.equal(read.isnan(), ~real[:, :-1])
    set_to = place[:, :-1] & real[:, :-1]
    assert bool((new[set_to] == 30.0 * GAINS["city"]).all())
    torch.testing.assert_close(new[real[:, :-1] & ~set_to], read[real[:, :-1] & ~set_to])


def test_the_trace_is_the_code_of_the_layer(model: Any) -> None:
    dictionary = trained()
    ids, mask = encode_prompts(tiny_tokenizer(), PROMPTS)  # padded on the right
    h = capture(model, ids, mask, [LAYER])[LAYER]
    with torch.no_grad(), steer(model, dictionary, {"city": 1.0}, read=["work", 17]) as s:
        model(input_ids=ids, attention_mask=mask)
    z = dictionary.encode(h.flatten(0, 1)).unflatten(0, h.shape[:2])
    for name, slot in (("city", 0), ("work", 2), ("17", 17)):
        torch.testing.assert_close(s.trace[name][mask.bool()], z[..., slot][mask.bool()], rtol=1e-4, atol=1e-4)
    row = torch.arange(len(PROMPTS))
    assert bool((s.steered["city"][row, last_token(mask)] == GAINS["city"]).all())
    assert torch.equal(s.steered["work"].nan_to_num(), s.trace["work"].nan_to_num())


class Renamed(GPT2LMHeadModel):
    """Takes its cache under the name that some versions of transformers have for it."""

    def forward(self, input_ids: Tensor, cache: DynamicCache, **options: Any) -> Any:
        return super().forward(input_ids, past_key_values=cache, **options)


def test_a_cache_is_known_whatever_it_is_called() -> None:
    model = Renamed(tiny_model().config).eval()
    ids, cache = torch.arange(5)[None], DynamicCache()
    with torch.no_grad(), steer(model, trained(), {"city": 1.0}) as s:
        for part in ids.split([3, 1, 1], dim=1):
            model(input_ids=part, cache=cache)
    assert s.trace["city"].shape == (1, 5)
    assert (s.trace["city"] != s.steered["city"]).nonzero().tolist() == [[0, 2]]


def test_without_a_cache_the_same_is_generated(model: Any) -> None:
    for where in ("prompt_end", "all", "generated"):
        with steer(model, trained(), {"city": 30.0, "work": 0}, where=where):
            assert torch.equal(generate(model, use_cache=False)[0], generate(model)[0])


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """One small model, for what depends on no architecture."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    torch.manual_seed(1)
    return build_model("gpt2", tokenizer, layers=2, width=WIDTH, heads=2, context=32).eval()


def slots_after(model: Any, dictionary: Trained, edits: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Activations [B, T, m] before and after."""
    ids, mask = encode_prompts(tiny_tokenizer(), PROMPTS)
    with torch.no_grad(), steer(model, dictionary, edits, where="all", **options) as s:
        model(input_ids=ids, attention_mask=mask)
    before, after = (torch.stack(list(d.values()), dim=2)[mask.bool()] for d in (s.trace, s.steered))
    return before, after


def test_a_dictionary_of_another_hook_point(gpt2: Any) -> None:
    dictionary = trained()
    dictionary.facts.hook_point = "blocks.1.hook_mlp_out"
    ids, _ = encode_prompts(tiny_tokenizer(), PROMPTS)
    h = capture(gpt2, ids, torch.ones_like(ids), [dictionary.hook_point])[dictionary.hook_point]
    with torch.no_grad(), steer(gpt2, dictionary, {"city": 1.0}) as s:
        gpt2(input_ids=ids)
    z = dictionary.encode(h.flatten(0, 1))[:, 0]
    torch.testing.assert_close(s.trace["city"].flatten(), z, rtol=1e-4, atol=1e-4)
    dictionary.facts.hook_point = "transformer.h.1.mlp.c_fc"
    with steer(gpt2, dictionary, {"city": 1.0}), pytest.raises(UserError, match="128 wide, the dictionary 32"):
        gpt2(input_ids=ids)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("set", lambda z: torch.ones_like(z)),
        ("add", lambda z: z + 1.0),
        ("scale", lambda z: 0.5 * z),
        ("suppress", lambda z: z.clamp_max(1.0)),
        ("clamp", lambda z: torch.where(z > 0, 1.0, z)),
    ],
)
def test_modes(gpt2: Any, mode: str, expected: Any) -> None:
    dictionary = random_dictionary()
    dictionary.set_normalisation([0.0] * WIDTH, 0.05)
    z, changed = slots_after(gpt2, trained(dictionary), {"city": 0.5}, mode=mode)
    assert bool((z > 0).any()) and bool((z == 0).any())
    torch.testing.assert_close(changed, expected(z))


def test_ablation_takes_names_and_activations_do_not_become_negative(gpt2: Any) -> None:
    z, changed = slots_after(gpt2, trained(), ["city", "work"], mode="ablate")
    assert z.shape[1] == 2 and bool(z.any()) and not bool(changed.any())
    _, changed = slots_after(gpt2, trained(), {"city": -50.0}, mode="add")
    assert not bool(changed.any())


def test_each_sequence_has_a_strength_of_its_own(gpt2: Any) -> None:
    edits: dict[str, Any] = {"city": [1.0, torch.nan, 2.0], "work": 3.0}
    ids, mask = encode_prompts(tiny_tokenizer(), PROMPTS)
    with torch.no_grad(), steer(gpt2, trained(), edits) as s:
        gpt2(input_ids=ids, attention_mask=mask)
    row, last = torch.arange(3), last_token(mask)
    read, new = s.trace["city"][row, last], s.steered["city"][row, last]
    assert new.tolist() == [2.0, pytest.approx(read[1].item()), 4.0]
    assert s.steered["work"][row, last].tolist() == [1.5, 1.5, 1.5]
    with steer(gpt2, trained(), edits), pytest.raises(UserError, match="for 3 sequences, the model reads 1"):
        gpt2(input_ids=ids[:1])


def test_only_the_chosen_slots_are_computed(gpt2: Any) -> None:
    ids, _ = encode_prompts(tiny_tokenizer(), PROMPTS)
    large = ConceptDictionary(DictionaryConfig(5000).form(WIDTH, CONCEPTS))

    def flops(edits: dict[str, float] | None) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if edits is None:
                gpt2(input_ids=ids)
            else:
                with steer(gpt2, trained(large), edits, where="all"):
                    gpt2(input_ids=ids)
        return counter.get_total_flops()

    assert flops({"city": 1.0, "work": 0}) - flops(None) == 2 * 2 * ids.numel() * WIDTH * 2


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ({"citty": 1.0}, {}, "did you mean city"),
        ({"53": 1.0}, {}, "slots 0 to 52"),
        ({"city": 1.0, "0": 1.0}, {}, "each once"),
        ({}, {}, "at least one"),
        ({"city": "much"}, {}, "no number"),
        ({"city": float("inf")}, {}, "not finite"),
        ({"city": [1.0, 2.0], "work": [1.0] * 3}, {}, "as many strengths"),
        (["city"], {}, "takes slot -> strength"),
        ({"city": 1.0}, {"mode": "ablate"}, "takes a list"),
        ({"city": 1.0}, {"mode": "sett"}, "use one of set"),
        ({"city": 1.0}, {"where": "here"}, "use one of prompt_end"),
    ],
)
def test_what_cannot_be_is_refused(gpt2: Any, edits: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message), steer(gpt2, trained(), edits, **options):
        pass


def test_a_slot_without_a_gain_is_set_in_units_of_the_code(gpt2: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, changed = slots_after(gpt2, trained(), {"major": 1.5})
    assert bool((changed == 1.5).all())
    assert "no gain is known of major" in caplog.text and len(caplog.records) == 1


def test_a_run_holds_the_gains_of_its_concept_slots(tiny_run: Any) -> None:
    found = load(tiny_run / "aligned")
    rows, _ = rows_of([str(tiny_run / "data" / "train")], found.dictionary)
    means = concept_slot_means(found.dictionary, rows).tolist()
    assert found.gains == pytest.approx(dict(zip(CONCEPTS, means, strict=True)), rel=1e-4)
    assert found.concepts == CONCEPTS and found.hook_point == "blocks.1.hook_resid_post"
    assert load(tiny_run / "plain").gains == {}


@pytest.mark.parametrize("options", [["safetensors"], ["saelens"], ["saelens", "--unit-norm"]], ids=" ".join)
def test_an_export_steers_as_its_run_does(tiny_run: Any, tmp_path: Any, options: list[str]) -> None:
    assert (
        main(["export", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path / "out"), "--format", *options]) == 0
    )
    run, export = load(tiny_run / "aligned"), load(tmp_path / "out")
    h = torch.randn(5, WIDTH)
    torch.testing.assert_close(export.decode(export.encode(h)), run.decode(run.encode(h)), rtol=1e-4, atol=1e-4)
    assert export.concepts == CONCEPTS
    model, tokenizer = load_language_model(tiny_run / "lm")
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    logits = []
    for dictionary in (run, export):
        with torch.no_grad(), steer(model, dictionary, {"city": 2.0, "work": 0}, where="all"):
            logits.append(model(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_the_command_charts_and_samples(tiny_run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "steered.png"
    command = ["steer", "--run", str(tiny_run / "aligned"), "--model", str(tiny_run / "lm"), "--max-new-tokens", "3"]
    prompts = ["--prompt", "Q where ann city", "--prompt", "Q bob", "--where", "all", "--read", "work"]
    sampled = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]
    assert main([*command, *prompts, *sampled, "--chart", "--png", str(png), "city=2"]) == 0
    first = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    # Four and two tokens of the prompts, and two of the three that were generated each.
    assert len(re.findall("^'.*█.* -> ", first, re.MULTILINE)) == 6 + 4
    assert main([*command, *prompts, *sampled, "--chart", "--png", str(png), "city=2"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, *prompts, "--mode", "ablate", "city", "work"]) == 0
    assert main([*command, *prompts, "--top-p", "0", "city=1"]) == 2
    assert "--top-p" in capsys.readouterr().err


def test_slots_are_measured_on_the_rows_of_their_concepts_or_not_at_all_where_rows_cannot_be_read() -> None:
    dictionary, x, concept = random_dictionary(), torch.randn(40, WIDTH), torch.randint(2, (40, 1))
    weights = dictionary.requires_grad_(False).concepts.weights()
    z = weights.encode(x)

    def damaged() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, concept
        raise DataError("gone")

    own = [concept[:, 0] == number for number in range(2)]
    expected = [float(z[rows, number].mean()) for number, rows in enumerate(own)]
    found = measure_concepts(weights, [(x[:9], concept[:9]), (x[9:], concept[9:])], Topology(), "softmax")
    assert found is not None and found.gains == pytest.approx([*expected, 0.0], rel=1e-5)
    # At its gain a slot writes what its concept has and the mean of the concepts has not; one without rows nothing.
    means = torch.stack([x[rows].mean(dim=0) for rows in own])
    torch.testing.assert_close(found.written[:2] * torch.tensor(expected)[:, None], means - means.mean(dim=0))
    assert not found.written[2].any()
    assert measure_concepts(weights, damaged(), Topology(), "softmax") is None


def test_importing_the_library_is_cheap() -> None:
    code = "import sys, trainer; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); trainer.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_gains_are_refused_where_they_are_no_numbers(tiny_run: Any, tmp_path: Any) -> None:
    out = tmp_path / "out"
    assert main(["export", "--run", str(tiny_run / "aligned"), "--out", str(out)]) == 0
    named = json.loads((out / "concepts.json").read_text())
    named["gains"] = {"city": "2", "major": -1.0, "work": 3}
    (out / "concepts.json").write_text(json.dumps(named))
    assert load(out).gains == {"work": 3.0}


def test_the_time_of_a_token_is_said(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["steer", "--run", str(tiny_run / "aligned"), "--model", str(tiny_run / "lm"), "--prompt", "Q where"]
    assert main([*command, "--max-new-tokens", "3", "--where", "all", "city=2", "--time", "2"]) == 0
    assert re.search(
        r"of a generated token: [\d.]+ ms, steered [\d.]+ ms \([+-][\d.]+%; medians", capsys.readouterr().out
    )
    assert main([*command, "city=2", "--time", "0"]) == 2
