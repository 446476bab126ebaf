"""Students in int8: folded batch norms, the graph, onnxruntime's quantiser, fake quantisation for training."""
