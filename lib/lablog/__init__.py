"""Functions that the notebooks of the executable lab log call."""

import warnings

# Bars are text, in the terminal, in papermill's log and in the book; no widgets are missed.
warnings.filterwarnings("ignore", message="IProgress not found")
