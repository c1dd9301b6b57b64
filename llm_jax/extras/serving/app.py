"""The web application: OpenAI's completions API for one loaded model, and a page that uses it."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.extras.serving.hosts import OnlyHosts
from llm_jax.extras.serving.requests import CHAT, COMPLETION, CONVERSATION, ApiError, Request, parse
from llm_jax.extras.serving.texts import Piece, count_prompts, generate
from llm_jax.extras.serving.worker import Job, Worker

PAGE = Path(__file__).parent / 'page.html'
MAX_BODY, BODY_SECONDS = 4 << 20, 30  # bytes, and the time in which they must arrive
# The page loads nothing from elsewhere, and no other page may show it in a frame.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; " \
              "img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


def make_app(trained: Any, name: str, worker: Worker, hosts: frozenset[str]) -> Starlette:
  server = Server(trained, name, worker)
  return Starlette(
      routes=[Route('/', server.page), Route('/health', server.health), Route('/v1/models', server.models),
              Route('/v1/models/{name:path}', server.models),
              Route('/v1/completions', server.completions, methods=['POST']),
              Route('/v1/chat/completions', server.chat, methods=['POST'])],
      middleware=[Middleware(OnlyHosts, hosts)],
      exception_handlers={ApiError: show_error, HTTPException: show_http_error, Exception: show_bug})


class Server:
  """The endpoints."""

  def __init__(self, trained: Any, name: str, worker: Worker):
    self.trained, self.name, self.worker, self.started = trained, name, worker, int(time.time())

  async def page(self, http: HttpRequest) -> Response:
    return Response(PAGE.read_bytes(), media_type='text/html', headers={
        'Content-Security-Policy': PAGE_POLICY, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer'})

  async def health(self, http: HttpRequest) -> Response:
    return as_json({'status': 'ok', 'model': self.name, 'step': int(self.trained.run.meta['step']),
                    'waiting': self.worker.waiting})

  async def models(self, http: HttpRequest) -> Response:
    model = {'id': self.name, 'object': 'model', 'created': self.started, 'owned_by': 'llm_jax',
             'max_model_len': self.trained.config.model.max_len}
    name = http.path_params.get('name')
    if name not in (None, self.name):
      raise ApiError(f'model {name!r} is not served; {self.name!r} is', 'model', status=404, code='model_not_found')
    return as_json({'object': 'list', 'data': [model]} if name is None else model)

  async def completions(self, http: HttpRequest) -> Response:
    return await self._answer(http, COMPLETION, Completion())

  async def chat(self, http: HttpRequest) -> Response:
    if isinstance(self.trained.run.tokenizer, ChatTokenizer):
      return await self._answer(http, CONVERSATION, Chat())
    if not self.trained.config.answers:
      raise ApiError(f'model {self.name!r} continues text and has learned neither a chat format nor answers to prompts'
                     '; use /v1/completions', code='chat_not_supported')
    return await self._answer(http, CHAT, Chat())

  async def _answer(self, http: HttpRequest, fields: dict[str, Any], form: Completion) -> Response:
    request = parse(await read_body(http, self.worker), fields, self.name, self.trained.config.model.max_len)
    num_prompt_tokens = await asyncio.to_thread(count_prompts, self.trained, request)
    job = self.worker.submit(lambda: generate(self.trained, request))
    header = {'id': f'{form.prefix}-{secrets.token_hex(12)}', 'created': int(time.time()), 'model': self.name}
    if request.stream:
      return EventStream(job, events(job, request, form, header, num_prompt_tokens))
    return as_json(await until_disconnect(http, job, whole(job, request, form, header, num_prompt_tokens)))


class Completion:
  """The form of answers of /v1/completions."""

  prefix, whole, chunk = 'cmpl', 'text_completion', 'text_completion'

  def choice(self, piece: Piece) -> dict[str, Any]:
    return {'index': piece.index, 'text': piece.text, 'logprobs': None, 'finish_reason': piece.finish}

  def delta(self, piece: Piece, first: bool) -> dict[str, Any]:
    return self.choice(piece)


class Chat(Completion):
  """The form of answers of /v1/chat/completions."""

  prefix, whole, chunk = 'chatcmpl', 'chat.completion', 'chat.completion.chunk'

  def choice(self, piece: Piece) -> dict[str, Any]:
    message = {'role': 'assistant', 'content': piece.text, 'refusal': None}
    return {'index': piece.index, 'message': message, 'logprobs': None, 'finish_reason': piece.finish}

  def delta(self, piece: Piece, first: bool) -> dict[str, Any]:
    delta = ({'role': 'assistant'} if first else {}) | {'content': piece.text}
    return {'index': piece.index, 'delta': delta, 'logprobs': None, 'finish_reason': piece.finish}


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
  return {'prompt_tokens': num_prompt_tokens, 'completion_tokens': num_tokens,
          'total_tokens': num_prompt_tokens + num_tokens}


def merged(pieces: list[Piece]) -> list[Piece]:
  """One piece for each text, in order of their indices."""
  found = []
  for index, group in itertools.groupby(sorted(pieces, key=lambda piece: piece.index), lambda piece: piece.index):
    parts = list(group)
    found.append(Piece(index, ''.join(p.text for p in parts), sum(p.num_tokens for p in parts), parts[-1].finish))
  return found


async def whole(job: Job, request: Request, form: Completion, header: dict[str, Any],
                num_prompt_tokens: int) -> dict[str, Any]:
  """The answer when all texts are complete."""
  pieces = merged([piece async for batch in job.batches() for piece in batch])
  return header | {'object': form.whole, 'choices': [form.choice(piece) for piece in pieces],
                   'usage': usage(num_prompt_tokens, sum(piece.num_tokens for piece in pieces))}


async def events(job: Job, request: Request, form: Completion, header: dict[str, Any],
                 num_prompt_tokens: int) -> AsyncIterator[str]:
  """The answer as server-sent events, while the texts are generated."""
  header, begun, num_tokens = header | {'object': form.chunk}, set[int](), 0
  no_usage = {'usage': None} if request.include_usage else {}
  try:
    async for batch in job.batches():
      for piece in merged(batch):
        num_tokens += piece.num_tokens
        if piece.text or piece.finish:
          yield event(header | {'choices': [form.delta(piece, piece.index not in begun)]} | no_usage)
          begun.add(piece.index)
    if request.include_usage:
      yield event(header | {'choices': [], 'usage': usage(num_prompt_tokens, num_tokens)})
    yield 'data: [DONE]\n\n'
  except ApiError as e:  # the status 200 has been sent
    yield event(e.body)


def event(body: dict[str, Any]) -> str:
  return f'data: {json.dumps(body)}\n\n'


class EventStream(StreamingResponse):
  """Cancels its job when it ends, also because the client has disconnected."""

  def __init__(self, job: Job, events: AsyncIterator[str]):
    super().__init__(events, media_type='text/event-stream', headers={'Cache-Control': 'no-cache'})
    self._job = job

  async def __call__(self, *args: Any) -> None:
    try:
      await super().__call__(*args)
    finally:
      self._job.cancel()


async def until_disconnect(http: HttpRequest, job: Job, answer: Any) -> dict[str, Any]:
  """The answer, or {} if the client disconnects before it is complete; then the job is cancelled."""
  async def disconnected() -> None:
    while (await http.receive())['type'] != 'http.disconnect':
      pass
  tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())]
  try:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return await tasks[0] if tasks[0] in done else {}
  finally:
    job.cancel()
    for task in tasks:
      task.cancel()


async def read_body(http: HttpRequest, worker: Worker) -> bytes:
  """The body of a request. Raises ApiError unless it is marked as JSON, which other web pages cannot send."""
  if http.headers.get('content-type', '').partition(';')[0].strip().lower() != 'application/json':
    raise ApiError('the header Content-Type must be application/json', status=415)
  body = b''
  try:
    async with worker.while_open(BODY_SECONDS):
      async for part in http.stream():
        body += part
        if len(body) > MAX_BODY:
          raise ApiError(f'the body is longer than {MAX_BODY} bytes', status=413)
  except TimeoutError:
    raise ApiError(f'the body did not arrive within {BODY_SECONDS} seconds', status=408) from None
  except ClientDisconnect:  # nobody reads the answer
    raise ApiError('the body is incomplete') from None
  return body


def as_json(body: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
  return Response(json.dumps(body), status, headers=headers, media_type='application/json')


async def show_error(http: HttpRequest, error: Any) -> Response:
  return as_json(error.body, error.status, {408: {'Connection': 'close'}, 503: {'Retry-After': '1'}}.get(error.status))


async def show_http_error(http: HttpRequest, error: Any) -> Response:
  return as_json(ApiError(f'{http.method} {http.url.path}: {error.detail}', status=error.status_code).body,
                 error.status_code, error.headers)


async def show_bug(http: HttpRequest, error: Exception) -> Response:
  """After which the traceback is printed."""
  return as_json(ApiError(f'internal error: {type(error).__name__}', status=500).body, 500)
