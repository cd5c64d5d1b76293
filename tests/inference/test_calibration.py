"""Tests of calibrated thresholds: against sorting, on every layout, and with the command."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.errors import UserError
from tests.distributed import run_ranks
from tests.inference.checkpoint import run_dir  # noqa: F401

# Seven sequences do not part evenly among two ranks. They count upwards, as the model's text did.
TEXT = (torch.arange(7).unsqueeze(1) * 61 + torch.arange(40)) % 480
RATE = 2 / 8


def on_one_rank(path):
    from megatron_ext.inference.calibration import calibrate, measure_routing
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.loading import load_model
    from megatron_ext.moe.router import routers_of

    trained = load_model(path)
    before = measure_routing(trained, TEXT)
    cutoffs = calibrate(trained, TEXT, batch_size=3)
    # Every logit of the model as it now routes, one sequence at a time.
    logits: dict[int, list[torch.Tensor]] = {layer: [] for layer in cutoffs}
    routers = {router.layer_number - 1: router for router in routers_of([trained.module])}
    for layer, router in routers.items():
        router.register_forward_pre_hook(
            lambda router, inputs, layer=layer: logits[layer].append(
                inputs[0].flatten(0, 1) @ router.weight.T
            )
        )
    losses = []
    for row in TEXT:
        output = full_logits(trained, row.unsqueeze(0))
        assert output is not None
        losses.append(torch.nn.functional.cross_entropy(output[0, :-1], row[1:]))
    everything = {layer: torch.cat(parts) for layer, parts in logits.items()}
    after = measure_routing(trained, TEXT, batch_size=2)
    return SimpleNamespace(
        cutoffs=cutoffs,
        thresholds={layer: router.thresholds.value() for layer, router in routers.items()},
        logits=everything,
        before=SimpleNamespace(load=before.load, loss=before.loss),
        after=SimpleNamespace(load=after.load, loss=after.loss, no_expert=after.no_expert),
        loss=float(torch.stack(losses).mean()),
    )


@pytest.fixture(scope="module")
def alone(run_dir):  # noqa: F811
    [facts] = run_ranks(on_one_rank, 1, run_dir)
    return facts


def test_calibrated_cutoffs_are_the_kth_largest_of_their_model(alone):
    """The logits come from the model with all its new thresholds, hence from fixed earlier ones."""
    assert list(alone.cutoffs) == [1, 3]
    for layer, cutoffs in alone.cutoffs.items():
        logits = alone.logits[layer]
        assert logits.shape == (TEXT.numel(), 8)
        k = int(RATE * TEXT.numel())
        expected, following = logits.sort(dim=0, descending=True).values[k - 1 : k + 1]
        torch.testing.assert_close(cutoffs, expected, atol=1e-5, rtol=0)
        assert (alone.thresholds[layer] < cutoffs).all()  # the k-th itself is taken
        halfway = (expected + following) / 2
        torch.testing.assert_close(alone.thresholds[layer], halfway, atol=1e-5, rtol=0)


def test_measure_routing_equals_loads_and_loss_of_the_logits(alone):
    for layer, logits in alone.logits.items():
        chosen = logits > alone.thresholds[layer]
        share = chosen.double().mean(dim=0)
        torch.testing.assert_close(alone.after.load[layer], share, atol=1.5 / TEXT.numel(), rtol=0)
        assert share.sub(RATE).abs().max() <= 1.5 / TEXT.numel()
        nobody = float((~chosen.any(dim=1)).double().mean())
        assert alone.after.no_expert[layer] == pytest.approx(nobody, abs=2 / TEXT.numel())
        assert alone.before.load[layer].sub(RATE).abs().max() > 3 / TEXT.numel()
    assert alone.after.loss == pytest.approx(alone.loss, abs=1e-5)


def on_a_layout(path, layout):
    from megatron_ext.inference.calibration import calibrate, measure_routing
    from megatron_ext.inference.loading import ParallelLayout, load_model

    trained = load_model(path, ParallelLayout(**layout))
    cutoffs = calibrate(trained, TEXT, batch_size=2)
    after = measure_routing(trained, TEXT, batch_size=2)
    return SimpleNamespace(cutoffs=cutoffs, load=after.load, loss=after.loss)


@pytest.mark.parametrize("layout", [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_calibration_is_equal_on_every_layout_and_rank(alone, run_dir, layout):  # noqa: F811
    for facts in run_ranks(on_a_layout, 2, run_dir, layout):
        assert list(facts.cutoffs) == [1, 3]
        for layer, cutoffs in facts.cutoffs.items():
            torch.testing.assert_close(cutoffs, alone.cutoffs[layer], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                facts.load[layer], alone.after.load[layer], atol=1.5 / TEXT.numel(), rtol=0
            )
        assert facts.loss == pytest.approx(alone.after.loss, abs=1e-4)


def as_a_user(run, save):
    """Run the tool, on a rank, on the text that the model's tokenizer was trained on."""
    import contextlib
    import io

    from megatron_ext.checkpoint import find_checkpoint
    from megatron_ext.hf.torch_dist import TorchDistReader
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.sampling import Sampling
    from tools import calibrate_thresholds

    out = io.StringIO()
    flags = ["--load", str(run), "--save", str(save), "--data", str(run.parent / "corpus.jsonl")]
    with contextlib.redirect_stdout(out):
        calibrate_thresholds.main([*flags, "--tokens", "4000"])
    old, new = (TorchDistReader(find_checkpoint(folder)) for folder in (run, save))
    assert old.shapes == new.shapes
    changed = [name for name in old.shapes if not torch.equal(old.read(name), new.read(name))]
    trained = load_model(save)
    greedy = Sampling(max_new_tokens=4, greedy=True, stop_at_eod=False)
    return out.getvalue(), changed, generate(trained, [[10, 11, 12]], greedy)[0].tokens


