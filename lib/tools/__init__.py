"""What serves the project but measures nothing in a chapter: benchmarks and helpers of Make.

The tools may import the library; the library never imports them.
"""

import lablog  # noqa: F401  # whose commands end quietly at Ctrl-C, from here on
