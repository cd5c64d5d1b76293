"""Tests that run the examples of docs/how-to/extending.md unchanged."""

import re

import pytest

from tests.distributed import ROOT, run_ranks

PAGE = (ROOT / "docs/how-to/extending.md").read_text()
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)

# Checks of the results of each example.
CHECKS = {
    "Router": """
from tests.moe import top_p_router
logits = torch.tensor([[0.3, 0.5, 0.1, 0.1], [0.9, 0.05, 0.03, 0.02]]).log()
for router in (TopPRouter, top_p_router.TopPRouter):
    margins = router.margins(object.__new__(router), logits)
    assert (margins > 0).tolist() == [[False, True, False, False], [True, False, False, False]]
assert ROUTERS["top-p"].load() is top_p_router.TopPRouter
""",
    "Model family": "assert MISTRAL",
    "Judge kind": """
from types import SimpleNamespace
verdict = WordCount(3).verdict(SimpleNamespace(id="1", text="one two three"))
assert verdict.score == 9.0
assert JUDGE_KINDS["words"](name="words", target=3).target == 3
""",
    "Detector": """
from types import SimpleNamespace
assert find_moss(SimpleNamespace(words=("green", "moss"))) == ("moss",)
""",
    "Reward function": """
from types import SimpleNamespace
assert brevity(SimpleNamespace(text="a" * 200)) == 7 and brevity(SimpleNamespace(text="")) is None
""",
    "Algorithm": "assert above_median(np.array([1.0, 2.0, 6.0])).tolist() == [-1.0, 0.0, 4.0]",
    "Metric of responses": """
from types import SimpleNamespace
assert RESPONSE_METRICS["short"](None, SimpleNamespace(tokens=[1]), None)
""",
    "Function paths": """
from types import SimpleNamespace
import torch
settings = SimpleNamespace(lr=2.0, steps=10)
assert cosine(0, settings) == 2.0
scores = SimpleNamespace(log_probs=torch.tensor([-1.0, -2.0]))
mask = torch.tensor([1.0, 0.0])
batch = SimpleNamespace(extras={"advantage": torch.tensor([3.0, 1.0])}, loss_mask=mask)
assert reinforce(scores, batch) == LossSums(torch.tensor(3.0), torch.tensor(1.0))
""",
}


def _run(program: str) -> None:
    exec(compile(program, "docs/how-to/extending.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("title, text", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_example_runs(title: str, text: str) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    run_ranks(_run, 1, f"{code}\n{CHECKS[title]}")


def test_files_and_tests_that_the_page_names_exist() -> None:
    for name in re.findall(r"`((?:tests|alignment|megatron_ext)/[\w/.]+)(?:::(\w+))?`", PAGE):
        path, test = name
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), (path, test)
