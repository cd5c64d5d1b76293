"""Choice of the device on which Megatron runs.

`activate` is called before anything of Megatron is imported. With CUDA it leaves torch unchanged;
without CUDA it puts the CPU device behind `torch.cuda`, so that Megatron's trainer runs unmodified.
"""

from megatron_ext.devices.cpu import activate, device_default_args, is_cpu_device

__all__ = ["activate", "device_default_args", "is_cpu_device"]
