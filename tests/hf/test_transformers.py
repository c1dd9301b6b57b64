"""Random tiny models of each family, held against transformers itself, to 1e-4 of the largest logit: of some random
weights both differ by 2e-5 from float64. Needs torch, which the test extra lacks:
pip install torch."""

import json
import random

import jax
import numpy as np
import pytest
from cases import FAMILIES, random_config
from test_families import batch_of, read
from weights import write_folder

from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import by_name
from llm_jax.hf.family import FAMILIES as REGISTERED
from llm_jax.hf.family import choose_family
from llm_jax.hf.weights import tensors_of, write_weights

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def theirs(folder, tokens):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
  with torch.no_grad():
    return model.eval()(torch.tensor(np.asarray(tokens))).logits.numpy()


@pytest.mark.parametrize('model_type', FAMILIES)
def test_in_and_out_equal_transformers(model_type, tmp_path):
  seed, mesh = random.randrange(10**6), make_mesh(MeshConfig(), jax.devices()[:1])
  print('seed', seed)
  for i in range(3):
    values = random_config(model_type, random.Random(seed + i))
    folder, out = tmp_path / f'{i}', tmp_path / f'out{i}'
    write_folder(folder, values, mesh, seed)
    tokens = np.random.default_rng(seed).integers(0, 67, (2, 20))
    with jax.set_mesh(mesh):
      model, _, params = read(folder, mesh)
      mine = np.asarray(jax.jit(lambda params: model.apply({'params': params}, batch_of(tokens)))(params))  # noqa: B023
    wanted = theirs(folder, tokens)
    np.testing.assert_allclose(mine, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=str(values))
    cfg = model.cfg
    chosen, config = choose_family(cfg)
    out.mkdir()
    ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
    (out / 'config.json').write_text(json.dumps(config | ids))
    rules = REGISTERED[chosen].rules(cfg)
    write_weights(out, tensors_of(by_name(params), rules, cfg.num_layers, cfg.vocab_size, 'float32'), 10**9)
    np.testing.assert_allclose(theirs(out, tokens), wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=str(config))
