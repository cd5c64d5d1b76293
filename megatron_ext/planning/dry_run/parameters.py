"""How many parameters a model has, whatever its layout."""

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
        embeddings: token embeddings and output head, without rows that pad the vocabulary.
        experts: the routed experts of all layers.
        others: attention, dense layers, shared experts, routers and norms.
    """

    embeddings: int
    experts: int
    others: int

    @property
    def total(self) -> int:
        """Every parameter once."""
        return self.embeddings + self.experts + self.others

    def active(self, rate: Fraction) -> int:
        """Parameters that a token meets on average: of the routed experts the share `rate`.

        Embeddings and head count in full, as in the paper's tables.
        """
        return self.embeddings + self.others + round(rate * self.experts)

    @staticmethod
    def of_model(stages: Iterable["Parameters"]) -> "Parameters":
        """Those of all pipeline stages together."""
        rows = [(stage.embeddings, stage.experts, stage.others) for stage in stages]
        return Parameters(*(sum(column) for column in zip(*rows, strict=True)))


def count_parameters(model: Sequence[Any], args: Namespace) -> Parameters:
    """Parameters of this rank's pipeline stage, those on its tensor and expert peers included."""
    counts = {"embeddings": 0, "experts": 0, "others": 0}
    tensor, expert_tensor = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    padding = args.padded_vocab_size - args.vocab_size
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
