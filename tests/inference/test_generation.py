"""Tests of generation: with a cache, in batches, on several ranks, and its routing metrics.

Starting ranks and loading a model takes longer than these checks. Each layout therefore starts once
and returns everything that tests check.
"""

import dataclasses
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling, choose
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.inference.checkpoint import MAX_LENGTH, run_dir  # noqa: F401

PROMPTS = [[10, 11, 12], [200, 201, 202, 203, 204, 205, 206], [77], [40, 300, 20, 31, 32]]
SEEDS = [5, 6, 7, 8]
GREEDY = Sampling(max_new_tokens=12, greedy=True, stop_at_eod=False)
RANDOM = Sampling(max_new_tokens=12, temperature=1.5, top_k=200, top_p=0.95, stop_at_eod=False)
TEXT = list(range(100, 130))


def plain(records):
    """Convert results to plain types, because their classes would import Megatron here."""
    return [SimpleNamespace(**vars(record)) for record in records]


def on_every_layout(trained):
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.text_routing import route_text

    routing = route_text(trained, TEXT)
    return SimpleNamespace(
        greedy=plain(generate(trained, PROMPTS, GREEDY)),
        random=plain(generate(trained, PROMPTS, RANDOM, SEEDS)),
        layers=routing.layers,
        maps=routing.maps,
        fan_out=routing.fan_out,
        margins=routing.margins,
        losses=routing.losses,
    )


def on_one_rank(path):
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.text_routing import route_text

    trained = load_model(path)
    facts = on_every_layout(trained)
    facts.logits = logits_with_cache_and_in_full(trained)
    facts.step_by_step = [greedy_by_full_forwards(trained, prompt) for prompt in PROMPTS]
    facts.reverse = plain(generate(trained, PROMPTS[::-1], RANDOM, SEEDS[::-1]))
    facts.alone = plain(generate(trained, [p], RANDOM, [s])[0] for p, s in zip(PROMPTS, SEEDS))
    facts.other_seeds = plain(generate(trained, PROMPTS, RANDOM, [1, 2, 3, 4]))
    facts.prefix_maps = route_text(trained, TEXT[:7]).maps
    # Hot enough for byte tokens, which make half characters.
    hot = Sampling(max_new_tokens=40, temperature=20.0, stop_at_eod=False)
    facts.streamed = streamed(trained, [[260, 261], [270], [280, 281, 282]], hot)
    facts.stopped = stopped(trained)
    facts.ended = ended(trained)
    near_the_end = [list(range(10, 10 + MAX_LENGTH - 3)), [50]]
    at_most_five = dataclasses.replace(GREEDY, max_new_tokens=5)
    facts.at_the_end = plain(generate(trained, near_the_end, at_most_five))
    facts.refusals = [
        refusal(trained, prompts) for prompts in ([[1], []], [[1] * MAX_LENGTH], [[500]], [[-1]])
    ]
    facts.broken = broken(trained)  # last, because it damages the model
    return facts


def broken(trained):
    """Return the errors of models with a weight of one token's output that is not finite."""
    from megatron_ext.inference.generation import generate

    [weight] = [p for name, p in trained.module.named_parameters() if "output_layer" in name]
    messages = []
    for weight[499] in (math.nan, math.inf):
        for sampling in (GREEDY, RANDOM):
            with pytest.raises(UserError) as refused:
                generate(trained, PROMPTS, sampling)
            messages.append(str(refused.value))
    return messages


