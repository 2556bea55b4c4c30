"""GGUF files that are hostile, damaged or no control vector: each is refused at once, and says why."""

from __future__ import annotations

import random
import struct
import time

import gguf
import numpy as np
import pytest

import commandv as cv
from commandv.cli.inspection import describe
from commandv.errors import FormatError, ModelError
from commandv.interop.control_vectors import read_control_vector, write_control_vector
from commandv.interop.detect import detect
from control_vectors import directions, steering, write


def header(n_tensors: int, n_keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, dims: list[int], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = key("general.architecture", 8, text("controlvector"))
KEYS = ARCH + key("controlvector.model_hint", 8, text("x")) + key("controlvector.layer_count", 4, b"\x01\0\0\0")
HOSTILE = {
    "not GGUF": (b"<html>404</html>" * 4, "magic"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "git lfs pull"),
    "empty": (b"", "empty"),
    "only the magic": (b"GGUF", "ends before"),
    "a version from the future": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "no architecture": (header(0, 1, key("x", 4, b"\0\0\0\0")), "says no general.architecture"),
    "an architecture that is a number": (header(0, 1, key("general.architecture", 4, b"\0\0\0\0")), "of a model"),
    "billions of keys": (header(0, 2**60, ARCH), "announces 1152921504606846976 keys"),
    "billions of tensors": (header(2**60, 1, ARCH), "1152921504606846976 tensors"),
    "a key of endless length": (header(0, 1, struct.pack("<Q", 2**63)), "ends before"),
    "a text of endless length": (header(0, 1, key("a", 8, struct.pack("<Q", 2**64 - 1))), "ends before"),
    "a list of endless length": (header(0, 1, key("a", 9, struct.pack("<IQ", 4, 2**62))), "items in a list"),
    "a list that the file has no room for": (header(0, 1, key("a", 9, struct.pack("<IQ", 4, 1000))), "ends before"),
    "lists in lists": (header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1) * 9000)), "recursion"),
    "an unknown type": (header(0, 1, key("a", 77, b"\0" * 8)), "77"),
    "a key twice": (header(0, 2, ARCH + ARCH), "Duplicate"),
    "a name that is no text": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 16), "decode|ends"),
    "a tensor twice": (header(2, 3, KEYS + info("direction.1", [4]) * 2 + b"\0" * 128), "duplicated"),
    "a tensor of 4 billion axes": (header(1, 3, KEYS + text("direction.1") + b"\xff" * 4), "ends before"),
    "a tensor beyond the file": (header(1, 3, KEYS + info("direction.1", [4], 2**40) + b"\0" * 64), "ends before"),
    "a tensor larger than the file": (header(1, 3, KEYS + info("direction.1", [2**40]) + b"\0" * 64), "ends before"),
    "axes that overflow": (header(1, 3, KEYS + info("direction.1", [2**33, 2**33]) + b"\0" * 64), "."),
    "a tensor type from nowhere": (header(1, 3, KEYS + info("direction.1", [4], kind=99) + b"\0" * 64), "99"),
    "an empty tensor": (header(1, 3, KEYS + info("direction.1", [0]) + b"\0" * 64), "no directions"),
}  # fmt: skip


def test_the_package_still_has_what_our_reader_overrides():
    """Were one of them renamed, the bounds would be gone and some of the files below would take for ever."""
    for name in ("_get", "_get_field_parts", "_push_field"):
        assert callable(getattr(gguf.GGUFReader, name, None)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(path)
    assert time.perf_counter() - start < 1
    with pytest.raises((FormatError, ModelError), match=r"v\.gguf"):  # what says that it is a model is tried as one
        describe(str(path))


BAD = {
    "no directions": ({}, {}, "holds no directions"),
    "another tensor": ({"token_embd.weight": np.ones(4, np.float32)}, {}, "token_embd.*direction.N only"),
    "a number that is none": ({"direction.one": np.ones(4, np.float32)}, {}, "direction.one"),
    "a number written twice over": ({"direction.01": np.ones(4, np.float32)}, {}, "direction.01"),
    "an endless number": ({"direction.99999999": np.ones(4, np.float32)}, {}, "direction.99999999"),
    "half precision": ({"direction.1": np.ones(4, np.float16)}, {}, r"is F16 \[4\], expected F32"),
    "a matrix": ({"direction.1": np.ones((2, 4), np.float32)}, {}, r"is F32 \[4, 2\]"),
    "two widths": ({**directions(1, d=4), **directions(2, d=8)}, {}, r"widths \[4, 8\]"),
    "NaN": ({"direction.2": np.array([1, np.nan], np.float32)}, {}, "direction.2 holds NaN"),
    "no hint": (directions(1), {"model_hint": None}, "model_hint is missing"),
    "no count": (directions(1), {"layer_count": None}, "layer_count is missing, expected int"),
    "a count that is text": (directions(1), {"layer_count": "1"}, "layer_count is '1', expected int"),
    "a count below the directions": (directions(1, 2, 3), {"layer_count": 2}, "says 2 layers but holds 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_sound_files_that_are_no_control_vector(name, tmp_path):
    tensors, keys, message = BAD[name]
    path = write(tmp_path / "v.gguf", tensors, **keys)
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(path)


def test_a_model_in_gguf_is_told_apart(tmp_path):
    path = write(tmp_path / "m.gguf", directions(1), arch="llama")
    with pytest.raises(FormatError, match="of a model, not of a control vector; open it with load_model"):
        detect(path)
    with pytest.raises(FormatError, match="architecture 'llama', expected controlvector"):
        read_control_vector(path)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Cut everywhere in the header, and with bytes changed at random."""
    path = write_control_vector(steering(1, 2), tmp_path / "v.gguf")
    whole, rng = path.read_bytes(), random.Random(0)
    cases = [whole[:n] for n in range(0, len(whole), 3)]
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(2):
            changed[rng.randrange(len(changed) if rng.random() < 0.2 else 300)] = rng.randrange(256)
        cases.append(bytes(changed))
    refused = 0
    with np.errstate(all="ignore"):
        for case in cases:
            path.write_bytes(case)
            try:
                cv.load_adapter(path)
            except FormatError:
                refused += 1
    assert refused > len(whole) // 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("controlvector.mode", "project"),
        ("other.mode", "add"),
        ("controlvector.scale", "2"),
        ("x.hook_point", "resid_pre"),
    ],
)
def test_a_key_that_may_change_the_meaning_is_refused(key, value, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for name, text in {"controlvector.model_hint": "llama", "general.name": "fine", key: value}.items():
        writer.add_string(name, text)
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=rf"says {key} = '{value}'"):
        cv.load_adapter(tmp_path / "v.gguf")
