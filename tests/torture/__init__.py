"""What is tried by the thousand: ``make torture``; a short part of it in ``make test``."""

import lablog  # noqa: F401  # whose commands end quietly at Ctrl-C, from here on
