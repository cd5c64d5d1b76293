"""Parameter counts of a model, independent of its parallel layout."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron.core.utils import unwrap_model


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, or of one pipeline stage of it, by kind.

    Attributes:
        embeddings: Token embeddings and output head, without rows that pad the vocabulary.
        experts: Routed experts of all layers.
        others: Attention, dense layers, shared experts, routers and norms.
    """

    embeddings: int
    experts: int
    others: int

    @property
    def total(self) -> int:
        """Return the number of all parameters."""
        return self.embeddings + self.experts + self.others

    def active(self, rate: Fraction) -> int:
        """Return the mean number of parameters that a token uses.

        Embeddings and head count in full, as in the tables of the paper.

        Args:
            rate: Share of the routed experts that process a token.
        """
        return self.embeddings + self.others + round(rate * self.experts)

    @staticmethod
    def of_model(stages: Iterable["Parameters"]) -> "Parameters":
        """Return the sum over all pipeline stages."""
        rows = [(stage.embeddings, stage.experts, stage.others) for stage in stages]
        return Parameters(*(sum(column) for column in zip(*rows, strict=True)))


def count_parameters(model: Sequence[Any], args: Namespace) -> Parameters:
    """Return the parameters of this rank's pipeline stage.

    Those on its tensor-parallel and expert-parallel peers are included.
    """
    counts = {"embeddings": 0, "experts": 0, "others": 0}
    tensor, expert_tensor = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    rows = getattr(args, "hf_vocab_size", None) or args.vocab_size
    padding = args.padded_vocab_size - rows
    for chunk in unwrap_model(list(model)):
        for name, parameter in chunk.named_parameters():
            experts = ".experts." in name
            size = parameter.numel()
            if getattr(parameter, "tensor_model_parallel", False):
                size *= expert_tensor if experts else tensor
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                if getattr(parameter, "shared_embedding", False) and not chunk.pre_process:
                    continue  # the last stage's copy of tied embeddings
                counts["embeddings"] += size - padding * parameter.shape[1]
            elif experts:
                counts["experts"] += size * args.expert_model_parallel_size
            else:
                counts["others"] += size
    return Parameters(**counts)
