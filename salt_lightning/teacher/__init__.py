"""What follows from a teacher's outputs: scores, thirds by its loss, whether it still helps."""
