"""Around the command line: parser, settings that contradict each other, streams."""
