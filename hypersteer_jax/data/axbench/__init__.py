"""AxBench's data (arXiv 2501.17148): where its files are, and a tensorflow-datasets builder with fixed splits."""
