from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError, ModelError
from commandv.models.blocks import find_blocks
from commandv.models.encoding import encode, opening, pad
from commandv.models.identity import ModelRef
from commandv.models.names import shape_of
from commandv.models.template import PLAIN_FORMAT
from commandv.prompts.sets import Prompt, PromptSet

MULTIMODAL = ("llava", "gemma3")
PROMPT = "How do I make a good cup of tea?"
LONG = "First of all, tell me why the fox jumps. " * 8 + "Read the book."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    lm = tiny.tiny_lm(chat=True)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("arch", [*tiny.ARCHS, *MULTIMODAL])
def test_every_architecture(arch):
    lm = tiny.tiny_lm(arch)
    assert (lm.n_layers, lm.d_model) == (tiny.LAYERS, tiny.D)
    ids = torch.tensor([encode(lm, PROMPT).ids])
    one = cv.profile(lm, [PROMPT, "Hi"], cache=False, text=None)
    # Mamba, RWKV and Gemma 3n record their hidden states in ways of their own.
    states = [] if arch in tiny.NOT_PLAIN else lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(len(states) - 2):  # the last hidden state has gone through the final norm
        torch.testing.assert_close(one.layer(layer)[0], states[layer + 1][0, -1].bfloat16(), rtol=1e-2, atol=1e-2)

    vector = torch.linspace(-3, 3, tiny.D)
    before = lm.model(input_ids=ids).logits
    with cv.attach(lm, cv.Adapter({2: cv.steering_vector(vector)}, lm.ref)):
        after = lm.model(input_ids=ids).logits
        moved = cv.profile(lm, [PROMPT, "Hi"], cache=False, text=None)
        answers = cv.generate(lm, [PROMPT], max_new_tokens=2)
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-4)
    assert (before[:, -1] - after[:, -1]).abs().max() > 0.1
    assert torch.equal(moved.layer(1), one.layer(1))
    torch.testing.assert_close(moved.layer(2).float(), one.layer(2).float() + vector, rtol=0.02, atol=0.05)
    assert isinstance(answers[0], str)


@pytest.mark.parametrize("arch", MULTIMODAL)
def test_the_vision_tower_is_not_taken(arch):
    model = tiny.tiny_model(arch)
    owner, blocks, *_ = find_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == tiny.LAYERS]
    assert any("vision" in name for name in lists)
    assert all("vision" not in names[module] for module in (owner, *blocks))


def test_other_lists_of_that_length_are_not_taken():
    model = tiny.tiny_model("llama")
    expected = find_blocks(model)[1]
    model.unused = nn.ModuleList(nn.Identity() for _ in range(tiny.LAYERS))
    model.repeated = nn.ModuleList(nn.Identity() for _ in range(tiny.LAYERS))
    model.model.embed_tokens.register_forward_hook(
        lambda _m, _i, out: [step(out) for step in model.repeated for _ in range(2)][-1]
    )
    first = model.model.layers[0]
    first.mlp.steps = nn.ModuleList(nn.Identity() for _ in range(tiny.LAYERS))  # each once, but deeper
    first.mlp.register_forward_hook(lambda module, _i, out: [step(out) for step in module.steps][-1])
    assert find_blocks(model)[1] == expected


