import random

import pytest

from rayltr.agenda import Agenda, Job, crowding, ranked
from rayltr.spec import Stage, fn

FIRST = Stage(source=fn("digits"), epochs=8, horizon=10)


def recipe(number, first=FIRST):
    """A chain that shares its first stage with the others."""
    return first.but(epochs=2, resume=first, loss=fn("focal", gamma=float(number)))


def agenda(stages, blocks=(), arms=None, ahead=0):
    """An agenda whose proposals are these chains."""
    left = [
        Job(number, 0, {"arm": (arms or {}).get(number, "study")}, number, stage) for number, stage in enumerate(stages)
    ]
    promoted = lambda job: Job(job.number, job.rung + 1, job.params, job.asked, job.stage)  # noqa: E731
    return Agenda(lambda: left.pop(0) if left else None, promoted, blocks, ahead)


def single(number, epochs=3):
    return Stage(source=fn("digits"), epochs=epochs, seed=number)


def drained(made, values, concurrent=1, seed=0):
    """Runs everything, trials ending in a random order; the jobs in the order in which they ended."""
    order, running, draw = [], [], random.Random(seed)
    while True:
        while len(running) < concurrent and (job := made.next()):
            running.append(job)
        if not running:
            assert made.finished()
            return order
        job = running.pop(draw.randrange(len(running)))
        made.ended(job, values(job))
        order.append(job)


def test_every_proposal_runs_once_in_order():
    made = agenda([single(n) for n in range(7)])
    assert not made.finished()
    assert [job.trial for job in drained(made, lambda job: (0.0,))] == [f"{n:04d}" for n in range(7)]


def test_no_two_trials_make_the_same_stage_at_once():
    made = agenda([recipe(0), recipe(1), single(2), recipe(3)])
    first = made.next()
    assert first.number == 0
    assert made.next().number == 2, "1 wants the stage that 0 makes, so another goes first"
    assert made.next() is None and not made.finished()
    made.moved(first.trial, 1)
    assert [made.next().number, made.next().number] == [1, 3], "the shared stage is there, each goes on with its own"


def test_a_stage_of_another_length_is_waited_for_too():
    shorter = FIRST.but(epochs=6)
    made = agenda([recipe(0), recipe(1, shorter)])
    first = made.next()
    assert made.next() is None
    made.ended(first, (1.0,))
    assert made.next().number == 1


def test_what_failed_keeps_nobody_waiting():
    made = agenda([recipe(0), recipe(1)])
    made.ended(made.next(), None)
    assert made.next().number == 1
    assert not made.made


def test_a_trial_that_died_is_repeated_alone():
    made = agenda([single(n) for n in range(4)])
    first, second = made.next(), made.next()
    made.repeat(first)
    third = made.next()
    assert third.number == 2, "not before the others have ended"
    for job in (second, third):
        made.ended(job, (0.0,))
    again = made.next()
    assert (again.number, again.again) == (0, True)
    assert made.next() is None, "nothing else runs beside it"
    made.ended(again, (0.0,))
    assert made.next().number == 3


def test_a_trial_that_lost_its_machine_is_repeated_beside_others():
    made = agenda([single(n) for n in range(3)])
    first, _ = made.next(), made.next()
    made.repeat(first, alone=False)
    assert [(job.number, job.again) for job in (made.next(), made.next())] == [(0, False), (2, False)]


def best_so_far(numbers, value, size):
    """With every block, and with the rest, the best of all so far that was not taken."""
    taken = []
    for end in [*range(size, len(numbers), size), len(numbers)]:
        taken.append(min((n for n in numbers[:end] if n not in taken), key=value.__getitem__))
    return taken


@pytest.mark.parametrize("concurrent", [1, 3])
def test_with_each_block_the_best_so_far_is_promoted(concurrent):
    arms = {n: "control" for n in range(0, 20, 5)}
    value = {n: ((7 * n) % 20,) for n in range(20)}
    made = agenda([single(n) for n in range(20)], (4,), arms)
    order = drained(made, lambda job: value[job.number], concurrent)
    study = best_so_far([n for n in range(20) if n not in arms], value, 4)
    assert study == [3, 6, 9, 12], "9, the second of its block, comes before 12, the best of the next"
    assert {job.number for job in order if job.rung} == {*study, *best_so_far(sorted(arms), value, 4)}
    assert len(order) == 20 + 5


def test_a_good_block_sends_its_second_before_the_best_of_a_bad_one():
    value = dict(enumerate([0, 1, 5, 7, 8, 9]))
    order = drained(agenda([single(n) for n in range(6)], (3,)), lambda job: (value[job.number],))
    assert [job.number for job in order if job.rung] == [0, 1]


