"""Which rows a step reads: packed rows, their order, shares of sources, whole examples."""
