"""A small model with a chat template and a separate tokenizer, and items to judge with it."""

import json
import random
from pathlib import Path

from alignment.records import Message, Outcome, Prompt, Response, Verdict

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = """the a one two three four five six seven eight nine zero good bad answer question prompt
response judge score red green blue house river stone bird walks runs sings over under near"""
NUMBERS = "zero one two three four five six seven eight nine"
BRIEF = """=== user ===
{mark} {prompt} {response} Rate from 0 to 9. {answer}
"""


def make_tokenizer(folder: Path) -> int:
    """Write a tokenizer of bytes and the words above, and return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


def make_model(folder: Path, **changes) -> None:
    """Write a Llama model of random weights, with the tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    size = make_tokenizer(folder)
    settings = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "eos_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(folder)


def responses(count: int, seed: int = 0) -> list[Response]:
    """Return responses whose score is easy to see: the number of times that they contain a word."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        score = draw.randrange(10)
        words = ["good"] * score + draw.choices(["house", "river", "stone"], k=9 - score)
        draw.shuffle(words)
        prompt = Prompt(f"p{seed}-{number}", (Message("user", "say good"),))
        made.append(Response(f"r{seed}-{number}", prompt, " ".join(words)))
    return made


def gold(items: list[Response]) -> list[Verdict]:
    """Return the number of good words, in words and as a digit."""
    verdicts = []
    for item in items:
        score = item.text.split().count("good")
        names = NUMBERS.split()
        verdicts.append(
            Verdict(
                item.id, Outcome.SCORE, float(score), thinking=f"{names[score]} good", judge="count"
            )
        )
    return verdicts


def write_rows(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row.to_row()) + "\n" for row in rows))
    return file
