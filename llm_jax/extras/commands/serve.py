"""Serves a run on this machine by a page and OpenAI's completions API.

Requests are answered one after another. docs/serving.md describes the endpoints and what is not supported.

  llm-jax serve runs/gpt_small
  llm-jax serve runs/gpt_small --checkpoint=best --port=8080
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import sys
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.base.process import waiting


def parser() -> flags.Parser:
  parser = flags.Parser('serve', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser, distributed=False)
  parser.add_argument('--port', type=int, default=8000, help='where to listen; 0: a free port')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen on; other addresses than the default '
                      'let everybody who reaches them use the model')
  parser.add_argument('--allow_host', action='append', default=[], metavar='NAME', help='a name of this machine that '
                      'clients may use beside its addresses, or *.NAME for all below a name; may be repeated')
  parser.add_argument('--max_waiting', type=int, default=32, help='requests that may wait; status 503 answers more')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  if args.max_waiting < 0:
    raise ConfigError(f'--max_waiting must be at least 0; got {args.max_waiting}')
  try:
    import starlette  # noqa: F401
    import uvicorn
  except ImportError:
    raise ConfigError("llm-jax serve needs starlette and uvicorn: pip install 'llm_jax[serve]'") from None
  from llm_jax.extras.serving.hosts import check_host
  args.allow_host = [check_host(name) for name in args.allow_host]
  with listen(args.host, args.port) as listener:  # first, to report a port that is taken before the model is loaded
    flags.apply(args)
    serve(args, listener, uvicorn)


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens. Raises ConfigError."""
  if not 0 <= port < 65536:
    raise ConfigError(f'--port: must be in 0 to 65535; got {port}')
  try:
    return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET, backlog=128,
                                dualstack_ipv6=host == '::' and socket.has_dualstack_ipv6())
  except OSError as e:
    reason = (e.strerror or str(e)).partition(' (while')[0]
    raise ConfigError(f'--host={host} --port={port}: cannot listen there: {reason}; set another --port, or --port=0 '
                      'for a free one') from None


def serve(args: argparse.Namespace, listener: socket.socket, uvicorn: Any) -> None:
  """Loads the run and serves it until SIGINT or SIGTERM."""
  from llm_jax.data.chat.tokenizer import ChatTokenizer
  from llm_jax.extras.serving.app import make_app
  from llm_jax.extras.serving.hosts import LOOPBACK, allowed_hosts
  from llm_jax.extras.serving.worker import Worker
  from llm_jax.infer.trained import load_writer

  class Server(uvicorn.Server):
    async def shutdown(self, sockets: Any = None) -> None:
      worker.close()  # otherwise it would wait for the requests in progress
      await super().shutdown(sockets)

  trained = load_writer(args.workdir, args.checkpoint, args.mesh, trust=args.trust)
  prompt, name = example_prompt(trained), args.workdir.resolve().name
  waiting('compiling (later again for the first text of each other length, rounded up to a power of two, for each '
          'new n and top_k, for temperature 0 and for top_p below 1)')
  for _ in trained.tokens(prompt, num_tokens=min(64, trained.config.model.max_len)):
    pass
  worker = Worker(args.max_waiting)
  app = make_app(trained, name, worker, allowed_hosts(args.host, args.allow_host))
  server = Server(uvicorn.Config(app, log_level='warning', lifespan='off', timeout_graceful_shutdown=3))
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, server.handle_exit)  # uvicorn sets it too, and raises the signals again when it has ended
  if args.host not in LOOPBACK:
    print(f'warning: --host={args.host}: there is no authentication: everybody who can reach this address can use the '
          'model', file=sys.stderr, flush=True)
  print(f'{args.workdir}, step {trained.run.meta["step"]}, as model {name}\n'
        + welcome(url(args.host, listener.getsockname()[1]), name, prompt,
                  isinstance(trained.run.tokenizer, ChatTokenizer)), flush=True)
  server.run(sockets=[listener])
  end(worker)


def end(worker: Any) -> None:
  """Ends the program at once if the worker still runs: it may be compiling, which nothing interrupts."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
  print('stopped', flush=True)
  if worker.running:
    sys.stderr.flush()
    os._exit(0)


def url(host: str, port: int) -> str:
  from llm_jax.extras.serving.hosts import ANY
  if host in ANY:
    host = '::1' if host == '::' and not socket.has_dualstack_ipv6() else '127.0.0.1'
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def example_prompt(trained: Any) -> str:
  """One of the config's prompts that can be encoded; '' starts a document."""
  for prompt in trained.config.eval.prompts:
    try:
      if prompt and trained.tokens(prompt):
        return prompt
    except UserError:  # for example, it is too long
      pass
  return ''


def welcome(address: str, name: str, prompt: str, chats: bool = False) -> str:
  body = shlex.quote(json.dumps({'model': name, 'prompt': prompt, 'max_tokens': 64}))
  if chats:
    messages = [{'role': 'user', 'content': prompt or 'Hello'}]
    body = shlex.quote(json.dumps({'model': name, 'messages': messages, 'max_tokens': 64}))
    return f"""
curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {body}

import openai
client = openai.OpenAI(base_url={f'{address}/v1'!r}, api_key='none')
print(client.chat.completions.create(model={name!r}, messages={messages!r}, max_tokens=64).choices[0].message.content)

ready: {address} (Ctrl-C ends)"""
  return f"""
curl {address}/v1/completions -H 'Content-Type: application/json' -d {body}

import openai
client = openai.OpenAI(base_url={f'{address}/v1'!r}, api_key='none')
print(client.completions.create(model={name!r}, prompt={prompt!r}, max_tokens=64).choices[0].text)

ready: {address} (Ctrl-C ends)"""
