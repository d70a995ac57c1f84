"""The operator: NexaTrainingJob objects in, Kubernetes objects and status out."""
