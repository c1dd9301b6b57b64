"""The page of llm-jax serve in a real browser: Chromium, driven by Playwright."""

import os
import re
import shutil

import pytest
import serving

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('playwright')

from playwright.sync_api import expect, sync_playwright

expect.set_options(timeout=60_000)
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')]


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  with serving.served(serving.train(tmp_path_factory.mktemp('page'))) as client:
    yield client


@pytest.fixture(params=['light', 'dark'])
def page(request, server):
  with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'] if os.getuid() == 0 else [])
    page = browser.new_page(color_scheme=request.param)
    page.problems = []
    page.on('console', lambda message: page.problems.append(message.text))  # also what the page's policy forbids
    page.on('pageerror', lambda error: page.problems.append(str(error)))
    page.on('request', lambda sent: sent.url.startswith((server.address, 'data:')) or page.problems.append(sent.url))
    page.goto(server.address)
    yield page
    browser.close()


def test_a_prompt_is_continued(page, server):
  expect(page).to_have_title('tiny')
  page.fill('#prompt', 'def ')
  page.fill('#max_tokens', '12')
  page.fill('#seed', '3')
  page.fill('#temperature', '0.33')
  page.fill('#top_p', '0.995')
  page.click('#generate')
  expect(page.locator('#status')).to_have_text(re.compile('^12 tokens.*; ended by the length$'))
  expected = server.complete(prompt='def ', max_tokens=12, seed=3, temperature=0.33, top_p=0.995)['choices'][0]['text']
  assert page.text_content('#asked') == 'def ' and page.text_content('#text') == expected
  assert page.is_enabled('#generate') and page.is_disabled('#stop') and not page.problems


def test_stop_ends_the_generation(page, server):
  held = server.begin(**serving.LONG)  # so that the page's request waits
  page.click('#generate')
  expect(page.locator('#status')).to_have_text('Waiting …')
  while server.get('/health')['waiting'] != 1:
    pass
  page.click('#stop')
  expect(page.locator('#status')).to_have_text('Stopped')
  while server.get('/health')['waiting'] != 0:
    pass
  assert page.is_enabled('#generate')
  held.connection.close()
  held.close()
  assert not page.problems


def test_an_error_is_shown(page):
  page.evaluate("document.querySelector('#max_tokens').removeAttribute('min')")
  page.fill('#max_tokens', '0')
  page.press('#prompt', 'Control+Enter')
  expect(page.locator('#status')).to_have_text(re.compile('max_tokens: .*at least 1; got 0$'))
  assert page.get_attribute('#status', 'class') == 'error' and page.is_enabled('#generate')
