"""The sparse autoencoders of `sae.py`: trained by SAELens on the donor's states, and which features are looked at."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import commandv as cv
from commandv.interop.sae import SAE, load_sae, save_sae
from commandv.steering import states

WORK = Path("build/sae")

DONOR, LAYER = "smollm2-135m-instruct", 17  # of 30: 60 % of the depth
N_FEATURES, K = 1024, 16
SAMPLES, BATCH, RATE, WARM_UP = 600_000, 512, 1e-3, 100
HELD_OUT = 10  # every tenth text is kept from training
N_TOP, N_KINDS = 50, 3  # strongest tokens of a feature that are looked at, and different words among them

# A feature is named by the words it is for. These lists were written before any steering was looked at.
CATEGORIES = {
    "numbers": "one two three four five six seven eight nine ten dozen hundred thousand half twice twelve twenty "
    "thirty forty fifty 0 1 2 3 4 5 6 7 8 9",
    "time spans": "second seconds minute minutes hour hours day days week weeks month months year years decade century",
    "question words": "how why what when where which who whose",
    "people": "he she they him her them his their",
    "family": "mother father brother sister son daughter wife husband uncle aunt cousin parents family grandmother "
    "grandfather child children mum dad baby",
    "body": "hand hands arm arms leg legs foot feet head eye eyes face knee shoulder heart finger fingers thumb mouth "
    "nose skin neck hair blood body brain",
    "weather": "rain rains rainy wind windy snow storm sun sunny cloud clouds fog ice cold heat hot frost frozen "
    "freezing weather thunder warm steam",
    "animals": "dog dogs puppy cat cats kitten bird birds horse horses fish cow goat sheep fox wolf bear mouse hen "
    "pigeon pigeons tortoise animal animals bee bees",
    "food": "bread butter soup cheese rice sugar flour salt milk cream egg eggs potato potatoes onion garlic chicken "
    "cake caramel tea coffee oil dough tomato tomatoes pepper lemon apple apples meat sauce dish meal cook cooking",
    "money": "money price prices cost costs pay pays paid paying cheap expensive charge tax bank budget salary cash "
    "bill loan rent debt dollars pounds coins fee fees",
    "travel": "bus buses train trains car cars van ferry boat ship bike flight plane airport station ticket lift",
    "work": "job jobs work office boss manager team meeting company colleague colleagues client clients customer "
    "customers staff friend friends employee",
}


@functools.cache
def donor() -> cv.LM:
    return cv.load_model(DONOR)


@functools.cache
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Return (states, token ids, text numbers) of the built-in texts at the layer, the prompt format left out."""
    lm = donor()
    texts = cv.load_prompts("builtin:general") + cv.load_prompts("builtin:text")
    encoded = [cv.encode(lm, one.text, one.response) for one in texts]
    rows, ids, owners = [], [], []
    for numbers, layers in states(lm, texts, cv.Positions(everywhere=True)):
        firsts = [number for at, number in enumerate(numbers) if not at or numbers[at - 1] != number]
        inside = torch.tensor([end >= 0 for number in firsts for end in encoded[number].text_ends])
        rows.append(layers[LAYER][inside])
        ids.append(torch.tensor([token for number in firsts for token in encoded[number].ids])[inside])
        owners.append(torch.tensor(numbers)[inside])
    return torch.cat(rows), torch.cat(ids), torch.cat(owners)


def trained(seed: int) -> tuple[SAE, dict[str, float]]:
    """Return a TopK SAE, from the cache or trained by SAELens, and how good it is."""
    states, _, owners = tokens()
    seen = owners % HELD_OUT != 0
    settings = {"layer": LAYER, "n": N_FEATURES, "k": K, "samples": SAMPLES, "batch": BATCH, "rate": RATE, "seed": seed}
    key = json.dumps([settings, donor().revision, len(states)], sort_keys=True)
    path = WORK / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not path.exists():
        save_sae(replace(train(states[seen].float(), seed), metadata={"model_name": DONOR, **settings}), path)
    sae = load_sae(path)
    h = states[~seen].float()
    features = sae.encode(h)
    facts = {
        "fvu": float((h - sae.decode(features)).square().sum() / (h - h.mean(0)).square().sum()),
        "dead": int((sae.encode(states.float()) == 0).all(0).sum()),
        "l0": float((features > 0).sum(1).float().mean()),
        "tokens_trained": int(seen.sum()),
        "tokens_held_out": len(h),
    }
    return sae, facts


def train(h: Tensor, seed: int) -> SAE:
    """Train on states [n, d_model] that are centred and scaled first; the result takes them as they are."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    mean = h.mean(0)
    scale = (h - mean).norm(dim=1).mean() / h.shape[1] ** 0.5
    x = (h - mean) / scale

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            yield from (x[chosen] for chosen in order.split(BATCH)[:-1])

    steps = SAMPLES // BATCH
    settings = SAETrainerConfig(
        total_training_samples=SAMPLES, train_batch_size_samples=BATCH, lr=RATE, lr_end=RATE / 10,
        lr_warm_up_steps=WARM_UP, lr_decay_steps=steps // 3, dead_feature_window=steps // 5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        made = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=h.shape[1], d_sae=N_FEATURES, k=K))
        SAETrainer(cfg=settings, sae=made, data_provider=batches()).fit()
        made.save_inference_model(folder)
        sae = load_sae(folder, layer=LAYER)
    return replace(sae, w_enc=sae.w_enc / scale, w_dec=sae.w_dec * scale, b_dec=sae.b_dec * scale + mean)


def chosen(sae: SAE) -> list[dict[str, Any]]:
    """Return one feature for each category: the one with most of the category's words among its strongest tokens.

    At least `N_KINDS` of these words must be different, so that no feature is for one word only.
    """
    states, ids, _ = tokens()
    strongest = torch.cat([sae.encode(rows.float()) for rows in states.split(4096)]).topk(N_TOP, dim=0).indices
    shown = ids[strongest.T]  # [n_features, N_TOP]
    texts = {token: donor().tokenizer.decode([token]).strip().lower() for token in shown.unique().tolist()}
    found: list[dict[str, Any]] = []
    for category, listed in CATEGORIES.items():
        wanted = set(listed.split())
        inside = torch.tensor([token for token, text in texts.items() if text in wanted])
        share = torch.isin(shown, inside).float().mean(1)
        kinds = torch.tensor([len(wanted & {texts[token] for token in row}) for row in shown.tolist()])
        share[kinds < N_KINDS] = 0
        share[[one["feature"] for one in found]] = 0
        best = int(share.argmax())
        common = Counter(texts[token] for token in shown[best].tolist()).most_common(6)
        found.append(
            {"category": category, "feature": best, "precision": float(share[best]), "tokens": [w for w, _ in common]}
        )
    return found
