"""Jobs: requests that are queued, drawn in a process of their own, and kept; no HTTP and, in this process, no torch."""
