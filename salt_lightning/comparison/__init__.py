"""Behind the verb compare: where runs come from, notes, table and figure."""
