"""Tests of the alarm about a policy that games its judge."""

from alignment.rl.gaming_alarm import GamingAlarm


def test_gaming_alarm_ignores_rounding():
    def rows(proxy, gold, noise):
        return [
            {"grade/proxy": p, "grade/gold": g, "grade/gap": p - g}
            for p, g in zip(proxy, (g + noise * i for i, g in enumerate(gold)))
        ]

    alarm = GamingAlarm(gap=0.5, window=2)
    for noise in (0.0, 1e-6, -1e-6):
        assert alarm.raised(rows([4, 5, 6, 7], [4, 4, 4, 4], noise)), noise
        assert not alarm.raised(rows([4, 4.2, 4.3, 4.5], [4, 4, 4, 4], noise)), noise  # 0.5, as may
        assert not alarm.raised(rows([7, 7, 7, 7 + noise], [7, 6, 6, 6], noise)), noise
    assert not alarm.raised(rows([4, 5, 6, 7], [4, 4, 4, 4], 1e-3))  # gold rises


def test_gaming_alarm_sentence_is_returned_once_per_alarm():
    def rows(proxy, gold):
        return [
            {"step": 10 * i, "grade/proxy": p, "grade/gold": g, "grade/gap": p - g}
            for i, (p, g) in enumerate(zip(proxy, gold))
        ]

    alarm = GamingAlarm(gap=0.5, window=2)
    course = rows([4, 5, 6, 7.25, 8], [4, 4, 3.5, 3, 3])
    assert alarm.sentence(course[:2]) is None and alarm.raised(course)
    assert alarm.sentence(course[:3]) == (
        "ALARM at step 20: the policy is gaming its judge: proxy +2.00, gold -0.50 since step 0"
    )
    assert alarm.sentence(course[:4]) is None and alarm.sentence(course) is None


def test_gaming_alarm_requires_a_gap_that_opens_without_a_rise_of_gold():
    def rows(proxy, gold):
        return [
            {"grade/proxy": p, "grade/gold": g, "grade/gap": None if g is None else p - g}
            for p, g in zip(proxy, gold)
        ]

    alarm = GamingAlarm(gap=0.5, window=2)
    assert alarm.raised(rows([4, 5, 6, 7], [4, 5, 4.9, 4.8]))
    assert not alarm.raised(rows([4, 5, 6, 7], [4, 5, 5.5, 6]))  # gold rises too
    assert not alarm.raised(rows([4, 4.1, 4.2, 4.3], [4, 4, 4, 4]))  # a small gap
    assert not alarm.raised(rows([9, 8, 7, 6], [4, 3, 2, 1]))  # both fall
    assert not alarm.raised(rows([4, 7], [4, 3]))  # too early to say
    assert alarm.raised(rows([4, 5, 9, 6, 7], [4, 5, None, 4.9, 4.8]))
    assert not alarm.raised(rows([4, 5, 6, 7, 8], [4, 5, 4.9, 4.8, None]))  # gold failed
