"""One seam under all work that can be spread: a task is handed over, its result comes back.

The engine is dask.distributed. One machine is a cluster of one local worker; a cluster of many is
the same code with another address. ``client`` hands tasks over, ``child`` makes each in a process
of its own, ``parcels`` brings files and results to where they are needed, ``fingerprint`` refuses a
worker that would compute something else, ``addresses`` says who may be spoken to without TLS, and
``python -m lablog.cluster`` starts a scheduler or a worker by hand.
"""
