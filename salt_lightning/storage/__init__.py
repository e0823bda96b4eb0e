"""How a checkpoint lies on the disk, what it holds, and whether it is whole."""
