"""All that knows architectures: layers to edit, their weights, the split pass and its gradients."""
