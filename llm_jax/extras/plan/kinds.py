"""The kinds of devices that a plan can be made for, with the figures of their makers."""

from __future__ import annotations

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of device. Bandwidths are bytes a second of one device; 0 and None: unknown."""

  name: str  # as in --on
  platform: str  # cpu, gpu or tpu
  device_kind: str  # JAX's
  memory: int | None  # bytes that programs can use
  hbm: float  # bandwidth of its memory
  link: float  # what it sends over the links of one axis, within a slice or a host
  network: float  # what it sends over the network, between slices or hosts
  price: float  # dollars for an hour of one device, on demand
  dims: int = 1  # of a slice's shape
  per_host: int = 1  # devices of a host
  capability: tuple[int, int] = (0, 0)  # of NVIDIA GPUs
  shapes: tuple[str, ...] = ()  # examples, for messages


# Memory: what the compilers report as usable ("of 15.75G hbm"). HBM, links, network of TPUs: cloud.google.com/tpu/docs
# (v5e, v5p, v6e), where a ring over one axis uses both directions of its links: twice the 4.5e10 (v5e)
# or 9e10 (v5p, v6e) bytes a second one way of jax-ml.github.io/scaling-book/tpus. Network: v5e 6.4 Tbit/s for 256
# chips, v5p 50 Gbit/s and v6e 100 Gbit/s a chip. GPUs: NVIDIA's data sheets (NVLink one way, a 400 Gbit/s adapter for
# each GPU). Prices are list prices of 2025, of cloud.google.com/tpu/pricing (us-central, on demand) and of GPU clouds
# (lambda.ai, runpod.io); they change, so --price sets another.
KINDS = {kind.name: kind for kind in (
    Kind('v5e', 'tpu', 'TPU v5 lite', int(15.75 * GIB), 8.19e11, 9e10, 3.1e9, 1.20, 2, 4,
         shapes=('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')),
    Kind('v5p', 'tpu', 'TPU v5', int(95.74 * GIB), 2.765e12, 1.8e11, 6.25e9, 4.20, 3, 4,
         shapes=('2x2x1', '2x2x2', '2x4x4', '4x4x4', '4x4x8', '8x8x8')),
    Kind('v6e', 'tpu', 'TPU v6 lite', int(31.25 * GIB), 1.6e12, 1.8e11, 1.25e10, 2.70, 2, 4,
         shapes=('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')),
    Kind('h100', 'gpu', 'NVIDIA H100 80GB HBM3', 84_942_979_072, 3.35e12, 4.5e11, 5e10, 2.99, 1, 8, (9, 0)),
    Kind('h200', 'gpu', 'NVIDIA H200', 150_109_880_320, 4.8e12, 4.5e11, 5e10, 3.99, 1, 8, (9, 0)),
    Kind('cpu', 'cpu', 'cpu', None, 0, 0, 0, 0, 1, 1),
)}
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another