def test_a_model_without_such_a_list_is_refused():
    model = tiny.tiny_model("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="no list of 3 decoder blocks"):
        find_blocks(model)


def test_finding_blocks_leaves_no_hooks(lm):
    assert not any(block._forward_hooks for block in lm.blocks)


# -- prompts as tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("response", ["", "Boil the water."])
def test_at_most_one_bos(bos, chat, response):
    lm = tiny.tiny_lm(bos=bos, chat=chat)
    ids = encode(lm, PROMPT, response).ids
    assert opening(lm) == ([lm.tokenizer.bos_token_id] if bos else [])
    assert ids.count(lm.tokenizer.bos_token_id) == (1 if bos or chat else 0)
    assert ids[0] == lm.tokenizer.bos_token_id or not (bos or chat)


def test_plain_format(lm):
    encoded = encode(lm, PROMPT)
    assert lm.tokenizer.decode(encoded.ids) == "<bos>" + PLAIN_FORMAT.format(PROMPT)
    assert encoded.n_prompt == len(encoded.ids)
    with_reply = encode(lm, PROMPT, "Boil water.")
    assert with_reply.ids[: with_reply.n_prompt] == encoded.ids
    assert lm.tokenizer.decode(with_reply.ids[with_reply.n_prompt :]) == "Boil water."


def test_chat_template():
    lm = tiny.tiny_lm(chat=True)
    encoded = encode(lm, PROMPT)
    assert lm.tokenizer.decode(encoded.ids) == f"<bos><|user|>\n{PROMPT}<eos>\n<|assistant|>\n"
    with_reply = encode(lm, PROMPT, "Boil water.")
    assert with_reply.ids[: with_reply.n_prompt] == encoded.ids
    assert lm.tokenizer.decode(with_reply.ids[with_reply.n_prompt :]) == "Boil water."


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [(PROMPT, ""), (PROMPT, "Boil it.\nSteep."), ("  tea  ", ""), ("Answer", ""), ("Answer:", "Answer:"), ("user", ""),
     ("a", ""), ("Question", "Question"), ("assistant", "a"), ("Thé vert à 80 °C, 茶", "茶 is tea")],
)  # fmt: skip
def test_text_ends_count_characters_of_the_text(chat, prompt, response):
    lm = tiny.tiny_lm(chat=chat)
    encoded = encode(lm, prompt, response)
    text = response or prompt.strip()
    ends = encoded.text_ends
    inside = [index for index, end in enumerate(ends) if end >= 0]
    assert len(ends) == len(encoded.ids)
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert ends[inside[-1]] == len(text)
    if not response:
        head = lm.tokenizer.decode(encoded.ids[: inside[0]]).removeprefix("<bos>").strip()
        assert head == ("<|user|>" if chat else PLAIN_FORMAT.partition("{}")[0].strip())
    for index in inside:
        so_far = lm.tokenizer.decode(encoded.ids[inside[0] : index + 1]).removeprefix(" ")
        if "�" not in so_far:  # a character of several tokens
            assert so_far.lstrip() == text[: ends[index]]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("response", ["", "The fox is quick."])
@pytest.mark.parametrize("max_length", [50, 57, 73])
def test_truncation_keeps_the_end_and_the_template(chat, response, max_length):
    lm = tiny.tiny_lm(chat=chat)
    whole, cut = encode(lm, LONG, response), encode(lm, LONG, response, max_length=max_length)
    assert len(whole.ids) > max_length
    assert max_length - 4 <= len(cut.ids) <= max_length
    text = lm.tokenizer.decode(cut.ids)
    head, tail = ("<bos><|user|>\n", "<eos>\n<|assistant|>\n") if chat else PLAIN_FORMAT.split("{}")
    if not chat:
        head = f"<bos>{head}"
    middle = text.removeprefix(head).removesuffix(response).removesuffix(tail)
    assert text.startswith(head)
    assert LONG.endswith(middle)
    assert middle.endswith("Read the book.")
    assert cut.ids[cut.n_prompt :] == whole.ids[whole.n_prompt :]


def test_a_short_prompt_is_not_cut(lm):
    assert encode(lm, PROMPT, max_length=400) == encode(lm, PROMPT)


@pytest.mark.parametrize("max_length", [None, 10_000])
def test_a_prompt_longer_than_the_context(max_length):
    lm = tiny.tiny_lm(max_position_embeddings=64)
    if max_length:
        assert len(encode(lm, LONG, max_length=max_length).ids) <= 64
    else:
        with pytest.raises(InputError, match=r"prompt of \d+ tokens .*longer than the context of tiny-llama \(64"):
            encode(lm, LONG)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 8])
def test_no_room_beside_the_template(lm, max_length):
    with pytest.raises(InputError, match="max_length"):
        encode(lm, LONG, max_length=max_length)


@pytest.mark.parametrize("prompt", ["", " \n"])
@pytest.mark.parametrize("use", [lambda lm, p: encode(lm, p), lambda lm, p: cv.generate(lm, [PROMPT, p])])
def test_an_empty_prompt(lm, prompt, use):
    with pytest.raises(InputError, match="empty"):
        use(lm, prompt)


def test_chat_needs_a_chat_template():
    with pytest.raises(InputError, match="no chat template; use template='plain'"):
        tiny.tiny_lm(template="chat")


def test_unknown_template():
    with pytest.raises(InputError, match="expected one of 'auto', 'chat', 'plain'"):
        tiny.tiny_lm(template="alpaca")


def test_plain_on_request():
    lm = tiny.tiny_lm(chat=True, template="plain")
    assert lm.tokenizer.decode(encode(lm, PROMPT).ids).startswith("<bos>Question: ")
    assert lm.ref.template != tiny.tiny_lm(chat=True).ref.template


