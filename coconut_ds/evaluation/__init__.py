"""Accuracy, ablations and inspection of trained models; generation and export."""
