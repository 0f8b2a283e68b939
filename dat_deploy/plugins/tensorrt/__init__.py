"""The operators as TensorRT plugins, in two forms over the launches that the torch operators make."""
