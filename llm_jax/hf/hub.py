"""Downloads published models from a hub, and uploads exported ones, by huggingface_hub.

HF_ENDPOINT, HF_HOME and HF_TOKEN in the environment are its server, its cache and its token.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.storage import STORAGE

# Neither pickles nor code.
WANTED = ('*.json', '*.safetensors', '*.jinja', 'tokenizer.model', 'merges.txt', 'README.md')


class Hub:
  """The storage `hub`."""

  @staticmethod
  def read(name: str) -> Path:
    """The local folder of org/name or org/name@revision, downloaded if it is not in the cache."""
    hub = _library()
    repository, _, revision = name.partition('@')
    try:
      return Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(WANTED),
                                        ignore_patterns=['consolidated*', 'original/*']))
    except Exception as e:  # the library and its HTTP client raise many types
      raise StorageError(f'hf:{name}: cannot be downloaded: {_reason(e)}') from None


def cached(name: str) -> Path | None:
  """The local folder of org/name or org/name@revision, if it was downloaded before; asks no server."""
  repository, _, revision = name.partition('@')
  try:
    found = _library().try_to_load_from_cache(repository, 'config.json', revision=revision or None)
  except (ConfigError, ValueError):  # without the library, or for a name that it refuses
    return None
  return Path(found).parent if isinstance(found, str) else None


def push(folder: Path, name: str) -> str:
  """Uploads a folder as the model org/name, which is created as a private one, and returns its address."""
  hub = _library()
  if not (os.environ.get('HF_TOKEN') or hub.get_token()):
    raise ConfigError('--push: set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)')
  try:
    api = hub.HfApi()
    address = api.create_repo(name, private=True, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=str(folder), commit_message='Model exported by llm_jax')
    return str(address)
  except Exception as e:
    raise StorageError(f'--push: {name}: cannot be uploaded: {_reason(e)}; the model is in {folder}') from None


def _library() -> Any:
  try:
    import huggingface_hub
    return huggingface_hub
  except ImportError:
    raise ConfigError("hf: and --push need the package huggingface_hub: pip install 'llm_jax[hf]'") from None


def _reason(error: Exception) -> str:
  """The first line of an error, with the server it was asked of."""
  line = ' '.join(str(error).split())[:300]
  return f'{type(error).__name__}: {line} (server: {os.environ.get("HF_ENDPOINT", "https://huggingface.co")})'


register(STORAGE, 'hub', Hub, NoSettings)
