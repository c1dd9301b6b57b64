"""The search for rows per device: it finds the most that fit, and keeps a run's number if that fits."""

import jax
import pytest

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.process import out_of_memory_as_config_error
from llm_jax.training.memory import most_rows, tokens_before


def search(num_rows, limit, likely=0, step_bytes=10, row_bytes=3):
  tried = []

  def bytes_needed(rows):
    tried.append(rows)
    return step_bytes + rows * row_bytes
  return most_rows(num_rows, bytes_needed, limit, likely), tried


@pytest.mark.parametrize('num_rows', [1, 7, 12, 360, 512])
def test_most_rows_are_found_in_few_trials(num_rows):
  divisors = [n for n in range(1, num_rows + 1) if num_rows % n == 0]
  for limit in (13, 16, 18, 40, 500, 10**6):
    rows, tried = search(num_rows, limit)
    assert rows == max(n for n in divisors if 10 + 3 * n <= limit)
    assert len(tried) == len(set(tried)) <= 2 + len(divisors).bit_length()


def test_the_previous_number_is_kept_if_it_fits():
  assert search(12, 100, likely=4) == (4, [4])
  assert search(12, 30, likely=12)[0] == 6
  assert search(12, 100, likely=5)[0] == 12, 'which does not divide the batch'


def test_an_error_if_not_even_one_row_fits():
  with pytest.raises(ConfigError, match=r'tokens_per_device.*not even one row'):
    search(8, 12)


def test_other_errors_are_not_memory_errors():
  def fails(rows):
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    most_rows(4, fails, 100)


@pytest.mark.parametrize('content', ['', '{', '[]', '{"seed": 0}', '{"tokens_per_device": "many"}', 'null'])
def test_a_damaged_config_json_of_the_run_is_one_message(content, tmp_path):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(StorageError, match=r'config\.json: damaged: .*; delete it .* or set config\.tokens_per_device'):
    tokens_before(tmp_path)


def test_the_number_of_a_run_is_read_from_its_config_json(tmp_path):
  assert tokens_before(tmp_path) == 0
  for content, tokens in (('{"tokens_per_device": null}', 0), ('{"tokens_per_device": 64}', 64)):
    (tmp_path / 'config.json').write_text(content)
    assert tokens_before(tmp_path) == tokens


@pytest.mark.parametrize(('message', 'shown'), [
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1610612736 bytes.',
     'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50 GiB.'),
    ('RESOURCE_EXHAUSTED: allocating 25165824B, step 1234567', 'RESOURCE_EXHAUSTED: allocating 24 MiB, step 1234567')])
def test_bytes_of_an_out_of_memory_message_are_gib_or_mib(message, shown):
  with pytest.raises(ConfigError, match='tokens_per_device') as error, out_of_memory_as_config_error(64):
    raise jax.errors.JaxRuntimeError(message)
  assert str(error.value).splitlines()[-1] == shown
