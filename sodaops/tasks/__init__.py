"""The tasks: what is predicted for a text. :class:`sodaops.tasks.base.Task` is the protocol."""

from sodaops.tasks.make import SINGLE_LABEL, is_allowed, make_task

__all__ = ["SINGLE_LABEL", "is_allowed", "make_task"]
