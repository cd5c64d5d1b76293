"""Checks that ranks, parallel sizes, model and batch fit each other, with advice on the fix.

Megatron detects most of these mistakes itself, some of them after minutes, but does not say which
sizes would work. The functions here depend on no global state of Megatron: they take sizes and
return one sentence.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class RunSizes:
    """Sizes that must fit each other; a size of the model is 0 where no flag sets it."""

    ranks: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    layers: int
    stage_layers: int  # of a virtual stage; 0 without interleaving
    heads: int
    kv_heads: int
    ffn: int
    experts: int
    moe_ffn: int
    shared_ffn: int
    sequence: int
    micro_batch: int
    global_batch: int
    even_stages: bool  # all pipeline stages have the same number of layers
    interleaved_batches: bool  # micro-batches go through virtual stages in groups of `pipeline`

    @property
    def model_ranks(self) -> int:
        """Return the number of ranks that share one copy of the model and one sample."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Return the data-parallel size."""
        return max(1, self.ranks // self.model_ranks)

    @property
    def stage_ranks(self) -> int:
        """Return the number of ranks of a pipeline stage, which contains expert-parallel groups."""
        return self.ranks // self.pipeline

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches of a step on each data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.data)


FLAGS = {
    "ranks": "ranks",
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "context": "--context-parallel-size",
    "expert": "--expert-model-parallel-size",
    "expert_tensor": "--expert-tensor-parallel-size",
    "layers": "--num-layers",
    "stage_layers": "--num-layers-per-virtual-pipeline-stage",
    "heads": "--num-attention-heads",
    "kv_heads": "--num-query-groups",
    "ffn": "--ffn-hidden-size",
    "experts": "--num-experts",
    "moe_ffn": "--moe-ffn-hidden-size",
    "shared_ffn": "--moe-shared-expert-intermediate-size",
    "sequence": "--seq-length",
    "micro_batch": "--micro-batch-size",
    "global_batch": "--global-batch-size",
}


@dataclass(frozen=True)
class DivisibilityRule:
    """Rule that one size must be divisible by others.

    Attributes:
        total: Name of the size that is divided.
        parts: Names of the sizes whose product divides it; advice changes the first ones first.
        quantity: Function that returns the divided number if it is not the size `total`.
        factor: Function that returns a further divisor, which no flag changes.
        when: Function that returns whether the rule applies.
    """

    total: str
    parts: tuple[str, ...]
    quantity: Callable[[RunSizes], int] | None = None
    factor: Callable[[RunSizes], int] = lambda layout: 1
    when: Callable[[RunSizes], bool] = lambda layout: True

    def holds(self, layout: RunSizes) -> bool:
        """Return whether the sizes comply with the rule, or the rule does not apply."""
        if not self.when(layout):
            return True
        number = getattr(layout, self.total) if self.quantity is None else self.quantity(layout)
        return number % self.divisor(layout) == 0

    def divisor(self, layout: RunSizes) -> int:
        """Return the product of all sizes and factors that must divide the total."""
        return prod(getattr(layout, part) for part in self.parts) * self.factor(layout)


RULES = (
    DivisibilityRule("ranks", ("tensor", "context", "pipeline")),
    DivisibilityRule("heads", ("tensor",)),
    DivisibilityRule("heads", ("kv_heads",), when=lambda x: x.kv_heads > 0),
    # Fewer KV heads than tensor-parallel ranks are copied, a whole number of times.
    DivisibilityRule("kv_heads", ("tensor",), when=lambda x: x.kv_heads >= x.tensor),
    DivisibilityRule("tensor", ("kv_heads",), when=lambda x: 0 < x.kv_heads < x.tensor),
    DivisibilityRule("ffn", ("tensor",)),
    DivisibilityRule("shared_ffn", ("tensor",)),
    DivisibilityRule("moe_ffn", ("expert_tensor",)),
    DivisibilityRule("experts", ("expert",)),
    DivisibilityRule("ranks", ("expert", "expert_tensor"), quantity=lambda x: x.stage_ranks),
    DivisibilityRule("layers", ("pipeline",), when=lambda x: x.even_stages),
    DivisibilityRule(
        "layers",
        ("stage_layers", "pipeline"),
        when=lambda x: x.even_stages and x.stage_layers > 0,
    ),
    # Causal attention splits a sequence into two chunks for each rank, and sequence parallelism
    # splits these.
    DivisibilityRule("sequence", ("context",), factor=lambda x: 2, when=lambda x: x.context > 1),
    DivisibilityRule(
        "sequence",
        ("tensor", "context"),
        factor=lambda x: 2 if x.context > 1 else 1,
        when=lambda x: x.tensor > 1,
    ),
    DivisibilityRule("global_batch", ("micro_batch",), factor=lambda x: x.data),
    DivisibilityRule(
        "global_batch",
        ("micro_batch", "pipeline"),
        factor=lambda x: x.data,
        when=lambda x: x.interleaved_batches,
    ),
)


