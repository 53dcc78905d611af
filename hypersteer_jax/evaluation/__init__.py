"""Evaluation: judges, the protocol of the paper, reports."""
