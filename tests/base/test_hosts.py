"""Metrics over the processes of a run, from their reports."""

import pytest

from llm_jax.base.hosts import HostLog, host_metrics, slowdown, step_times


def report(own, wait, data=0.0, memory=0.5):
  return {'step_seconds': own + wait, 'own_seconds': own, 'wait_seconds': wait, 'data_seconds': data,
          'host_memory': memory}


def test_the_process_that_the_others_wait_for_is_the_slowest():
  """All steps take 0.1 s. Process 1 works 0.06 s itself; the others wait for it, and the devices need 0.04 s."""
  reports = {0: report(0.01, 0.09), 1: report(0.06, 0.04, data=0.05, memory=0.9), 2: report(0.01, 0.09)}
  assert step_times(reports) == pytest.approx({0: 0.05, 1: 0.1, 2: 0.05})
  assert slowdown(1, step_times(reports)) == pytest.approx((2.0, 0.05))
  assert host_metrics(reports) == pytest.approx({'host/slowest': 1, 'host/spread': 2.0, 'host/data_seconds': 0.05,
                                                 'host/memory': 0.9})


def test_equal_processes_have_no_spread_and_one_has_no_metrics():
  assert host_metrics({i: report(0.01, 0.09) for i in range(4)})['host/spread'] == pytest.approx(1.0)
  assert host_metrics({0: report(0.01, 0.09)}) == host_metrics({}) == {}
  assert host_metrics({0: report(0.01, 0.09), 1: report(0.0, 0.0)}) == {}, 'not every one has trained a step'


def test_a_single_process_has_no_log_of_its_own(tmp_path):
  HostLog(tmp_path, 0, 1).write(1)
  assert not list(tmp_path.iterdir())
  log = HostLog(tmp_path, 1, 2)
  log.write(1)
  log.write(2)
  assert len((tmp_path / 'logs/process_1.jsonl').read_text().splitlines()) == 1, 'at most one in five seconds'
