"""Tests of tools.inspect_routing on trained models of several routers, and of refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.inspection.routed_text import pieces
from megatron_ext.inspection.windows import Domain
from tests.distributed import run_ranks
from tests.hf import models
from tests.inference.checkpoint import MAX_LENGTH, run_dir  # noqa: F401
from tools import inspect_routing

WORDS = {"first": "ba kélo müni rasu", "second": "vozi téba zizi su"}


def write_domains(folder: Path) -> list[str]:
    """Return the flags of a JSONL domain and of a domain of two plain files."""
    rows = [json.dumps({"text": f"{WORDS['first']} " * n}) for n in (3, 40, 1)]
    (folder / "first.jsonl").write_text("\n".join(rows) + "\n")
    for number in (1, 2):
        (folder / f"second{number}.txt").write_text(f"{WORDS['second']}\n" * 30 * number)
    return domains(folder)


def domains(folder: Path) -> list[str]:
    """Return the flags of the domains that `write_domains` wrote."""
    return [
        *("--domain", f"first={folder / 'first.jsonl'}"),
        *("--domain", f"second={folder / 'second1.txt'}"),
        *("--domain", f"second={folder / 'second2.txt'}"),
    ]


def result(output: Path) -> SimpleNamespace:
    return SimpleNamespace(
        figures=json.loads((output / "routing.json").read_text()),
        page=(output / "routing.html").read_text(),
        files={file.name: file.read_bytes()[:4] for file in output.iterdir()},
    )


def on_one_rank(run: Path, folder: Path) -> SimpleNamespace:
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.text_routing import route_text

    facts = SimpleNamespace(folder=folder)
    flags = ["--load", str(run), *write_domains(folder)]
    text = folder / "text.txt"
    text.write_text("ba <b>kélo</b> müni\n" * 20)
    inspect_routing.main([*flags, "--output", str(folder / "et"), "--text-file", str(text)])
    facts.et = result(folder / "et")

    trained = load_model(run)
    facts.text_tokens = len(trained.tokenizer.tokenize(text.read_text()))
    tokens = list(range(40, 90))
    routing = route_text(trained, tokens)
    facts.signs = torch.equal(routing.margins > 0, routing.maps)
    facts.by_hand = by_hand(trained, tokens, routing)
    facts.tokens = {
        name: [w.tokens for w in Domain(name, paths, "text").windows(trained.tokenizer, MAX_LENGTH)]
        for name, paths in (
            ("first", [str(folder / "first.jsonl")]),
            ("second", [str(folder / "second1.txt"), str(folder / "second2.txt")]),
        )
    }
    ids = trained.tokenizer.tokenize("kélo 🙂 müni" * 30)
    facts.pieces = "".join(pieces(trained.tokenizer, ids)), trained.tokenizer.detokenize(ids)

    facts.of_first_only = specialise(trained, *map(set, map(flat, facts.tokens.values())))
    words = [*flags, "--output", "x", "--max-tokens", "100"]
    parsed = inspect_routing._parser().parse_args(words, inspect_routing.InspectFlags())
    domains = inspect_routing._domains(parsed)
    inspect_routing.inspect(trained, {}, domains, folder / "made", max_tokens=100)
    facts.made = result(folder / "made")
    return facts


def flat(windows: list[list[int]]) -> list[int]:
    return [token for window in windows for token in window]


def by_hand(trained, tokens, routing) -> tuple[float, float]:
    """Return the largest differences of margins from the gates and of losses from log-softmax."""
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.moe.router import routers_of

    routers = routers_of([trained.module])
    gates = []
    hooks = [r.register_forward_hook(lambda *call: gates.append(call[2][0])) for r in routers]
    full = full_logits(trained, torch.tensor([tokens]))
    assert full is not None
    logits = full[0].double()
    for hook in hooks:
        hook.remove()
    off = 0.0
    for router, gate, margins, selection in zip(routers, gates, routing.margins, routing.maps):
        expected = torch.logit(gate.double()) - router.thresholds.value()
        off = max(off, float((expected - margins)[selection].abs().max()))
    predicted = [-float(logits[i - 1].log_softmax(-1)[tokens[i]]) for i in range(1, len(tokens))]
    assert torch.isnan(routing.losses[0])
    return off, float((routing.losses[1:] - torch.tensor(predicted)).abs().max())


def specialise(trained, first: set[int], second: set[int]) -> set[int]:
    """Make logits depend on the token alone, and return the tokens of the first domain only.

    In the first MoE layer experts 0 to 3 take the tokens that only the first domain has, the
    others those of the second; in the last MoE layer every expert takes everything.
    """
    from megatron_ext.moe.router import routers_of

    for name, parameter in trained.module.named_parameters():
        if "linear_proj" in name or "linear_fc2" in name:  # nothing is added to the embedding
            parameter.zero_()
    embedding = trained.model.embedding.word_embeddings.weight
    embedding.zero_()
    embedding[:, 1] = 1.0
    embedding[sorted(first - second), 0] = 1.0
    embedding[sorted(second - first), 0] = -1.0
    by_token, even = routers_of([trained.module])
    by_token.weight.zero_()
    by_token.weight[:4, 0], by_token.weight[4:, 0] = 1.0, -1.0
    even.weight.zero_()
    even.weight[:, 1] = 1.0
    for router in (by_token, even):
        router.thresholds.average.zero_()
    return first - second


@pytest.fixture(scope="module")
def facts(run_dir, tmp_path_factory) -> SimpleNamespace:  # noqa: F811
    [results] = run_ranks(on_one_rank, 1, run_dir, tmp_path_factory.mktemp("inspect"))
    return results


PICTURES = ["domains", "specialisation", "margins", "fan_out_by_loss", "coactivation"]


@pytest.mark.slow
def test_inspect_routing_writes_page_statistics_and_pictures_only(facts):
    names = {"routing.html", "routing.json", *(f"{name}.png" for name in PICTURES)}
    assert set(facts.et.files) == names
    assert all(facts.et.files[f"{name}.png"] == b"\x89PNG" for name in PICTURES)
    assert "text.txt" in facts.et.page
    assert facts.et.page.count('<span tabindex="-1"') == facts.text_tokens > MAX_LENGTH
    assert facts.et.figures["layers"] == [1, 3] and facts.et.figures["iteration"] == 40


@pytest.mark.slow
def test_windows_contain_every_token_of_a_domain_once(facts):
    for name, windows in facts.tokens.items():
        assert {len(window) for window in windows[:-1]} == {MAX_LENGTH}
        assert facts.et.figures["domains"][name]["tokens"] == len(flat(windows))
    ends = [flat(windows).count(flat(windows)[-1]) for windows in facts.tokens.values()]
    assert ends == [3, 2]  # documents


@pytest.mark.slow
def test_margins_and_losses_match_gates_and_log_softmax(facts):
    assert facts.signs
    assert max(facts.by_hand) < 1e-4


@pytest.mark.slow
def test_pieces_of_a_long_text_concatenate_to_it(facts):
    joined, decoded = facts.pieces
    assert joined == decoded and "🙂" in decoded


@pytest.mark.slow
def test_specialization_detects_experts_of_a_domain(facts):
    results = facts.made.figures
    assert results["tokens"] == 200  # --max-tokens of each
    by_token, even = results["specialisation"]["nmi"]
    assert by_token > 0.99 and even < 0.01
    scores = np.array(results["specialisation"]["experts"])
    assert (scores[0] > 0.99).all() and (scores[1] < 0.01).all()
    share = np.mean([token in facts.of_first_only for token in flat(facts.tokens["first"])[:100]])
    assert 0.1 < share < 1
    assert results["domains"]["first"]["share"][0] == pytest.approx([share] * 4 + [0] * 4)
    assert results["domains"]["second"]["share"][1] == [1.0] * 8
    assert "first (its first 64 tokens)" in facts.made.page


def on_two_ranks(run: Path, folder: Path) -> None:
    text = ["--text-file", str(folder / "text.txt"), "--pipeline-model-parallel-size", "2"]
    output = ["--output", str(folder / "two")]
    inspect_routing.main(["--load", str(run), *domains(folder), *text, *output])


@pytest.mark.slow
def test_statistics_are_equal_on_two_pipeline_stages(facts, run_dir):  # noqa: F811
    run_ranks(on_two_ranks, 2, run_dir, facts.folder)
    two = result(facts.folder / "two")
    assert two.figures == facts.et.figures
    assert set(two.files) == set(facts.et.files)


def convert(folder: Path, name: str) -> None:
    from tools import convert_checkpoint

    models.make(name, folder / name)
    models.add_tokenizer(folder / name, models.VOCAB)
    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / name)]
    convert_checkpoint.main([*flags, "--save", str(folder / f"{name}-megatron")])


def other_models(folder: Path) -> SimpleNamespace:
    from megatron_ext.inference.loading import load_model
    from megatron_ext.moe.router import routers_of

    facts = SimpleNamespace()
    # Not w1, the end of the document, nor words that begin so: the tokenizer would cut them.
    text = ["--text", " ".join(f"w{200 + i * 7 % 300}" for i in range(150))]
    for name in ("mixtral", "llama"):
        flags = ["--load", str(folder / f"{name}-megatron"), "--output", str(folder / "out")]
        try:
            inspect_routing.main([*flags, *text])
        except UserError as error:
            facts.refusal = name, str(error)
    facts.mixtral = result(folder / "out")
    router = routers_of([load_model(folder / "mixtral-megatron").module])[0]
    logits = torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(0)) * 2
    bias = torch.tensor([0.4, -0.3, 0.0, 0.2])
    facts.kinds = {}
    for kind, score in {
        "softmax": lambda x: x,
        "sigmoid": lambda x: torch.sigmoid(x) + bias,
        "sqrtsoftplus": lambda x: torch.log1p(x.exp()).sqrt() + bias,
        "quantile_balancing": lambda x: x - bias,
    }.items():
        router.score_function = "softmax" if kind == "quantile_balancing" else kind
        router.expert_bias = bias if kind in ("sigmoid", "sqrtsoftplus") else None
        router.routing_type = kind if kind == "quantile_balancing" else "none"
        router.qb_beta = bias
        scores = score(logits[:, 0])
        expected = torch.empty_like(scores)
        for expert in range(4):  # the second best of the three others
            others = scores[:, [e for e in range(4) if e != expert]]
            expected[:, expert] = scores[:, expert] - others.sort(descending=True).values[:, 1]
        margins = router.margins(logits[:, 0])
        chosen = router.routing(logits)[1].bool()
        facts.kinds[kind] = (
            float((margins - expected).abs().max()),
            torch.equal(margins > 0, chosen),
        )
    return facts


@pytest.mark.slow
def test_token_choice_margins_and_refusal_of_dense_models(tmp_path):
    for name in ("mixtral", "llama"):  # Megatron parses arguments once in a process
        run_ranks(convert, 1, tmp_path, name)
    [facts] = run_ranks(other_models, 1, tmp_path)
    for kind, (difference, agrees) in facts.kinds.items():
        assert difference < 1e-5 and agrees, kind
    name, message = facts.refusal
    assert name == "llama" and "dense" in message
    figures = facts.mixtral.figures
    assert figures["router"] == "token-choice" and figures["tokens"] == 150
    for layer in range(3):
        assert figures["fan_out_histogram"][layer] == [0, 0, 150, 0, 0]
        counts = figures["margins"][layer]["counts"]
        assert sum(counts[len(counts) // 2 :]) == 2 * 150  # as many above 0 as chosen
    assert "specialisation.png" not in facts.mixtral.files  # of one domain


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to route"),
        (["--domain", "news"], "NAME=FILE"),
        (["--domain", "news=missing.jsonl"], "--domain news missing.jsonl does not exist"),
        (["--text-file", "missing.txt"], "--text-file missing.txt cannot be read"),
        (["--text", "a", "--max-tokens", "0"], "--max-tokens"),
        (["--text", "a"], "no-run is not a folder"),
    ],
)
def test_inspect_routing_refuses_wrong_flags_before_loading(flags, message):
    with pytest.raises(UserError, match=message):
        inspect_routing.main(["--load", "no-run", "--output", "out", *flags])


def test_domain_names_a_malformed_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    domain = Domain("a", [str(tmp_path / "a.jsonl")], "text")
    with pytest.raises(UserError, match="line 2: no key 'text'"):
        list(domain.windows(SimpleNamespace(eod=0, tokenize=lambda text: [1]), 8))
