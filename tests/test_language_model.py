"""Loading, residual capture and edits on three architectures, prompt files, greedy answers."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.lm_training.models import build_model, build_tokenizer
from trainer.errors import UserError
from trainer.language_model import (
    EditableModel,
    answer_matches,
    capture,
    encode_answer,
    encode_prompts,
    find_blocks,
    generate_answers,
    hook_point,
    last_token,
    load_language_model,
    module_at,
    read_prompts,
    read_texts,
)

PROMPTS = ["Q: Who?\nA:", "Q: Where does Ada work today?\nA:", "Q: a\nA:", "Q: What did Ben Ash study?\nA:"]
LAYERS = 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per word, so that different answers are different texts."""
    vocabulary = ["<end>", "<pad>", *dict.fromkeys(" ".join(PROMPTS).split()), *(f"w{i}" for i in range(50))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", bos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def byte_pairs() -> Any:
    return build_tokenizer(PROMPTS, 300)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    model = build_model(request.param, tokenizer, layers=LAYERS, width=32, heads=2, context=64).eval()
    with torch.no_grad():  # far from the start, where prompts hardly matter
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter) * (parameter.ndim > 1))
    return model


def test_capture_is_the_output_of_each_block(model: Any, tokenizer: Any) -> None:
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    found = capture(model, ids, mask, [2, 0, 1])
    with torch.no_grad():
        reference = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    real = mask.bool()
    for layer in (0, 1):
        torch.testing.assert_close(found[layer][real], reference[layer + 1][real])
    # transformers stores the last one behind the final norm; ours is before it.
    norm = next(m for name, m in model.named_modules() if name.split(".")[-1] in ("ln_f", "norm", "final_layer_norm"))
    torch.testing.assert_close(norm(found[2])[real], reference[3][real])


def test_the_forward_pass_stops_after_the_last_hooked_layer(model: Any, tokenizer: Any) -> None:
    ran: list[int] = []
    hooks = [len(block._forward_hooks) for block in find_blocks(model)]
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
        for i, block in enumerate(find_blocks(model))
    ]
    capture(model, *encode_prompts(tokenizer, PROMPTS), [0, 1])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert [len(block._forward_hooks) for block in find_blocks(model)] == hooks


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, tokenizer: Any, side: str) -> None:
    ids, mask = encode_prompts(tokenizer, PROMPTS, side=side)
    batch, last = capture(model, ids, mask, [0, 2]), last_token(mask)
    for row, prompt in enumerate(PROMPTS):
        alone = capture(model, *encode_prompts(tokenizer, [prompt]), [0, 2])
        for layer in (0, 2):
            torch.testing.assert_close(batch[layer][row, last[row]], alone[layer][0, -1], atol=1e-4, rtol=1e-4)


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 5))
def test_last_token_on_either_side(left: int, real: int, right: int) -> None:
    mask = torch.tensor([[0] * left + [1] * real + [0] * right])
    assert last_token(mask).tolist() == [left + real - 1]


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7]])
def test_a_layer_out_of_range_is_named(model: Any, tokenizer: Any, layers: list[int]) -> None:
    with pytest.raises(UserError, match=r"layer (3|-1|7) does not exist: the model has layers 0 to 2"):
        capture(model, *encode_prompts(tokenizer, PROMPTS), layers)
    with pytest.raises(UserError, match="does not exist"):
        EditableModel(model, tokenizer, layers[-1])


def test_a_model_without_blocks_is_refused(model: Any) -> None:
    class Foreign(torch.nn.Module):
        config = model.config

    with pytest.raises(UserError, match="no ModuleList of 3 blocks"):
        find_blocks(Foreign())


def test_batched_answers_equal_single_ones(model: Any, tokenizer: Any) -> None:
    single = [generate_answers(model, tokenizer, [p], max_new_tokens=5)[0] for p in PROMPTS]
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3) == single
    assert len(set(single)) > 1


def test_answers_stop_at_the_end_token_and_at_a_new_line(model: Any, byte_pairs: Any, monkeypatch: Any) -> None:
    words = {
        "end": [*byte_pairs(" Ada Ash")["input_ids"], byte_pairs.eos_token_id, 40],
        "line": byte_pairs(" Ben\nQ:")["input_ids"],
    }
    for name, expected in (("end", "Ada Ash"), ("line", "Ben")):
        tail = torch.tensor([words[name]])
        monkeypatch.setattr(model, "generate", lambda input_ids, tail=tail, **_: torch.cat([input_ids, tail], dim=1))
        cut = generate_answers(model, byte_pairs, ["Q: x\nA:"])
        assert cut[0].startswith(expected) and "Q:" not in cut[0]


def test_answers_are_tokenised_behind_the_prompt(byte_pairs: Any) -> None:
    ids = encode_answer(byte_pairs, "Ada work")
    assert ids[-1] == byte_pairs.eos_token_id
    joined = byte_pairs(PROMPTS[0] + " Ada work")["input_ids"]
    assert byte_pairs(PROMPTS[0])["input_ids"] + ids[:-1] == joined
    assert answer_matches(" Ada work\n", "Ada work") and not answer_matches("Ada", "Ada work")


