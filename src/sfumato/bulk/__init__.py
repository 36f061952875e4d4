"""Bulk jobs: a million images, each generated exactly once, on one machine or many, even when processes are killed.

A job is a folder: `job.json` (what it is), `rows.parquet` (every row, with its key), pictures named after their keys,
and `manifest/` (the ledger). Nothing else is remembered anywhere, so whoever comes back to the folder goes on with it.
"""
