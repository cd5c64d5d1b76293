"""Indexed dataset of real text, and the steps that create it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.steps import Step, module
from megatron_ext.data.shards import expand_inputs

VOCABULARY = 2048
# Share of the documents. Its about 90,000 tokens determine the loss to about 0.01 nats.
_VALID_FRACTION = 0.03


@dataclass(frozen=True)
class Corpus:
    """News and encyclopedia articles, 2.9 million tokens for training, or other text.

    Attributes:
        folder: Folder of all files.
        inputs: Files, folders or globs of other text, as `tools.preprocess_data` reads them.
    """

    folder: Path
    inputs: tuple[str, ...] = ()

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def train(self) -> str:
        """Prefix of the training dataset, for `--train-data-path`."""
        return f"{self.folder / 'news'}_train_text_document"

    @property
    def valid(self) -> str:
        """Prefix of the validation dataset, for `--valid-data-path`."""
        return f"{self.folder / 'news'}_valid_text_document"

    @property
    def files(self) -> list[Path]:
        """Files on which training depends."""
        return [Path(f"{self.train}.bin"), Path(f"{self.valid}.bin"), self.tokenizer]

    @property
    def flags(self) -> Sequence[str]:
        """Flags of pretrain_et.py that select this dataset."""
        return [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer)),
            *("--train-data-path", self.train, "--valid-data-path", self.valid),
        ]

    def steps(self, log: Path) -> list[Step]:
        """Return the steps that create the dataset."""
        prepare = Path(__file__).with_name("prepare_text.py")
        text = Step(
            "text",
            "cleaning news and encyclopedia articles",
            module("examples.quickstart.prepare_text", "--output", self.text, "--wikipedia"),
            log,
            makes=[self.text],
            depends=[prepare],
        )
        inputs = self.inputs or (str(self.text),)
        files = [*map(Path, expand_inputs([*self.inputs], "--text"))] or [self.text]
        return [
            *([] if self.inputs else [text]),
            Step(
                "tokenizer",
                f"learning {VOCABULARY:,} entries",
                module(
                    "tools.train_tokenizer", "--input", *inputs, "--output", self.tokenizer,
                    "--overwrite", "--vocab-size", str(VOCABULARY),
                ),
                log,
                makes=[self.tokenizer],
                depends=files,
            ),
            Step(
                "data",
                "indexing the tokens for training and validation",
                module(
                    "tools.preprocess_data", "--input", *inputs,
                    "--tokenizer-model", self.tokenizer, "--output-prefix", self.folder / "news",
                    "--valid-fraction", str(_VALID_FRACTION), "--overwrite",
                ),
                log,
                makes=self.files[:2],
                depends=[*files, self.tokenizer],
            ),
        ]  # fmt: skip