def test_a_saved_model_loads_frozen_with_its_tokenizer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = load_language_model(tmp_path, "cpu", torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert words.pad_token_id is not None
    again, _ = load_language_model(tmp_path)
    inputs = encode_prompts(words, PROMPTS)
    torch.testing.assert_close(capture(again, *inputs, [2])[2], capture(model, *inputs, [2])[2])


@pytest.mark.parametrize("damage", ["missing", "empty", "config", "weights", "pickle"])
def test_an_unreadable_model_folder_is_one_line(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "missing":
        folder.mkdir()
    if damage in ("config", "weights", "pickle"):
        model = build_model("gpt2", tokenizer, layers=1, width=16, heads=2, context=16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load a language model") as caught:
        load_language_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


GOOD = '{"prompt": "Q: a\\nA:", "answer": "b", "concept": "c", "note": 1}\n'


def test_prompts_keep_order_and_ignore_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + "\n" + GOOD.replace('"b"', '"d"').replace('"note": 1', '"template": 3, "split": "heldout"'))
    first, second = read_prompts(path)
    assert (first.answer, first.split, first.template) == ("b", "train", "")
    assert (second.answer, second.split, second.template) == ("d", "heldout", "3")
    path.write_text(GOOD.replace('"c"', "null") + '{"prompt": "Q: b"}')
    first, second = read_prompts(path)
    assert (first.answer, first.concept, second.answer, second.concept) == ("b", "", "", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + GOOD.replace('"b"', '"  "'), ":2: answer is empty"),
        (GOOD.replace('"Q: a\\nA:"', '""'), ":1: prompt is empty"),
        (GOOD.replace('"prompt"', '"text"'), "no field 'prompt'; found answer, concept, note, text"),
        (GOOD.replace('"note": 1', '"split": "test"'), "split 'test' is not train, validation or heldout"),
        (GOOD.replace('"b"', "7"), ":1: answer is empty or no text"),
        ("[1]\n", "expected a JSON object"),
        ("{\n", "not UTF-8 JSON lines"),
        ("", "holds no prompts"),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"p\.jsonl") as caught:
        read_prompts(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "answer", "concept", "template", "split", "subject", "x"]), _VALUE))
def test_any_line_is_a_prompt_of_texts_or_refused_in_one_line(row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_text(json.dumps({**json.loads(GOOD), **row}))
        try:
            (prompt,) = read_prompts(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert all(isinstance(value, str) for value in asdict(prompt).values())
            assert prompt.prompt.strip()
            assert all(value == "" or value.strip() for value in (prompt.answer, prompt.concept))
            assert prompt.split in ("train", "heldout")


@pytest.mark.parametrize("line", ['{"prompt": NaN}', "[" * 100_000, '{"prompt": "\\ud800"}', '{"template": 1e999}'])
def test_what_is_no_strict_json_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + line)
    with pytest.raises(UserError, match=r"p\.jsonl:2 is not UTF-8 JSON lines"):
        read_prompts(path)


def test_an_empty_prompt_and_a_missing_file_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 1 of the batch is empty"):
        encode_prompts(tokenizer, ["a", ""])
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_texts_from_lines_and_from_a_data_set_folder(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "one"}\n{"body": "two"}\n')
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"body": ["one", "two"]}).save_to_disk(str(saved))
    assert list(read_texts(path, "body")) == list(read_texts(saved, "body")) == ["one", "two"]
    for source in (path, saved):
        with pytest.raises(UserError, match="no text field 'text'; found body"):
            list(read_texts(source, "text"))
    (tmp_path / "bad").mkdir()
    with pytest.raises(UserError, match="cannot read the data set"):
        list(read_texts(tmp_path / "bad", "text"))


def test_hook_points_are_named_by_block() -> None:
    assert hook_point(6) == "blocks.6.hook_resid_post"


def test_parts_of_a_block_and_modules_by_name_are_hook_points(model: Any, tokenizer: Any) -> None:
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    block = find_blocks(model)[1]
    attention, mlp = (m for name, m in block.named_children() if name in ("attn", "self_attn", "attention", "mlp"))
    path = next(name for name, module in model.named_modules() if module is mlp)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        attention.register_forward_hook(lambda module, args, out: seen.__setitem__("attention", out[0])),
        mlp.register_forward_hook(lambda module, args, out: seen.__setitem__("mlp", out)),
    ]
    found = capture(model, ids, mask, ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"])
    torch.testing.assert_close(found["blocks.1.hook_attn_out"], seen["attention"])
    torch.testing.assert_close(found["blocks.1.hook_mlp_out"], seen["mlp"])
    torch.testing.assert_close(found["blocks.1.hook_resid_post"], capture(model, ids, mask, [1])[1])
    torch.testing.assert_close(capture(model, ids, mask, [path])[path], seen["mlp"])
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("blocks.3.hook_mlp_out", "layer 3 does not exist: the model has layers 0 to 2"),
        ("layer-06", "no module of that name"),
        ("", "no module of that name"),
        ("lm_head.bias", "no module of that name"),
    ],
)
def test_a_hook_point_that_is_not_there_is_named(model: Any, point: str, message: str) -> None:
    with pytest.raises(UserError, match=r"does not exist|hook point") as caught:
        module_at(model, point)
    assert message in str(caught.value) and "\n" not in str(caught.value)
