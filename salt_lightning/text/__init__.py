"""From settings to tokens on disk: files, documents, examples, tokenizer, preparation."""
