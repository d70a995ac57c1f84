"""A real Kubernetes on this machine, for tests and for `make cluster-up`.

The folder in the order in which things happen: `tools` (binaries) and `host` (what this machine can give), `ledger`
(what must be undone), `process` and `network` (the two things that are started), `pki`, `control_plane`, `node`, `minio`,
`images`, and at the end the two ways in: `fixtures` for pytest and `__main__` for the command line.
"""
