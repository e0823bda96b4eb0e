"""Parts of the verb compare: where runs come from, notes, table and figure."""
