"""CUDA graph captures that fail and leave nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_numbers_survive() -> Iterator[None]:
    """Let the current CUDA device draw random numbers after a capture in here that fails.

    A capture puts its generator's state in a mode that only the end of a whole capture leaves: after a failure
    torch refuses to draw. So captures in here get a copy of the state, and a failure gives the generator its own
    back, as it was before. A whole capture keeps the copy, which its replays advance.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(own)
        raise
