"""The studio's server: jobs over HTTP, in its own words and in those of others. Nothing here imports torch."""
