"""How ranks find each other, notice a loss, and share a step."""
