"""Base models, and all that knows their architectures: layers to edit, weights, the split pass and its gradients."""
