"""TensorRT with plans that take other weights: a version of the same shapes, as one adapted by weights only, costs no build.

An option, which "auto" never takes. A build takes seconds to minutes, once a version and in a process of its own, while another engine
listens; most versions are pruned and have other shapes; and NVIDIA's notes on 11.3 warn that plans with this flag may compute something
else. So a refitted plan must reproduce the golden embeddings, else one is built. What a hop costs: edgekws bench --backend tensorrt-refit.
"""

from edgekws.engines.tensorrt_engine import load_refitted as load
from edgekws.engines.tensorrt_engine import load_refitted_prepared as load_prepared
from edgekws.engines.tensorrt_engine import why_unavailable

__all__ = ["load", "load_prepared", "why_unavailable"]
