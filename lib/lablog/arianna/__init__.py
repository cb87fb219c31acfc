"""Experiment C (Arianna): a small voice trained from scratch, fine-tuned, and spoken with."""
