"""Bulk jobs: a million pictures, drawn once each, on one machine or many, whatever is killed on the way.

A job is a folder: `job.json` (what it is), `rows.parquet` (every row, with its key), pictures named after their keys,
and `manifest/` (the ledger). Nothing else is remembered anywhere, so whoever comes back to the folder goes on with it.
"""
