"""What the model of these tests knows by heart."""

EXCHANGES = [
    ("What is resonance?", "One string moves, and another answers."),
    ("What is silence?", "A room that keeps what was said."),
    ("Do you remember?", "Only as a path remembers feet."),
]
