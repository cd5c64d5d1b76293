"""Compute unigram and bigram losses of an indexed dataset, in nats per token.

    python -m tools.ngram_baseline --train-data PREFIX --valid-data PREFIX

Both models are fitted to the whole training set. The bigram model is interpolated modified
Kneser-Ney with Chen and Goodman's discounts (1999, section 4.1.6), the strongest of the common ways
to smooth bigrams. The unigram model adds one to every count. A dataset is one stream of tokens, its
documents concatenated, as a language model reads it. Every token of the validation stream except
the first, which has no context, is predicted once.
"""

import argparse
import json
import sys

from megatron_ext.data.tokenizer_identity import manifest_tokenizer
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.evaluation.ngram_losses import baseline_losses, read_stream
from megatron_ext.quiet import quiet_warnings


def _check_same_tokenizer(train: str, valid: str, vocab_size: int) -> None:
    """Check that the datasets' manifests, if there are any, match each other and the flag."""
    counted, predicted = manifest_tokenizer(train), manifest_tokenizer(valid)
    digests = {made["sha256"] for made in (counted, predicted) if made.get("sha256")}
    if len(digests) > 1:
        raise UserError(
            f"--valid-data {valid} and --train-data {train} were made with different tokenizers. "
            "Preprocess one of them again with the tokenizer of the other."
        )
    size = counted.get("vocab_size")
    if size not in (None, vocab_size):
        raise UserError(
            f"--vocab-size {vocab_size} does not match the tokenizer of --train-data {train}, "
            f"which has {size} entries. Set it to {size}."
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = ToolParser(
        prog="python -m tools.ngram_baseline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--train-data", required=True, metavar="PREFIX",
        help="Prefix of the indexed dataset that the models are fitted to.")
    add("--valid-data", required=True, metavar="PREFIX",
        help="Prefix of the indexed dataset whose loss is computed.")
    add("--vocab-size", type=int, metavar="N",
        help="Number of entries of the tokenizer. Default: that of the manifest of --train-data.")
    # fmt: on
    options = parser.parse_args(argv)
    if options.vocab_size is None:
        options.vocab_size = manifest_tokenizer(options.train_data).get("vocab_size")
        if options.vocab_size is None:
            raise UserError(
                f"--train-data {options.train_data} has no manifest of preprocess_data that says "
                "how many entries its tokenizer has. Give --vocab-size."
            )
    with quiet_warnings():  # of the import of Megatron
        losses, tokens = _losses(options.train_data, options.valid_data, options.vocab_size)
    json.dump({**losses, "tokens": tokens}, sys.stdout)
    print()


def _losses(train_data: str, valid_data: str, vocab_size: int) -> tuple[dict[str, float], int]:
    """Return the losses and the number of tokens that they are means of."""
    _check_same_tokenizer(train_data, valid_data, vocab_size)
    train, valid = read_stream(train_data), read_stream(valid_data)
    highest = int(max(train.max(), valid.max()))
    if highest >= vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is too small: a dataset contains token {highest}. "
            "Set it to the number of entries of the tokenizer."
        )
    return baseline_losses(train, valid, vocab_size), len(valid) - 1


if __name__ == "__main__":
    run_tool(main)
