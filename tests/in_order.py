"""Tasks one after the other in this process: what a test takes in the place of a cluster."""

from lablog.tasks import told_nobody


class InOrder:
    """Makes every call where it stands; `calls` counts them by kind."""

    def __init__(self):
        self.calls = {}

    def map(self, kind, function, calls, *, common=(), reads=(), threads=1, gpus=0, memory=0,
            unit="run", names=(), done=told_nobody):
        results = []
        for index, call in enumerate(calls):
            self.calls[kind] = self.calls.get(kind, 0) + 1
            results.append(function(*common, *call))
            done(index, results[-1])
        return results
