"""A run's folder, terminal and processes: log, config, lock, progress, scheduler."""
