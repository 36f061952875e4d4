"""The studio's server: jobs over HTTP, through its native API and two compatible ones. Does not import torch."""
