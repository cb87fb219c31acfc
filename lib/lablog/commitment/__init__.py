"""Experiment A: a latent commitment, sampled once, that colours every later hidden state."""
