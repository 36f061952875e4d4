"""Pipelines under the ecosystem's names: thin classes, one module per family of signatures."""
