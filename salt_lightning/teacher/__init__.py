"""What a teacher says of the text: scores, thirds by its loss, whether it still helps."""
