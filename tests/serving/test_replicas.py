"""Tests of the scheduler with replicas of a model on several ranks, against one rank."""

from functools import partial
from types import SimpleNamespace

import pytest

from megatron_ext.inference.sampling import Sampling
from tests.distributed import run_ranks

PROMPTS = [[10, 11, 12], list(range(200, 240)), [77], [40, 300, 20, 31, 32], [5, 6], [400, 401]]
SAMPLINGS = [
    Sampling(max_new_tokens=5, greedy=True, stop_at_eod=False),
    Sampling(max_new_tokens=9, temperature=1.5, top_p=0.9, stop_at_eod=False),
    Sampling(max_new_tokens=3, temperature=0.8, top_k=20, stop_at_eod=False),
]


def serve(path, sizes):
    """Return each job's result on rank 0; job 1 is canceled in the queue, job 4 at token 2."""
    import torch.distributed as dist

    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import ParallelLayout, load_model
    from megatron_ext.serving.replicas import GenerationRequest, ModelReplicas
    from megatron_ext.serving.scheduler import Closing, Job, QueueFull, Scheduler

    trained = load_model(path, ParallelLayout(**sizes))
    works = [
        GenerationRequest(prompt, SAMPLINGS[i % 3], seed=i, likeliest=2, scores_prompt=True)
        for i, prompt in enumerate(PROMPTS)
    ]
    replicas = ModelReplicas(trained, max_slots=2, prompt_tokens=7)  # prompts of several passes
    alone = [generate(trained, [work.prompt], work.sampling, [work.seed])[0] for work in works]
    if dist.get_rank() > 0:
        replicas.follow()
        return None
    scheduler = Scheduler(replicas, max_waiting=4)
    events: list[list] = [[] for _ in works]

    def deliver(i, piece):
        events[i].append(piece)
        if i == 4 and len(events[i]) == 2:
            scheduler.cancel([jobs[i]])

    jobs = [Job(work, partial(deliver, i)) for i, work in enumerate(works)]
    with pytest.raises(QueueFull):
        scheduler.submit([*jobs, *jobs])
    scheduler.submit(jobs)
    scheduler.cancel([jobs[1]])
    scheduler.close()
    with pytest.raises(Closing):
        scheduler.submit(jobs[:1])
    scheduler.run()
    return SimpleNamespace(
        got=[
            [
                (piece.text, piece.finish, [(t.part.text, t.score) for t in piece.tokens])
                for piece in pieces
            ]
            for pieces in events
        ],
        texts=[
            trained.tokenizer.detokenize(prompt + completion.tokens)
            for prompt, completion in zip(PROMPTS, alone)
        ],
        alone=[vars(completion) for completion in alone],
        left=(scheduler.running, scheduler.waiting),
    )


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_replicas_on_several_ranks_generate_what_one_rank_does(run_dir, sizes):
    facts = run_ranks(serve, 2 if sizes else 1, run_dir, sizes)[0]
    assert facts.left == (0, 0)
    for i, (pieces, alone) in enumerate(zip(facts.got, facts.alone)):
        count = {1: 0, 4: 2}.get(i, len(alone["tokens"]))
        prompt = PROMPTS[i]
        tokens = [token for _, _, tokens in pieces for token in tokens]
        assert "".join(text for text, _, _ in pieces) == "".join(text for text, _ in tokens)
        scores = [score for _, score in tokens]
        assert scores[:1] == [None][: len(scores)]  # the prompt's first token has none
        new = scores[len(prompt) :]
        assert [score.token for score in new] == alone["tokens"][: len(new)]
        log_probs = pytest.approx(alone["log_probs"][: len(new)], abs=1e-4)
        assert [score.log_prob for score in new] == log_probs
        if i in (1, 4):
            assert len(pieces) == count
            continue
        text = "".join(text for text, _, _ in pieces)
        assert text == facts.texts[i] and text.endswith(alone["text"])
        assert [finish for _, finish, _ in pieces] == [None] * (count - 1) + ["length"]
        assert [score.token for score in scores[1:]] == prompt[1:] + alone["tokens"]
        for score in scores[1:]:
            (first, best), (_, second) = score.likeliest
            assert score.log_prob <= best + 1e-6 and second <= best
            assert score.token != first or score.log_prob == pytest.approx(best, abs=1e-6)
