"""llm-jax validate: which files a validator accepts, and the exit code."""

import pytest

from llm_jax.__main__ import main
from llm_jax.base.errors import ConfigError, DataError, UserError
from llm_jax.infer import answers, validators


@pytest.fixture
def files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'good.json').write_text('{"a": 1}')
  (tmp_path / 'bad.json').write_text('{"a": 1')
  (tmp_path / 'latin.json').write_bytes('"caf\xe9"'.encode('latin-1'))
  (tmp_path / 'good.wgsl').write_text('fn f(x: f32) -> f32 { return x * 2.0; }')
  (tmp_path / 'bad.wgsl').write_text('fn f(x: f32 -> f32 { return x * 2.0; }')


@pytest.mark.parametrize('validator, good, bad', [
    ('json', 'good.json', 'bad.json'), ('wgsl', 'good.wgsl', 'bad.wgsl'), ('grep -q 1}', 'good.json', 'bad.json')])
def test_each_invalid_file_is_one_line_and_gives_exit_code_1(validator, good, bad, files, capsys):
  main(['validate', good, good, f'--validator={validator}'])
  assert capsys.readouterr().out == ''
  with pytest.raises(UserError, match=r'^1 of 2 file\(s\) are invalid$') as error:
    main(['validate', good, bad, f'--validator={validator}'])
  assert error.value.exit_code == 1
  assert capsys.readouterr().out == f'{bad}: invalid: not accepted by {validator}\n'


def test_a_file_that_is_not_utf8_is_invalid(files, capsys):
  with pytest.raises(UserError, match='1 of 1'):
    main(['validate', 'latin.json', '--validator=json'])
  assert capsys.readouterr().out == 'latin.json: invalid: not UTF-8 text at byte 4\n'


def test_a_command_that_takes_too_long_is_not_said_to_refuse(files, monkeypatch, capsys):
  monkeypatch.setattr(validators, 'SECONDS', 0.2)
  with pytest.raises(UserError, match='1 of 1'):
    main(['validate', 'good.json', '--validator=sleep 5'])
  assert capsys.readouterr().out == 'good.json: invalid: sleep 5 timed out after 0.2 s\n'
  assert answers.is_valid(validators.make_validator('sleep 5'), '') is False
  assert 'sleep 5 timed out' in capsys.readouterr().err


@pytest.mark.parametrize('flags, error, message', [
    (['good.json', '--validator=jsn'], ConfigError,
     "--validator: 'jsn' is not a command on this machine, nor a validator; known: python, json, wgsl (did you mean"),
    (['none.json', '--validator=json'], DataError, 'none.json: cannot be read: No such file or directory'),
    (['good.json'], ConfigError, '--validator is missing'), (['--validator=json'], ConfigError, 'required: files')])
def test_mistakes_are_one_message(flags, error, message, files):
  with pytest.raises(error) as e:
    main(['validate', *flags])
  assert message in str(e.value) and '\n' not in str(e.value)
