"""Memory and time of a run, before it starts."""

from jaxtune.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
