"""Plug-in through which vLLM serves Expert Threshold models.

vLLM calls :func:`register` in each of its processes, by the entry point `vllm.general_plugins`.
Nothing here imports Megatron, so the package can be installed next to vLLM without dependencies.
"""

import logging
from typing import Any

TESTED = ("0.32",)
"""Versions of vLLM that this plug-in has been tested with."""
TRANSFER_BACK_END = "megatron_et"
"""Name of the back end of vLLM's weight transfer that receives streams."""


def register() -> None:
    """Register the model, its configuration, its tokenizer and the transfer of weights with vLLM.

    With another version of vLLM than :data:`TESTED` an error is logged and nothing is registered,
    so that vLLM refuses the model, and other models are not affected.
    """
    import vllm

    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in TESTED:
        logging.getLogger("vllm.megatron_ext").error(
            "The plug-in of megatron-et has been tested with vLLM %s, and this is %s. Expert "
            "Threshold models are not registered: install a tested version of vLLM.",
            " and ".join(TESTED),
            vllm.__version__,
        )
        return
    from transformers import AutoConfig, AutoTokenizer
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
    from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer

    AutoConfig.register(ExpertThresholdConfig.model_type, ExpertThresholdConfig, exist_ok=True)
    AutoTokenizer.register(
        ExpertThresholdConfig, slow_tokenizer_class=ExpertThresholdTokenizer, exist_ok=True
    )
    # A name and not the class, which would initialize CUDA in vLLM's main process.
    ModelRegistry.register_model(
        "ExpertThresholdForCausalLM", "megatron_ext.vllm.model:ExpertThresholdForCausalLM"
    )
    WeightTransferEngineFactory.register_engine(
        TRANSFER_BACK_END, "megatron_ext.vllm.weight_transfer", "StreamEngine"
    )


def check_layers(config: Any) -> None:
    """Refuse a model with layers that the plug-in does not have.

    Args:
        config: Configuration of the model in transformers.

    Raises:
        ValueError: The model has Gated DeltaNet layers. vLLM prints the message and ends.
    """
    if config.layer_types is not None:
        raise ValueError(
            "This model has Gated DeltaNet layers (layer_types in config.json), which the "
            "plug-in of megatron-et does not serve. Use transformers, or tools.serve."
        )
