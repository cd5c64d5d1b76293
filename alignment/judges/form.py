"""How a judge is asked for a verdict, and what counts as one: a template and a parser together."""

import json
from hashlib import sha256

from alignment.commands.judge_flags import Options
from alignment.judges.formats.parsing import Parser
from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.questions import Form
from megatron_ext.errors import UserError


def form_for(options: Options, pairwise: bool) -> Form:
    """The form for responses, or for pairs.

    Raises:
        UserError: the template is for something else.
    """
    kind = "pairwise" if pairwise else "pointwise"
    thinks = options.thinking != "none"
    template = judge_prompt(options.template or kind, thinks)
    if template.kind != kind:
        holds = "pairs" if pairwise else "responses"
        raise UserError(
            f"--template {options.template} is {template.kind}, and --input holds {holds}: give a "
            f"{kind} one"
        )
    parser = Parser(pairwise, thinks, options.thinking == "opened")
    depends = json.dumps([template.identity, parser.identity]).encode()
    return Form(template.messages, parser.read, Parser(pairwise).read, sha256(depends).hexdigest())