def test_slow_tokenizers_are_refused(lm):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="no fast version"):
        cv.wrap_model(lm.model, Slow(), "slow")


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(lm, side):
    batch = pad(lm, [[5, 6, 7], [8]], side)
    column = 2 if side == "left" else 0
    assert batch.input_ids[0].tolist() == [5, 6, 7]
    assert batch.input_ids[1, column] == 8
    assert batch.attention_mask.sum(1).tolist() == [3, 1]
    assert batch.attention_mask[1, column] == 1
    assert batch.position_ids[:, column].tolist() == [column, 0]


# -- loading ----------------------------------------------------------------------------------------------------------


def test_load_from_a_directory(saved):
    lm = cv.load_model(saved, dtype="float32")
    original = tiny.tiny_lm(chat=True)
    assert lm.chat
    assert lm.id == str(saved)
    ids = torch.tensor([encode(lm, PROMPT).ids])
    torch.testing.assert_close(lm.model(input_ids=ids).logits, original.model(input_ids=ids).logits)
    assert next(cv.load_model(saved, dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


def test_load_a_multimodal_model_from_a_directory(tmp_path):
    original = tiny.tiny_lm("llava")
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    assert cv.generate(cv.load_model(tmp_path, dtype="float32"), [PROMPT]) == cv.generate(original, [PROMPT])


def test_unknown_dtype(saved):
    with pytest.raises(InputError, match="dtype='int8'"):
        cv.load_model(saved, dtype="int8")


def _lfs(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n")


def _truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _forget(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _reshape(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "model.safetensors").write_bytes(b""),
        lambda path: (path / "config.json").write_text("{"),
        lambda path: (path / "tokenizer.json").write_text("{}"),
        _lfs,
        _truncate,
        _forget,
        _reshape,
    ],
    ids=["no-weights", "empty", "config", "tokenizer", "lfs", "truncated", "missing-tensor", "shape"],
)
def test_a_damaged_directory(saved, tmp_path, damage):
    path = tmp_path / "tiny"
    shutil.copytree(saved, path)
    damage(path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        cv.load_model(path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04rest of a zip", "expected a GGUF file, got b'PK"),
        (b"", "expected a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "cannot read this GGUF file"),
        (None, "no such file"),
    ],
    ids=["lfs", "zip", "empty", "truncated", "absent"],
)
def test_not_a_gguf_file(tmp_path, cache, content, got):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=got):
        cv.load_model(path)
    assert not list(cache.glob("models/*/config.json"))


@pytest.mark.parametrize("field", ["d_model", "n_layers", "revision", "template"])
def test_refs_compare_what_both_know(field):
    known = ModelRef("a", "r", 8, 4, "t")
    known.require(known, "adapter")
    other = {"d_model": 9, "n_layers": 5, "revision": "s", "template": "u"}[field]
    with pytest.raises(MismatchError, match=f"{field} {other}"):
        known.require(ModelRef("a", **{field: other}), "adapter")
    ModelRef().require(ModelRef("a", **{field: other}), "adapter")


def test_profile_of_another_prompt_format_is_another_profile():
    prompts = PromptSet((Prompt(PROMPT), Prompt("Hi")))
    chat, plain = (tiny.tiny_lm(chat=True, template=t) for t in ("chat", "plain"))
    with pytest.raises(MismatchError, match="template"):
        cv.profile(chat, prompts, text=None).model.require(plain.ref, "profile")


def test_a_tokenizer_whose_settings_have_wrong_types_is_told_when_wrapped():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.model_max_length = "512"
    with pytest.raises(ModelError, match="cannot read a word"):
        cv.wrap_model(tiny.tiny_model(), tokenizer, "odd")


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_that_panics_is_told_when_wrapped(special, monkeypatch):
    class PanicException(BaseException):  # as the tokenizers package raises for files that contradict themselves
        pass

    def panic(self, text, add_special_tokens=True, **options):
        if add_special_tokens == special:
            raise PanicException("no entry found for key")

    tokenizer = tiny.tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", panic)
    with pytest.raises(ModelError, match="cannot read a word: no entry found"):
        cv.wrap_model(tiny.tiny_model(), tokenizer, "broken")


@pytest.mark.parametrize("width", ["1e999", '"wide"', "[32]"])
def test_a_configuration_without_a_usable_width_tells_no_shape(width, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {width}, "num_hidden_layers": 4}}')
    assert shape_of(str(tmp_path)) is None
