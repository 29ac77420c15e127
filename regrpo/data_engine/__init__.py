"""The structured reflective data engine: near-miss -> execute -> reflect -> gate."""
