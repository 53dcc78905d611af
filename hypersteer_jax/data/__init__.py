"""Data: from steering examples and chat templates to padded batches."""
