"""Layers: modules hold parameters, plain functions do the math."""
