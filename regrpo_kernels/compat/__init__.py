"""The entry points of TRL, Liger and verl on this package's kernels; one module a peer.

No peer is imported here: `trl` and `verl` are, by the functions that patch or register.
"""
