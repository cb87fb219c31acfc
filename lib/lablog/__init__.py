"""Functions that the notebooks of the executable lab log call."""