def check_layout(args: Namespace, ranks: int) -> None:
    """Refuse a layout that cannot work.

    Args:
        args: Arguments as parsed, before Megatron's validation.
        ranks: World size.

    Raises:
        UserError: Sizes do not fit; the message names them and the nearest sizes that do.
    """
    _check_sizes(args)
    if args.tensor_model_parallel_size > 1 and args.num_experts and not args.sequence_parallel:
        raise UserError(
            "--tensor-model-parallel-size above 1 with experts needs --sequence-parallel. Add it."
        )
    for flag in ("hierarchical_context_parallel_sizes", "hybrid_context_parallel"):
        if getattr(args, flag, None):
            raise UserError(
                f"--{flag.replace('_', '-')} distributes tokens over ranks in an order in which "
                "ties at a cutoff cannot be resolved. Use --context-parallel-size alone."
            )
    if args.num_layers_per_virtual_pipeline_stage and args.pipeline_model_parallel_size == 1:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at "
            "least 2. Raise that one or leave this one out."
        )
    layout = run_sizes(args, ranks)
    for rule in RULES:
        if not rule.holds(layout):
            raise UserError(f"{_violation(rule, layout)}. {_advice(rule, layout)}")
    _check_distributed_muon(args, layout)


def _check_distributed_muon(args: Namespace, layout: RunSizes) -> None:
    """Refuse layouts in which Megatron's distributed Muon cannot distribute the matrices.

    Muon distributes experts over ranks only where it distributes all other matrices too.
    """
    if args.optimizer != "muon" or not args.use_distributed_optimizer:
        return
    if layout.pipeline > 2 and not args.et_norm_scale and args.muon_router == "muon":
        raise UserError(
            "--muon-router muon with --use-distributed-optimizer leaves AdamW no parameter on the "
            "inner of more than 2 pipeline stages, which Megatron cannot save. Use --muon-router "
            "adam, or --pipeline-model-parallel-size 2."
        )
    if not layout.experts:
        return
    copies = layout.stage_ranks // (layout.expert * layout.expert_tensor)
    if layout.data * layout.context == 1 and copies > 1:
        raise UserError(
            f"--use-distributed-optimizer with --optimizer muon cannot distribute experts that "
            f"have {copies} copies where all other parameters have one. Leave it out, or use "
            f"--expert-model-parallel-size {layout.expert * copies}."
        )


def run_sizes(args: Namespace, ranks: int) -> RunSizes:
    """Return the sizes of a run.

    Args:
        args: Arguments as parsed, before Megatron's validation.
        ranks: World size.
    """
    tensor = args.tensor_model_parallel_size
    context, pipeline = args.context_parallel_size, args.pipeline_model_parallel_size
    heads, experts = args.num_attention_heads or 0, args.num_experts or 0
    data = max(1, ranks // (tensor * pipeline * context))
    uneven = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "hybrid_layer_pattern",
    )
    batch = (
        None if getattr(args, "decrease_batch_size_if_needed", False) else args.global_batch_size
    )
    ffn = args.ffn_hidden_size or (0 if args.swiglu else 4 * (args.hidden_size or 0))
    return RunSizes(
        ranks=ranks,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or tensor,
        layers=args.num_layers or 0,
        stage_layers=args.num_layers_per_virtual_pipeline_stage or 0,
        heads=heads,
        kv_heads=(args.num_query_groups or 0) if args.group_query_attention else heads,
        ffn=ffn,
        experts=experts,
        moe_ffn=(args.moe_ffn_hidden_size or ffn) if experts else 0,
        shared_ffn=(args.moe_shared_expert_intermediate_size or 0) if experts else 0,
        sequence=args.seq_length or 0,
        micro_batch=args.micro_batch_size or 1,
        global_batch=batch or (args.micro_batch_size or 1) * data,
        even_stages=not any(getattr(args, name, None) for name in uneven),
        interleaved_batches=bool(
            args.num_layers_per_virtual_pipeline_stage
            or getattr(args, "num_virtual_stages_per_pipeline_rank", None)
        )
        and not getattr(args, "microbatch_group_size_per_vp_stage", None),
    )


