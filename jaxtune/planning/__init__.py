"""What a run needs, and how long it takes, before it starts."""

from jaxtune.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
