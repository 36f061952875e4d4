"""The pipelines under the ecosystem's names: thin classes, one module a family of signatures."""
