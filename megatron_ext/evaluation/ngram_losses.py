"""Unigram and bigram models of token streams, as baselines for a language model's loss.

The bigram is interpolated modified Kneser-Ney with Chen and Goodman's discounts (1999, section
4.1.6), the strongest of the common ways to smooth a bigram; the unigram adds one to every count.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import UserError

Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unigram:
    """Unigram model with add-one smoothing.

    Attributes:
        probabilities: Probability of each token, `[vocabulary]`.
    """

    probabilities: Floats

    @classmethod
    def fit(cls, tokens: Tokens, vocab_size: int) -> "Unigram":
        """Fit the model to a stream of tokens."""
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        return cls(counts / counts.sum())

    def probability(self, context: Tokens, token: Tokens) -> Floats:
        """Return the probability of each `token`, which does not depend on its `context`."""
        return self.probabilities[token]


@dataclass(frozen=True)
class Bigram:
    """Bigram model with interpolated modified Kneser-Ney smoothing.

    P(token | context) = max(count - discount, 0) / total + backoff(context) * P_cont(token).
    P_cont(token) is the share of distinct bigrams that end in the token, with one added to every
    count so that none is 0. The discount depends on whether a bigram occurred once, twice or more
    often.

    Attributes:
        pairs: Sorted distinct bigrams of the training stream as context * vocabulary + token.
        discounted: Count minus discount of each pair.
        totals: Number of occurrences of each context, `[vocabulary]`.
        backoff: Probability mass that discounting freed in each context, `[vocabulary]`.
        continuation: P_cont, `[vocabulary]`.
    """

    pairs: Tokens
    discounted: Floats
    totals: Floats
    backoff: Floats
    continuation: Floats

    @classmethod
    def fit(cls, tokens: Tokens, vocab_size: int) -> "Bigram":
        """Fit the model to a stream of tokens."""
        pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        discount = _discounts(counts)[np.minimum(counts, 3)]
        contexts, endings = pairs // vocab_size, pairs % vocab_size
        totals = np.bincount(contexts, weights=counts, minlength=vocab_size)
        freed = np.bincount(contexts, weights=discount, minlength=vocab_size)
        continuation = np.bincount(endings, minlength=vocab_size) + 1.0
        return cls(
            pairs=pairs,
            discounted=counts - discount,
            totals=np.maximum(totals, 1.0),
            backoff=np.where(totals > 0, freed / np.maximum(totals, 1.0), 1.0),
            continuation=continuation / continuation.sum(),
        )

    def probability(self, context: Tokens, token: Tokens) -> Floats:
        """Return the probability of each `token` after its `context`."""
        pair = context * len(self.totals) + token
        index = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        discounted = np.where(self.pairs[index] == pair, self.discounted[index], 0.0)
        return discounted / self.totals[context] + self.backoff[context] * self.continuation[token]


def _discounts(counts: Tokens) -> Floats:
    """Return the discounts of pairs that occur 0, 1, 2, and 3 or more times."""
    number = [int((counts == times).sum()) for times in range(5)]
    if not all(number[1:]):  # the text is too short for the estimate
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = number[1] / (number[1] + 2 * number[2])
    estimate = [0.0, *(m - (m + 1) * y * number[m + 1] / number[m] for m in (1, 2, 3))]
    # A discount of 0 would leave nothing for unseen pairs: their loss would be infinite.
    return np.clip(estimate, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0])


def baseline_losses(train: Tokens, valid: Tokens, vocab_size: int) -> dict[str, float]:
    """Return the mean losses of both models over `valid[1:]`, in nats per token.

    Args:
        train: Stream of tokens to fit the models to.
        valid: Stream of tokens to predict.
        vocab_size: Number of entries of the tokenizer.
    """
    context, token = valid[:-1], valid[1:]
    models: dict[str, Unigram | Bigram] = {
        "unigram": Unigram.fit(train, vocab_size),
        "bigram": Bigram.fit(train, vocab_size),
    }
    return {
        name: float(-np.log(model.probability(context, token)).mean())
        for name, model in models.items()
    }


def read_stream(prefix: str) -> Tokens:
    """Return all tokens of an indexed dataset, its documents concatenated.

    Raises:
        UserError: The dataset does not exist, or has fewer than two tokens.
    """
    if not Path(prefix + ".idx").is_file():
        raise UserError(f"{prefix}.idx does not exist. Give the prefix of an indexed dataset.")
    from megatron_ext.devices import activate

    activate()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    documents = [dataset[i] for i in range(len(dataset))]
    if sum(map(len, documents)) < 2:
        raise UserError(
            f"{prefix} has fewer than two tokens, so there is nothing to predict. Give a larger "
            "dataset."
        )
    return np.concatenate(documents).astype(np.int64)
