"""Data that people have: data sets, loaders, pairs and modules of them, and files of tokens, as splits of samples."""
