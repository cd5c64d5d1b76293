"""One place that decides which device Megatron runs on.

`activate` is called before anything of Megatron is imported. With CUDA it leaves torch alone;
without, it puts the CPU device behind `torch.cuda`, so that Megatron's trainer runs unmodified.
"""

from megatron_ext.devices.cpu import activate, cpu_default_args, is_cpu_device

__all__ = ["activate", "cpu_default_args", "is_cpu_device"]