def test_calibrate_thresholds_writes_a_checkpoint_with_other_thresholds_only(run_dir, tmp_path):  # noqa: F811
    save = tmp_path / "calibrated"
    [(printed, changed, tokens)] = run_ranks(as_a_user, 1, run_dir, save)
    assert sorted(changed) == [
        f"decoder.layers.{layer}.mlp.router.thresholds.{name}"
        for layer in (1, 3)
        for name in ("average", "updates")
    ]
    assert len(tokens) == 4
    report = json.loads((save / "calibration.json").read_text())
    before, after = (report[name]["layers"]["3"] for name in ("before", "after"))
    assert abs(after["fan_out"] - 2) < 0.2 < abs(before["fan_out"] - 2)
    assert f"{before['fan_out']:.3f} > {after['fan_out']:.3f}" in printed
    assert f"loss {report['before']['loss']:.4f} > {report['after']['loss']:.4f}" in printed
    # 62 sequences of 64 tokens; every eighth is reserved.
    assert report["after"]["tokens"] == 7 * 64
    assert "calibrated on 3,520 tokens, measured on 448" in printed


def from_token_choice(folder):
    """Route, on a rank, a token-choice model with softmax weights by thresholds."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_ext.inference.calibration import measure_routing
    from megatron_ext.inference.loading import load_model
    from tools import calibrate_thresholds, convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "token-choice")])
    builder = IndexedDatasetBuilder(str(folder / "text.bin"))
    for row in torch.randint(450, (20, 64), generator=torch.Generator().manual_seed(0)):
        builder.add_document(row, [64])
    builder.finalize(str(folder / "text.idx"))
    refused = []
    for data, extra in (("none", []), ("text", ["--tokens", "70"]), ("text", ["--tokens", "3"])):
        with pytest.raises(UserError) as error:
            calibrate(calibrate_thresholds, folder, data, *extra)
        refused.append(str(error.value))
    calibrate(calibrate_thresholds, folder, "text")
    report = json.loads((folder / "threshold" / "calibration.json").read_text())
    trained = load_model(folder / "threshold")
    text = torch.randint(450, (20, 64), generator=torch.Generator().manual_seed(0))
    measured = measure_routing(trained, text)
    gate, router_type = trained.model.config.et_gate, trained.args.router_type
    return report, measured.load, (gate, router_type), refused


def calibrate(tool, folder, data, *extra):
    flags = ["--load", str(folder / "token-choice"), "--save", str(folder / "threshold")]
    tool.main([*flags, "--data", str(folder / data), *extra])


def test_calibrated_token_choice_model_routes_by_threshold_at_its_rate(tmp_path):
    from tests.hf.models import make

    make("qwen3_moe-unnormalized", tmp_path / "hf")
    [(report, load, kind, refused)] = run_ranks(from_token_choice, 1, tmp_path)
    assert kind == ("softmax", "expert-threshold")
    for before in report["before"]["layers"].values():
        assert before["fan_out"] == 2  # top 2 of 4
    for share in load.values():  # every eighth sequence was not calibrated on
        assert share.sub(0.5).abs().max() < 0.05
    for text, message in zip(
        ("none does not exist", "calibration needs two", "less than one sequence"), refused
    ):
        assert text in message