def test_another_merit_decides_every_second_time():
    made, order = agenda([single(n) for n in range(8)], (2,)), []
    merit = dict(enumerate([0.1, 0.2, 0.9, 0.3, 0.4, None, 0.8, 0.7]))
    while (job := made.next()) is not None:
        order.append(job)
        made.ended(job, (float(job.number),), merit[job.number])
    assert [job.number for job in order if job.rung] == [0, 2, 1, 6]


def test_the_same_recipe_is_promoted_once():
    order = drained(agenda([single(0), single(0), single(2), single(3)], (2,)), lambda job: (float(job.number),))
    assert [job.number for job in order if job.rung] == [0, 2]


def test_nothing_is_promoted_before_a_proposal_that_a_crash_left_open():
    made = agenda([single(n) for n in range(6)], (3,))
    jobs = [made.next() for _ in range(4)]
    resumed = agenda([single(1)], (3,))
    for number in (0, 2, 3):
        resumed.ended(jobs[number], (float(number),))
    resumed.propose = lambda left=[jobs[1]]: left.pop() if left else None
    assert resumed.next().number == 1, "0, 2 and 3 are three, but no block"
    resumed.ended(jobs[1], (-1.0,))
    assert resumed.next().trial == "0001.1"


def test_what_comes_first_to_a_higher_rung_depends_on_no_machine():
    """The blocks of the second rung are those of the promotions, not of their numbers or of when they ended."""
    value = {n: (float(-n),) for n in range(12)}
    for seed in range(8):
        order = drained(agenda([single(n) for n in range(12)], (2, 2)), lambda job: value[job.number], 5, seed)
        assert sorted(job.trial for job in order if job.rung == 1) == [f"{n:04d}.1" for n in (1, 3, 5, 7, 9, 11)]
        assert sorted(job.trial for job in order if job.rung == 2) == ["0003.2", "0007.2", "0011.2"]


def test_promotions_do_not_depend_on_the_order_in_which_trials_end():
    value = {n: ((11 * n) % 27,) for n in range(27)}
    found = set()
    for seed in range(5):
        order = drained(agenda([single(n) for n in range(27)], (3, 3)), lambda job: value[job.number], 4, seed)
        found.add(tuple(sorted(job.trial for job in order)))
    assert len(found) == 1
    (trials,) = found
    assert [sum(trial.endswith(end) for trial in trials) for end in (".1", ".2")] == [9, 3]


def test_a_block_without_results_promotes_nothing_and_a_rest_its_best():
    made = agenda([single(n) for n in range(5)], (3,))
    order = drained(made, lambda job: None if job.number < 3 else (float(-job.number),))
    assert [job.trial for job in order if job.rung] == ["0004.1"]


def test_an_agenda_that_is_told_the_past_goes_on_where_it_was():
    value = {n: ((5 * n) % 9,) for n in range(9)}
    stages = [single(n) for n in range(9)]
    whole = {job.trial for job in drained(agenda(stages, (3,)), lambda job: value[job.number])}
    for done in range(12):
        made, rest = agenda(stages, (3,)), agenda(stages, (3,))
        for _ in range(done):
            job = made.next()
            made.ended(job, value[job.number])
            rest.ended(job, value[job.number])
            if not job.rung:
                rest.propose()
        found = {job.trial for job in drained(rest, lambda job: value[job.number])}
        assert found | {job.trial for job in map(lambda key: made.known[key], made.found)} == whole


def test_what_is_trained_already_goes_first_if_asked_for():
    made = agenda([recipe(0), single(1), single(2), recipe(3)], ahead=3)
    made.ended(made.next(), (0.0,))
    assert made.next().number == 3


def test_a_broken_point_runs_and_fails_by_itself():
    made = agenda([None, single(1)])
    job = made.next()
    assert job.stages == [] and job.number == 0
    made.ended(job, None)
    assert made.next().number == 1


def test_several_objectives_rank_by_front_and_crowding():
    points = [(1.0, 4.0), (2.0, 2.0), (4.0, 1.0), (3.0, 3.0), (2.1, 2.1)]
    order = sorted(range(5), key=ranked(points).__getitem__)
    assert order[:2] == [0, 2], "the ends of the first front"
    assert order[2] == 1 and order[3] == 4 and order[4] == 3
    assert [key[2] for key in sorted(ranked([(3.0,), (1.0,), (2.0,)]))] == [1, 2, 0]


def test_crowding_is_the_sum_of_the_gaps():
    found = crowding({0: (0.0, 4.0), 1: (1.0, 1.0), 2: (4.0, 0.0)})
    assert found[0] == found[2] == float("inf")
    assert found[1] == pytest.approx(4 / 4 + 4 / 4)


def test_a_trial_that_is_dropped_is_neither_done_nor_in_the_way():
    made = agenda([recipe(0), recipe(1)])
    made.dropped(made.next())
    assert made.next().number == 1 and not made.found
