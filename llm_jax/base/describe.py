"""What the metrics of a run mean, by patterns of their names."""

from __future__ import annotations

import re

# (pattern of the whole name, description); the first that fits counts. {} is the first group of the pattern.
DESCRIPTIONS = (
    ('train/loss', 'The loss of the training batch of this step, without extra losses.'),
    ('train/extra_loss', 'The part of the objective that is not in train/loss, such as what modules add.'),
    ('(?:train/|epoch/)grad_norm', 'The norm of the gradient over all trained parameters, before clipping.'),
    ('train/learning_rate', 'The learning rate of this update.'),
    ('train/num_tokens', 'The targets that the loss of this batch counts.'),
    ('train/skipped', 'Steps since the last point whose update was not applied: not finite, or a spike.'),
    ('train/spikes', 'Steps of the run that skip_spikes did not apply.'),
    ('train/spike_score', 'The larger robust z-score of loss and gradient norm, in standard deviations.'),
    ('train/tokens_per_second', 'Tokens trained on per second, without evaluations and saves.'),
    ('train/seconds_per_step', 'The time of a step, without evaluations and saves.'),
    ('train/mfu', 'Model FLOPs utilization: the share of the peak FLOPs of the devices that the model uses.'),
    ('train/data_wait', 'The share of the time of steps in which the next batch is waited for.'),
    ('val/tokens', 'The targets that the evaluation counts.'),
    ('(train|val)/(?:.*/)?perplexity', 'e to the power of the next-token loss, {} part.'),
    ('(train|val)/(?:.*/)?bits_per_byte', 'The next-token loss in bits for each byte of text, {} part.'),
    ('(train|val)/(?:.*/)?accuracy', 'The share of targets with the highest probability, {} part.'),
    ('(train|val)/(?:.*/)?top5_accuracy', 'The share of targets among the five most probable ones, {} part.'),
    ('val/(?:.*/)?loss', 'The loss of the validation part.'),
    ('best/(.*)', 'The best {} of the run so far.'),
    ('epoch/number', 'The number of the epoch that ends with this step.'),
    ('epoch/(.*)', 'The mean of {} over the steps of an epoch.'),
    ('capability/retained', 'The share of the conditions reached so far that still hold.'),
    ('capability/(.*)', 'The step that first met the condition {}.'),
    ('goodput/(.*)', "The share of the run's time so far spent on: {}."),
    ('system/host_cpu', 'The load of the CPUs of the first host.'),
    ('system/host_memory', 'The share of the memory of the first host that is in use.'),
    ('system/process_bytes', 'The memory of the first process, in bytes.'),
    ('system/device_(.*)', 'The first device: {}.'),
    ('weights/(.*)', 'The weights of {}.'),
    ('gradients/(.*)', 'The gradient of {}, before clipping.'),
    ('updates/(.*)', 'What the optimizer adds to {}.'),
    ('update_ratio/(.*)', 'The RMS of the update of {} divided by the RMS of its weights; 1e-3 is usual.'),
    ('sample/(.*)', 'Text that the model writes after this prompt: {}'),
    ('config', 'The config of the run, with all fields.'),
    ('train/(.*)', '{} of the training batch.'),
    ('val/(.*)', '{} of the validation part.'),
)


def describe_metric(name: str) -> str:
  """A sentence on a metric; its name if nothing is known."""
  for pattern, text in DESCRIPTIONS:
    if match := re.fullmatch(pattern, name, re.DOTALL):
      return text.format(*match.groups()) if match.groups() else text
  return name
