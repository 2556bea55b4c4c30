"""What files of others may hold: everything is read, or refused at once with an error of ours."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import commandv as cv
import foreign
import tiny
from commandv.errors import CommandVError, FormatError, InputError
from commandv.evaluation.study import load_study
from commandv.evaluation.tasks import load_splits
from commandv.interop.sae import SAE, load_sae, save_sae
from commandv.profiles.profile import load_profile
from commandv.storage.reading import DEPTH, parse_json, read_json, read_text, read_yaml
from commandv.storage.tensors import read_numpy, read_safetensors, read_torch

DEEP = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 900 + "1" + "}" * 900,
    "just too deep": "[" * (DEPTH + 2) + "]" * (DEPTH + 2),
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "more digits than a number of 64 bits": '{"a": ' + "9" * 21 + "}",
    "beyond float64": '{"a": 1e999}',
    "half a pair": '{"a": "\\ud800"}',
    "half a pair in a key": '{"\\udfff": 1}',
    "a name twice": '{"prompt": "tea?", "prompt": "milk?"}',
    "not JSON": "{'a': 1}",
    "nothing but space": " ",
}


@pytest.mark.parametrize("name", DEEP)
def test_json_beyond_its_bounds_is_refused_at_once(name, tmp_path):
    with pytest.raises(FormatError, match="here: not valid JSON"):
        parse_json(DEEP[name], "here")
    (tmp_path / "p.jsonl").write_text(DEEP[name] + "\n" + '{"prompt": "tea?"}')
    if name != "nothing but space":
        with pytest.raises(InputError, match="line 1: not valid JSON"):
            cv.load_prompts(tmp_path / "p.jsonl")


def test_json_within_them_is_read():
    text = '{"whole": 18446744073709551615, "deep": [[[{"a": -1.5e300}]]], "text": "\\ud83d\\ude00 \\u0000"}'
    assert parse_json(text, "here") == json.loads(text)


YAML = {
    "deep": "[" * 3000 + "]" * 3000,
    "many digits": "a: " + "9" * 5000,
    "names that blow up": "a: &a [x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "a part that holds itself": "a: &a [*a]",
    "a key that cannot be one": "? {a: b}\n: c",
    "Python": "a: !!python/object/apply:os.getcwd []",
    "a date that is none": "a: !!timestamp x",
    "a number that is none": "a: !!int x",
    "large": "a: " + "x" * 400_000,
    "a key twice": "scales: [0.5]\nname: a\nscales: [1.0]",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_beyond_its_bounds_is_refused_at_once(name, tmp_path):
    (tmp_path / "s.yaml").write_text(YAML[name])
    with pytest.raises(InputError, match=r"s\.yaml"):
        load_study(tmp_path / "s.yaml")


def test_a_key_that_replaces_a_merged_one_is_no_second(tmp_path):
    (tmp_path / "s.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3")
    assert read_yaml(tmp_path / "s.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_a_date_in_yaml_is_a_text(tmp_path):
    (tmp_path / "s.yaml").write_text("a: 2024-99-99\nb: 2024-01-02\nc: &c [1]\nd: *c")
    assert read_yaml(tmp_path / "s.yaml") == {"a": "2024-99-99", "b": "2024-01-02", "c": [1], "d": [1]}


@pytest.mark.skipif(os.name == "nt", reason="no FIFOs")
@pytest.mark.parametrize("suffix", [".jsonl", ".yaml", ".pt", ".npy", ".safetensors", ".gguf", ".svec"])
def test_what_has_no_end_is_not_opened(suffix, tmp_path):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    load: Callable[[Path], object] = {".jsonl": cv.load_prompts, ".yaml": load_study}.get(suffix, cv.load_adapter)
    for path in (tmp_path / f"pipe{suffix}", tmp_path):
        with pytest.raises(CommandVError):
            load(path)
    with pytest.raises(FormatError, match="not a regular file"):
        read_text(Path(os.devnull))


def test_text_that_is_not_utf_8_and_text_with_a_mark(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(FormatError, match="not UTF-8"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes('{"a": "é"}'.encode("utf-8-sig"))
    assert read_json(tmp_path / "b.json") == {"a": "é"}


def test_half_a_surrogate_pair_in_a_prompt_from_python_is_refused():
    with pytest.raises(InputError, match="prompt 2 or its reply holds half of a surrogate pair"):
        cv.generate(tiny.tiny_lm(), ["fine", "not \ud800"], max_new_tokens=1)


# -- tensors -----------------------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def shaped(shape: str, descr: str = "'<f4'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': ({shape}), }}", bytes(64))


NUMPY = {
    "terabytes": shaped("10**12,".replace("10**12", str(10**12))),
    "more than fits an index": shaped(f"{2**63},"),
    "digits": shaped("9" * 3000 + ","),
    "objects": shaped("4,", "'|O'"),
    "nested types": shaped("4,", "[" * 200 + "]" * 200),
    "a sub-array of terabytes": shaped("1,", f"('<f4', ({2**20}, {2**20}))"),
    "code": npy("__import__('os').getcwd()"),
    "an open text": npy("{'descr': '''"),
    "open brackets": npy("(" * 3000),
    "an archive that is none": b"PK\x03\x04 junk",
}


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_headers_that_lie_are_refused(name, tmp_path):
    (tmp_path / "v.npy").write_bytes(NUMPY[name])
    with pytest.raises(FormatError, match=r"v\.npy"):
        read_numpy(tmp_path / "v.npy")


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("v.npy", bytes(1 << 20))
    data = bytearray((tmp_path / "v.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", (1 << 32) - 2)  # the size that the directory announces
    (tmp_path / "v.npz").write_bytes(data)
    with pytest.raises(FormatError, match="unpack to 4294967294 bytes"):
        read_numpy(tmp_path / "v.npz")


TORCH: dict[str, tuple[Callable[[], object], str]] = {
    "repeats of one number": (lambda: torch.ones(1).expand(10**6, 10**6), r"of which 4 bytes are stored"),
    "sparse": (lambda: torch.ones(4, 4).to_sparse(), "sparse"),
    "sparse by rows": (lambda: torch.ones(4, 4).to_sparse_csr(), "sparse"),
    "without numbers": (lambda: torch.zeros(4, device="meta"), "meta"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "quantised|refused"),
    "among others": (lambda: {"a": [{"b": torch.ones(1).expand(9, 9)}]}, "are stored"),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_more_than_is_stored_of_them_are_refused(name, tmp_path):
    make, message = TORCH[name]
    torch.save(make(), tmp_path / "v.pt")
    with pytest.raises(FormatError, match=message):
        read_torch(tmp_path / "v.pt")


def test_a_compressed_torch_file_is_refused(tmp_path):
    torch.save(torch.zeros(10_000), tmp_path / "v.pt")
    with zipfile.ZipFile(tmp_path / "v.pt") as plain, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as packed:
        for one in plain.namelist():
            packed.writestr(one, plain.read(one))
    with pytest.raises(FormatError, match="is compressed, which no torch file is"):
        read_torch(tmp_path / "z.pt")


def test_safetensors_that_lie_are_refused(tmp_path):
    for entry in (
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**40]},
        {"dtype": "F33", "shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]},
    ):
        head = json.dumps({"v": entry}).encode()
        (tmp_path / "v.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
        with pytest.raises(FormatError, match="truncated or not safetensors"):
            read_safetensors(tmp_path / "v.safetensors")


# -- at random ---------------------------------------------------------------------------------------------------------


def strange(rng: random.Random) -> object:
    """Return a value that the field of a file may hold instead of its own."""
    return rng.choice(
        [None, True, -1, 0, 2**31, 2**63, 10**19, 1.5, -1e308, "", "a", "\x00", "é" * 40, "9" * 25, "../..", [], [[]],
         {}, {"a": 1}, [None], {"": None}, "a" * 9000]
    )  # fmt: skip


def disturbed(value: object, rng: random.Random) -> object:
    """Return JSON with one value replaced, removed or repeated somewhere in it."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return strange(rng)
    keys: list = list(value) if isinstance(value, dict) else list(range(len(value)))
    out: dict | list = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(keys)
    how = rng.random()
    if how < 0.15:
        del out[key]
    elif how < 0.25 and isinstance(out, dict):
        out[rng.choice(["x", "", str(key).upper()])] = out.pop(key)
    else:
        out[key] = disturbed(out[key], rng)
    return out


