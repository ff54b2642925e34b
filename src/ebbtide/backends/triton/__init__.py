"""The rules on a GPU: one launch a step for each kind of row.

Nothing here is imported before a tensor lies on a GPU; `ebbtide.backends.triton.support` says
whether one can be stepped.
"""
