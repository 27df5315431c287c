"""Serve until told to stop, be found by other commands, and roll to another version when asked.

One process owns all that serves a model: it starts Triton and the gateway, and both end with it. So it is also the one
that rolls; ``nemobuild roll`` only asks it to.
"""

from nemobuild.serving.control import present_endpoint
from nemobuild.serving.run import serve_until_stopped
from nemobuild.serving.service import Front, Served, find_served

__all__ = ["Front", "Served", "find_served", "present_endpoint", "serve_until_stopped"]
