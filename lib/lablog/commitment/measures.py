"""The room's measures: their units, their names on axes, and which of them count answers."""

from __future__ import annotations

UNITS = {
    "answered": "fraction", "recall": "fraction", "eviction": "fraction",
    "same_choice": "fraction", "yes_sum": "", "yes_named": "fraction", "yes_largest": "fraction",
    "answer_mass": "fraction", "named_mass": "fraction", "first_named": "fraction",
    "kept": "fraction", "hangman": "fraction", "reached": "fraction",
    "kl": "nat", "perplexity": "", "kl_mean": "nat", "kl_p95": "nat", "own_kl_mean": "nat",
    "own_kl_p95": "nat", "same_top": "fraction", "repeated_4grams": "fraction",
    "distinct_1": "fraction", "distinct_2": "fraction", "dose": "",
}
COUNTED = ("answered", "recall", "eviction", "same_choice", "kept", "hangman")
"""Of an item true or false."""
LABELS = {
    "recall": "recall in the window", "eviction": "recall after eviction",
    "same_choice": "same X in both forms", "yes_sum": "Σ P(yes)",
    "yes_named": "P(yes) of X named", "yes_largest": "largest P(yes)",
    "hangman": "a game of one answer", "perplexity": "held-out perplexity",
    "kl_p95": "95th percentile of KL", "own_kl_p95": "KL on own text, 95th percentile",
    "repeated_4grams": "repeated 4-grams", "distinct_2": "distinct-2",
}
