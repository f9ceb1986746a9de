import pytest

from edgekws.errors import PowerError
from edgekws.power.budget import LOOK_S, Budget
from edgekws.power.recording import Recording


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


class Drawing:
    """A meter of known watts: 4 W, and 8 W more while it works. Its board's clock moves on in 50 ms, and each time it is read."""

    name, rail, covers, counts, interval_s, waits, step_mw = "synthetic", "IN", frozenset({"cpu"}), False, 0.05, False, None

    def __init__(self, idle_w=4.0, working_w=12.0):
        self.now, self.joules, self.working, self.readable = 100.0, 0.0, False, True
        self.idle_w, self.working_w = idle_w, working_w
        self.recording = Recording(self, gap_s=10.0, clock=lambda: self.now)
        self.recording._begin_s = self.now

    def watts(self):
        return self.working_w if self.working else self.idle_w

    def read(self):
        if not self.readable:
            raise PowerError("the chip is gone")
        return {"IN": self.watts() * 1000}

    def go(self, seconds, working=False):
        self.working = working
        for _ in range(round(seconds / self.interval_s)):
            self.recording.sample()
            self.now += self.interval_s
            self.joules += self.watts() * self.interval_s
        self.working = False

    def budget(self, max_w, **options):
        return Budget(
            max_w=max_w,
            clock=lambda: self.now,
            sleep=self.go,
            thermometer=lambda: None,
            free_mb=lambda: None,
            joules=lambda begin_s, end_s: self.recording.energy(begin_s, end_s).joules,
            **options,
        )


@pytest.mark.parametrize(("max_w", "duty"), [(6.0, 0.25), (8.0, 0.5), (10.0, 0.75)])
def test_the_machine_draws_no_more_on_average_than_the_budget_and_works_as_much_as_that_allows(max_w, duty):
    """The joules are counted beside the meter."""
    board = Drawing()
    budget = board.budget(max_w)
    for step_s in (0.5, 1.0, 0.25, 2.0) * 60:
        board.go(step_s, working=True)
        budget.pause()

    elapsed_s = board.now - 100
    assert 0.95 * max_w <= board.joules / elapsed_s <= 1.01 * max_w
    assert 0.9 * duty <= budget.worked_s / elapsed_s <= 1.02 * duty
    assert budget.worked_s + budget.rested_s == pytest.approx(elapsed_s)


def test_a_budget_that_is_not_reached_costs_no_rest():
    board = Drawing()
    budget = board.budget(15.0)
    for _ in range(20):
        board.go(1.0, working=True)
        budget.pause()

    assert budget.rested_s == 0.0


def test_what_was_saved_long_ago_is_not_spent_at_once():
    board = Drawing()
    budget = board.budget(6.0)
    board.go(600)
    budget.pause()
    begin_s, before = board.now, board.joules
    for _ in range(40):
        board.go(1.0, working=True)
        budget.pause()

    assert (board.joules - before) / (board.now - begin_s) <= 6.0 * 1.01


def test_a_machine_that_draws_more_at_rest_than_the_budget_ends_the_round_with_the_reason():
    board = Drawing(idle_w=7.0)
    budget = board.budget(6.0, patience_s=120.0)
    board.go(1.0, working=True)

    with pytest.raises(PowerError, match=r"given up after 120 s of rest: the machine draws 7\.0 W on average, accepted are 6"):
        budget.pause()


def test_a_meter_that_vanishes_is_reported_once_and_does_not_stop_the_round(caplog):
    board = Drawing()
    budget = board.budget(6.0)
    board.readable = False
    for _ in range(30):
        board.go(1.0, working=True)
        budget.pause()

    assert budget.worked_s == pytest.approx(30.0)
    assert [record.getMessage() for record in caplog.records] == ["the power cannot be read here, so that its limit is not held"]
