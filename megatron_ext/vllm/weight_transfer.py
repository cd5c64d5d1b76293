"""Back end of vLLM's weight transfer that receives streams from a training run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from megatron_ext.vllm.weight_stream import Stream, TensorPlace, receive


def _is_partial(layer: torch.nn.Module) -> bool:
    """Return whether a layer waits for more of its weights, such as one of packed projections."""
    info = get_layerwise_info(layer)
    # Embeddings are padded with rows that are in no checkpoint.
    if not info.can_load() or isinstance(layer, VocabParallelEmbedding):
        return False
    return 0 < info.load_numel < (info.load_numel_total or 0)


@dataclass
class StreamInitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine.

    Attributes:
        stream: The next stream, as a dictionary.
    """

    stream: dict[str, str | int | float]


@dataclass
class StreamUpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights.

    Attributes:
        buckets: Descriptions of all buckets; see `Bucket.describe`.
    """

    buckets: Sequence[tuple[int, Sequence[TensorPlace]]]


class StreamEngine(WeightTransferEngine[StreamInitInfo, StreamUpdateInfo]):
    """Receiver of one stream for each update. The weights have the format of a checkpoint."""

    init_info_cls = StreamInitInfo
    update_info_cls = StreamUpdateInfo

    def init_transfer_engine(self, init_info: StreamInitInfo) -> None:
        """Remember the next stream, which `receive_weights` requests."""
        self.stream = Stream(**init_info.stream)  # type: ignore[arg-type]

    def start_weight_update(self) -> None:
        """Let every layer process its weights when all of them have arrived."""
        # Meanwhile an output layer that is tied to the embeddings has a separate parameter.
        self.required = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """End the loading of layers by their parts."""
        finalize_layerwise_reload(self.model, self.model_config)
        # On CPUs an output layer computes with a packed copy of its weight, which vLLM makes when
        # it loads the layer. It never loads one that is tied to the embeddings.
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(layer, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)  # does nothing on GPUs

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receive a stream and load it.

        Raises:
            ValueError: A tensor is unknown or missing, or has another shape.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            # The next update would load what this one has left behind.
            for layer in self.model.modules():
                if (info := get_layerwise_info(layer)).can_load():
                    info.loaded_weights.clear()
                    info.load_numel = 0
            self.finish_weight_update()  # restores the old weights of these layers
            raise
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StreamUpdateInfo) -> None:
        """See `update_weights`."""
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        size = parallel.world_size_across_dp
        missing = set(self.required)
        for tensors in receive(self.stream, update_info.buckets, 1 + rank, 1 + size, self.device):
            missing -= self.model.load_weights(tensors) or set()
        if self.vllm_config.quant_config is None:
            missing |= {name for name, layer in self.model.named_modules() if _is_partial(layer)}
            if missing:
                raise ValueError(f"The stream has no weights for {min(missing)} of the model.")

    def shutdown(self) -> None:
        """Do nothing, as no connection lasts longer than an update."""
