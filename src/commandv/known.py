"""The names that tables of code have, where only the names are wanted: the tables themselves take seconds to import."""

from __future__ import annotations

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"
]  # `training.train.TRAINABLE`
Fitter: TypeAlias = Literal["ridge", "pinv", "affine", "reduced-rank", "procrustes", "fourier", "autoencoder"]
Matcher: TypeAlias = Literal["proportional", "nearest", "covering", "lowest-error"]  # `transfer.match.MATCHERS`
Direction: TypeAlias = Literal["caa", "actadd", "pca", "probe"]  # `steering.METHODS`
Application: TypeAlias = Literal["add", "ablate", "mean-ablate", "clamp"]  # `steering.APPLICATIONS`
Method: TypeAlias = Literal["activations", "context", "vocabulary", "answers", "training"]  # `evaluation.METHODS`
Needed: TypeAlias = Literal["unmodified", "pasted"]  # the arms of `evaluation.ARMS` that every comparison has
Spared: TypeAlias = Literal[
    "published", "random", "random-in-span", "shuffled", "mean-ablation", "text-bridge", "few-shot", "context",
    "vocabulary", "answers", "donor-answers", "direct",
]  # its others  # fmt: skip
