#!/bin/bash
# Starts the same command on every host of a TPU pod slice; jax finds the other hosts by itself.
#   launch/tpu_pod.sh NAME ZONE --config=configs/gpt_small.py --workdir=/mnt/BUCKET/runs/gpt_small
# Each host needs this checkout in ~/llm_jax with `pip install -e .[tpu]`, and the workdir and LLM_JAX_CACHE on
# storage that all hosts share (a mounted bucket or NFS).
set -eu
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/llm_jax && python3 -m llm_jax.main --distributed $(printf '%q ' "$@")"
