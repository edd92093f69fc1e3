"""The frozen values that travel between rooms, and their JSON."""
