"""The command line: parser, checks of settings, resume, streams."""
