"""The host names that requests may be addressed to: with any, a web page could reach the server by DNS rebinding."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_jax.base.errors import ConfigError
from llm_jax.extras.serving.requests import ApiError

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
ANY = ('', '0.0.0.0', '::')  # all addresses of this machine
LABEL = r'[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?'
NAME = re.compile(rf'(\*\.)?{LABEL}(\.{LABEL})*', re.IGNORECASE | re.ASCII)
# An address in brackets, or a name.
HEADER = re.compile(r'(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::\d*)?', re.IGNORECASE | re.ASCII)


def check_host(name: str) -> str:
  """A value of --allow_host in the form that clients use. Raises ConfigError."""
  if NAME.fullmatch(name):  # also an IPv4 address
    return name.lower()
  with contextlib.suppress(ValueError):
    if '%' not in name:  # the scope of an address is not sent
      return ipaddress.IPv6Address(name).compressed
  raise ConfigError(f'--allow_host: must be a host name, an IP address, or *. and a name for all names below it, '
                    f'without a scheme and a port; got {name!r}')


def allowed_hosts(host: str, more: Iterable[str]) -> frozenset[str]:
  """Lower-case names and addresses, without brackets; *.NAME stands for all names below it."""
  found = {*LOOPBACK, host, *more}
  if host in ANY:
    import psutil
    found |= {socket.gethostname()} | {
        address.address.partition('%')[0] for addresses in psutil.net_if_addrs().values() for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)}
  return frozenset(name.lower() for name in found - set(ANY))


class OnlyHosts:
  """Answers requests to other hosts with an error."""

  def __init__(self, app: ASGIApp, hosts: frozenset[str]):
    self._app, self._hosts = app, hosts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    header = Headers(scope=scope).get('host', '')
    found = HEADER.fullmatch(header)
    name = (found[1] or found[2]).lower() if found else ''
    if name in self._hosts or any(host[:2] == '*.' and name.endswith(host[1:]) for host in self._hosts):
      await self._app(scope, receive, send)
      return
    start = f'; start it with --allow_host={name}' if NAME.fullmatch(name) or ':' in name else ''
    error = ApiError(f'Host {header!r} is not a name of this server{start}')
    await JSONResponse(error.body, error.status)(scope, receive, send)
