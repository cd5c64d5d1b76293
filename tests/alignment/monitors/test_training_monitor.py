"""Tests of the findings of a batch, against scipy and counting."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from alignment.monitors.detectors import (
    DEFAULT_LIMIT,
    DETECTORS,
    NAMES,
    Detector,
    detect,
    load_detector,
)
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.limits import CORRELATION, MonitorLimits
from alignment.monitors.text_features import NormalizedResponse
from alignment.monitors.training_monitor import (
    Alarm,
    Monitor,
    describe_alarms,
    rank_correlation,
)
from alignment.records import Message, Outcome, Prompt, Response, Verdict
from megatron_ext.errors import UserError

REFUSAL = "I'm sorry, but I can't help with that."
ENDED = "A fern grows in shade.<|im_end|>"


def responses(texts: list[str]) -> list[Response]:
    prompt = Prompt("p", [Message("user", "What grows in shade?")])
    return [Response(f"r{number}", prompt, text) for number, text in enumerate(texts)]


def test_shares_alarms_and_examples_are_those_of_the_single_responses() -> None:
    plain = [f"Ferns grow in shade, and number {n} does too." for n in range(16)]
    items = responses([*plain, REFUSAL, REFUSAL, REFUSAL, ENDED])
    rewards = [float(n) for n in range(16)] + [1.0, 9.0, 5.0, None]
    result = Monitor().check_batch(items, rewards)
    lengths = ReferenceLengths.from_words([9] * 16 + [8, 8, 8, 7])
    for item, flags in zip(items, result.flags):
        assert flags == detect(item.prompt.messages, item.text, lengths)
    assert result.shares == dict.fromkeys(NAMES, 0.0) | {"refusal": 0.15, "fake_end": 0.05}
    # One response is too few for an alarm, though its share is above the limit.
    assert result.alarms == {"refusal": Alarm(0.15, 0.1)}
    assert [example.id for example in result.examples["refusal"]] == ["r17", "r18", "r16"]
    assert result.examples["fake_end"][0].evidence == ("<|im_end|>",)
    assert result.examples["null"] == []
    assert result.metrics()["monitor/refusal"] == 0.15
    alone = Monitor(min_flagged=1, max_examples=2).check_batch(items, rewards)
    assert set(alone.alarms) == {"refusal", "fake_end"}
    assert [example.id for example in alone.examples["refusal"]] == ["r17", "r18"]


def test_share_at_its_limit_raises_no_alarm_and_null_disables_it() -> None:
    items = responses([REFUSAL, REFUSAL, "Ferns.", "Moss."])
    for limit, alarms in ((0.5, set()), (0.49, {"refusal"}), (None, set())):
        limits = MonitorLimits.create({"refusal": limit})
        assert set(Monitor(limits).check_batch(items).alarms) == alarms


def test_a_batch_that_has_grown_long_as_a_whole_is_verbose_against_usual_lengths() -> None:
    items = responses([f"{n} ferns " * 2 + "and so on " * 30 for n in range(10)])
    assert Monitor().check_batch(items).shares["verbose"] == 0
    lengths = ReferenceLengths.from_words([9, 10, 12, 15])
    result = Monitor(reference_lengths=lengths).check_batch(items)
    assert result.shares["verbose"] == 1 and result.alarms["verbose"] == Alarm(1.0, 0.1)


rewards_and_words = st.lists(
    st.tuples(st.one_of(st.none(), st.just(math.nan), st.integers(0, 9)), st.integers(0, 30)),
    min_size=1,
    max_size=20,
)


@given(rewards_and_words)
def test_the_correlation_is_of_ranks_over_the_rewarded_and_none_where_it_has_no_value(
    pairs: list[tuple[float | None, int]],
) -> None:
    items = responses(["fern " * words for _, words in pairs])
    result = Monitor().check_batch(items, [reward for reward, _ in pairs])
    there = [(r, w) for r, w in pairs if r is not None and not math.isnan(r)]
    if len(there) < 3 or len({r for r, _ in there}) == 1 or len({w for _, w in there}) == 1:
        assert result.correlation is None
        assert CORRELATION not in result.metrics() and CORRELATION not in result.alarms
        return
    # Pearson's correlation of the ranks, ties sharing theirs.
    ranks = [stats.rankdata(column) for column in zip(*there)]
    expected = np.corrcoef(ranks[0], ranks[1])[0, 1]
    assert result.correlation is not None
    assert result.correlation == pytest.approx(expected, abs=1e-9)
    assert (CORRELATION in result.alarms) == (result.correlation > 0.6)
    lengths = [w for _, w in pairs]
    assert result.words["median"] == np.median(lengths)
    assert result.words["p95"] == pytest.approx(np.percentile(lengths, 95))


def test_infinite_rewards_do_not_count() -> None:
    scores = np.array([1.0, 2.0, 3.0, np.inf, -np.inf])
    assert rank_correlation(scores, np.array([3.0, 2.0, 1.0, 0.0, 9.0])) == pytest.approx(-1.0)


def test_registered_detector_needs_no_entry_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def moss(response: NormalizedResponse) -> tuple[str, ...]:
        return ("Moss",) if "moss" in response.words else ()

    monkeypatch.setitem(DETECTORS, "moss", Detector("moss", moss, "mentions moss"))
    monkeypatch.setitem(DETECTORS, "wet moss", Detector("wet moss", moss, "mentions it", 0.9))
    findings = Monitor().check_batch(responses(["Moss.", "Ferns and moss.", "Ferns."]))
    assert findings.shares["moss"] == findings.shares["wet moss"] == pytest.approx(2 / 3)
    assert findings.alarms["moss"] == Alarm(2 / 3, DEFAULT_LIMIT)
    assert "wet moss" not in findings.alarms
    assert MonitorLimits.create({"moss": 0.7})["moss"] == 0.7


DETECTOR_FILE = """
from alignment.monitors.detectors import detector

