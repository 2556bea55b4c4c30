"""How alike the texts of two sets are."""

from __future__ import annotations

import re

import numpy as np

NEAR = 0.7  # Jaccard similarity of word sets from which two prompts count as near-duplicates


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def similar(first, second):
    """Pairs of texts whose word sets overlap by more than NEAR."""
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*map(words, [*first, *second]))))}
    bags = []
    for texts in (first, second):
        bag = np.zeros((len(texts), len(vocabulary)), np.float32)
        for row, text in enumerate(texts):
            bag[row, [vocabulary[word] for word in words(text)]] = 1
        bags.append(bag)
    shared = bags[0] @ bags[1].T
    union = bags[0].sum(1)[:, None] + bags[1].sum(1)[None] - shared
    pairs = np.argwhere(shared > NEAR * union)
    return [(first[i], second[j]) for i, j in pairs if first is not second or i < j]
