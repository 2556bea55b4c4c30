"""Sparse autoencoders in SAELens' format: a directory of `cfg.json` and `sae_weights.safetensors`.

    f = act((h - a b_dec) W_enc + b_enc)        h' = f W_dec + b_dec        a = 1 with `apply_b_dec_to_input`, else 0

Read and written without SAELens. act is a ReLU ("standard"), a ReLU where the input is above the feature's threshold
("jumprelu"), or the ReLU of the k largest ("topk"; with `rescale_acts_by_decoder_norm` features are measured in the
norm of their decoder rows). Gated and other architectures, and inputs that are normalised first, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.edit import require_shapes
from commandv.adapters.kinds import steering_vector
from commandv.errors import FormatError, InputError, MismatchError, require_known
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE
from commandv.storage.foreign import new_directory, require_new
from commandv.storage.reading import number_of, read_json
from commandv.storage.tensors import read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "jumprelu", "topk")
# The oldest SAELens that reads what `save_sae` writes; without a version it would look for keys of older ones.
_VERSION = "6.0.0"
# TransformerLens' names, those of its bridge, and transformers' own module of a block.
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|out|in)|(?:\w+\.)*(?:layers|h)\.(\d+)")


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of the residual stream at one layer."""

    w_enc: Tensor  # [d_model, n_features]
    b_enc: Tensor  # [n_features]
    w_dec: Tensor  # [n_features, d_model]
    b_dec: Tensor  # [d_model]
    layer: int  # whose output it reads, 0-based; -1 for the embeddings (`resid_pre` of block 0)
    architecture: str = "standard"  # one of `ARCHITECTURES`
    threshold: Tensor | None = None  # [n_features], for jumprelu
    k: int | None = None  # for topk
    centred: bool = True  # b_dec is taken off the input
    rescaled: bool = False  # topk features are measured in the norm of their decoder rows
    metadata: Mapping[str, Any] = field(default_factory=dict)  # JSON-able facts of the file: model, hook, data

    def __post_init__(self) -> None:
        require_known("SAE architecture", self.architecture, ARCHITECTURES)
        if (self.threshold is not None) != (self.architecture == "jumprelu"):
            raise InputError(
                f"a {self.architecture} SAE {'with' if self.threshold is not None else 'without'} thresholds"
            )
        topk = self.architecture == "topk"
        if topk != (type(self.k) is int) or (topk and not 0 < int(self.k or 0) <= self.n_features):
            raise InputError(f"a {self.architecture} SAE of {self.n_features} features with k={self.k}")
        d, n = self.d_model, self.n_features
        expected = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
        require_shapes(f"SAE of width {d} with {n} features", self.tensors(), expected)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.w_dec.shape[-1]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.w_dec.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by SAELens' names."""
        named = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        return named if self.threshold is None else {**named, "threshold": self.threshold}

    def encode(self, h: Tensor) -> Tensor:
        """Return the features [..., n_features] of states `h` [..., d_model], in float32.

        Raises:
            MismatchError: states of another width.
        """
        if h.shape[-1] != self.d_model:
            raise MismatchError(f"the SAE is for width {self.d_model}, got states of shape {tuple(h.shape)}")
        before = (h.float() - self.b_dec if self.centred else h.float()) @ self.w_enc + self.b_enc
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        if self.k is not None:
            if self.rescaled:
                before = before * self.w_dec.norm(dim=-1)
            values, places = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, places, values.relu())
        return before.relu()

    def decode(self, features: Tensor) -> Tensor:
        """Return the states [..., d_model] that features [..., n_features] stand for.

        Raises:
            MismatchError: another number of features.
        """
        if features.shape[-1] != self.n_features:
            raise MismatchError(f"the SAE has {self.n_features} features, got shape {tuple(features.shape)}")
        if self.rescaled:
            features = features / self.w_dec.norm(dim=-1)
        return features @ self.w_dec + self.b_dec

    def feature(self, number: int) -> Tensor:
        """Return what one unit of a feature adds to the stream, [d_model]: its decoder row.

        Raises:
            InputError: no such feature.
        """
        if not 0 <= number < self.n_features:
            raise InputError(f"feature {number}: the SAE has 0 .. {self.n_features - 1}")
        row = self.w_dec[number]
        return row / row.norm() if self.rescaled else row

    def steering(self, number: int, strength: float) -> Adapter:
        """Return an adapter that adds `strength` units of a feature to every token at the SAE's layer.

        It knows the model by width only: the file has TransformerLens' name of the model, not the hub's.

        Raises:
            InputError: no such feature, or an SAE of the embeddings, where there is no block's output to change.
        """
        direction = self.feature(number)
        if self.layer < 0:
            raise InputError("the SAE reads the embeddings, and adapters change the outputs of blocks")
        facts = {"made_by": "sae", "feature": number, "strength": strength, "sae": dict(self.metadata)}
        made = {self.layer: steering_vector(direction, strength)}
        return Adapter(made, ModelRef(d_model=self.d_model), f"feature-{number}", facts).at(EVERYWHERE)


