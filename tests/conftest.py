from __future__ import annotations

import hypothesis
import pytest
import torch

import tiny
from caching import cache as cache

torch.set_num_threads(1)
# A busy machine is slow at times; nothing here is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_lm():
    """Factory: tiny_lm(arch="llama", seed=0, chat=False, bos=True, ...) -> LM."""
    return tiny.tiny_lm


@pytest.fixture
def lm():
    return tiny.tiny_lm()
