"""Jobs: requests that are queued, run in a worker process, and stored. No HTTP here, and no torch in this process."""
