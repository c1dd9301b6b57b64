"""Callbacks by name: functions or objects that are called with each logged step of a training."""

from __future__ import annotations

from llm_jax.base.registry import Registry, bind_settings

# CALLBACKS[name](settings) is called with a training.session.Event.
CALLBACKS = Registry('callback', bind_settings)
