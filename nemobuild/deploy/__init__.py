"""``deploy``: files that serve a profile's repository elsewhere, as pure functions of its plan.

Nothing here talks to Docker or a cluster: each target is ``plan -> {file name: text}``, so that the output can be read,
compared with golden files, and validated against published schemas. Numbers come from the plan or from ``served``.
"""
