"""Adapters baked into weights: a model of the usual kind, which needs nothing of ours to run.

Exact are two sorts of adapters only. A vector added to every token goes into the bias of the block's last linear map,
whose output is added to the stream as it is. A directional ablation goes into everything that writes the stream; see
`bake`. What reads the state, acts on some tokens only, or meets a norm between that last map and the stream has no
place in the weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter, low_rank
from commandv.adapters.attach import attach
from commandv.errors import InputError, ModelError
from commandv.interop.control_vectors import constant
from commandv.models.encoding import encode
from commandv.models.lm import LM
from commandv.models.load import load_model, wrap_like
from commandv.models.running import evaluating
from commandv.models.state import require_own
from commandv.prompts.sets import load_prompts
from commandv.storage.directories import CONFIG
from commandv.storage.foreign import new_directory, require_new

# Where blocks write the stream, by the names of transformers' models.
ATTENTION = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj", "attention.dense",
    "self_attention.dense",
)  # fmt: skip
MLP = ("mlp.down_proj", "mlp.c_proj", "mlp.fc_out", "mlp.fc2", "mlp.dense_4h_to_h", "fc2")
# Architectures whose configuration can give the last linear map a bias, and those that are Llama with other biases.
SWITCHES = {"llama": "mlp_bias", "falcon": "bias", "starcoder2": "use_bias"}
AS_LLAMA = {"qwen2": True, "mistral": False}  # whether queries, keys and values have biases
N_CHECKS = 4
# Largest difference of log-probabilities that the rounding of weights in a dtype makes, in nats.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class Baked(NamedTuple):
    """What was written and what its check found."""

    path: Path  # the model's directory
    # largest difference of log-probabilities between the model as it was saved and loaded again, and the one that it
    # stands for, in nats, over every token of the prompts of the check
    difference: float
    effect: float  # largest difference that the adapter makes there
    # of an ablation, the mean KL at the last prompt token from the model with the adapter attached, which acts on
    # blocks' outputs only; None for additions, where these are the same model
    kl: float | None


def bake(lm: LM, adapter: Adapter, path: str | Path, *, every_writer: bool = False) -> Baked:
    """Write a model into whose weights an adapter is built, as a directory that transformers loads.

    *Additions* on every token: c is added to the bias of the last linear map of the block, down(x) + b + c; Llama gets
    such biases by its configuration (`mlp_bias`), Qwen2 and Mistral become Llamas, which they are but for biases.

    *Ablation* h (I - Uᵀ U) at every block: each W that writes the stream (token and position embeddings, attention's
    and the MLP's last map) becomes one that cannot write U. That is more than the attached adapter does, which acts on
    blocks' outputs and lets attention and the MLP read U within a block, so it has to be asked for.

    What is saved is loaded again, in float32, and compared with the original, changed by hooks; it is only kept when
    their log-probabilities agree up to the rounding of the weights, and within a tenth of what the adapter changes.

    Args:
        lm: the model that the adapter is for, with nothing attached. Memory must hold it three times, in float32.
        adapter: additions on every token, or the ablation of the same directions at every layer.
        path: absent or empty directory.
        every_writer: allow an ablation.

    Raises:
        InputError: the adapter has no place in these weights; the message says why.
        MismatchError: the adapter is of another model.
        FormatError: `path` holds something.
        ModelError: the model has no such maps, or what was saved does not agree.
        StorageError: not writable or disk full.

    Source: Arditi et al., arXiv 2406.11717, section 4 (weight orthogonalisation).
    """
    require_own(lm, "baking")
    adapter.model.require(lm.ref, f"adapter {adapter.name}")
    path = Path(path)
    require_new(path, CONFIG)
    basis = _ablated(lm, adapter)
    if basis is not None and not every_writer:
        raise InputError(
            f"{adapter.name}: attached, an ablation acts on blocks' outputs; in weights it acts on everything that "
            "writes the stream, inside blocks and in the embeddings, too, which is not the same. every_writer=True "
            "(--every-writer) does that, and tells how far it is from the attached one"
        )
    model = _with_constants(lm, adapter) if basis is None else _with_ablation(lm, basis)
    prompts = load_prompts("builtin:general", limit=N_CHECKS).texts
    exact = _in_float32(lm)
    before = _log_probs(exact, prompts)
    with attach(exact, adapter):
        attached = _log_probs(exact, prompts)
    meant = attached
    if basis is not None:
        with _ablating(exact, basis):
            meant = _log_probs(exact, prompts)
    with new_directory(path, CONFIG) as folder:
        model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        del model
        found = _log_probs(_again(exact, folder), prompts)
        difference, effect = _largest(found, meant), _largest(meant, before)
        _require_equal(lm, adapter, difference, effect)
    return Baked(path, difference, effect, None if basis is None else _kl(attached, found))


# -- additions --------------------------------------------------------------------------------------------------------


def _with_constants(lm: LM, adapter: Adapter) -> Any:
    made = {layer: constant(adapter, layer, "baked into weights") for layer in adapter.layers}
    for block in lm.blocks:
        _require_no_norm(lm, block)
    model = _with_biases(lm)
    blocks = _blocks(model, lm)
    with torch.no_grad():
        for layer, vector in made.items():
            last = _writer(lm, blocks[layer], MLP)
            last.bias += vector.to(last.bias)
    return model


def _with_biases(lm: LM) -> Any:
    """Return a copy of a model in which each block's last linear map has a bias."""
    if all(_writer(lm, block, MLP).bias is not None for block in lm.blocks):
        return copy.deepcopy(lm.model)
    kind = lm.model.config.model_type
    if kind in SWITCHES:
        config = copy.deepcopy(lm.model.config)
        setattr(config, SWITCHES[kind], True)
        empty = type(lm.model)(config)
    elif kind in AS_LLAMA and _attends_to_all(lm.model.config):
        empty = transformers.LlamaForCausalLM(_llama_config(lm.model.config, AS_LLAMA[kind]))
    else:
        raise ModelError(
            f"{lm.id}: a {kind}, the last linear map of whose blocks has no bias and can be given none; additions can "
            f"be baked into models that have one (GPT-2, GPT-NeoX, Phi ...), {', '.join(SWITCHES)}, and full-attention "
            f"{', '.join(AS_LLAMA)}. Export a control vector instead, or serve the adapter attached"
        )
    model = empty.to(next(lm.model.parameters()).dtype).eval()
    left = model.load_state_dict(lm.model.state_dict(), strict=False)
    if left.unexpected_keys or any(not name.endswith(".bias") for name in left.missing_keys):
        raise ModelError(f"{lm.id}: its weights are not those of a plain {kind}, so no biases can be added to it")
    with torch.no_grad():
        for name in left.missing_keys:
            model.get_parameter(name).zero_()
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    return model


def _attends_to_all(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or []
    return all(kind == "full_attention" for kind in kinds) if kinds else getattr(config, "sliding_window", None) is None


def _llama_config(config: Any, biased: bool) -> transformers.LlamaConfig:
    known = config.to_dict()
    taken = {
        name: known[name]
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "initializer_range",
        )
        if known.get(name) is not None
    }  # fmt: skip
    return transformers.LlamaConfig(**taken, attention_bias=biased, mlp_bias=True)


def _require_no_norm(lm: LM, block: nn.Module) -> None:
    """Raise `InputError` for a block that norms what it is about to add to the stream."""
    config = lm.model.config.get_text_config(decoder=True)
    names = [name for name, _ in block.named_children()]
    after = [name for name in names if name in ("post_feedforward_layernorm", "post_mlp_layernorm")]
    if getattr(config, "do_layer_norm_before", True) is False:
        after.append("final_layer_norm")
    if after:
        raise InputError(
            f"{lm.id}: its blocks norm what the MLP puts out before it reaches the stream ({after[0]}), so no bias "
            "there adds a constant. Export a control vector instead, or serve the adapter attached"
        )


# -- ablation ---------------------------------------------------------------------------------------------------------


def _ablated(lm: LM, adapter: Adapter) -> Tensor | None:
    """Return the directions U [rank, d_model] that an adapter ablates at every layer and token, None for another."""
    bases = []
    for many in adapter.interventions.values():
        one = low_rank(many[0], "baking")
        if not one.read.any() or len(many) > 1:
            return None
        read, write = one.read.double().cpu(), one.write.double().cpu()
        alike = torch.allclose(read.T @ write, -read.T @ torch.linalg.pinv(read.T), atol=1e-5)
        if not alike or one.bias.any() or one.activation != "linear" or not one.positions.everywhere:
            return None
        bases.append(torch.linalg.svd(read, full_matrices=False).Vh)
    first = bases[0]
    if any(not torch.allclose(other.T @ other, first.T @ first, atol=1e-5) for other in bases):
        raise InputError(f"{adapter.name}: ablates other directions at other layers; in weights they are the same")
    if adapter.layers != list(range(lm.n_layers)):
        raise InputError(
            f"{adapter.name}: ablates at layers {adapter.layers} of {lm.n_layers}; in weights only at all of them, "
            "since what one block may not write, later ones read"
        )
    return first


def _with_ablation(lm: LM, basis: Tensor) -> Any:
    for block in lm.blocks:
        _require_no_norm(lm, block)
        if any(name.startswith("post_self_attn") for name, _ in block.named_children()):
            raise InputError(f"{lm.id}: its blocks norm what attention puts out before it reaches the stream")
    model = copy.deepcopy(lm.model)
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is tokens.weight:  # reading is not to be changed
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
    with torch.no_grad():
        for module in _writers(model, lm):
            weight = module.weight
            u = basis.to(weight.device)
            rows = isinstance(module, nn.Linear)  # others (embeddings, GPT-2's Conv1D) have [in, out]
            full = weight.double() if not rows else weight.double().T
            cut = full - full @ u.T @ u
            weight.copy_(cut.T if rows else cut)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(module.bias.double() - module.bias.double() @ u.T @ u)
    return model


def _writers(model: Any, lm: LM) -> list[Any]:
    """Return everything that writes the stream of a model: embeddings, and two maps a block."""
    owner = model.get_submodule(next(name for name, one in lm.model.named_modules() if one is lm.owner))
    embeddings = [
        one for one in owner.children() if isinstance(one, nn.Embedding) and one.weight.shape[1] == lm.d_model
    ]
    per_block = [_writer(lm, block, names) for block in _blocks(model, lm) for names in (ATTENTION, MLP)]
    return [*embeddings, *per_block]


@contextlib.contextmanager
def _ablating(lm: LM, basis: Tensor) -> Iterator[None]:
    """Ablate what each writer of the live model puts out: the same, said without weights."""

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        u = basis.to(output.device, torch.float32)
        return output - (output.float() @ u.T @ u).to(output.dtype)

    handles = [module.register_forward_hook(cut) for module in _writers(lm.model, lm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- parts of a model, and the check ----------------------------------------------------------------------------------


def _blocks(model: Any, lm: LM) -> list[nn.Module]:
    """Return the blocks of a model of the same form."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    return [model.get_submodule(names[id(block)]) for block in lm.blocks]


def _writer(lm: LM, block: nn.Module, names: tuple[str, ...]) -> Any:
    """Return the one map of a block under one of the names."""
    for name in names:
        with contextlib.suppress(AttributeError):
            found = block.get_submodule(name)
            if getattr(found, "weight", None) is not None and found.weight.ndim == 2:
                return found
    raise ModelError(
        f"{lm.id}: a {lm.model.config.model_type}, whose blocks have none of {', '.join(names)} as a plain linear map "
        "(experts, quantised weights, a LoRA, another layout), so nothing can be baked into it"
    )


def _in_float32(lm: LM) -> LM:
    """Return a half-precision model in float32, in which rounding does not hide what differs; others as they are."""
    if next(lm.model.parameters()).dtype in (torch.float32, torch.float64):
        return lm
    return wrap_like(lm, copy.deepcopy(lm.model).float(), lm.id)


def _again(lm: LM, folder: Path) -> LM:
    """Load what was saved, asked as the original is."""
    dtype = next(lm.model.parameters()).dtype
    made = load_model(
        folder, dtype=dtype, template="chat" if lm.chat else "plain", system=lm.format.system,
        template_options=lm.format.options,
    )  # fmt: skip
    made.model.to(lm.device)
    return made


def _log_probs(lm: LM, prompts: list[str]) -> list[Tensor]:
    found = []
    with torch.inference_mode(), evaluating(lm.model):
        for prompt in prompts:
            ids = torch.tensor([encode(lm, prompt).ids], device=lm.device)
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            found.append(logits.double().log_softmax(-1).cpu())
    return found


def _largest(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of log-probabilities of what either holds possible, down to e^-15."""

    def gap(a: Tensor, b: Tensor) -> float:
        return float((a.clamp(min=-15) - b.clamp(min=-15)).abs().max())

    return max(gap(a, b) for a, b in zip(one, other, strict=True))


def _kl(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((a[-1].exp() * (a[-1] - b[-1])).sum()) for a, b in zip(one, other, strict=True)) / len(one)


def _require_equal(lm: LM, adapter: Adapter, difference: float, effect: float) -> None:
    limit = TOLERANCE[next(lm.model.parameters()).dtype]
    if not difference <= min(limit, max(effect / 10, TOLERANCE[torch.float64])):
        raise ModelError(
            f"{adapter.name} baked into {lm.id}: its log-probabilities differ by {difference:.3g} nats from those of "
            f"the changed model, which the adapter changes by {effect:.3g}; at most {limit:.3g} is rounding. Nothing "
            "was written. The blocks of this architecture do more to what they add than is known here, or the adapter "
            "does next to nothing in this precision: load the model with dtype='float32'"
        )
