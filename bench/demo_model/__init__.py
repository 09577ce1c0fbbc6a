"""The small model that ships with the package: its corpus, tokenizer, network and training."""
