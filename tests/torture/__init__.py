"""What is tried by the thousand: ``make torture``; a short part of it in ``make test``."""
