"""EleutherAI's lm-evaluation-harness with an adapter attached: the model named `commandv`.

The harness knows this model once this module is imported. Its command line has no way of finding other packages'
models, so `python -m commandv.interop.lm_eval run ...` is that command line with the model known.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.errors import InputError
from commandv.interop.load import load_adapter
from commandv.models.lm import LM
from commandv.models.load import Template, load_model
from commandv.models.template import render

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"commandv.interop.lm_eval needs lm-evaluation-harness ({error}); pip install 'commandv[lm-eval]'"
    ) from error


@register_model("commandv")
class CommandVLM(HFLM):
    """The harness's own transformers model, with an adapter attached while it answers requests.

    What the harness calls the context is the adapter's prompt, what it scores or generates is the reply. An empty
    context, and each window of a rolling log-likelihood, has a prompt of one token: the one before what is scored.
    Contexts come from the task as they are; an adapter made for chat prompts wants `apply_chat_template=True`
    (`--apply_chat_template`).
    """

    def __init__(
        self,
        pretrained: LM | str,
        adapter: Adapter | str | Path | None = None,
        scale: float = 1.0,
        *,
        layer: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        template: Template = "auto",
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        same_as: str = "",
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        logits_cache: bool = True,
    ) -> None:
        """Wrap a model; it stays as it is between requests.

        With the harness's `apply_chat_template` contexts are formatted as commandv formats a prompt.

        Args:
            pretrained: a loaded model, or what `commandv.load_model` takes, whose arguments are among these.
            adapter: an adapter, what `commandv.load_adapter` takes, or None for the model alone.
            scale: factor on the adapter's deltas.
            layer: for a bare vector file, the layer it acts on.
            device: where the model goes, such as `"cuda"` or `"auto"`; a `"cuda"` that is not there is the CPU.
            template: which prompt format the adapter was made for.
            system: system prompt, where a task or `--system_instruction` gives none.
            enable_thinking: the template's option of this name, for model arguments on the command line.
            think_end_token: what ends a model's thinking in its answer, which is left out; as in the harness.
            batch_size: rows per forward pass, or the harness's `"auto"`.
            max_batch_size: where `"auto"` starts.
            max_length: longest input in tokens. Default: the model's context.
            add_bos_token: as in the harness's own model.
            logits_cache: compute continuations of one token that share a context once.

        Raises:
            InputError: loading options given with a loaded model, or a scale that is not a finite number.
            CommandVError: what loading a model or an adapter raises, or the adapter is for another model.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        options = {**(template_options or {}), **thinking}
        lm = self.lm = _loaded(
            pretrained, dtype=dtype, device=device, revision=revision, template=template, system=system,
            template_options=options, same_as=same_as, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self.adapter = load_adapter(adapter, layer=layer) if isinstance(adapter, str | Path) else adapter
        self.scale = float(scale)
        with self._attached():  # an adapter that does not fit is an error now, not after the data has been loaded
            pass
        super().__init__(
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            logits_cache=logits_cache,
            enable_thinking=enable_thinking,
            think_end_token=think_end_token,
        )
        self._device = lm.device  # of a model spread over devices, the one that takes the token ids

    def _attached(self, n_prompt: int | None = None) -> Any:
        if self.adapter is None:
            return contextlib.nullcontext()
        return attach(self.lm, self.adapter, scale=self.scale, n_prompt=n_prompt)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as commandv formats it, with the model's own system prompt and template options.

        Raises:
            InputError: the template refuses it; the harness's own model would leave the system message out.
        """
        return render(self.lm, chat_history, begun=not add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests with the adapter attached; the harness pads on the left and hands over the mask."""
        with self._attached():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score requests whose prompts end in the same column together.

        The harness writes context and continuation into one row, padded on the right, and passes no mask; one number
        says where all prompts of such a batch end. An adapter that acts on every token does not ask; its requests are
        grouped by the length of the continuation, which makes fewer batches.

        Either way no two rows of a group are the same tokens split in different places. The harness's logits cache
        would let those share a pass, and (lm-eval 0.4.13) reads the shorter continuation at the wrong tokens.
        """
        if self.adapter is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        everywhere = all(one.positions.everywhere for many in self.adapter.interventions.values() for one in many)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            # The harness drops the beginning of what is too long, and the last token, which is only scored.
            dropped = max(0, len(context) + len(continuation) - (self.max_length + 1))
            groups[len(continuation) if everywhere else len(context) - dropped].append(index)
        if self.batch_size == "auto" and override_bs is None and requests:
            # Found once, on the longest row; the harness would search again in every group.
            override_bs = self._detect_batch_size(sorted(requests, key=lambda one: -len(one[1]) - len(one[2])))
        scored: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for length, members in sorted(groups.items(), reverse=True):
                with self._attached(None if everywhere else length):
                    results = super()._loglikelihood_tokens(
                        [requests[i] for i in members], disable_tqdm=True, override_bs=override_bs
                    )
                for index, result in zip(members, results, strict=True):
                    scored[index] = result
                bar.update(len(members))
        return scored

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give the mask that the harness leaves out: its padding is on the right, behind all that is scored."""
        if self.adapter is None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, attention_mask=torch.ones_like(inps)).logits

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness stores beside its results; unlike its own model, without asking the hub."""
        return {
            "model_num_parameters": self.lm.model.num_parameters(),
            "model_dtype": str(self.lm.model.dtype),
            "model_revision": self.lm.revision,
            "model_sha": self.lm.revision,
            "commandv_model": self.lm.id,
            "commandv_format": str(self.lm.format),
            "commandv_adapter": self.adapter.name if self.adapter else None,
            "commandv_scale": self.scale if self.adapter else None,
        }


def _loaded(pretrained: LM | str, *, device: str | None, template: Template, **options: Any) -> LM:
    """Load a model; one that is loaded already is taken as it is, without options."""
    if not isinstance(pretrained, LM):
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the command line says cuda:0 where the user says nothing; its own model does the same
        return load_model(pretrained, device_map=device, template=template, **options)
    system = options.pop("system")
    if device or template != "auto" or system is not None or any(options.values()):
        raise InputError(
            f"{pretrained.id} is loaded already; give dtype, device, revision, template, system, "
            "template_options, enable_thinking, same_as and trust_remote_code to load_model"
        )
    return pretrained


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
