"""CVFP: context vectors as fixed points, a recurrent language model without attention."""
