"""Job and plan -> exactly what TRL, DeepSpeed or Axolotl is given, as plain values. Pure.

Used by the backends of those names, and printed by `nexa plan --show-backend-config`.
"""
