from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import commandv as cv
import tiny
from commandv.errors import InputError
from commandv.models.encoding import model_inputs, pad

ARCHS = ("llama", "gpt2", "opt", "bloom", "falcon", "gptj", "gemma3_text", "qwen3_moe", "llava", "gemma3")
ROWS = ([5], [1, 40, 41], [1, 7, 8, 9, 10, 11, 12, 13, 14], [1, 99])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def models():
    return {
        arch: tiny.tiny_lm(arch, sliding_window=6) if arch == "gemma3_text" else tiny.tiny_lm(arch) for arch in ARCHS
    }


def forward(lm, rows, side="right"):
    """Logits of each row's real tokens."""
    batch = pad(lm, rows, side)
    with torch.inference_mode():
        logits = lm.model(**model_inputs(lm.model, batch)).logits
    return [row[mask.bool()] for row, mask in zip(logits, batch.attention_mask, strict=True)]


def generated(lm, rows, steps=5, **options):
    """Sequences and step logits of greedy generation; rows that end early are not cut."""
    batch = pad(lm, rows)
    out = lm.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    return out.sequences[:, batch.input_ids.shape[1] :], torch.stack(out.logits, 1)


def streams(lm, layer, **inputs):
    """What block `layer` passes on to the next one."""
    seen = []

    def keep(_block, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = lm.blocks[layer + 1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            lm.model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def hooks(lm):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called))
        for name, module in lm.model.named_modules()
    ]


@pytest.mark.parametrize("positions", ["l1", "f2", "f1+l2", "all"])
@pytest.mark.parametrize("arch", ARCHS)
def test_padding_and_batching_change_nothing(models, arch, positions):
    lm = models[arch]
    plain = [forward(lm, [row])[0] for row in ROWS]
    with cv.attach(lm, tiny.random_adapter(lm, (0, 2), positions)):
        alone = [forward(lm, [row])[0] for row in ROWS]
        left, right = forward(lm, ROWS, "left"), forward(lm, ROWS, "right")
    for i, row in enumerate(ROWS):
        assert_close(left[i], alone[i], **CLOSE)
        assert_close(right[i], alone[i], **CLOSE)
        acts = not (positions == "f1+l2" and len(row) == 1)  # half of one token is none
        assert ((alone[i] - plain[i]).abs().max() > 0.05) == acts


@pytest.mark.parametrize("positions", ["l1", "g2", "f1+l1+g3", "all"])
@pytest.mark.parametrize("arch", ARCHS)
def test_cached_decoding_equals_uncached(models, arch, positions):
    lm = models[arch]
    with cv.attach(lm, tiny.random_adapter(lm, (1, 3), positions)):
        tokens, logits = generated(lm, ROWS, use_cache=True)
        again, uncached = generated(lm, ROWS, use_cache=False)
    assert torch.equal(tokens, again)
    assert_close(logits, uncached, rtol=1e-3, atol=1e-3)
    assert (generated(lm, ROWS)[1] - logits).abs().max() > 0.05


@pytest.mark.parametrize("arch", ["llama", "bloom", "gemma3_text"])
def test_generated_positions_equal_a_pass_over_the_whole_text(models, arch):
    lm = models[arch]
    row = [1, 7, 8, 9, 10, 11, 12]
    adapter = tiny.random_adapter(lm, (1,), "l2+g3")
    with cv.attach(lm, adapter):
        tokens, logits = generated(lm, [row])
    with cv.attach(lm, adapter, n_prompt=len(row)):
        whole = forward(lm, [[*row, *tokens[0].tolist()]])[0]
    assert_close(whole[len(row) - 1 : -1], logits[0], rtol=1e-3, atol=1e-3)


def test_a_cached_loop_by_hand_equals_generate(lm):
    row = torch.tensor([[1, 7, 8, 9]])
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1+g2")), torch.inference_mode():
        tokens, logits = generated(lm, row.tolist(), steps=4)
        out = lm.model(input_ids=row, use_cache=True)
        mine = [out.logits[:, -1]]
        for step in range(3):
            out = lm.model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            mine.append(out.logits[:, -1])
    assert_close(torch.stack(mine, 1), logits, **CLOSE)


