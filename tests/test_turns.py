"""lab/bench/turns.py: who is ready in time takes one turn a round, and what goes wrong with one stays with it."""

import pytest

from lab.bench.turns import Candidate, start_all, take_turns


@pytest.fixture
def candidate(tmp_path):
    made = []

    def make(name: str, **job: object) -> Candidate:
        made.append(Candidate(name, "tests.turn_taker", {"name": name, "order": str(tmp_path / "order"), **job}))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert all(one._process is None or one._process.returncode is not None for one in made)


def test_each_takes_one_turn_a_round_and_warm_up_does_not_count(candidate, tmp_path):
    everyone, rounds = [candidate(name) for name in "abc"], []
    start_all(everyone, at_once=2, seconds=None)
    assert [one.about for one in everyone] == [{"name": name} for name in "abc"]
    take_turns(everyone, 12, 2, lambda: rounds.append(min(len(one.seconds["step"]) for one in everyone)))
    assert rounds == list(range(1, 13))
    assert all(one.seconds["step"] == list(range(3, 15)) and one.about["asked"] == "turn" for one in everyone)
    took = (tmp_path / "order").read_text().split()
    orders = [tuple(took[i : i + 3]) for i in range(0, len(took), 3)]
    assert all(set(order) == set("abc") for order in orders) and len(set(orders)) > 2


def test_who_fails_is_named_and_the_others_go_on(candidate):
    everyone = [candidate("good"), candidate("never", fails="start"), candidate("later", fails="turn"), candidate("fine")]
    start_all(everyone, at_once=4, seconds=None)
    take_turns(everyone, 3, 0, lambda: None)
    good, never, later, fine = everyone
    assert good.seconds["step"] == fine.seconds["step"] == [1, 2, 3] and not (good.failure or fine.failure)
    assert never.failure.startswith("ended with exit code 3") and never.seconds == {}
    assert later.failure.startswith("ended with exit code 4") and later.seconds["step"] == [1]


def test_who_is_not_ready_in_time_is_left_out(candidate):
    everyone = [candidate("quick"), candidate("slow", sleep=3600), candidate("not begun")]
    # The quick one is ready before the clock begins, so that no machine is too slow for it
    everyone[0].start()
    everyone[0].get_ready()
    start_all(everyone[1:], at_once=1, seconds=0.5)
    take_turns(everyone, 1, 0, lambda: None)
    assert everyone[0].seconds["step"] == [1]
    assert [one.failure for one in everyone[1:]] == ["not ready after 0 s"] * 2
