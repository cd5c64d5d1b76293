"""Checks of the datasets of a run before they are built: blends, weights, splits and length.

Megatron detects most mistakes at the first evaluation, at the end of training or never: it repeats
a single dataset and a blend with weights as often as necessary, but reads a blend without weights
once, and counts the epochs of an empty split indefinitely.
"""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.checkpoint import file_digest
from megatron_ext.data.blend_words import number_of, parse_blend
from megatron_ext.errors import UserError
from megatron_ext.training.run_progress import RunProgress

_KINDS = ("training", "validation", "test")
_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
SOURCES = ("data_path", "data_args_path", *_PER_SPLIT, "per_split_data_args_path")
_NO_VALIDATION = "give --eval-iters 0 to train without validation"


class Blend(NamedTuple):
    """Datasets from which one split is drawn.

    Attributes:
        flag: Flag that names the datasets.
        kind: Kind of the split, one of `_KINDS`.
        prefixes: Paths of the datasets without the suffixes of their files.
        weights: Weight of each dataset, or None to read each once.
        part: Begin and end of the split, as shares of the documents of each dataset.
    """

    flag: str
    kind: str
    prefixes: list[str]
    weights: list[float] | None
    part: tuple[float, float] = (0.0, 1.0)

    @property
    def is_read_once(self) -> bool:
        """Return whether Megatron builds at most one epoch of the blend."""
        return self.weights is None and len(self.prefixes) > 1


def blends(args: Namespace) -> list[Blend]:
    """Return the blend of every split that the flags describe, training first.

    Raises:
        UserError: Flags contradict each other, a weight is not a positive number, or there are no
            training or validation data.
    """
    sources = [_flag(name) for name in SOURCES if getattr(args, name)]
    per_split = [flag for flag in sources if flag in map(_flag, _PER_SPLIT)]
    if not sources:
        raise UserError("No data. Give --data-path, or --train-data-path and --valid-data-path.")
    if len(sources) > 1 and sources != per_split:
        raise UserError(f"{' and '.join(sources)} both name training data. Give only one of them.")
    if sources[0] in ("--data-path", "--data-args-path"):
        words = args.data_path or _read(args.data_args_path, sources[0]).split()
        prefixes, weights = parse_blend(words, sources[0])
        matrix = _split_matrix(args)
        result = [
            Blend(sources[0], kind, prefixes, weights, part)
            for kind, part in zip(_KINDS, matrix, strict=True)
            if part is not None
        ]
    else:
        if args.split is not None:
            raise UserError(
                f"--split {args.split} divides --data-path, but {sources[0]} names the data of "
                "each split. Leave --split out."
            )
        result = [
            Blend(flag, kind, *parse_blend(words, flag))
            for kind, flag, words in zip(_KINDS, *_per_split(args), strict=True)
            if words
        ]
    _check_kinds(result, args)
    return result


def data_digest(args: Namespace) -> str | None:
    """Return the SHA-256 digest of the indices of all datasets of a run, None with mock data.

    An index contains the length of every document, and no text. Two runs with the same flags and
    this digest read samples at the same positions, in the same order.
    """
    if args.mock_data:
        return None
    prefixes = dict.fromkeys(prefix for blend in blends(args) for prefix in blend.prefixes)
    digests = [file_digest(Path(f"{prefix}.idx")) for prefix in prefixes]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_mock_split(args: Namespace) -> None:
    """Refuse `--mock-data` without a split for validation.

    Raises:
        UserError: There is nothing to train or to evaluate on.
    """
    if args.split is not None:
        parts = zip(_KINDS, _split_matrix(args), strict=True)
        _check_kinds([Blend("--split", k, [], None, p) for k, p in parts if p is not None], args)


def check_documents(splits: Sequence[Blend], args: Namespace) -> None:
    """Refuse a split for which too few documents remain.

    Args:
        splits: Blends of all splits.
        args: Validated arguments of the run.

    Raises:
        UserError: The message names the split and the dataset.
    """
    for blend in splits:
        evaluates = bool(args.eval_iters or args.full_validation)
        once = blend.is_read_once or (blend.kind != "training" and not evaluates)
        once |= blend.kind == "validation" and args.full_validation
        for prefix in blend.prefixes:
            tokens = _tokens(prefix, blend.part)
            if tokens > (args.seq_length if once else 0):
                continue
            source = f"--split {args.split}" if blend.part != (0.0, 1.0) else blend.flag
            fix = "Give another --split." if blend.part != (0.0, 1.0) else "Give more data."
            raise UserError(
                f"{source} leaves {tokens:,} tokens of {prefix} for {blend.kind}, fewer than a "
                f"sample of --seq-length {args.seq_length} needs. {fix}"
            )