@pytest.mark.parametrize("positions", ["l1", "f2", "l3+g2"])
def test_a_prompt_fed_in_chunks(lm, positions):
    rows = [[1, 7, 8, 9, 10, 11, 12], [1, 30, 31]]
    with cv.attach(lm, tiny.random_adapter(lm, (1,), positions)):
        tokens, logits = generated(lm, rows)
        again, chunked = generated(lm, rows, prefill_chunk_size=3)
    assert torch.equal(tokens, again)
    assert_close(logits, chunked, **CLOSE)


@pytest.mark.parametrize("positions", ["l1", "f1+l2+g2", "all"])
def test_beam_search_batched_equals_single(lm, positions):
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    plain, _ = generated(lm, ROWS, **options)
    with cv.attach(lm, tiny.random_adapter(lm, (1, 2), positions)):
        together, _ = generated(lm, ROWS, **options)
        alone = torch.cat([generated(lm, [row], **options)[0] for row in ROWS])
        uncached, _ = generated(lm, ROWS, use_cache=False, **options)
    assert torch.equal(together, alone)
    assert torch.equal(together, uncached)
    assert not torch.equal(together, plain)


def test_several_samples_of_a_prompt_start_from_the_same_logits(lm):
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1+g2")):
        _, greedy = generated(lm, ROWS)
        torch.manual_seed(0)
        batch = pad(lm, ROWS)
        out = lm.model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, num_return_sequences=3,
            max_new_tokens=2, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        )  # fmt: skip
    assert_close(out.logits[0], greedy[:, 0].repeat_interleave(3, 0), **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "falcon"])
@pytest.mark.parametrize(
    ("positions", "marked"),
    [("l2", {2, 3}), ("f1", {0}), ("f3+l3", {0, 1, 2, 3}), ("f9", {0, 1, 2, 3}), ("g2", {4, 5}), ("l1+g1", {3, 4}),
     ("all", {0, 1, 2, 3, 4, 5, 6})],
)  # fmt: skip
def test_acts_at_its_positions_and_nowhere_else(models, arch, positions, marked):
    lm = models[arch]
    ids = torch.tensor([[1, 20, 21, 22, 23, 24, 25], [0, 0, 1, 30, 23, 24, 25]])  # four prompt columns, then a reply
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = streams(lm, 1, **inputs)
    with cv.attach(lm, tiny.random_adapter(lm, (1,), positions), n_prompt=4):
        after = streams(lm, 1, **inputs)
    changed = (after != before).any(-1)
    assert set(changed[0].nonzero().flatten().tolist()) == marked
    short = {"l2": {2, 3}, "f1": {2}, "f3+l3": {2, 3}, "f9": {2, 3}, "all": {2, 3, 4, 5, 6}}.get(positions, marked)
    assert set(changed[1].nonzero().flatten().tolist()) == short


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_interventions_of_a_layer_read_the_same_stream_and_add_up(models, arch):
    lm = models[arch]
    ids = torch.tensor([[1, 20, 21, 22, 23]])
    parts = [
        tiny.random_adapter(lm, (1,), p, seed=i).interventions[1][0] for i, p in enumerate(("l2", "l2", "f1", "all"))
    ]
    parts.append(cv.Intervention(parts[0].read, parts[0].bias, parts[1].write, "tanh", parts[0].positions))
    h = streams(lm, 1, input_ids=ids)
    expected = h.clone()
    for one, columns in zip(parts, ([3, 4], [3, 4], [0], [0, 1, 2, 3, 4], [3, 4]), strict=True):
        expected[:, columns] += 0.7 * one.delta(h[:, columns])
    with cv.attach(lm, cv.Adapter({1: tuple(parts)}, lm.ref), scale=0.7):
        assert_close(streams(lm, 1, input_ids=ids), expected, **CLOSE)


