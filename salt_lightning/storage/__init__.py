"""How a checkpoint is stored, what it contains, and whether it is undamaged."""
