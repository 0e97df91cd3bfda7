"""Evaluation of a model: perplexity, divergence from another model, text generation, speed, harness tasks."""
