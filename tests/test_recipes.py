"""Tests of the precedence of recipes, their bases and the command line."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_ext.errors import ToolParser, UserError
from megatron_ext.recipes import expand_recipes

BASE = "train_iters: 8\nlr_decay_iters: 7\nlr_warmup_fraction: 0.1\nlr: 1\nglobal_batch_size: 4\n"


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pretrain_et.py")
    for name in (
        "train-iters", "train-samples", "lr-decay-iters", "lr-warmup-iters", "lr-warmup-samples",
        "lr-warmup-fraction", "lr", "global-batch-size", "step-batch-size-schedule", "split",
    ):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("data-path", "train-data-path", "valid-data-path"):
        parser.add_argument(f"--{name}", nargs="*")
    parser.add_argument("--mock-data", action="store_true")
    parser.add_argument(
        "--et-capacity", type=lambda text: None if text == "none" else float(text), default=0.5
    )
    return parser


def values(
    folder: Path, recipe: str, *after: str, before: tuple[str, ...] = ()
) -> dict[str, object]:
    """Return the arguments that differ from their defaults."""
    (folder / "recipe.yaml").write_text(recipe)
    words = expand_recipes([*before, "--recipe", str(folder / "recipe.yaml"), *after], parser())
    usual = vars(parser().parse_args([]))
    settings = vars(parser().parse_args(words))
    return {name: value for name, value in settings.items() if value != usual[name]}


SAMPLES = {"train_samples": "24", "lr_warmup_fraction": "0.1", "lr": "1", "global_batch_size": "4"}


@pytest.mark.parametrize(
    "before, after",
    [
        ((), ("--train-samples", "24")),
        (("--train-samples=24",), ()),
        ((), ("--train-samples", "24", "--train-iters", "0")),
        ((), ("--train-samples", "24", "--train-iters=0")),
    ],
)
def test_samples_on_the_command_line_replace_steps_of_a_recipe(
    before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    assert values(tmp_path, BASE, *after, before=before) == SAMPLES


def test_alternatives_of_other_kinds_are_replaced(tmp_path: Path) -> None:
    warmup = values(tmp_path, BASE, "--lr-warmup-iters", "0")
    assert warmup["lr_warmup_iters"] == "0" and "lr_warmup_fraction" not in warmup
    assert warmup["train_iters"] == "8"
    batches = values(tmp_path, BASE, "--step-batch-size-schedule", "0:4 1K:8")
    assert "global_batch_size" not in batches
    mock = "mock_data: true\nsplit: 90,5,5\n"
    assert values(tmp_path, mock, "--train-data-path", "A") == {"train_data_path": ["A"]}
    assert values(tmp_path, mock, "--data-path", "A") == {"data_path": ["A"], "split": "90,5,5"}


def test_list_of_a_later_source_replaces_that_of_an_earlier_one(tmp_path: Path) -> None:
    recipe = "data_path: [1, a]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    tool = ToolParser(prog="pretrain_et.py")
    for name in ("data-path", "split"):
        tool.add_argument(f"--{name}", nargs="*")

    def path(*words: str) -> object:
        return tool.parse_args(expand_recipes(words, tool)).data_path

    from_recipe = ("--recipe", str(tmp_path / "recipe.yaml"))
    assert path(*from_recipe) == ["1", "a"]
    assert path(*from_recipe, "--data-path", "b") == ["b"]
    assert path("--data-path", "b", *from_recipe) == ["1", "a"]
    with pytest.raises(UserError, match="--data-path is repeated"):
        path(*from_recipe, "--data-path", "b", "--data-path=c")


def test_flags_of_a_program_are_overridden_like_those_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train_samples: 24\n")
    tool = ToolParser(prog="pretrain_et.py")
    for name in ("train-iters", "train-samples", "lr"):
        tool.add_argument(f"--{name}")
    for name in ("moe-aux-loss-coeff", "data-path"):
        tool.add_argument(f"--{name}", nargs="*")
    defaults = ["--moe-aux-loss-coeff", "0.1", "--train-iters", "3", "--lr", "2"]

    def settings(*words: str) -> dict[str, object]:
        arguments = vars(tool.parse_args(expand_recipes(words, tool, defaults=defaults)))
        return {name: value for name, value in arguments.items() if value is not None}

    assert settings() == {"moe_aux_loss_coeff": ["0.1"], "train_iters": "3", "lr": "2"}
    assert settings("--moe-aux-loss-coeff", "0", "1", "--lr", "1") == {
        "moe_aux_loss_coeff": ["0", "1"], "train_iters": "3", "lr": "1"
    }  # fmt: skip
    other = settings("--recipe", str(tmp_path / "recipe.yaml"))
    assert other == {"moe_aux_loss_coeff": ["0.1"], "train_samples": "24", "lr": "2"}
    with pytest.raises(UserError, match="--moe-aux-loss-coeff is repeated"):
        settings("--moe-aux-loss-coeff", "0", "--moe-aux-loss-coeff", "1")


def test_contradiction_within_one_source_reaches_the_checks(tmp_path: Path) -> None:
    both = values(tmp_path, "{}", "--train-samples", "24", "--train-iters", "3")
    assert both == {"train_samples": "24", "train_iters": "3"}


def test_null_removes_a_key_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "mock_data: true\net_capacity: 0.25\n")
    recipe = "base: base.yaml\nlr: null\nlr_warmup_fraction: null\nmock_data: false\n"
    left = {"train_iters": "8", "lr_decay_iters": "7", "global_batch_size": "4"}
    assert values(tmp_path, recipe) == left | {"et_capacity": 0.25}
    # A flag that accepts the value none receives it.
    assert values(tmp_path, recipe + "et_capacity: null\n") == left | {"et_capacity": None}


def test_recipes_that_include_each_other_over_another_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.yaml").write_text("base: ../a/x.yaml\n")
    with pytest.raises(UserError, match="has itself as a base"):
        expand_recipes(["--recipe", str(tmp_path / "a" / "x.yaml")], parser())


def test_misspelt_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_itres is not a flag .* mean train_iters\?"):
        values(tmp_path, "train_itres: 3\n")
    with pytest.raises(UserError, match=r"zzz is not a flag .*see --help"):
        values(tmp_path, "zzz: 3\n")


def test_keys_that_only_other_commands_use_are_left_out_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("rows: 32\nlr: 1\n")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nrows: 64\n")
    argv = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert expand_recipes(argv, parser(), unused=("rows",)) == ["--lr", "1"]
    with pytest.raises(UserError, match=r"base\.yaml: rows is not a flag"):
        expand_recipes(argv, parser())


@pytest.mark.parametrize(
    "recipe, flags, context",
    [
        ("seq_length: 64", (), None),
        ("seq_length: 64", ("--max-position-embeddings", "256"), "256"),
        ("seq_length: 64\nmax_position_embeddings: 64", ("--seq-length", "128"), None),
        ("seq_length: 64\nmax_position_embeddings: 256", ("--seq-length=128",), "256"),
    ],
)
def test_context_follows_the_sequence_length_where_it_would_be_below(
    tmp_path: Path, recipe: str, flags: tuple[str, ...], context: str | None
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "\n")
    words = expand_recipes(["--recipe", str(path), *flags], length_parser())
    lengths = [
        words[at + 1] for at, word in enumerate(words) if word == "--max-position-embeddings"
    ]
    assert lengths == ([] if context is None else [context])


def test_context_below_the_sequence_length_of_the_same_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seq_length: 64\nmax_position_embeddings: 32\n")
    with pytest.raises(UserError, match=f"32 of {path} is below --seq-length 64 of {path}"):
        expand_recipes(["--recipe", str(path)], length_parser())
    path.write_text("seq_length: 64\n")
    flags = ["--max-position-embeddings", "32", "--recipe", str(path)]
    with pytest.raises(UserError, match="32 of the command line is below --seq-length 64"):
        expand_recipes(flags, length_parser())


def length_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--max-position-embeddings", type=int)
    return parser


def test_recipe_dir_is_the_folder_of_the_file_that_has_it(tmp_path: Path) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "recipe.yaml").write_text(
        "step_batch_size_schedule: ${recipe_dir}/a\ntrain_data_path:\n- ${recipe_dir}/b\n- c\n"
        "lr: 2\n"
    )
    outer = "base: model/recipe.yaml\nvalid_data_path:\n- ${recipe_dir}/d\n"
    assert values(tmp_path, outer, "--lr", "3") == {
        "step_batch_size_schedule": f"{inner}/a",
        "train_data_path": [f"{inner}/b", "c"],
        "valid_data_path": [f"{tmp_path}/d"],
        "lr": "3",
    }
