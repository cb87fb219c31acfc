"""Faults of the lab logs, planted on purpose: what chapter 7 puts into the other rooms' places."""
