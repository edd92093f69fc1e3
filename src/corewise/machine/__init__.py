"""The CPU: what it can do, and which threads instances get."""
