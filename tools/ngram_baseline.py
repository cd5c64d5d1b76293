"""How well counting does: unigram and bigram losses of an indexed dataset, in nats per token.

    python -m tools.ngram_baseline --train-data PREFIX --valid-data PREFIX --vocab-size N

Both models are fitted to the whole training set. The bigram is interpolated modified Kneser-Ney
with Chen and Goodman's discounts (1999, section 4.1.6), the strongest of the common ways to smooth
a bigram; the unigram adds one to every count. A data set is one stream of tokens with documents end
to end, as a language model reads it; every token of the validation stream but the first, which has
nothing before it, is predicted once.
"""

import argparse
import json
import sys

from megatron_ext.data.tokenizer_identity import manifest_tokenizer
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.evaluation.ngram_losses import baseline_losses, read_stream


def _check_same_tokenizer(train: str, valid: str, vocab_size: int) -> None:
    """Compare the datasets' manifests, where there are any, with each other and the flag."""
    counted, predicted = manifest_tokenizer(train), manifest_tokenizer(valid)
    digests = {made["sha256"] for made in (counted, predicted) if made.get("sha256")}
    if len(digests) > 1:
        raise UserError(
            f"--valid-data {valid} was made with another tokenizer than --train-data {train}: make "
            "one of them again with the other's tokenizer"
        )
    size = counted.get("vocab_size")
    if size not in (None, vocab_size):
        raise UserError(
            f"--vocab-size {vocab_size}: the tokenizer of --train-data {train} has {size} entries: "
            f"give {size}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(
        prog="python -m tools.ngram_baseline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--train-data", required=True, metavar="PREFIX", help="indexed dataset to count in")
    add("--valid-data", required=True, metavar="PREFIX", help="indexed dataset to predict")
    add("--vocab-size", type=int, required=True, metavar="N", help="entries of the tokenizer")
    options = parser.parse_args(argv)
    _check_same_tokenizer(options.train_data, options.valid_data, options.vocab_size)
    train, valid = read_stream(options.train_data), read_stream(options.valid_data)
    highest = int(max(train.max(), valid.max()))
    if highest >= options.vocab_size:
        raise UserError(f"--vocab-size {options.vocab_size} is too small: a token is {highest}")
    losses = baseline_losses(train, valid, options.vocab_size)
    json.dump({**losses, "tokens": len(valid) - 1}, sys.stdout)
    print()


if __name__ == "__main__":
    run_tool(main)