def test_nested_attachments_compose(lm):
    ids = torch.tensor([[1, 20, 21, 22, 23]])
    first, second = tiny.random_adapter(lm, (1,), seed=1), tiny.random_adapter(lm, (1,), "all", seed=2)
    h = streams(lm, 1, input_ids=ids)
    middle = h.clone()
    middle[:, -1] += first.interventions[1][0].delta(h[:, -1])
    with cv.attach(lm, first):
        with cv.attach(lm, second):
            both = streams(lm, 1, input_ids=ids)
        assert_close(streams(lm, 1, input_ids=ids), middle, **CLOSE)
    assert_close(both, middle + second.interventions[1][0].delta(middle), **CLOSE)


def test_handles_detach_in_any_order(lm):
    rows = [[1, 20, 21, 22]]
    plain, hooked = forward(lm, rows)[0], hooks(lm)
    first, second = tiny.random_adapter(lm, (1,), seed=1), tiny.random_adapter(lm, (2,), "all", seed=2)
    with cv.attach(lm, second):
        only_second = forward(lm, rows)[0]
        tokens = generated(lm, rows)[0]
    a, b = cv.attach(lm, first), cv.attach(lm, second)
    a.detach()
    assert torch.equal(forward(lm, rows)[0], only_second)
    assert torch.equal(generated(lm, rows)[0], tokens)
    a.detach()
    assert torch.equal(generated(lm, rows)[0], tokens)
    b.detach()
    assert torch.equal(forward(lm, rows)[0], plain)
    assert hooks(lm) == hooked


@pytest.mark.parametrize("arch", ARCHS)
def test_detaching_restores_the_model(models, arch):
    lm = models[arch]
    plain, hooked, attributes = forward(lm, ROWS), hooks(lm), set(vars(lm.model))
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    with cv.attach(lm, tiny.random_adapter(lm, range(4), "all")):
        generated(lm, ROWS)
    for before, after in zip(plain, forward(lm, ROWS), strict=True):
        assert torch.equal(before, after)
    assert hooks(lm) == hooked
    assert set(vars(lm.model)) == attributes
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())


def test_the_scale_is_one_unless_it_is_given(lm):
    ids = torch.tensor([[1, 20, 21]])
    adapter = tiny.random_adapter(lm, positions="all")
    h = streams(lm, 1, input_ids=ids)
    with cv.attach(lm, adapter):
        assert_close(streams(lm, 1, input_ids=ids), h + adapter.interventions[1][0].delta(h), **CLOSE)


def test_an_edit_goes_where_the_stream_is(lm, monkeypatch):
    """A block on another device; the one that there is without any hardware holds shapes alone."""
    moved: list[str] = []
    monkeypatch.setattr(cv.Intervention, "to", lambda self, device: moved.append(str(device)) or self)
    monkeypatch.setattr(cv.Intervention, "delta", lambda self, h: h)
    h = torch.zeros(1, 3, tiny.D)
    attachment = cv.attach(lm, tiny.random_adapter(lm, positions="all"))
    (addend,) = attachment.change.addends[1]
    assert addend.delta(h).device.type == "cpu"
    assert moved == []
    for _ in range(2):
        assert addend.delta(h.to("meta")).device.type == "meta"
    assert moved == ["meta"]
    attachment.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_delta_is_bit_identical(dtype):
    lm = tiny.tiny_lm(dtype=dtype)
    adapter = tiny.random_adapter(lm, range(4), "all")
    plain = forward(lm, ROWS)
    for attachment in (cv.attach(lm, adapter, scale=0.0), cv.attach(lm, adapter.scaled(0.0))):
        with attachment:
            for before, after in zip(plain, forward(lm, ROWS), strict=True):
                assert torch.equal(before, after)


def test_scale_multiplies_the_delta(lm):
    ids = torch.tensor([[1, 20, 21]])
    adapter = tiny.random_adapter(lm)
    h = streams(lm, 1, input_ids=ids)
    moved = []
    for scale in (1.0, -2.5):
        with cv.attach(lm, adapter, scale=scale):
            moved.append(streams(lm, 1, input_ids=ids) - h)
    assert_close(moved[1], -2.5 * moved[0], **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2"])
def test_bfloat16(arch):
    lm = tiny.tiny_lm(arch, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 20, 21, 22]])
    adapter = tiny.random_adapter(lm)
    h = streams(lm, 1, input_ids=ids)
    with cv.attach(lm, adapter):
        after = streams(lm, 1, input_ids=ids)
        generated(lm, ROWS)
    assert after.dtype == lm.model(input_ids=ids).logits.dtype == torch.bfloat16
    expected = (h[:, -1] + adapter.interventions[1][0].delta(h[:, -1].float())).float()
    assert_close(after[:, -1].float(), expected, rtol=2e-2, atol=2e-2)


