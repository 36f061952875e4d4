"""Bulk jobs: a million images, each generated exactly once, on one machine or many, even when processes are killed.

A job is a folder with `job.json` (its settings), `rows.parquet` (every row, with its key), images named after their
keys, and `manifest/` (the ledger). There is no other state, so any run in this folder can continue the job.
"""
