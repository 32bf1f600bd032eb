"""Landmark attention."""
CONTRACT_OPTIONS = [{"block": 3}]
def test_x(): pass
