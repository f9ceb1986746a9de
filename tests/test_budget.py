import pytest

from edgekws.errors import PowerError
from edgekws.power.budget import LOOK_S, Budget


class Board:
    """A clock that only sleeping and working move, a thermometer and a memory meter that follow it."""

    def __init__(self, celsius=lambda s: 40.0, free_mb=lambda s: 4000.0):
        self.now = 100.0
        self.slept = []
        self._celsius, self._free_mb = celsius, free_mb

    def budget(self, *limits, **options):
        return Budget(
            *limits,
            **options,
            clock=lambda: self.now,
            sleep=self.sleep,
            thermometer=lambda: self._celsius(self.now - 100),
            free_mb=lambda: self._free_mb(self.now - 100),
        )

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def work(self, seconds):
        self.now += seconds


def test_without_limits_nothing_waits():
    board = Board(celsius=lambda s: 95.0, free_mb=lambda s: 1.0)
    budget = board.budget()
    for _ in range(10):
        board.work(0.5)
        budget.pause()

    assert board.slept == []
    assert budget.worked_s == pytest.approx(5.0)


@pytest.mark.parametrize("duty", [0.1, 0.25, 0.5, 0.9])
def test_the_duty_cycle_is_held(duty):
    board = Board()
    budget = board.budget(duty)
    for step_s in (0.01, 0.5, 0.02, 0.3) * 5:
        board.work(step_s)
        budget.pause()

    assert budget.worked_s / (board.now - 100) == pytest.approx(duty)


def test_one_step_that_took_an_hour_is_not_paid_for_with_hours():
    board = Board()
    budget = board.budget(0.1)
    board.work(3600)
    budget.pause()

    assert board.slept == [60.0]


def test_it_waits_until_the_board_is_cooler_than_its_limit():
    """Hot at 10 s, and colder by 1 °C a second from then on: it goes on 3 °C below the limit."""
    board = Board(celsius=lambda s: 60.0 if s < 10 else 85.0 - (s - 10))
    budget = board.budget(max_temperature_c=80.0)
    for _ in range(10):
        board.work(1.0)
        budget.pause()

    assert board.slept == [LOOK_S] * 4  # 85, 83, 81, 79, 77 °C
    assert budget.hot_s == pytest.approx(8.0)
    assert (budget.worked_s, budget.rested_s) == (pytest.approx(10.0), 0.0)


def test_it_waits_until_there_is_memory_again():
    board = Board(free_mb=lambda s: 900.0 if 5 <= s < 20 else 1500.0)
    budget = board.budget(min_free_mb=1000.0)
    for _ in range(8):
        board.work(1.0)
        budget.pause()

    assert budget.short_s == pytest.approx(16.0)
    assert budget.hot_s == 0.0


def test_a_board_that_stays_hot_ends_the_round_with_the_reason():
    board = Board(celsius=lambda s: 91.0)
    with pytest.raises(PowerError, match="training was given up after 120 s of waiting: the board has 91 °C, accepted is 80"):
        board.budget(max_temperature_c=80.0, patience_s=120.0).pause()

    assert 120 < board.now - 100 <= 120 + LOOK_S


def test_memory_that_stays_short_ends_the_round_with_the_reason():
    board = Board(free_mb=lambda s: 300.0)
    with pytest.raises(PowerError, match="300 MB of memory are free, wanted are 1000"):
        board.budget(min_free_mb=1000.0).pause()


def test_a_thermometer_that_vanishes_is_reported_once_and_does_not_stop_the_round(caplog):
    board = Board(celsius=lambda s: 70.0 if s < 2 else None)
    budget = board.budget(max_temperature_c=80.0)
    for _ in range(5):
        board.work(1.0)
        budget.pause()

    assert board.slept == []
    assert [record.getMessage() for record in caplog.records] == ["the temperature cannot be read here, so that its limit is not held"]


def test_one_that_vanishes_while_it_waits_lets_it_go_on():
    board = Board(celsius=lambda s: 90.0 if s < 3 else None)
    budget = board.budget(max_temperature_c=80.0)
    budget.pause()

    assert board.slept == [LOOK_S] * 2


@pytest.mark.parametrize("duty", [0.0, -0.5, 1.5, float("nan")])
def test_a_duty_cycle_that_is_none_is_refused(duty):
    with pytest.raises(PowerError, match=r"is no share of the time\. Accepted: above 0, at most 1"):
        Budget(duty)


def test_waiting_is_not_counted_as_work():
    """Else a wait for a cool board would be paid for with rest again."""
    board = Board(celsius=lambda s: 90.0 if 1 <= s < 50 else 40.0)
    budget = board.budget(0.5, 80.0)
    for _ in range(3):
        board.work(1.0)
        budget.pause()

    assert budget.worked_s == pytest.approx(3.0)
    assert budget.rested_s == pytest.approx(3.0)
