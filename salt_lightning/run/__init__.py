"""A run's folder and terminal: its log, config, lock, progress, scheduler."""