def load_sae(path: str | Path, *, layer: int | None = None) -> SAE:
    """Load an SAE from a directory of SAELens.

    Args:
        path: the directory.
        layer: whose output it is for. Default: read from the hook's name, where `resid_post` of block N is layer N
            and `resid_pre` of block N is layer N - 1.

    Raises:
        FormatError: missing or truncated files, an unknown architecture, missing or unknown tensors, shapes that do
            not fit the configuration, NaN, a normalised input, or a hook elsewhere than between blocks.
    """
    path = Path(path)
    config = _config(path)
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise FormatError(f"{path}: an SAE of architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    normalised = config.get("normalize_activations") or "none"
    # The remaining one is a factor that SAELens folds into the weights before it saves them.
    if normalised not in ("none", "expected_average_only_in"):
        raise FormatError(f"{path}: its inputs are normalised ({normalised}), so its features are not the stream's own")
    if config.get("reshape_activations", "none") != "none":
        raise FormatError(f"{path}: an SAE of attention heads ({config['reshape_activations']}), not of the stream")
    metadata = config["metadata"]
    if (head := metadata.get("hook_head_index")) is not None:
        raise FormatError(f"{path}: an SAE of attention head {head!r}, not of the stream")
    tensors = _tensors(path)
    optional = {"threshold"} if architecture == "jumprelu" else set()
    expected = {"W_enc", "b_enc", "W_dec", "b_dec"} | optional
    if odd := sorted(set(tensors) ^ expected):
        raise FormatError(f"{path}: tensors {odd[:4]} are missing, or not those of a {architecture} SAE")
    try:
        sae = SAE(
            **{name.lower(): tensors[name] for name in expected},
            layer=_layer(path, metadata.get("hook_name")) if layer is None else layer,
            architecture=architecture,
            k=config.get("k") if architecture == "topk" else None,
            centred=bool(config.get("apply_b_dec_to_input", True)),
            rescaled=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
            metadata=metadata,
        )
    except (InputError, IndexError) as error:
        raise FormatError(f"{path}: {error}") from error
    for key, got in (("d_in", sae.d_model), ("d_sae", sae.n_features)):
        if config.get(key) != got:
            raise FormatError(f"{path}: {CONFIG} says {key} {config.get(key, 'nothing')}, the weights have {got}")
    return sae


def save_sae(sae: SAE, path: str | Path) -> Path:
    """Write an SAE as SAELens does, into a new or empty directory.

    Raises:
        FormatError: `path` holds something; two files of fixed names cannot be replaced at once.
        StorageError: not writable or disk full; nothing is left.
    """
    path = Path(path)
    require_new(path, CONFIG)
    hook = f"blocks.{sae.layer}.hook_resid_post" if sae.layer >= 0 else "blocks.0.hook_resid_pre"
    config: dict[str, Any] = {
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _VERSION, **sae.metadata, "hook_name": hook},
        "architecture": sae.architecture,
    }
    if sae.architecture == "topk":
        config.update(k=sae.k, rescale_acts_by_decoder_norm=sae.rescaled)
    weights = {name: one.detach().float().cpu().contiguous().clone() for name, one in sae.tensors().items()}
    with new_directory(path, CONFIG) as directory:
        (directory / WEIGHTS).write_bytes(to_bytes(weights))
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return path


def _config(path: Path) -> dict[str, Any]:
    """Return the configuration in the keys of SAELens 6, whose predecessors had one flat dictionary."""
    raw = read_json(path / CONFIG)
    if not isinstance(raw, dict) or not isinstance(raw.get("metadata", {}), dict):
        raise FormatError(f"{path}: {CONFIG} is not SAELens', expected an object with metadata")
    if "metadata" in raw:
        return raw
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {old.get(str(key), str(key)): value for key, value in raw.items()}
    activation = config.get("activation_fn") or "relu"
    if activation == "topk":
        kwargs = config.get("activation_fn_kwargs")
        config.update(architecture="topk", k=kwargs.get("k") if isinstance(kwargs, dict) else None)
    elif activation != "relu":
        raise FormatError(f"{path}: an SAE with the activation {activation!r}; known are relu and topk")
    facts = ("model_name", "hook_name", "hook_head_index", "dataset_path", "context_size", "prepend_bos")
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return {**config, "metadata": {key: config[key] for key in facts if key in config}}


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = {name: _floats(one, name, path) for name, one in read_safetensors(path / WEIGHTS).content.items()}
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    # SAELens wrote a factor of 1 for a while, and reads past it.
    if "scaling_factor" in tensors and (tensors["scaling_factor"] == 1).all():
        del tensors["scaling_factor"]
    return tensors


def _floats(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise FormatError(f"{path}: {name[:60]} holds {tensor.dtype}, expected floating-point numbers")
    return tensor.float()


def _layer(path: Path, hook: Any) -> int:
    match = _HOOK.fullmatch(str(hook))
    number = number_of(match[3] or match[1], most=9999) if match else None
    if number is None or not match:
        raise FormatError(
            f"{path}: its hook is {str(hook)[:80]!r}, expected the stream between blocks "
            "(blocks.N.hook_resid_post or _pre); where you know better, say layer="
        )
    return number - (match[2] in ("resid_pre", "in"))
