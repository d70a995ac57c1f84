"""Checkpoints as immutable, verifiable artifacts.

`manifest` says what an artifact is (pure values), `publish` writes and reads it back, `verify` proves it byte
by byte. Before: `nexa_train.checkpoint` hands over files. After: `nexa_train.store` carries the bytes.
"""