def _check_sizes(args: Namespace) -> None:
    """Refuse sizes below 1, by which later checks would divide."""
    for name, flag in FLAGS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
        least = 0 if name == "experts" else 1  # 0 experts: Megatron's dense model
        if name != "ranks" and value is not None and value < least:
            raise UserError(f"{flag} {value} must be at least {least}.")


def _violation(rule: DivisibilityRule, layout: RunSizes) -> str:
    """Return a phrase that names the size that is not divisible, and by which sizes."""
    parts = [f"{FLAGS[part]} {getattr(layout, part)}" for part in rule.parts]
    parts = [text for text, part in zip(parts, rule.parts) if getattr(layout, part) > 1] or parts
    total = getattr(layout, rule.total)
    text = f"{FLAGS[rule.total]} {total}"
    if rule.total == "ranks":
        text = f"{total} ranks" if total > 1 else "1 rank"
        if rule.quantity is not None and layout.pipeline > 1:
            text = f"a pipeline stage of {rule.quantity(layout)} ranks"
        return f"{text} cannot be distributed over {' times '.join(parts)}"
    if rule.total == "global_batch" and layout.data > 1:
        parts.append(f"{layout.data} data-parallel ranks")
    elif (factor := rule.factor(layout)) > 1:
        parts.insert(0, str(factor))
    verb = "is not divisible by" if total >= rule.divisor(layout) else "is too small for"
    return f"{text} {verb} {' times '.join(parts)}"


def _advice(rule: DivisibilityRule, layout: RunSizes) -> str:
    """Return the nearest sizes that comply with all rules, changing one flag at a time."""
    names = [part for part in rule.parts if getattr(layout, part) > 1] or list(rule.parts)
    names.append(rule.total)
    if rule.total == "global_batch" and layout.data > 1:
        names.append("ranks")
    # If no single change satisfies all rules, the advice is on the first broken rule alone.
    largest = 2 * max(rule.divisor(layout), *(getattr(layout, name) for name in names))
    phrases = _working_sizes(names, layout, RULES, largest) or _working_sizes(
        names, layout, (rule,), largest
    )
    text = ", or ".join(phrases)
    text = text if text.startswith("start") else f"use {text}"
    return f"{text[0].upper()}{text[1:]}."


def _working_sizes(
    names: Sequence[str], layout: RunSizes, rules: Sequence[DivisibilityRule], largest: int
) -> list[str]:
    """Return a phrase for each size that has values with which the rules hold."""
    phrases = []
    for name in names:

        def works(value: int, name: str = name) -> bool:
            changed = replace(layout, **{name: value})  # type: ignore[arg-type]
            if name == "tensor" and layout.expert_tensor == layout.tensor:
                changed = replace(changed, expert_tensor=value)  # its default is the tensor size
            return all(rule.holds(changed) for rule in rules)

        if values := nearest(getattr(layout, name), works, largest):
            choice = " or ".join(map(str, values))
            start = "start 1 rank" if choice == "1" else f"start {choice} ranks"
            phrases.append(start if name == "ranks" else f"{FLAGS[name]} {choice}")
    return phrases


def nearest(value: int, works: Callable[[int], bool], largest: int) -> list[int]:
    """Return the nearest smaller and larger numbers that work.

    Args:
        value: Number that does not work.
        works: Function that returns whether a number works.
        largest: Largest number to try; the smallest is 1.

    Returns:
        At most one number below `value` and one above.
    """
    smaller = next((n for n in range(value - 1, 0, -1) if works(n)), None)
    larger = next((n for n in range(value + 1, largest + 1) if works(n)), None)
    return [n for n in (smaller, larger) if n is not None]
