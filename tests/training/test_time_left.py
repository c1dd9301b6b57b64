"""The time left: steps, evaluations and saves that remain, by what they took so far."""

import random

import pytest

from llm_jax.training.throughput import TimeLeft, work_left


@pytest.mark.parametrize('periods', [(100, 20, 50), (100, 30, 7), (100, 0, 30), (99, 10, 1000), (97, 97, 97),
                                     (60, 20, 20), (100, 1000, 25), (100, 25, 1000)])
def test_the_work_left_is_what_a_run_does(periods):
  num_steps, eval_every, save_every = periods
  left = {'step': 0, 'evaluation': 0, 'save': 0}
  assert work_left(num_steps, *periods) == left
  for step in range(num_steps, 0, -1):  # from the end: what step does is left before it
    last = step == num_steps
    evaluates = eval_every > 0 and (step % eval_every == 0 or last)
    saves = step % save_every == 0 or last
    left = {'step': left['step'] + 1, 'evaluation': left['evaluation'] + evaluates,
            'save': left['save'] + (saves and not evaluates)}
    assert work_left(step - 1, *periods) == left, step


@pytest.mark.parametrize('seed', range(5))
def test_the_estimate_at_a_fifth_of_a_run_is_near_its_end(seed):
  """Evaluations take 40% of the time, saves 5%; all vary by a third, and the first of each compiles."""
  rng, periods = random.Random(seed), (1000, 50, 200)
  time_left, now, compiled, at_a_fifth = TimeLeft(), 0.0, set(), None

  def spend(kind, seconds):
    nonlocal now
    seconds *= rng.uniform(0.67, 1.33)
    if kind not in compiled:
      compiled.add(kind)
      seconds += 20
    now += seconds
    return seconds

  mean, since = 0.0, 0
  for step in range(1, 1001):
    mean, since = mean + spend('step', 0.1), since + 1
    if step % 10 == 0:
      time_left.add('step', mean / since)
      mean, since = 0.0, 0
    before, after = work_left(step - 1, *periods), work_left(step, *periods)
    for kind, seconds in (('evaluation', 73 / 20), ('save', 9 / 3)):
      if before[kind] > after[kind]:
        time_left.add(kind, spend(kind, seconds))
    if step == 201:
      at_a_fifth = now, time_left.seconds(after)
  true = now - at_a_fifth[0]
  assert at_a_fifth[1] == pytest.approx(true, rel=0.15), f'seed {seed}'


def test_nothing_is_estimated_before_a_step_was_timed():
  time_left = TimeLeft()
  time_left.add('evaluation', 3.0)
  assert time_left.seconds({'step': 5, 'evaluation': 1}) is None
  time_left.add('step', 2.0)
  assert time_left.seconds({'step': 5, 'evaluation': 1, 'save': 4}) == pytest.approx(13.0)


def test_the_estimate_follows_a_change():
  time_left = TimeLeft()
  for seconds in [1.0] * 50 + [2.0] * 50:
    time_left.add('step', seconds)
  assert time_left.seconds({'step': 100}) == pytest.approx(200, rel=0.02)
