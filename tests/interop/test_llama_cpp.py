"""A control vector that we wrote, applied by llama.cpp itself, beside the same adapter attached to the same model."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import commandv as cv
from commandv.interop.control_vectors import write_control_vector
from commandv.models.encoding import encode
from commandv.models.lm import LM
from commandv.models.names import packaged_files
from commandv.positions import EVERYWHERE
from real import SMOL, load

pytestmark = pytest.mark.real

PROMPT = "What should I do on a rainy afternoon?"
LAYERS = (10, 11, 12, 13, 14)


@pytest.fixture(scope="module")
def smol() -> LM:
    return load(SMOL)


class Llama:
    """llama.cpp on the packaged GGUF file, through its plain C functions."""

    def __init__(self, file: Path) -> None:
        self.api = pytest.importorskip(
            "llama_cpp", reason="llama-cpp-python is not there: pip install 'commandv[llama]'"
        )
        self.model = self.api.Llama(str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False)

    def control(self, file: Path | None) -> None:
        """Apply a control vector as `common_control_vector_load` and llama-cli do; None takes it off."""
        if file is None:
            assert self.api.llama_set_adapter_cvec(self.model.ctx, None, 0, 0, 0, 0) == 0
            return
        n_layers, width = self.api.llama_model_n_layer(self.model.model), self.model.n_embd()
        buffer = np.zeros((n_layers, width), dtype=np.float32)
        for tensor in gguf.GGUFReader(file).tensors:
            buffer[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data  # row 0 holds direction.1
        data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert self.api.llama_set_adapter_cvec(self.model.ctx, data, buffer.size, width, 1, n_layers) == 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[len(ids) - 1].copy())

    def greedy(self, ids: list[int], count: int) -> list[int]:
        out = [int(self.logits(ids).argmax())]
        while len(out) < count:
            self.model.eval(out[-1:])
            out.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return out


@pytest.fixture(scope="module")
def llama(smol) -> Llama:
    return Llama(packaged_files(SMOL)[0])


def steering(lm: LM, *layers: int, strength: float = 0.6) -> cv.Adapter:
    """Random directions, as long as `strength` of the median state at their layer."""
    generator = torch.Generator().manual_seed(0)
    typical = cv.profile(lm, cv.load_prompts("builtin:general", limit=4), cache=False, text=None)
    made = {}
    for layer in layers:
        direction = torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)
        made[layer] = cv.steering_vector(direction, strength * float(typical.layer(layer).float().norm(dim=1).median()))
    return cv.Adapter(made, lm.ref, "push").at(EVERYWHERE)


def logits(lm: LM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(torch.tensor([ids])).logits[0, -1].float()


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one - one.mean(), two - two.mean(), dim=0))


def test_both_run_the_same_model(smol, llama):
    ids = encode(smol, PROMPT).ids
    assert cosine(logits(smol, ids), llama.logits(ids)) > 0.99


def test_llama_cpp_adds_each_direction_where_we_do(smol, llama, tmp_path):
    """The change of the logits agrees, and best with our adapter on the very layer that the file names."""
    ids = encode(smol, PROMPT).ids
    plain, plain_there = logits(smol, ids), llama.logits(ids)
    adapter = steering(smol, 12)
    llama.control(write_control_vector(adapter, tmp_path / "push.gguf"))
    there = llama.logits(ids) - plain_there
    llama.control(None)
    assert torch.equal(llama.logits(ids), plain_there)
    agreement = {}
    for layer in LAYERS:
        moved = cv.Adapter({layer: adapter.interventions[12]}, adapter.model, adapter.name)
        with cv.attach(smol, moved):
            agreement[layer] = cosine(logits(smol, ids) - plain, there)
    assert agreement[12] > 0.98, agreement  # measured .9965
    assert max(agreement[layer] for layer in LAYERS if layer != 12) < 0.9, agreement  # measured .68 to .76


@pytest.mark.parametrize("layers", [(1,), (29,), tuple(range(1, 30))], ids=["first", "last", "all"])
def test_first_last_and_all_layers_agree(layers, smol, llama, tmp_path):
    ids = encode(smol, PROMPT).ids
    plain, plain_there = logits(smol, ids), llama.logits(ids)
    adapter = steering(smol, *layers, strength=0.6 if len(layers) == 1 else 0.1)
    llama.control(write_control_vector(adapter, tmp_path / "push.gguf"))
    there = llama.logits(ids) - plain_there
    llama.control(None)
    with cv.attach(smol, adapter):
        ours = logits(smol, ids) - plain
    assert cosine(ours, there) > 0.98  # measured .9965, .9994 and .9973
    assert 0.8 < float(ours.norm() / there.norm()) < 1.25


def test_greedy_words_agree(smol, llama, tmp_path):
    """Quantised arithmetic may part the two where two tokens are nearly as likely, so the first eight are compared."""
    ids = encode(smol, PROMPT).ids
    adapter = steering(smol, 12)
    plain = smol.tokenizer.decode(llama.greedy(ids, 8))
    llama.control(write_control_vector(adapter, tmp_path / "push.gguf"))
    there = smol.tokenizer.decode(llama.greedy(ids, 8))
    llama.control(None)
    with cv.attach(smol, adapter):
        (ours,) = cv.generate(smol, [PROMPT], max_new_tokens=8)
    assert there != plain
    assert there.strip() == ours.strip()
