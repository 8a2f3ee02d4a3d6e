"""The policy, on a simulated clock: which gear follows from which load."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from variator_jax.serving.policy import ArrivalRate, Load, PolicyConfig, Slowdown, State, next_state

CONFIG = PolicyConfig(target=0.1)
SPEEDS = (1.0, 0.6, 0.3)  # time of each gear against ratio 1


def simulate(rates, seconds=0.005):
    """Requests of `seconds` at ratio 1 arrive evenly, at a rate for each second: (time, gear)."""
    state = State()
    now, queue, rate, gears = 0.0, [], ArrivalRate(len(SPEEDS)), []
    arrivals = [i + k / n for i, n in enumerate(rates) for k in range(n)]
    while arrivals or queue:
        if not queue:
            now = max(now, arrivals[0])
        while arrivals and arrivals[0] <= now:
            queue.append(arrivals.pop(0))
            rate.add(queue[-1], [seconds * speed for speed in SPEEDS])
        queued = [len(queue) * seconds * speed for speed in SPEEDS]
        state = next_state(CONFIG, state, Load(now, now - queue[0], queued, rate.at(now)))
        gears.append((now, state.gear))
        taken, queue = queue[:4], queue[4:]
        now += len(taken) * seconds * SPEEDS[state.gear]
    return gears


def test_a_load_that_ratio_1_carries_is_answered_at_ratio_1():
    assert {gear for _, gear in simulate([100] * 10)} == {0}


def test_a_load_above_ratio_1_shifts_and_returns_step_by_step_when_it_ends():
    gears = simulate([400] * 5 + [20] * 15)
    assert max(gear for now, gear in gears if now < 5) == 2
    assert gears[-1][1] == 0
    falling = [gear for now, gear in gears if now > 5]
    assert all(0 <= before - after <= 1 for before, after in itertools.pairwise(falling))


def test_a_steady_load_between_two_gears_settles():
    gears = simulate([240] * 30)
    changes = sum(a != b for (_, a), (_, b) in itertools.pairwise(gears))
    assert gears[-1][1] > 0 and changes <= 4


times = st.floats(0, 10)
loads = st.builds(
    lambda waited, queued, arriving: Load(
        100.0, waited, [queued * s for s in SPEEDS], [arriving * s for s in SPEEDS]
    ),
    *[times] * 3,
)
states = st.builds(State, st.integers(0, 2), st.one_of(st.just(math.inf), st.floats(0, 100)))


@settings(max_examples=200, deadline=None)
@given(states, loads, st.floats(1, 5))
def test_more_load_never_means_a_slower_gear(state, load, factor):
    queued, arriving = ([x * factor for x in work] for work in (load.queued, load.arriving))
    more = Load(load.now, load.waited * factor, queued, arriving)
    assert next_state(CONFIG, state, more).gear >= next_state(CONFIG, state, load).gear


@settings(max_examples=200, deadline=None)
@given(states, loads)
def test_a_gear_that_holds_the_target_is_chosen_if_there_is_one(state, load):
    gear = next_state(CONFIG, state, load).gear
    wait = CONFIG.wait_share * CONFIG.target

    def holds(g):
        return load.waited + load.queued[g] <= wait and load.arriving[g] <= CONFIG.busy

    assert holds(gear) or gear == 2 or not any(map(holds, range(3)))
    assert state.gear - gear <= 1


def test_the_rate_of_arrivals_is_the_work_of_the_last_seconds():
    rate = ArrivalRate(1, shorter=2.0)
    for i in range(2_000):
        rate.add(i / 100, [0.005])
    assert abs(rate.at(20.0)[0] - 0.5) < 0.01
    assert rate.at(30.0)[0] < 0.01


def test_arrivals_by_chance_are_no_load_and_a_load_that_ended_is_soon_none():
    rate = ArrivalRate(1, shorter=2.0, longer=10.0)
    rate.add(0.0, [1.0])
    assert rate.at(0.0) == [0.1]
    for tenth in range(1, 600):
        rate.add(tenth / 10, [0.08])
    assert 0.7 < rate.at(60.0)[0] < 0.9
    assert rate.at(64.0)[0] < 0.15


def test_a_request_after_an_idle_gap_is_answered_at_ratio_1():
    idle = (0.5 * CONFIG.hold, CONFIG.hold)
    after = [Load(9.0, 0.0, [0.01] * 3, [0.1] * 3, seconds) for seconds in idle]
    assert [next_state(CONFIG, State(2), load).gear for load in after] == [2, 0]


def test_an_overload_is_given_to_the_gear_with_the_least_work():
    assert next_state(CONFIG, State(), Load(9.0, 0.0, [1.0, 0.2, 0.6], [9.0, 2.0, 5.0])).gear == 1


def test_a_slow_program_or_a_stall_does_not_make_the_others_slow():
    slow = Slowdown()
    for program, took in (("generate", 0.3), ("embed", 0.1)):
        slow.add(program, took, 0.1)
    assert [round(slow.of(p), 6) for p in ("generate", "embed", "labels")] == [3, 1, 1]
    slow.add("embed", 60.0, 0.1)
    for _ in range(20):
        slow.add("embed", 0.1, 0.1)
    assert slow.of("embed") < 1.2
