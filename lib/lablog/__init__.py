"""Functions that the notebooks of the executable lab log call."""

import logging
import sys
import warnings
from types import TracebackType

if sys.argv[:1] == ["-m"]:  # a command is being loaded, which takes seconds
    _told = sys.excepthook

    def _ended(kind: type[BaseException], error: BaseException,
               traceback: TracebackType | None) -> None:
        """Who presses Ctrl-C knows why the command ends, and where it was is of no use to them."""
        if not issubclass(kind, KeyboardInterrupt):
            _told(kind, error, traceback)

    sys.excepthook = _ended

# Bars are text, in the terminal, in papermill's log and in the book; no widgets are missed.
warnings.filterwarnings("ignore", message="IProgress not found")

# On CPUs with bfloat16 bitsandbytes offers, at import, to fetch a compiled kernel from the Hub. The
# project loads no code from there; the kernels inside the package do the work.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

# Weights in 4 bits are dequantised on purpose, to f32, wherever probes are read on a CPU.
logging.getLogger("transformers.integrations.bitsandbytes").addFilter(
    lambda record: "modules are dequantized" not in record.getMessage()
)