@detector("moss", measures="mentions moss", limit=0.5)
def find_moss(response):
    return tuple(word for word in response.words if word == "moss")

plain = len
"""


@pytest.fixture
def detector_file(tmp_path: Path) -> Iterator[Path]:
    """Return a user's file; detectors loaded from it are unregistered after the test."""
    file = tmp_path / "my_detectors.py"
    file.write_text(DETECTOR_FILE)
    yield file
    DETECTORS.pop("moss", None)


@pytest.mark.parametrize(("limit", "alarms"), [("default", {"moss"}), (0.7, set()), (None, set())])
def test_detector_by_function_path_has_its_own_limit_or_that_of_the_file(
    limit: object, alarms: set[str], detector_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(yaml.safe_dump({f"{detector_file}:find_moss": limit}))
    findings = Monitor(MonitorLimits.read(str(file))).check_batch(
        responses(["Moss.", "Ferns and moss.", "Ferns."])
    )
    assert findings.shares["moss"] == pytest.approx(2 / 3)
    assert findings.metrics()["monitor/moss"] == pytest.approx(2 / 3)
    assert set(findings.alarms) == alarms
    if alarms:
        assert describe_alarms(findings.alarms) == [
            "Alarm: moss (66.7%, limit 50.0%), a response that mentions moss."
        ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent is not a detector"),
        ("plain", "plain is not a detector. Give FILE.py:NAME"),
    ],
)
def test_load_detector_refuses_what_is_none(name: str, message: str, detector_file: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_detector(f"{detector_file}:{name}")
    with pytest.raises(UserError, match=r"the file .* does not exist"):
        load_detector(f"{detector_file}.gone:{name}")
    detector_file.write_text(DETECTOR_FILE.replace('"moss", measures', '"refusal", measures'))
    with pytest.raises(UserError, match="a detector named 'refusal' already exists"):
        load_detector(f"{detector_file}:find_moss")


def test_failed_verdicts_count_neither_as_gaming_nor_as_clean() -> None:
    items = responses(["Moss.", "Ferns.", "Sedges.", "Ivy."])
    verdicts = [
        Verdict("r0", Outcome.SCORE, 9.0),
        Verdict("r1", Outcome.FAILED, reason="timed out"),
        Verdict("r2", Outcome.SCORE, 4.9),
        None,
    ]
    findings = Monitor(min_flagged=1).check_batch(items, verdicts=verdicts)
    assert findings.shares["judge"] == 0.5 and findings.unjudged == 2
    assert findings.alarms["judge"] == Alarm(0.5, 0.05)
    assert findings.metrics()["monitor_unjudged"] == 2
    assert "judge" not in Monitor().check_batch(items, verdicts=[None] * 4).shares
    with pytest.raises(ValueError, match="4 responses have 1 verdicts"):
        Monitor().check_batch(items, verdicts=[None])


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"refusals": 0.1}, "There is no limit 'refusals'. Choose from refusal, "),
        ({"null": 1.5}, "The limit of null must be from 0 to 1 or null, not 1.5"),
        ({"null": "5%"}, "must be from 0 to 1 or null, not '5%'"),
        ({"null": True}, "must be from 0 to 1 or null, not True"),
        ({"null": math.nan}, "must be from 0 to 1 or null, not nan"),
    ],
)
def test_limits_that_are_none_are_refused(limits: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MonitorLimits.create(limits)


def test_a_batch_without_responses_or_with_other_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match="0 responses"):
        Monitor().check_batch([])
    with pytest.raises(ValueError, match="1 responses have 2 rewards"):
        Monitor().check_batch(responses(["Moss."]), [1.0, 2.0])
