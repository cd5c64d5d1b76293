"""Expert Threshold models in vLLM's layers: paged attention, tensor, pipeline, expert parallelism.

They compute the same as `megatron_ext/hf/remote/modeling_et.py`, which is their reference.
"""

from collections.abc import Iterable
from itertools import islice

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
from megatron_ext.vllm import check_layers
from megatron_ext.vllm.layers import ExpertThresholdLayer, rms_norm

# Names of projections in a folder, and the parameter and the part of it that they become.
_PARTS: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@support_torch_compile
class ExpertThresholdModel(nn.Module):
    """Decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ExpertThresholdConfig = vllm_config.model_config.hf_config
        check_layers(config)
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens: nn.Module = PPMissingLayer()
        self.embedding_norm: RMSNorm | None = None
        if first or (config.tie_word_embeddings and last):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps, has_weight=False
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: ExpertThresholdLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = rms_norm(config, config.hidden_size) if last else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of `input_ids` `[tokens]`, before their norm."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states `[tokens, hidden]`, for the head or for the next stage."""
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            x = inputs_embeds
            if self.embedding_norm is not None:
                x = self.embedding_norm(x)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(positions, x)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)


class ExpertThresholdForCausalLM(nn.Module, SupportsPP):
    """Decoder with its head."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ExpertThresholdConfig = vllm_config.model_config.hf_config
        if vllm_config.quant_config is not None:
            raise ValueError(
                "Expert Threshold models cannot be served quantized. Remove --quantization."
            )
        parallel = vllm_config.parallel_config
        if parallel.data_parallel_size > 1 and parallel.enable_expert_parallel:
            raise ValueError(
                "Expert Threshold models do not divide experts over data-parallel ranks. Remove "
                "--enable-expert-parallel, or start one server per replica."
            )
        self.config = config
        # On CPUs vLLM packs the head's weight, and packs it again only if it is loaded again: a
        # head that is tied there keeps the weights of the first load.
        self.tied = config.tie_word_embeddings and not current_platform.is_cpu()
        self.model = ExpertThresholdModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            self.lm_head = head.tie_weights(self.model.embed_tokens) if self.tied else head
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=config.logit_softcap or None
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of `input_ids` `[tokens]`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states `[tokens, hidden]`, for the head or for the next stage."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits, `[tokens, vocab]`, on the ranks that sample."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors of a Hugging Face folder, at the start or again.

        Args:
            weights: Names, as in the folder, and tensors, in any order.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: The thresholds were never updated, or a tensor is unknown.
        """
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, tensor in weights:
            if name.endswith(".threshold_updates") and not int(tensor):
                raise ValueError(
                    f"The thresholds of the model were never updated ({name} is 0). Train it for "
                    "at least one step, or set them with tools.calibrate_thresholds."
                )
            if name.endswith((".threshold_average", ".threshold_updates")):
                continue  # state of training
            for name_of_use in self._uses(name):
                if is_pp_missing_parameter(name_of_use, self):
                    continue
                target, arguments = self._parameter_name(name_of_use)
                if target not in params:
                    raise ValueError(f"The model has no parameter for the tensor {name}.")
                loader = getattr(params[target], "weight_loader", default_weight_loader)
                loader(params[target], tensor, *arguments)
                loaded.add(target)
        return loaded

    def _uses(self, name: str) -> list[str]:
        """Return the names under which a tensor is loaded."""
        if self.config.tie_word_embeddings:
            if name == "lm_head.weight":
                return []
            if name == "model.embed_tokens.weight" and not self.tied:
                return [name, "lm_head.weight"]
        return [name]

    def _parameter_name(self, name: str) -> tuple[str, tuple[str | int, ...]]:
        """Return the parameter of a tensor and what its loader needs to know about the tensor."""
        block, *rest = name.split(".experts.")
        if rest:  # MODULE.experts.NUMBER.PROJECTION.weight
            expert, projection, _ = rest[0].split(".")
            part = "down" if projection == "down_proj" else "up"
            return f"{block}.experts.{part}", (projection, int(expert))
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if projection in _PARTS and (self.config.gated_mlp or projection != "up_proj"):
            packed, slot = _PARTS[projection]
            return f"{parent}.{packed}.{kind}", (slot,)
        return name, ()