def logits_with_cache_and_in_full(trained):
    """Compare two rows of unequal length that begin, grow and meet others at different times."""
    from megatron_ext.inference.cache import RaggedCache, TokenChunk
    from megatron_ext.inference.forward import full_logits, next_logits

    rows = [list(range(10, 40)), list(range(400, 450))]
    cache, done = RaggedCache(max_slots=3, max_length=50), {0: 0, 2: 0}
    result: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    # (slot, number of tokens) of each pass, those with one token first
    passes = [[(0, 7)], [(0, 1), (2, 30)], [(0, 1), (2, 1)], [(2, 1), (0, 20)]]
    passes += [[(0, 1), (2, 17)], [(2, 1)]]
    for parts in passes:
        chunks = []
        for slot, count in parts:
            tokens = rows[slot // 2][done[slot] : done[slot] + count]
            chunks.append(TokenChunk(slot, done[slot], tokens, scored=count))
            done[slot] += count
        logits = next_logits(trained, cache, chunks)
        assert logits is not None
        for (slot, _), part in zip(parts, logits.split([count for _, count in parts])):
            result[slot].append(part)
    full = [
        logits for row in rows if (logits := full_logits(trained, torch.tensor([row]))) is not None
    ]
    return torch.cat(result[0] + result[2]), torch.cat([logits[0] for logits in full])


def greedy_by_full_forwards(trained, prompt):
    from megatron_ext.inference.forward import full_logits

    tokens, log_probs = list(prompt), []
    for _ in range(GREEDY.max_new_tokens):
        full = full_logits(trained, torch.tensor([tokens]))
        assert full is not None
        logits = full[0, -1]
        tokens.append(int(logits[: trained.vocab_size].argmax()))
        log_probs.append(float(logits.log_softmax(-1)[tokens[-1]]))
    return tokens[len(prompt) :], log_probs


def streamed(trained, prompts, sampling):
    """Return the pieces of a stream, its completions, and their texts decoded at once."""
    from megatron_ext.inference.generation import stream

    decode = trained.tokenizer.detokenize
    generation, pieces = stream(trained, prompts, sampling), []
    while True:
        try:
            pieces.append(next(generation))
        except StopIteration as end:
            texts = [decode(p + c.tokens)[len(decode(p)) :] for p, c in zip(prompts, end.value)]
            return plain(pieces), plain(end.value), texts


def stopped(trained):
    """Return a continuation, a part of its text, and the results that this part stops."""
    from megatron_ext.inference.generation import generate

    prompt = [300, 301]
    [free] = generate(trained, [prompt], GREEDY)
    stop = free.text[len(free.text) // 2 :][:4]
    sampling = dataclasses.replace(GREEDY, stop=("§", stop))
    pieces, [cut], _ = streamed(trained, [prompt], sampling)
    return *plain([free]), stop, cut, "".join(piece.text for piece in pieces)


def ended(trained):
    """Return a continuation, and the one whose fourth token is the end of the document."""
    from megatron_ext.inference.generation import generate

    class OtherEnd:
        end_tokens: frozenset[int] = frozenset()

        def __getattr__(self, name):
            return getattr(trained.tokenizer, name)

    [free] = generate(trained, [[300]], GREEDY)
    tokenizer = OtherEnd()
    tokenizer.end_tokens = frozenset([free.tokens[3]])
    other = dataclasses.replace(trained, tokenizer=tokenizer)
    stopping = dataclasses.replace(GREEDY, stop_at_eod=True)
    [ended], [ignoring] = (generate(other, [[300]], s) for s in (stopping, GREEDY))
    return plain([free, ended, ignoring])


def refusal(trained, prompts):
    from megatron_ext.inference.generation import generate

    try:
        generate(trained, prompts, GREEDY)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def one_rank(run_dir):  # noqa: F811
    [facts] = run_ranks(on_one_rank, 1, run_dir, timeout=240)
    return facts


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def test_logits_with_a_cache_are_those_of_the_full_forward(one_rank):
    with_cache, full = one_rank.logits
    assert (
        full.isfinite().any() and full[full.isfinite()].std() > 1
    )  # a trained model: equality is not that of zeros
    torch.testing.assert_close(with_cache, full, atol=rounding(full, 1e-5), rtol=0)


def test_greedy_tokens_and_log_probs_of_a_ragged_batch_are_those_of_full_forwards(one_rank):
    for completion, (tokens, log_probs) in zip(one_rank.greedy, one_rank.step_by_step):
        assert completion.tokens == tokens
        assert completion.log_probs == pytest.approx(log_probs, abs=rounding(log_probs, 1e-5))
        assert completion.finish == "length"


def test_generated_sample_depends_on_its_prompt_and_seed_alone(one_rank):
    tokens = tokens_of(one_rank.random)
    assert tokens_of(one_rank.reverse[::-1]) == tokens
    assert tokens_of(one_rank.alone) == tokens
    assert all(a != b for a, b in zip(tokens, tokens_of(one_rank.other_seeds)))


def test_streamed_texts_concatenate_to_the_completion(one_rank):
    pieces, completions, texts = one_rank.streamed
    for row, (completion, text) in enumerate(zip(completions, texts)):
        assert completion.text == text
        assert "".join(piece.text for piece in pieces if piece.row == row) == text
        assert [piece.token for piece in pieces if piece.row == row] == completion.tokens
    assert any(piece.text == "" for piece in pieces)


def test_generation_ends_before_a_stop_string(one_rank):
    free, stop, cut, with_stop = one_rank.stopped
    assert cut.finish == "stop" and cut.text == free.text[: free.text.index(stop)] == with_stop
    assert cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) < len(free.tokens)


def test_generation_ends_at_the_end_of_document_unless_disabled(one_rank):
    free, ended, ignoring = one_rank.ended
    assert ended.finish == "eod" and ignoring.finish == "length"
    first = free.tokens.index(free.tokens[3])
    assert ended.tokens == free.tokens[: first + 1] and ignoring.tokens == free.tokens
    assert len(ended.log_probs) == len(ended.tokens) and free.text.startswith(ended.text)


def test_generation_ends_at_the_length_of_the_model(one_rank):
    long, short = one_rank.at_the_end
    assert (len(long.tokens), long.finish) == (3, "length")
    assert (len(short.tokens), short.finish) == (5, "length")


def test_generation_refuses_invalid_prompts(one_rank):
    empty, long, unknown, negative = one_rank.refusals
    assert "empty" in empty
    assert f"--max-position-embeddings {MAX_LENGTH}" in long
    assert "vocabulary of 500" in unknown and "vocabulary of 500" in negative


def test_routing_of_a_text_is_causal(one_rank):
    maps, fan_out = one_rank.maps, one_rank.fan_out
    assert one_rank.layers == [1, 3] and maps.shape == (2, 30, 8) and maps.dtype == torch.bool
    assert fan_out.dtype == torch.int64 and torch.equal(fan_out, maps.sum(-1))
    assert fan_out.unique().numel() > 1  # the number of experts varies
    assert torch.equal(one_rank.prefix_maps, maps[:, :7])


def on_two_ranks(path, sizes):
    import torch.distributed as dist

    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import ParallelLayout, load_model

    trained = load_model(path, ParallelLayout(**sizes))
    facts = on_every_layout(trained)
    if trained.groups.ep.size() > 1:
        batches = [PROMPTS, [], PROMPTS[1:2]]
        first = dist.get_rank()
        facts.own = [plain(generate(trained, batches[(first + i) % 3], GREEDY)) for i in range(3)]
    return facts


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_generation_on_two_ranks_equals_one_rank(run_dir, one_rank, sizes):  # noqa: F811
    for rank, facts in enumerate(run_ranks(on_two_ranks, 2, run_dir, sizes)):
        for name in ("greedy", "random"):
            for completion, alone in zip(getattr(facts, name), getattr(one_rank, name)):
                assert completion.tokens == alone.tokens
                assert completion.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
        assert facts.layers == one_rank.layers and torch.equal(facts.maps, one_rank.maps)
        for name in ("margins", "losses"):
            ours, alone = getattr(facts, name), getattr(one_rank, name)
            torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0, equal_nan=True)
        if "expert" in sizes:  # copies that share experts may continue different prompts
            alone = tokens_of(one_rank.greedy)
            for i, completions in enumerate(facts.own):
                assert tokens_of(completions) == [alone, [], alone[1:2]][(rank + i) % 3]


