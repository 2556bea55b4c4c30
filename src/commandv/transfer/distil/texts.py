"""What two tokenizers have in common: the texts of their tokens, and how answers begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.models.template import end_of_turn, stop_tokens
from commandv.transfer.distil.demonstrations import END

ASKED = 8  # prompts whose answers tell how a model begins one


def token_texts(lm: LM) -> dict[int, str]:
    """Return the text that each token adds within a sentence; special tokens and parts of characters have none.

    Tokens at which the model stops have the text of an answer's end.
    """
    tokenizer = lm.tokenizer
    size = min(len(tokenizer), lm.model.get_output_embeddings().weight.shape[0])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    decoder = tokenizer.backend_tokenizer.decoder
    found = {}
    for number, name in enumerate(names):
        if name is None or number in special:
            continue
        # Decoders strip the space of a first word, so that the token stands second.
        text = decoder.decode(["a", name])[1:] if decoder is not None else name
        if text and "�" not in text:
            found[number] = text
    return found | {number: END for number in stop_tokens(lm) if number < size}


def tokens_by_text(lm: LM) -> dict[str, int]:
    """Return the token of each text, the first where several have it; an answer ends with the template's token."""
    found: dict[str, int] = {}
    for number, text in sorted(token_texts(lm).items()):
        found.setdefault(text, number)
    end = end_of_turn(lm)
    return found | ({END: end} if end is not None and END in found else {})


def beginning(lm: LM, prompts: Sequence[str]) -> str:
    """Return the white space with which a model of its own accord begins most answers."""
    if not lm.chat:
        return ""  # the plain format ends with a line break
    answers = generate(lm, list(prompts[:ASKED]), max_new_tokens=3)
    spaces = [one[: len(one) - len(one.lstrip())] for one in answers if one.strip()]
    return Counter(spaces).most_common(1)[0][0] if spaces else ""
