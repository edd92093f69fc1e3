"""Engines: each makes a payload from a program and opens it as a session. One file an engine."""

from corewise.engines.base import ENGINES, BuildInputs, Engine, Session, engine

__all__ = ["ENGINES", "BuildInputs", "Engine", "Session", "engine"]
