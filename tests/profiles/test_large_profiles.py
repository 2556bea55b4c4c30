"""Profiles and links that are larger than what may be held in memory."""

from __future__ import annotations

import shutil
import threading
import weakref

import pytest
import torch
from safetensors.torch import load, save

import commandv as cv
from commandv.errors import FormatError
from commandv.profiles import profiling, work
from commandv.profiles.profile import Layers, Profile
from commandv.storage.tensors import safetensors_bytes
from commandv.transfer import link as linking, workers
from made_up import adapter_of, both
from profiled import PROMPTS, TEXT, same


def test_a_part_holds_no_more_rows_than_fit_into_its_bytes(lm, cache, monkeypatch):
    expected = cv.profile(lm, PROMPTS, text=TEXT, batch_size=1, cache=False)
    written = []
    real = profiling.write_part

    def write_part(target, number, stamp, data):
        written.append(load(data))
        return real(target, number, stamp, data)

    monkeypatch.setattr(profiling, "write_part", write_part)
    monkeypatch.setattr(work.Work, "BYTES", 2 * lm.n_layers * lm.d_model * 4)
    same(cv.profile(lm, PROMPTS, text=TEXT, batch_size=1), expected)
    rows = [len(part["keys"]) for part in written]
    texts = [len(set(part["keys"][:, 0].tolist())) for part in written]
    assert len(written) > 2
    assert all(count <= 4 or n == 1 for count, n in zip(rows, texts, strict=True))
    assert sum(rows) == len(expected)


def test_layers_of_parts_are_joined_one_at_a_time(lm, cache, monkeypatch):
    alive, most = [], []
    real = profiling.joined

    def joined(files, places, name):
        made = real(files, places, name)
        alive[:] = [one for one in alive if one() is not None]
        alive.append(weakref.ref(made))
        most.append(sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(profiling, "joined", joined)
    cv.profile(lm, PROMPTS, text=None)
    assert len(most) == lm.n_layers
    assert max(most) == 1


def test_a_file_of_one_tensor_is_what_the_library_writes():
    for one in (torch.randn(5, 3).bfloat16(), torch.randn(4, 6).T, torch.arange(6).reshape(3, 2), torch.zeros(0, 7)):
        assert bytes(safetensors_bytes("rows", one)) == save({"rows": one.contiguous()})
    with pytest.raises(FormatError, match="complex64"):
        safetensors_bytes("rows", torch.zeros(2, dtype=torch.complex64))


def test_a_profile_whose_files_are_gone_says_so(lm, tmp_path):
    one = cv.profile(lm, PROMPTS, cache=tmp_path / "mine", text=None)
    held = one.layer(0)
    shutil.rmtree(tmp_path / "mine")
    assert torch.isfinite(held).all()
    with pytest.raises(FormatError, match="layer-001"):
        one.layer(1)


def test_a_part_of_a_profile_takes_its_rows_when_they_are_asked_for(lm):
    asked = []
    whole = cv.profile(lm, PROMPTS, text=TEXT, cache=False)
    spied = Layers(range(lm.n_layers), lambda layer: asked.append(layer) or whole.layer(layer))
    few = Profile(spied, whole.keys, whole.model, whole.prompts).first(3)
    asked.clear()
    assert torch.equal(few.layer(2), whole.layer(2)[(whole.keys[:, 0] < 3) | (whole.keys[:, 1] != -1)])
    assert asked == [2]


def test_a_link_keeps_fits_up_to_its_bytes_and_makes_the_others_again(monkeypatch):
    donor, recipient = both()
    adapter = adapter_of(0, 2, 4)
    expected = cv.link(donor, recipient).paste(adapter, layers="all_layers")
    roomy, full = cv.link(donor, recipient), cv.link(donor, recipient)
    roomy.paste(adapter, layers="all_layers")
    assert roomy.kept.nbytes > 0
    monkeypatch.setattr(linking, "KEPT", roomy.kept.nbytes // 3)
    for _ in range(2):
        again = full.paste(adapter, layers="all_layers")
        for layer in expected.layers:
            torch.testing.assert_close(again.interventions[layer][0].read, expected.interventions[layer][0].read)
    assert 0 < full.kept.nbytes <= roomy.kept.nbytes // 3


def test_fewer_workers_where_all_would_take_too_much_memory(monkeypatch):
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(workers, "MEMORY", 1000)
    torch.set_num_threads(4)
    running, most, lock = [0], [0], threading.Lock()

    def one(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1
        return number

    try:
        assert workers.parallel(one, range(6), memory=400) == list(range(6))
        assert 1 <= most[0] <= 2
        assert workers.parallel(one, range(3), memory=5000) == [0, 1, 2]
    finally:
        torch.set_num_threads(1)