def damaged(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(min(len(out), rng.choice([64, 512, len(out)])))
        how = rng.random()
        if how < 0.5:
            out[at] = rng.choice([0, 255, 127, rng.randrange(256)])
        elif how < 0.7:
            del out[at : at + rng.randrange(1, 30)]
        elif how < 0.8:
            del out[at:]
        else:
            out[at : at + 8] = rng.choice([2**63, 2**64 - 1, 2**40, len(out)]).to_bytes(8, "little")
        if not out:
            break
    return bytes(out)


def whole(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Write one sound artefact of each kind: name -> (file to disturb, how what holds it is read)."""
    lm = tiny.tiny_lm()
    ours = cv.save(tiny.random_adapter(lm, (1, 2), "f1+l1"), folder / "ours")
    held = cv.profile(lm, ["tea", "a cup"], cache=folder / "profile", text=None).path
    pyreft = foreign.write_pyreft(folder / "pyreft", {foreign.key(1): foreign.Reft("DiReFT")}, positions="l1")
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(8, 16, generator=generator), torch.zeros(16)
    sae = save_sae(SAE(w, b, w.T.clone(), torch.zeros(8), layer=1), folder / "sae")
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"p {n}", "answer": n}) for n in range(4)))
    torch.save({"vector": torch.randn(8), "layer": 1, "base_model": "m"}, folder / "v.pt")
    np.save(folder / "v.npy", np.ones((3, 8), np.float32))
    return {
        "ours": (ours / "config.json", lambda file: cv.load_adapter(file.parent)),
        "profile": (held / "config.json", lambda file: load_profile(file.parent)),
        "pyreft": (pyreft / "config.json", lambda file: cv.load_adapter(file.parent)),
        "its facts": (pyreft / "training_metadata.json", lambda file: cv.load_adapter(file.parent)),
        "its weights": (next(pyreft.glob("*.bin")), lambda file: cv.load_adapter(file.parent)),
        "sae": (sae / "cfg.json", lambda file: load_sae(file.parent)),
        "its tensors": (sae / "sae_weights.safetensors", lambda file: load_sae(file.parent)),
        "prompts": (folder / "p.jsonl", lambda file: (cv.load_prompts(file).hash, load_splits(file))),
        "torch": (folder / "v.pt", cv.load_adapter),
        "numpy": (folder / "v.npy", cv.load_adapter),
    }


def test_disturbed_files_give_a_result_or_an_error_of_ours(tmp_path):
    rng, refused = random.Random(0), 0
    for name, (file, load) in whole(tmp_path).items():
        data = file.read_bytes()
        load(file)
        for _ in range(60):
            if file.suffix == ".json" and rng.random() < 0.8:
                content = json.dumps(disturbed(json.loads(data), rng)).encode()
            elif file.suffix == ".jsonl" and rng.random() < 0.8:
                rows = [disturbed(json.loads(line), rng) for line in data.split(b"\n")]
                content = "\n".join(map(json.dumps, rows)).encode()
            else:
                content = damaged(data, rng)
            file.write_bytes(content)
            try:
                load(file)
            except CommandVError:
                refused += 1
            except Exception as error:  # for the message
                raise AssertionError(f"{name}: {content[:300]!r}") from error
        file.write_bytes(data)
    assert 200 < refused < 600
