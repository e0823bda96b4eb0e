"""The meter with our own clock: every time and rate that a logged step reports, by literal values."""

import pytest

from salt_lightning.fit.meter import Meter, Totals


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets this much time pass."""
    now = [1000.0]
    monkeypatch.setattr("salt_lightning.fit.meter.time.perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def taught(steps):
    return min(steps, 4)


def new(step_tokens=100):
    meter = Meter()
    meter.follow(step_tokens, taught)
    return meter


def test_a_logged_step_speaks_of_the_time_since_the_one_before(clock):
    meter = new()
    meter.start(0, wait_s=5.0)
    clock(10.0)
    first = meter.read(2, wait_s=6.0, peak=None)
    assert (first["time_s"], first["tokens"], first["tokens_per_s"], first["data_wait_s"]) == (10.0, 200.0, 20.0, 1.0)
    clock(4.0)
    second = meter.read(4, wait_s=6.5, peak=None)
    assert (second["time_s"], second["tokens"], second["tokens_per_s"], second["data_wait_s"]) == (14.0, 400, 50.0, 0.5)


def test_a_resumed_run_counts_its_own_steps_and_adds_to_the_time(clock):
    meter = new()
    meter.time_s = 60.0  # from earlier starts
    meter.start(8, wait_s=0.0)
    clock(2.0)
    values = meter.read(10, wait_s=0.0, peak=None)
    assert (values["time_s"], values["tokens"], values["tokens_per_s"]) == (62.0, 1000.0, 100.0)


def test_a_checkpoint_has_the_time_since_the_last_logged_step_without_a_validation(clock):
    meter = new()
    meter.start(0, wait_s=0.0)
    clock(10.0)
    meter.read(2, wait_s=0.0, peak=None)
    clock(3.0)
    assert meter.state(2)["time_s"] == 10.0  # later time belongs to an unfinished step
    assert meter.state(3)["time_s"] == 13.0
    meter.pause()
    clock(50.0)
    assert meter.state(3)["time_s"] == 13.0
    meter.go_on()
    clock(1.0)
    assert meter.state(4)["time_s"] == 14.0
    assert meter.read(4, wait_s=0.0, peak=None)["time_s"] == 14.0
    meter.pause()  # a validation that ended with an error
    clock(50.0)
    meter.start(0, wait_s=0.0)  # another fit
    clock(1.0)
    assert meter.state(1)["time_s"] == 15.0


def test_a_second_fit_of_a_module_counts_from_zero():
    meter = new()
    meter.time_s = meter.teacher_time_s = 60.0
    meter.forget()
    assert (meter.time_s, meter.teacher_time_s) == (0.0, 0.0)


def test_validation_is_not_counted(clock):
    meter = new()
    meter.start(0, wait_s=0.0)
    clock(3.0)
    meter.pause()
    clock(50.0)
    meter.go_on()
    clock(1.0)
    assert meter.read(2, wait_s=0.0, peak=None)["tokens_per_s"] == 50.0
    assert meter.time_s == 4.0


def test_the_teachers_seconds_are_those_of_its_forward(clock):
    meter = new()
    meter.start(0, wait_s=0.0)
    for _ in range(2):
        with meter.teacher_runs(on_cuda=False):
            clock(0.5)
        clock(2.0)
    values = meter.read(2, wait_s=0.0, peak=None)
    assert (values["time_s"], values["teacher_time_s"]) == (5.0, 1.0)
    clock(1.0)
    meter._watched = [(Event(100.0), Event(150.0)), (Event(200.0), Event(450.0))]  # milliseconds, as on a GPU
    assert meter.read(3, wait_s=0.0, peak=None)["teacher_time_s"] == 1.3
    clock(1.0)
    assert meter.read(4, wait_s=0.0, peak=None)["teacher_time_s"] == 1.3
    late = Event(800.0, reached=False)
    meter._watched = [(Event(500.0), Event(700.0)), (Event(700.0), late)]
    assert meter.state(4)["teacher_time_s"] == 1.5
    late.reached = True  # between two logged steps a run may save several times
    assert [meter.state(4)["teacher_time_s"] for _ in range(2)] == [1.6, 1.6]


class Event:
    def __init__(self, at_ms, reached=True):
        self.at_ms, self.reached = at_ms, reached

    def query(self):
        return self.reached

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


def test_mfu_is_that_of_the_stretch_and_the_totals_are_of_the_run(clock):
    meter = new()
    meter.forward_flops = {"student": 2.0, "teacher": 1.0}
    meter.start(3, wait_s=0.0)
    clock(10.0)
    values = meter.read(5, wait_s=0.0, peak=200.0)
    assert values["flops_student_total"] == 5 * 100 * 3 * 2.0
    assert values["flops_teacher_total"] == 4 * 100 * 1.0
    # two steps of the student, one of the teacher, in 10 s of 200 FLOP/s
    assert values["mfu"] == pytest.approx((2 * 100 * 6.0 + 1 * 100 * 1.0) / 10 / 200)


def spent(meter, clock, step, seconds):
    clock(seconds)
    meter.read(step, wait_s=0.0, peak=None)
    return meter.what_it_brought()


@pytest.mark.parametrize("every", [1, 5, 50])
def test_what_the_leaving_brought_is_said_once_over_many_steps_without_the_first_interval(every, clock):
    meter = new(1000)
    meter.start(0, wait_s=0.0)
    assert spent(meter, clock, 1, 8.0) is None  # a compile
    assert spent(meter, clock, 2, 0.5) is None
    assert spent(meter, clock, 4, 2.5) is None
    meter.teacher_left()
    assert spent(meter, clock, 5, 8.0) is None  # the boundary's checkpoint, and a compile
    said = [spent(meter, clock, 5 + every * (i + 1), every * (0.4 + 0.2 * (i % 2))) for i in range(20)]
    reads = max(2, 10 // every) if every < 50 else 1
    speed = "2,500" if every == 50 else "2,000"
    assert said[reads - 1] == f"{speed} tokens/s without the teacher, 1,000 with it"
    assert [line for line in said if line] == [said[reads - 1]]


def test_speeds_of_an_earlier_fit_are_not_compared(clock):
    meter = new(1000)
    for step in (1, 2):
        assert spent(meter, clock, step, 1.0) is None
    meter.teacher_left()
    meter.follow(1000, taught)  # another fit of the same module
    assert [spent(meter, clock, step, 1.0) for step in range(3, 30)] == [None] * 27


@pytest.mark.parametrize(
    ("steps", "kd_steps", "has_teacher"), [(0, 4, 0), (3, 4, 3), (4, 4, 4), (99, 4, 4), (99, 0, 0)]
)
def test_the_teacher_costs_while_it_teaches(steps, kd_steps, has_teacher):
    meter = Meter()
    meter.forward_flops = {"student": 7.0, "teacher": 2.0}
    meter.follow(10, lambda steps: min(steps, kd_steps))
    assert meter.totals(steps) == Totals(steps, has_teacher, 10 * steps, 3 * 7.0 * 10 * steps, 2.0 * 10 * has_teacher)


def test_what_a_checkpoint_has_counted_stays_where_the_settings_change():
    meter = new()
    meter.forward_flops = {"student": 2.0, "teacher": 1.0}
    counted = Totals(6, 4, 600, 3600.0, 400.0)
    assert meter.totals(6) == counted
    saved = meter.state(6)
    meter = new()
    meter.forward_flops["student"] = 2.0
    meter.load(saved)
    meter.follow(100, taught)
    assert meter.before == Totals()  # nothing has changed: the same formula from step 0, bit for bit
    meter.forward_flops["teacher"] = 3.0
    meter.follow(50, lambda steps: min(steps, 8))
    assert meter.totals(6) == counted
    assert meter.totals(7) == Totals(7, 5, 650, 3600.0 + 50 * 6.0, 400.0 + 50 * 3.0)
    assert meter.totals(10) == Totals(10, 6, 800, 3600.0 + 200 * 6.0, 400.0 + 100 * 3.0)


def test_a_new_fit_forgets_what_a_checkpoint_had_counted():
    earlier, meter = new(), new()
    meter.load(earlier.state(8))
    meter.forget()
    meter.follow(50, taught)
    assert (meter.totals(2).tokens, meter.before) == (100.0, Totals())
