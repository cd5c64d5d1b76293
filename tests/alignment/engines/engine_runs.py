"""The same short training by every engine and by plain torch."""

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import LossSums, Optimization
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

STEPS = 10
LENGTH = 48
VOCAB = 128
TEMPERATURE = 0.7
TOLERANCE = 1e-4
CHOICES = [3, VOCAB - 1, 70]
OPTIMIZATION = Optimization(
    lr=2e-3, steps=STEPS, warmup=2, betas=(0.9, 0.95), weight_decay=0.1, clip=0.3
)


def samples(step):
    """Return the samples of a step, with different numbers of tokens on each rank."""
    generator = torch.Generator().manual_seed(step)

    def whole(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for length in (5, 24, 11, 40, 3, 9, 16):
        tokens = [whole(0, VOCAB) for _ in range(length)]
        advantages = torch.rand(length, generator=generator).tolist()
        made.append(TokenSample(tokens, whole(1, length), {"advantage": advantages}))
    return made


def by_token(scores, batch):
    weight = batch.loss_mask.sum()
    total = -(scores.log_probs * batch.extras["advantage"] * batch.loss_mask).sum()
    first = scores.log_probs.detach() * batch.loss_mask
    return LossSums(total, weight, {"log_prob": (first.sum(), weight)})


def by_sample(scores, batch):
    """Return the mean over samples of their mean over tokens, which requires whole samples."""
    tokens = batch.sum_by_sample(batch.loss_mask.float())
    results = batch.sum_by_sample(scores.log_probs * batch.extras["advantage"] * batch.loss_mask)
    means = results / tokens.clamp(min=1)
    weight = torch.tensor(len(tokens), device=tokens.device)
    return LossSums(-means.sum(), weight, {"log_prob": (scores.log_probs.detach().sum(), weight)})


def loss_of(step):
    return by_sample if step % 2 else by_token


def share(engine, step, packed=False):
    """Return this rank's samples of a step; in the third step the first rank has all of them."""
    rank, size = (engine.data_rank, engine.data_size) if step != 2 else (engine.data_rank, 1)
    own_samples = samples(step)[rank::size] if rank < size else []
    return TokenBatch.packed(own_samples, LENGTH) if packed else TokenBatch.of(own_samples)


def train(engine, steps=range(STEPS), packed=False):
    """Train, and return the loss and the norm of the gradients of each step."""
    results = []
    for step in steps:
        result = engine.train_step(
            share(engine, step, packed), loss_of(step), temperature=TEMPERATURE
        )
        results.append((result.loss, result.grad_norm, result.lr))
    return results


def scores(engine, packed=False):
    """Return log-probabilities and entropies of this rank's first samples, by their tokens."""
    batch = share(engine, 0, packed)
    results = engine.log_probs(batch, temperature=TEMPERATURE, entropy=True)
    assert results.log_probs.shape == results.entropy.shape == batch.tokens.shape
    trained = engine.log_probs(batch, temperature=TEMPERATURE, entropy=True, trained_only=True)
    mask = batch.loss_mask.to(results.log_probs.device)
    for name in ("log_probs", "entropy"):
        every, some = getattr(results, name), getattr(trained, name)
        assert torch.allclose(some, torch.where(mask, every, 0), atol=1e-5)
    by_tokens = {}
    for row in range(batch.rows):
        for number in range(int(batch.samples[row].max()) + 1):
            at = batch.samples[row] == number
            values = (results.log_probs[row, at].tolist(), results.entropy[row, at].tolist())
            by_tokens[tuple(batch.tokens[row, at].tolist())] = values
    return by_tokens


def after_last(engine, packed=False):
    """Return log-probabilities of some tokens as successors of this rank's first samples."""
    batch = share(engine, 0, packed)
    results = engine.next_log_probs(batch, CHOICES)
    assert results.shape == (*batch.tokens.shape, len(CHOICES))
    return {tokens: values[-1] for tokens, values in _by_tokens(batch, results).items()}


def values(engine, packed=False):
    """Return the products of a token's row of the output layer with this rank's first samples."""
    batch = share(engine, 0, packed)
    results = engine.values(batch, CHOICES[-1])
    trained = engine.values(batch, CHOICES[-1], trained_only=True)
    torch.testing.assert_close(trained.cpu(), results.cpu() * batch.loss_mask)
    return _by_tokens(batch, results)


def _by_tokens(batch, results):
    by_tokens = {}
    for row in range(batch.rows):
        for number in range(int(batch.samples[row].max()) + 1):
            at = batch.samples[row] == number
            by_tokens[tuple(batch.tokens[row, at].tolist())] = results[row, at].tolist()
    return by_tokens


def generate(engine):
    """Return sampled continuations, and the scores of their tokens."""
    prompts = [sample.tokens[: sample.prompt] for sample in samples(1)]
    prompts = prompts[engine.data_rank :: engine.data_size]
    sampling = Sampling(
        max_new_tokens=7,
        temperature=TEMPERATURE,
        top_k=50,
        stop_at_eod=False,
        score_temperature=TEMPERATURE,
    )
    results = engine.generate(prompts, sampling, seeds=[sum(prompt) for prompt in prompts])
    rows = [TokenSample(p + g.tokens, len(p)) for p, g in zip(prompts, results)]
    scores = engine.log_probs(TokenBatch.of(rows), temperature=TEMPERATURE).log_probs
    return [
        (tuple(p), g.tokens, g.log_probs, scores[i, len(p) : len(p) + len(g.tokens)].tolist())
        for i, (p, g) in enumerate(zip(prompts, results))
    ]


def saved(folder):
    """Return the tensors of a Hugging Face folder."""
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def observe(engine, folder, checkpoint, packed=False):
    """All that is compared, of one engine on one rank.

    Args:
        folder: the Hugging Face folder the engine has loaded.
        checkpoint: where to save.
        packed: whether it trains on packed rows.
    """
    results = SimpleNamespace()
    results.first = dict(engine.parameters())
    results.alone, results.packed = scores(engine), scores(engine, packed=True)
    results.after, results.values = after_last(engine, packed), values(engine, packed)
    half = STEPS // 2
    results.steps = train(engine, range(half), packed)
    results.generated = generate(engine)
    engine.save(checkpoint)
    rest = train(engine, range(half, STEPS), packed)
    results.steps += rest
    results.last = dict(engine.parameters())
    engine.export(folder / "exported")
    exported = saved(folder / "exported")
    assert exported.keys() == results.last.keys()
    assert all(torch.equal(results.last[name].cpu(), tensor) for name, tensor in exported.items())
    engine.load(checkpoint)
    assert engine.step == half
    results.resumed = rest, train(engine, range(half, STEPS), packed)
    engine.load_parameters(saved(folder).items())
    results.again = scores(engine)
    return results


def brute_force(folder):
    """Return log-probabilities, entropies, losses and last weights by transformers and torch."""
    from transformers import AutoModelForCausalLM

    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM

    own = json.loads((folder / "config.json").read_text())["model_type"] == "expert_threshold"
    loader = ExpertThresholdForCausalLM if own else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)

    def logits(sample):
        return model(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits[0]

    def of_tokens(sample, temperature):
        table = (logits(sample) / temperature).log_softmax(-1)
        tokens = torch.tensor(sample.tokens[1:])
        return table[:-1].gather(1, tokens.unsqueeze(1)).squeeze(1), table

    results = SimpleNamespace(scores={}, after={}, values={}, losses=[], norms=[])
    raw = []  # before a soft cap
    model.lm_head.register_forward_hook(lambda layer, inputs, output: raw.append(output[0]))
    with torch.no_grad():
        for sample in samples(0):
            last = logits(sample)[-1].log_softmax(-1)
            results.after[tuple(sample.tokens)] = last[CHOICES].tolist()
            before = raw[-1][:-1, CHOICES[-1]].tolist()
            results.values[tuple(sample.tokens)] = [0.0, *before]
            values, table = of_tokens(sample, TEMPERATURE)
            entropy = -(table.exp() * table).sum(-1)[:-1]
            both = ([0.0, *values.tolist()], [0.0, *entropy.tolist()])
            results.scores[tuple(sample.tokens)] = both

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(STEPS):
        parts, trained, samples_now = [], 0, samples(step)
        for sample in samples_now:
            values, _ = of_tokens(sample, TEMPERATURE)
            values = values[sample.prompt - 1 :]
            advantages = torch.tensor(sample.extras["advantage"][sample.prompt :])
            each = -values * advantages
            parts.append(each.sum() if step % 2 == 0 else each.sum() / max(len(each), 1))
            trained += len(each)
        loss = torch.stack(parts).sum() / (trained if step % 2 == 0 else len(samples_now))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        rate = 2e-3 * (step / 2 if step < 2 else (10 - step) / 8)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        results.losses.append(loss.item())
        results.norms.append(norm.item())
    results.weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return results


def error_message_of(call):
    """Return the error message of a call, or an empty text if it succeeds."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None