def check_enough_samples(args: Namespace, progress: RunProgress) -> None:
    """Refuse a blend that is read once and has fewer samples than the run reads.

    Args:
        args: Validated arguments of the run.
        progress: Progress of the checkpoint from which training resumes.

    Raises:
        UserError: The message names the flag, and the numbers of existing and needed samples.
    """
    if args.mock_data or args.skip_train:
        return
    steps = progress.last_step(args)
    train = args.train_samples or progress.samples_after(steps)
    interval = args.eval_interval
    evaluations = steps // interval - min(progress.iteration, steps) // interval + 1
    valid = progress.validation_samples + evaluations * _validation_batch(args)
    needed = {"training": train, "validation": valid, "test": _validation_batch(args)}
    for blend in blends(args):
        if not blend.is_read_once or (blend.kind == "validation" and args.full_validation):
            continue
        samples = sum(
            (_tokens(prefix, blend.part) - 1) // args.seq_length for prefix in blend.prefixes
        )
        if samples < needed[blend.kind]:
            limiting_flag = "--train-iters" if blend.kind == "training" else "--eval-iters"
            raise UserError(
                f"{blend.flag}: datasets without weights are read once, and their {samples:,} "
                f"samples are fewer than the {needed[blend.kind]:,} of {blend.kind}. Give a weight "
                f"before every dataset, or lower {limiting_flag}."
            )


def _validation_batch(args: Namespace) -> int:
    """Return the samples of one evaluation."""
    return 0 if args.full_validation else args.eval_iters * args.eval_global_batch_size


def _check_kinds(splits: Sequence[Blend], args: Namespace) -> None:
    """Refuse a run without the training or validation data that it needs."""
    kinds = {blend.kind: blend for blend in splits}
    if "training" not in kinds and not args.skip_train:
        raise UserError("No training data. Give --train-data-path, or --split with a first share.")
    evaluates = bool(args.eval_iters or args.full_validation)
    if evaluates and "validation" not in kinds:
        flag = splits[0].flag
        where = f"--split {args.split}" if args.split is not None else f"{flag} alone"
        fix = (
            "Give it a second share above 0" if args.split is not None else "Give --valid-data-path"
        )
        raise UserError(f"No validation data with {where}. {fix}, or {_NO_VALIDATION}.")
    if args.full_validation and kinds["validation"].weights is not None:
        raise UserError(
            f"--full-validation reads every dataset once, and {kinds['validation'].flag} has "
            "weights. Leave out one of the two."
        )


def _split_matrix(args: Namespace) -> list[tuple[float, float] | None]:
    """Return begin and end of each split as shares of the documents, None for an empty split."""
    words = [word.strip() for word in str(args.split).split(",")]
    numbers = [number_of(word) for word in words]
    if (
        not 1 <= len(words) <= len(_KINDS)
        or any(n is None or not math.isfinite(n) or n < 0 for n in numbers)
        or not any(numbers)
    ):
        raise UserError(
            f"--split {args.split} is invalid. Give the shares of training, validation and test "
            "data, such as 969,30,1."
        )
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))


def _per_split(args: Namespace) -> tuple[list[str], list[Sequence[str]]]:
    """Return the flags and the words of training, validation and test data."""
    names = ("train", "valid", "test")
    file = args.per_split_data_args_path
    if file is None:
        flags = [f"--{name}-data-path" for name in names]
        return flags, [getattr(args, f"{name}_data_path") or [] for name in names]
    flag = f"--per-split-data-args-path {file}"
    text = _read(file, flag)
    try:
        contents = json.loads(text)
        values = [contents[name] for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} must be a JSON object with train, valid and test.") from error
    return [flag] * 3, [v.split() if isinstance(v, str) else v or [] for v in values]


def _tokens(prefix: str, part: tuple[float, float]) -> int:
    """Return the tokens of a dataset's documents in a split, as Megatron cuts it."""
    dataset = IndexedDataset(prefix)  # closes its index file when it is deleted
    count = len(dataset.sequence_lengths)
    begin, end = (round(share * float(count)) for share in part)
    return int(dataset.sequence_lengths[begin:end].sum())


def _read(file: str, flag: str) -> str:
    """Return the text of a file that a flag names."""
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {file} cannot be read: {error}") from error


def _flag(name: str) -> str:
    """Return the flag of an argument."""
    return "--" + name.replace("_", "-")
