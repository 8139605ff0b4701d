"""Shape checks shared by the losses."""

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError naming the tensors unless all have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
