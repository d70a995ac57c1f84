"""A real Kubernetes on this machine, for tests and for `make cluster-up`.

The folder in the order in which things happen: `tools` (binaries) and `host` (what this machine can give), `ledger`
(what must be undone), `process` and `network` (what is started), `pki`, `control_plane`, `images`, `node`, `minio`, and
at the end the two ways in: `fixtures` for pytest and `__main__` for the command line.
"""