def refusals_to_load(path):
    from megatron_ext.inference.loading import ParallelLayout, load_model

    messages = []
    for options in ({"layout": ParallelLayout(tensor=2)}, {"tokenizer_model": "nowhere.model"}):
        with pytest.raises(UserError) as refused:
            load_model(path, **options)
        messages.append(str(refused.value))
    return messages


def test_load_model_refuses_wrong_layouts_and_tokenizers(run_dir):  # noqa: F811
    [(layout, tokenizer)] = run_ranks(refusals_to_load, 1, run_dir)
    assert "divisible" in layout and "--tokenizer-model" in tokenizer


def damage_weights(folder):
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])


def lose_metadata(folder):
    (folder / ".metadata").unlink()


@pytest.mark.parametrize("damage", [damage_weights, lose_metadata])
def test_load_model_refuses_a_damaged_checkpoint(run_dir, tmp_path, damage):  # noqa: F811
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    damage(copy / "checkpoints" / "iter_0000040")
    with pytest.raises(UserError, match="incomplete"):
        run_ranks(on_one_rank, 1, copy)


def test_load_model_accepts_run_checkpoints_and_iteration_folders(run_dir):  # noqa: F811
    checkpoints = run_dir / "checkpoints"
    newest = checkpoints / "iter_0000040"
    assert [find_checkpoint(p) for p in (run_dir, checkpoints, newest)] == [newest] * 3


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]).expand(4000, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]

    def shares(**options):
        chosen = choose(logits, Sampling(**options), generators)
        return torch.bincount(chosen, minlength=5) / 4000

    def expected(scores):
        return torch.softmax(torch.tensor(scores), dim=0)

    close = partial(torch.testing.assert_close, atol=0.03, rtol=0)
    inf = math.inf
    close(shares(), expected([2.0, 1, 0, -1, -inf]))
    close(shares(temperature=0.5), expected([4.0, 2, 0, -2, -inf]))
    close(shares(top_k=2), expected([2.0, 1, -inf, -inf, -inf]))
    # The first two have 0.88 of the mass: 0.9 takes a third, 0.5 only the first.
    close(shares(top_p=0.9), expected([2.0, 1, 0, -inf, -inf]))
    assert shares(top_p=0.5)[0] == 1
    assert shares(greedy=True)[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_sampling_refusals_name_the_flag(options):
    flag = next(iter(options)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag}"):
        Sampling(**options)


def test_logits_that_are_not_finite_are_refused(one_rank):
    assert len(one_rank.broken) == 4
    for message in one_rank.broken:
        assert message.startswith("The logits of the model are not finite")
