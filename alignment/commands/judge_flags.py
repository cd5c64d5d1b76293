"""The flags of `et-align annotate`, and those of a judge for whatever asks one."""

import argparse
import math
from collections.abc import Sequence
from urllib.parse import urlsplit

from alignment.endpoints.api_key import API_KEY_VARIABLE
from alignment.endpoints.retry import MAX_WAIT
from alignment.judges.formats.scale import check_scale
from alignment.judges.kinds.endpoint import ENDPOINT_TIMEOUT
from alignment.judges.kinds.function_judge import FUNCTION_TIMEOUT
from alignment.judges.kinds.registry import JUDGE_KINDS, is_judge_file
from megatron_ext.errors import ToolParser, UserError

Options = argparse.Namespace


def parse(argv: Sequence[str] | None, doc: str) -> Options:
    """Read and check the flags.

    Raises:
        UserError: naming the flag.
    """
    options = _parser(doc).parse_args(argv)
    check(options)
    return options


def check(options: Options) -> None:
    """Check the flags of a judge.

    Raises:
        UserError: naming the flag.
    """
    _check_judge(options)
    function = options.judge.startswith("function:")
    if options.timeout is None:
        options.timeout = FUNCTION_TIMEOUT if function else ENDPOINT_TIMEOUT
    if options.scale and not function:
        raise UserError("--scale is for --judge function:...: other judges score from 0 to 9")
    if options.scale:
        check_scale(options.scale, "--scale")
    for name in ("samples", "max_tokens", "concurrency", "tries", "requests_per_minute",
                 "tokens_per_minute", "timeout"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    for name in ("temperature", "first_wait", "max_wait", "price_in", "price_out"):
        value = getattr(options, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value} must not be negative")
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max-failed {options.max_failed} is a share: from 0 to 1")
    program = is_judge_file(options.judge) or options.judge.partition(":")[0] in JUDGE_KINDS
    if options.samples > 1 and options.temperature == 0 and not program:
        raise UserError(
            f"--samples {options.samples} at --temperature 0 would pay for the same answer again: "
            "give a temperature, 0.7 say"
        )


def _check_judge(options: Options) -> None:
    judge = options.judge
    if is_judge_file(judge) or judge.partition(":")[0] in JUDGE_KINDS:
        for name in ("model", "generate", "rubrics", "expected_score", "cache", "template"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is for a judge at an address, and --judge is {judge}")
        return
    try:
        parts = urlsplit(judge)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise UserError(
            f"--judge {judge} is neither http://HOST:PORT/v1, nor rule, rule:NAME, "
            "function:FILE.py:NAME or FILE.yaml."
        )
    if parts.username or parts.password:
        raise UserError(
            f"--judge must not hold a key, which others could read: set {API_KEY_VARIABLE} instead"
        )
    options.judge = judge.rstrip("/")
    if not options.model:
        raise UserError("--judge at an address needs --model: the name that the endpoint serves")
    if options.rubrics and (options.generate or options.samples > 1 or options.template):
        raise UserError("--rubrics goes without --generate, --template and several --samples")
    if options.expected_score and options.rubrics:
        raise UserError("--expected-score is for judging, and --rubrics does not judge")
    if options.expected_score and options.generate:
        raise UserError("--expected-score is for judging, and --generate does not judge")
    if options.rule_text:
        raise UserError("--rule-text is for --judge rule")


def _parser(doc: str) -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align annotate",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("what is asked").add_argument
    add("--input", required=True, metavar="FILE",
        help="responses or pairs (--generate, --rubrics: prompts)")
    add("--output", required=True, metavar="FILE",
        help="verdicts to write (--generate: responses; --rubrics: prompts)")
    add("--overwrite", action="store_true", help="replace an --output that was made otherwise")
    add("--generate", action="store_true", help="answer prompts instead of judging")
    add("--rubrics", action="store_true",
        help="write what a good answer to each prompt has, for judges that are shown rubrics")
    add("--orders", choices=["both", "given", "swapped"], default="both",
        help="in which the responses of a pair are shown (%(default)s)")
    # fmt: on
    add_judge(parser)
    return parser


def add_judge(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add what makes a judge: who is asked, in what form, how it answers, how fast, at what price.

    Args:
        required: there is no use without one.
    """
    # fmt: off
    add = parser.add_argument_group("who is asked").add_argument
    add("--judge", required=required, metavar="URL",
        help="http://HOST:PORT/v1 of an OpenAI-compatible endpoint, rule, rule:NAME, or "
        "function:FILE.py:NAME, which takes a Response and gives a score, or FILE.yaml, which "
        "describes a judge of any kind")
    add("--model", default="", metavar="NAME", help="as the endpoint calls it")
    add("--revision", default="", metavar="TEXT",
        help="of the model: answers are kept apart by it where one name serves several")
    add("--api-key-variable", default=API_KEY_VARIABLE, metavar="NAME",
        help="environment variable that holds the endpoint's key, if it wants one (%(default)s)")
    add("--rule-text", metavar="FILE", help="text that --judge rule holds for fluent: JSONL, "
        "Parquet, plain")
    add("--scale", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="Scale of a function's scores, which are mapped to 0 to 9. Default: 0 9.")
    add = parser.add_argument_group("how it is asked").add_argument
    add("--samples", type=int, default=1, metavar="N", help="answers a question (%(default)s)")
    add("--template", metavar="NAME",
        help="of the judge's prompt: pointwise-rubric, pairwise-rubric or a file (plain)")
    add("--thinking", choices=["none", "asked", "opened"], default="none",
        help="the judge is asked to think in <think> before its label; opened: the model's chat "
        "template has begun it (%(default)s)")
    add("--expected-score", action="store_true",
        help="the mean of labels 0 to 9 under the log-probabilities where the label stands")
    add = parser.add_argument_group("how it answers").add_argument
    add("--temperature", type=float, default=0.0, help="(%(default)s)")
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--max-tokens", type=int, default=8192, help="of an answer with its thinking (%(default)s)")
    add("--reasoning-effort", metavar="LEVEL", help="low, medium or high, if the model has it")
    add("--seed", type=int, help="of the first sample; the second has the next, and so on")
    add = parser.add_argument_group("how fast, and what when it fails").add_argument
    add("--concurrency", type=int, default=32, metavar="N", help="calls at a time (%(default)s)")
    add("--requests-per-minute", type=float, metavar="N")
    add("--tokens-per-minute", type=float, metavar="N", help="of prompts and answers")
    add("--timeout", type=float, metavar="SECONDS",
        help=f"Time limit of one call. Default: {ENDPOINT_TIMEOUT:g} for an endpoint, "
        f"{FUNCTION_TIMEOUT:g} for a function.")
    add("--tries", type=int, default=7, metavar="N", help="of a call before it fails (%(default)s)")
    add("--first-wait", type=float, default=1.0, metavar="SECONDS",
        help="after a failed try at most, then twice as long each time (%(default)s)")
    add("--max-wait", type=float, default=MAX_WAIT, metavar="SECONDS",
        help="Longest wait that the endpoint may ask for; a longer one ends the run. Default: "
        "%(default)s.")
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="Share of the questions that may end without a result, for any reason; more end the "
        "command with status 3. Default: %(default)s.")
    add = parser.add_argument_group("what it costs").add_argument
    add("--price-in", type=float, metavar="DOLLARS", help="a million tokens of prompts")
    add("--price-out", type=float, metavar="DOLLARS", help="a million tokens of answers")
    add("--cache", metavar="FILE",
        help="keeps the answers; runs may share it in turn (OUTPUT.answers.jsonl)")
    # fmt: on
