"""What people add to a checkpoint: files that change its weights (LoRA and its relatives), and new words."""
