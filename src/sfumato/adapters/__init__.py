"""Additions to a checkpoint: adapters that change its weights (LoRA and its relatives), and embeddings."""