def test_prefill_only_adapters_leave_decode_steps_alone(lm, monkeypatch):
    select, selected, seen = cv.Positions.select, [], []
    monkeypatch.setattr(cv.Positions, "select", lambda self, *args: selected.append(self) or select(self, *args))
    handle = lm.blocks[1].register_forward_pre_hook(lambda block, _: seen.append(len(block._forward_hooks)))
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "f1+l1")):
        generated(lm, ROWS, steps=4)
    assert len(selected) == 1
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1+g2")):
        generated(lm, ROWS, steps=4)
    handle.remove()
    assert seen == [1, 0, 0, 0, 1, 1, 1, 0]


def test_an_exception_inside_a_pass_leaves_no_block_hooks(lm):
    def fail(*_):
        raise RuntimeError("out of memory")

    hooked = hooks(lm)
    plain = forward(lm, ROWS)
    with cv.attach(lm, tiny.random_adapter(lm, (0, 1, 2), "all")):
        attached, expected = hooks(lm), forward(lm, ROWS)
        handle = lm.blocks[1].register_forward_pre_hook(fail)
        for run in (forward, generated):
            with pytest.raises(RuntimeError, match="out of memory"):
                run(lm, ROWS)
        handle.remove()
        assert hooks(lm) == attached
        for before, after in zip(expected, forward(lm, ROWS), strict=True):
            assert torch.equal(before, after)
    assert hooks(lm) == hooked
    for before, after in zip(plain, forward(lm, ROWS), strict=True):
        assert torch.equal(before, after)


def test_a_pass_does_not_depend_on_the_one_before(lm):
    prompts = ["Hi", "Why does Venus spin backwards?"]
    adapter = tiny.random_adapter(lm, (1,), "f1+l1")
    with cv.attach(lm, adapter):
        expected = forward(lm, [[1, 20, 21, 22, 23, 24]])[0]
    with cv.attach(lm, adapter):
        through_the_blocks = cv.profile(lm, prompts, cache=False, text=None)
        generated(lm, [[1, 7]])
        assert torch.equal(forward(lm, [[1, 20, 21, 22, 23, 24]])[0], expected)
        again = cv.profile(lm, prompts, cache=False, text=None)
    for layer in range(tiny.LAYERS):
        assert torch.equal(again.layer(layer), through_the_blocks.layer(layer))


def test_detaching_in_the_middle_of_a_pass(lm):
    plain, hooked = forward(lm, ROWS), hooks(lm)
    attachment = cv.attach(lm, tiny.random_adapter(lm, (2,), "all"))
    handle = lm.blocks[0].register_forward_hook(lambda *_: attachment.detach())
    middle = forward(lm, ROWS)
    handle.remove()
    assert hooks(lm) == hooked
    for before, during in zip(plain, middle, strict=True):
        assert torch.equal(before, during)


def test_the_with_block_detaches_when_it_raises(lm):
    hooked = hooks(lm)
    with pytest.raises(KeyError), cv.attach(lm, tiny.random_adapter(lm)):
        raise KeyError("user code")
    assert hooks(lm) == hooked
    assert "generate" not in vars(lm.model)


def test_masks_that_hide_the_padding_are_refused(lm):
    ids = torch.tensor([[1, 20, 21]])
    mask = torch.zeros(1, 1, 3, 3)
    with cv.attach(lm, tiny.random_adapter(lm)):
        with pytest.raises(InputError, match="two-dimensional"):
            lm.model(input_ids=ids, attention_mask=mask)
        with pytest.raises(InputError, match="static caches"):
            generated(lm, ROWS, cache_implementation="static")
        forward(lm, [[1, 20, 21]])
