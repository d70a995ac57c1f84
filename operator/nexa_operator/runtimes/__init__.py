"""RunPlan -> Kubernetes objects, one module a runtime; pure. After `plan.py`, before `cluster.py`."""
